"""Slurm launcher: a config file's sweep as job arrays, followed by evaluations and a report.

  python -m launch.slurm --config=configs/shampoo.py:50m --root=runs/tuning/shampoo --parallel=4 \
    --gpus_per_task=8 --sbatch='--time=24:00:00 --partition=h100' --evaluate=behind

Scripts are in <root>/slurm, the jobs' output in <root>/logs. Before its time limit, a run is asked
to stop, saves, and queues itself again; so does one that is preempted.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from absl import flags

from beyond_outliers import cli
from beyond_outliers.errors import ConfigError
from launch import jobs, sbatch


def define_flags() -> None:
  jobs.define_flags()
  flags.DEFINE_integer("nodes", 1, "Nodes of a run.", 1)
  flags.DEFINE_integer("tasks_per_node", 1, "Processes of a run on each node.", 1)
  flags.DEFINE_integer("gpus_per_task", 0, "GPUs of each process.", 0)
  flags.DEFINE_integer("parallel", 0, "Runs at a time; 0: as many as the cluster takes.", 0)
  flags.DEFINE_integer(
    "lead", 300, "Seconds before its time limit at which a run saves and is queued again.", 1, 65535
  )
  flags.DEFINE_integer("restarts", 0, "How often a job that failed is queued again.", 0)
  cli.path_flag("environment", "", "Folder of the jobs' virtual environment; by default, this one.")
  flags.DEFINE_string(
    "container", "", "Image to run in, with Apptainer (FILE.sif, docker://NAME) or pyxis (others)."
  )
  flags.DEFINE_string(
    "sbatch", "", "Further options of sbatch: '--time=24:00:00 --partition=h100'."
  )
  flags.DEFINE_string(
    "evaluate_sbatch",
    "",
    "Options of sbatch for evaluations and the report, in addition to --sbatch.",
  )


def launch(argv: list[str]) -> None:
  """Submits what is not done; prints what it submits, or would with --dry_run."""
  del argv
  given = flags.FLAGS
  listed = jobs.of_flags(here=True)
  options = sbatch.Options(
    folder=os.path.abspath(jobs.local_folder(given.config, given.root)),
    clone=os.getcwd(),
    title=jobs.title(given.config, given.root),
    nodes=given.nodes,
    tasks_per_node=given.tasks_per_node,
    gpus_per_task=given.gpus_per_task,
    parallel=given.parallel,
    lead=given.lead,
    restarts=given.restarts,
    python=_python(given.environment, given.container),
    container=_image(given.container),
    sbatch=_options("sbatch", given.sbatch),
    evaluate_sbatch=_options("evaluate_sbatch", given.evaluate_sbatch),
  )
  made = sbatch.scripts(listed, options)
  statuses = {job.workdir: jobs.status_of(job.workdir) for job in listed if job.kind == "train"}
  todo = sbatch.submissions(listed, {at for at, status in statuses.items() if status in jobs.ENDED})
  if given.dry_run:
    _print(made, todo, options)
    return
  _check_queue(options)
  for number, (workdir, status) in enumerate(statuses.items()):
    print(f"[{number + 1}/{len(statuses)}] {workdir}: {status}; task {number}")
  _submit(made, todo, options)


def _python(environment: str, container: str) -> str:
  if environment:
    return os.path.join(os.path.abspath(environment), "bin", "python")
  return "python" if container else sys.executable


def _image(container: str) -> str:
  """A container's image; a file by its absolute path, or pyxis would look for it in a registry."""
  return os.path.abspath(container) if os.path.isfile(container) else container


def _options(flag: str, text: str) -> tuple[str, ...]:
  """Options of sbatch in a flag, each of the form --option=value. Errors: ConfigError."""
  try:
    words = shlex.split(text)
  except ValueError as error:
    raise ConfigError(f"--{flag}={text}: {error}; close it") from None
  if not all(word.startswith("--") for word in words):
    raise ConfigError(f"--{flag}={text}: expected --option=value of sbatch for each")
  return tuple(words)


def _print(
  made: dict[str, str], todo: Sequence[sbatch.Submission], options: sbatch.Options
) -> None:
  """Prints a shell script that does what the launcher would."""
  for kind, text in made.items():
    print(f"# {os.path.join(options.folder, 'slurm', kind)}.sh\n{text}")
  print(shlex.join(["mkdir", "-p", os.path.join(options.folder, "logs")]))
  for i, submission in enumerate(todo):
    *command, script = sbatch.command(submission, options, [f"$job{j}" for j in range(len(todo))])
    print(f"job{i}=$({' '.join(command)} {shlex.quote(script)})")


def _check_queue(options: sbatch.Options) -> None:
  """Errors: ConfigError if there is no Slurm here, or the sweep is in its queue already."""
  if not shutil.which("sbatch"):
    raise ConfigError("sbatch: there is no Slurm here; --dry_run prints what would be submitted")
  names = ",".join(f"{options.title}-{kind}" for kind in ("train", "evaluate", "report"))
  command = ["squeue", "--me", "--noheader", "--format=%A", f"--name={names}"]
  if queued := sorted(set(_ask(command).split())):
    raise ConfigError(
      f"--root={options.folder}: its jobs {' '.join(queued)} are in the queue; wait for them, or "
      "scancel them first"
    )


def _submit(
  made: dict[str, str], todo: Sequence[sbatch.Submission], options: sbatch.Options
) -> None:
  for folder in ("slurm", "logs"):
    os.makedirs(os.path.join(options.folder, folder), exist_ok=True)
  for kind, text in made.items():
    with open(os.path.join(options.folder, "slurm", f"{kind}.sh"), "w") as file:
      file.write(text)
  ids: list[str] = []
  for submission in todo:
    command = sbatch.command(submission, options, ids)
    ids.append(_ask(command).strip().partition(";")[0])
    print(f"job {ids[-1]}: {shlex.join(command)}", flush=True)


def _ask(command: Sequence[str]) -> str:
  """Output of a Slurm command. Errors: ConfigError with its message, if it fails."""
  answer = subprocess.run(command, capture_output=True, text=True)
  if answer.returncode:
    said = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
    raise ConfigError(f"{command[0]}: {said}; see its command: {shlex.join(command)}")
  return answer.stdout


if __name__ == "__main__":
  define_flags()
  cli.run_command(launch)
