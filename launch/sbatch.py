"""Batch scripts and commands for Slurm, as text: all jobs of one kind form one array."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Collection, Sequence

from beyond_outliers.errors import ConfigError
from launch import jobs


@dataclasses.dataclass(frozen=True)
class Options:
  """Resources of the jobs, and where they run."""

  folder: str  # absolute; has slurm/, with the scripts, and logs/
  clone: str  # absolute; the jobs' working folder
  title: str  # of the sweep
  nodes: int = 1
  tasks_per_node: int = 1
  gpus_per_task: int = 0
  parallel: int = 0  # runs at a time; 0: all that the cluster takes
  lead: int = 300  # seconds before the time limit, at which a run is asked to stop
  restarts: int = 0  # of a failed job
  python: str = "python"
  container: str = ""
  sbatch: tuple[str, ...] = ()  # further options
  evaluate_sbatch: tuple[str, ...] = ()  # for evaluations and the report, in addition to those


@dataclasses.dataclass(frozen=True)
class Submission:
  """One call of sbatch: some of a script's tasks, which may wait for earlier submissions."""

  kind: str
  tasks: tuple[int, ...]
  how: str = ""  # aftercorr | afterany
  behind: tuple[int, ...] = ()  # positions of those submissions


SCRIPT = """\
#!/bin/bash
{directives}
case $SLURM_ARRAY_TASK_ID in
{runs}
  *) echo "there is no task $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
cd -- {clone} || exit 2
{prelude}
trap : TERM INT HUP USR1  # what it runs gets them too, and saves: this shell waits for it
srun --kill-on-bad-exit=0{srun} {command} "${{run[@]}}"
code=$?
case $code in
{ends}
esac
{last}exit "$code"
"""
AGAIN = """\
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # the last one's SLURM_JOB_ID is the whole array's
again() {
  if scontrol show job "$task" | grep -q JobState=RUNNING; then
    echo "exit code $code: queued again"
    scontrol requeue "$task"
    exit "$code"
  fi # else it was cancelled
}"""
CPUS = """\
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi"""
ENDS = """\
  42) again ;; # it was asked to stop, and saved
  3) code=0 ;; # it diverged, which is a result: what waits for it may go on"""
ALONE = """\
case $code in
  0 | 42) ;;
  *) # the evaluation beside it would wait for more
    squeue --me --noheader --array --format=%i --name={evaluations} |
      grep "_$SLURM_ARRAY_TASK_ID\\$" | xargs --no-run-if-empty scancel ;;
esac
"""
RESTART = """\
  0 | 2) ;;
  *)
    failures={failures}_$task
    echo "$code" >> "$failures"
    if [ "$(wc -l < "$failures")" -le {restarts} ]; then again; fi ;;"""


ENROOT_SCHEMES = ("dockerd", "podman")  # not known to Apptainer


def scripts(listed: Sequence[jobs.Job], options: Options) -> dict[str, str]:
  """{kind: batch script of all jobs of that kind, an array with a task for each}."""
  kinds = dict.fromkeys(job.kind for job in listed)
  beside = any(job.kind == "evaluate" and not job.after for job in listed)
  return {
    kind: _script([job for job in listed if job.kind == kind], options, kind == "train" and beside)
    for kind in kinds
  }


def submissions(listed: Sequence[jobs.Job], ended: Collection[str]) -> list[Submission]:
  """What to submit of the scripts, in order; for runs that have ended, only evaluations. ended:
  their workdirs."""
  trainings, evaluations = (
    [job for job in listed if job.kind == kind] for kind in ("train", "evaluate")
  )
  todo = tuple(i for i, job in enumerate(trainings) if job.workdir not in ended)
  made = [Submission("train", todo)] if todo else []
  behind = tuple(i for i, job in enumerate(evaluations) if job.after and i in todo)
  at_once = tuple(i for i in range(len(evaluations)) if i not in behind)
  if behind:
    made.append(Submission("evaluate", behind, "aftercorr", (0,)))
  if at_once:
    made.append(Submission("evaluate", at_once))
  if any(job.kind == "report" for job in listed):
    made.append(Submission("report", (0,), "afterany" if made else "", tuple(range(len(made)))))
  return made


def command(submission: Submission, options: Options, ids: Sequence[str]) -> list[str]:
  """Command of a submission. ids: job ids of the submissions before it."""
  tasks = ",".join(map(str, submission.tasks))
  throttle = f"%{options.parallel}" if options.parallel else ""
  words = ["sbatch", "--parsable", f"--array={tasks}{throttle}"]
  if submission.behind:
    jobs_before = ":".join(ids[position] for position in submission.behind)
    words += [f"--dependency={submission.how}:{jobs_before}", "--kill-on-invalid-dep=yes"]
  return [*words, os.path.join(options.folder, "slurm", f"{submission.kind}.sh")]


