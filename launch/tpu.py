"""Cloud TPU launcher: a sweep on queued resources, as gcloud commands, one run after another.

  python -m launch.tpu --config=configs/shampoo_qat.py:1.5b --root=gs://BUCKET/shampoo \
    --image=REGISTRY/beyond_outliers:TAG --accelerator=v5litepod-256 --zone=us-west4-a --dry_run

prints the commands; without --dry_run they run here, in order: request the slices and wait for
them, fetch the image on every host, start each run on all hosts as a systemd unit and follow its
log until it ends, and finally give the slices back. Runs outlive this command: the same command
follows them again. --steps selects some of the steps.

systemd restarts a run that failed or was asked to stop (42), but not one that was refused (2) or
diverged (3).
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from beyond_outliers import cli
from beyond_outliers.errors import ConfigError
from launch import jobs, remote, tpus
from launch.jobs import Job

STEPS = ("create", "setup", "run", "delete")
FINAL = (2, 3)  # exit codes after which systemd does not restart a run: refused, diverged
WIDTH = 98  # columns of a line, before the backslash that continues it
WELL = (0, 3)  # exit codes of a run that has ended: done, diverged


@dataclasses.dataclass(frozen=True)
class Resource:
  """A queued resource: one or several slices that come and go together."""

  name: str
  zone: str
  part: tpus.Slice
  slices: int = 1
  project: str = ""
  spot: bool = False
  service_account: str = ""

  @property
  def processes(self) -> int:
    return self.part.hosts * self.slices


@dataclasses.dataclass(frozen=True)
class Step:
  """A shell command, and what it does."""

  kind: str  # one of STEPS
  title: str
  command: str
  job: Job | None = None


def define_flags() -> None:
  jobs.define_flags()
  remote.define_image(required=True)
  flags.DEFINE_string("accelerator", None, "Slice: v5litepod-256, v5p-128, ...", required=True)
  flags.DEFINE_integer("slices", 1, "Slices that a run is spread over.", 1)
  flags.DEFINE_string("zone", None, "Zone of Google Cloud that has them.", required=True)
  flags.DEFINE_string("project", "", "Project of Google Cloud; if empty, gcloud's own.")
  flags.DEFINE_bool("spot", False, "Spot slices, which cost less and may be taken away.")
  flags.DEFINE_string(
    "service_account",
    "",
    "Account that may use the bucket and the image; if empty, Compute Engine's default.",
  )
  flags.DEFINE_string("name", "", "Name of the queued resource; if empty, the sweep's.")
  flags.DEFINE_integer("restarts", 10, "How often a run that failed is started again.", 0)
  flags.DEFINE_list("steps", list(STEPS), f"Which steps to take, of {', '.join(STEPS)}.")


def steps(
  listed: Sequence[Job], resource: Resource, image: str, restarts: int = 10
) -> Iterator[Step]:
  """All that has to be done, in order. Errors: ConfigError for an evaluation beside its training,
  since a chip can only be used by one program."""
  what = f"{resource.part.accelerator} x {resource.slices}"
  yield Step("create", f"ask for {what}, {resource.processes} hosts", create(resource))
  yield Step("create", "wait until it is there", wait(resource))
  fetch = "\n".join(_fetch(image))
  yield Step("setup", "fetch the image on every host", ssh(resource, fetch))
  for job in in_turn(listed):
    start = _start(job, resource, image, restarts)
    everywhere = job.kind != "report"
    yield Step("run", f"start {job.name}", ssh(resource, start, everywhere), job)
    follow = ssh(resource, _follow(job), False)
    yield Step("run", f"follow {job.name} until it ends", follow, job)
  yield Step("delete", "give the slices back", delete(resource))


def in_turn(listed: Sequence[Job]) -> list[Job]:
  """The jobs, each evaluation right after its training. Errors: ConfigError for one beside it."""
  behind = {job.after[0]: job for job in listed if job.kind == "evaluate" and job.after}
  if any(job.kind == "evaluate" and not job.after for job in listed):
    raise ConfigError(
      "--evaluate=beside: only one program can use the chips of a slice; give --evaluate=behind, "
      "or start python -m beyond_outliers.evaluate --follow on another machine"
    )
  turns = []
  for job in listed:
    if job.kind != "evaluate":
      turns += [job, *([behind[job.name]] if job.name in behind else [])]
  return turns


def create(resource: Resource) -> str:
  """A command that requests the slices, unless they exist or were requested."""
  nodes = (
    [f"--node-id={resource.name}"]
    if resource.slices == 1
    else [f"--node-count={resource.slices}", f"--node-prefix={resource.name}"]
  )
  asked = _gcloud(
    "create",
    resource,
    f"--accelerator-type={resource.part.accelerator}",
    f"--runtime-version={resource.part.kind.runtime}",
    *nodes,
    *([f"--service-account={resource.service_account}"] if resource.service_account else []),
    *(["--spot"] if resource.spot else []),
  )
  return f"{_state(resource)} 2> /dev/null ||\n{asked}"


def wait(resource: Resource) -> str:
  """A command that waits until the slices are there; it fails if they never will be."""
  return "\n".join(
    [
      "while true; do",
      f"  state=$({_state(resource)}) || exit 1",
      '  case "$state" in',
      "    ACTIVE) break ;;",
      "    FAILED | SUSPEND* | DELETING)",
      '      echo "$state: delete it (--steps=delete), and give the command again" >&2; exit 1 ;;',
      "  esac",
      '  echo "$state"; sleep 30',
      "done",
    ]
  )


def delete(resource: Resource) -> str:
  return _gcloud("delete", resource, "--force", "--quiet")


def ssh(resource: Resource, command: str, everywhere: bool = True) -> str:
  """A command that runs `command` on every host of every slice, or on the first."""
  which = "all" if everywhere else "0"
  reached = _gcloud("ssh", resource, f"--node={which}", f"--worker={which}")
  return f"{reached} --command={shlex.quote(command)}"


def _gcloud(verb: str, resource: Resource, *arguments: str) -> str:
  where = [f"--zone={resource.zone}"]
  where += [f"--project={resource.project}"] if resource.project else []
  words = ["gcloud", "compute", "tpus", "queued-resources", verb, resource.name]
  return _lines([*words, *where, *arguments])


def _state(resource: Resource) -> str:
  return f"{_gcloud('describe', resource)} --format='value(state.state)'"


def _lines(words: Sequence[str], indent: str = "  ") -> str:
  """Words quoted for a shell, on lines of at most a hundred columns if the words allow it."""
  lines = [shlex.quote(words[0])]
  for word in map(shlex.quote, words[1:]):
    if len(lines[-1]) + len(word) > WIDTH:
      lines.append(f"{indent}{word}")
    else:
      lines[-1] += f" {word}"
  return " \\\n".join(lines)


def _fetch(image: str) -> Iterator[str]:
  registry = image.split("/")[0]
  if registry.endswith(("gcr.io", "pkg.dev")):
    yield shlex.join(["sudo", "gcloud", "auth", "configure-docker", registry, "--quiet"])
  yield shlex.join(["sudo", "docker", "pull", image])


def _start(job: Job, resource: Resource, image: str, restarts: int) -> str:
  """Starts a job as a systemd unit, which outlives the connection, unless it runs already."""
  here = remote.across(job, resource.processes, resource.slices)
  platform = "cpu" if job.kind == "report" else "tpu,cpu"
  program, *arguments = remote.command(here)
  container = [
    *("/usr/bin/docker", "run", "--rm", "--init", f"--name={job.name}"),
    *("--privileged", "--network=host", f"--env=JAX_PLATFORMS={platform}"),
    *(f"--entrypoint={program}", image),
    *(argument.replace("$", "$$") for argument in arguments),  # systemd expands variables
  ]
  unit = [
    *("sudo", "systemd-run", f"--unit={job.name}"),
    *("--property=Restart=on-failure", "--property=RestartSec=30"),
    *(f"--property=RestartPreventExitStatus={code}" for code in FINAL),
    *("--property=StartLimitIntervalSec=30d", f"--property=StartLimitBurst={restarts + 1}"),
    "--property=TimeoutStopSec=600",
  ]
  name = shlex.quote(job.name)
  return "\n".join(
    [
      f"systemctl is-active --quiet {name} || {{",
      f"  sudo systemctl reset-failed {name} 2> /dev/null",
      f"  {_lines([*unit, *container], '    ')}",
      "}",
    ]
  )


def _follow(job: Job) -> str:
  """Shows a job's log until it ends; exits with its code: systemd forgets successful units."""
  name = shlex.quote(job.name)
  return "\n".join(
    [
      f"sudo journalctl --unit={name} --follow --output=cat & log=$!",
      f"while systemctl is-active {name} | grep -qx -e active -e activating -e deactivating",
      "do sleep 10; done",
      'sudo kill "$log"',
      f'exit "$(systemctl show {name} --property=ExecMainStatus --value)"',
    ]
  )