def _script(same: Sequence[jobs.Job], options: Options, followed: bool) -> str:
  """The script of one kind of jobs. followed: each has an evaluation, in the task of its number."""
  job = same[0]
  train = job.kind == "train"
  nodes, tasks = (options.nodes, options.tasks_per_node) if train else (1, 1)
  gpus = options.gpus_per_task if train else min(options.gpus_per_task, job.kind == "evaluate")
  # Sent before the time limit, to what srun runs and not to the shell (B:). An evaluation has
  # nothing to save: it ends, to be started again.
  signal = [f"--signal=USR1@{options.lead}"] if train else []
  if not train and options.restarts:
    signal = ["--signal=TERM@60"]
  directives = [
    f"--job-name={options.title}-{job.kind}",
    f"--output={_pattern(os.path.join(options.folder, 'logs'))}/%x_%a.txt",
    "--open-mode=append",
    f"--nodes={nodes}",
    f"--ntasks-per-node={tasks}",
    *([f"--gpus-per-task={gpus:d}"] if gpus else []),
    "--requeue",
    *signal,
    f"--array=0-{len(same) - 1}" + (f"%{options.parallel}" if options.parallel else ""),
    *options.sbatch,
    *(() if train else options.evaluate_sbatch),
  ]
  several = nodes * tasks > 1
  extra = ["--distributed=auto"] if several else []
  prelude = [CPUS]
  if several and gpus:  # otherwise JAX would give each task one GPU, by its number on the node
    prelude.append(f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))}")
  if train or options.restarts:
    prelude.append(AGAIN)
  srun, inside = _container(options)
  ends = [ENDS] if train else []
  failures = shlex.quote(os.path.join(options.folder, "logs", "failures"))
  restart = RESTART.format(restarts=options.restarts, failures=failures)
  ends.append(restart if options.restarts else "  *) ;;")
  return SCRIPT.format(
    directives="\n".join(f"#SBATCH {_directive(word)}" for word in directives),
    runs="\n".join(
      f"  {i}) run=({shlex.join([*each.arguments, *extra])}) ;;" for i, each in enumerate(same)
    ),
    clone=shlex.quote(options.clone),
    prelude="\n".join(prelude),
    srun="".join(f" {shlex.quote(word)}" for word in srun),
    command=shlex.join([*inside, options.python, "-m", job.module]),
    ends="\n".join(ends),
    last=ALONE.format(evaluations=shlex.quote(f"{options.title}-evaluate")) if followed else "",
  )


def _directive(word: str) -> str:
  """An option as sbatch reads it from a script, by its own rules for quotes and backslashes."""
  if not word.isprintable():
    raise ConfigError(
      f"{word!r}: sbatch cannot read such characters from a script; give a name without them"
    )
  if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
    return word
  return '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'


def _pattern(path: str) -> str:
  """A path escaped so that Slurm replaces nothing in it. Errors: ConfigError for a backslash."""
  if "\\" in path:
    raise ConfigError(f"--root: {path}: Slurm interprets backslashes; give a path without")
  return path.replace("%", "%%")


def _container(options: Options) -> tuple[list[str], list[str]]:
  """(options of srun, command to prefix) that run a job in a container: with Apptainer an image
  file or an address, with pyxis what enroot can import."""
  image, seen = options.container, (options.clone, options.folder)
  if not image:
    return [], []
  scheme, separator, _ = image.partition("://")
  apptainer = image.endswith(".sif") or (separator and scheme not in ENROOT_SCHEMES)
  # pyxis's mounts become lines of an fstab, in which spaces separate fields.
  separators, forbidden = (", and :", "[,:]") if apptainer else (", : and spaces", r"[,:\s]")
  for path in seen:
    if re.search(forbidden, path):
      raise ConfigError(
        f"--container: {path} cannot be mounted in it; use a path without {separators}"
      )
  if apptainer:
    binds = [word for path in seen for word in ("--bind", path)]
    return [], ["apptainer", "exec", "--nv", *binds, "--pwd", options.clone, image]
  mounts = ",".join(f"{path}:{path}" for path in seen)
  return [
    f"--container-image={image}",
    f"--container-mounts={mounts}",
    f"--container-workdir={options.clone}",
  ], []