def described() -> list[Step]:
  """The steps that the flags describe. Errors: ConfigError."""
  given = flags.FLAGS
  remote.check_image(given.image)
  remote.check_files(given.config, given.root)
  if unknown := [step for step in given.steps if step not in STEPS]:
    raise ConfigError(f"--steps={','.join(given.steps)}: no {unknown[0]}; of {', '.join(STEPS)}")
  name = given.name or jobs.title(given.config, given.root)
  for flag, value in (("name", name), ("zone", given.zone), ("project", given.project)):
    if value and not re.fullmatch(r"[a-z]([-a-z0-9]{0,58}[a-z0-9])?", value):
      raise ConfigError(f"--{flag}={value}: expected lower-case letters, digits and hyphens")
  part = tpus.parse(given.accelerator)
  resource = Resource(
    name, given.zone, part, given.slices, given.project, given.spot, given.service_account
  )
  every = steps(jobs.of_flags(), resource, given.image, given.restarts)
  return [step for step in every if step.kind in given.steps]


def launch(argv: list[str]) -> None:
  """Prints the commands, or runs them. Exits with 1 after all have ended, if a run failed."""
  del argv
  todo = described()
  if flags.FLAGS.dry_run:
    for step in todo:
      print(f"# {step.title}\n{step.command}\n")
    return
  if shutil.which("gcloud") is None:
    raise ConfigError("gcloud: is not installed here; install Google Cloud's command line")
  failed: dict[str, str] = {}  # step that failed -> name of its job, or ""
  for number, step in enumerate(todo, 1):
    if step.job and step.job.kind == "evaluate" and {*step.job.after} & {*failed.values()}:
      continue
    print(f"[{number}/{len(todo)}] {step.title}", flush=True)
    try:
      code = subprocess.run(["bash", "-c", step.command]).returncode
    except KeyboardInterrupt:
      print(
        "asked to stop; what was started goes on, and the same command follows it again", flush=True
      )
      sys.exit(jobs.STOPPED)
    if code not in (WELL if step.kind == "run" else (0,)):
      failed[f"{step.title} (exit code {code})"] = step.job.name if step.job else ""
      if step.kind in ("create", "setup"):
        break
  if failed:
    sys.exit("not done: " + ", ".join(failed))


if __name__ == "__main__":
  define_flags()
  cli.run_command(launch)
