"""Jobs of a sweep, which every launcher starts: from a config file, its sweep and the shared flags.

A job is a module, its arguments and the names of the jobs that it waits for. The launcher decides
where it runs, on how many devices, and after which exit codes it runs again.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import hashlib
import os
import re
import runpy
import shlex
from collections.abc import Iterable, Sequence

from absl import flags

from beyond_outliers import cli
from beyond_outliers.config import sweeps
from beyond_outliers.config.checks import require_once
from beyond_outliers.config.files import read_json
from beyond_outliers.errors import ConfigError, WorkdirError
from launch import recorded

NAME_LENGTH = 52  # of Kubernetes' 63 characters, what is left after the suffixes that it appends
ENDED = ("done", "diverged")  # statuses of runs that a repeated command leaves alone
STOPPED = 42  # exit code of a run, or a launcher, that was asked to stop
FINAL = (0, 2, 3, STOPPED)  # exit codes other than failures: done, refused, diverged, stopped

flags.disclaim_key_flags()  # flags belong to the launcher that defines them


@dataclasses.dataclass(frozen=True)
class Job:
  """One command of a sweep."""

  name: str  # unique in its list; at most 52 of [a-z0-9-], starting with a letter, no final hyphen
  kind: str  # train | evaluate | report
  module: str  # what `python -m` runs
  arguments: tuple[str, ...]  # of the module, unquoted
  workdir: str  # of its run; for the report, the root
  after: tuple[str, ...] = ()  # names of the jobs that must have ended, in whatever way


def define_flags() -> None:
  """Defines the flags that all launchers share. Launchers call it when run, not when imported, so
  that a program may import several."""
  cli.path_flag(
    "config",
    None,
    "Config file that has a sweep; a size and overrides may follow after a colon.",
    required=True,
  )
  cli.path_flag("root", None, "Folder of the workdirs.", required=True)
  flags.DEFINE_list(
    "where", [], "key=value,...: only the runs of the sweep that have these values."
  )
  cli.path_flag(
    "overrides",
    "",
    "File that analysis --overrides wrote: values by optimizer, which replace the sweep's.",
  )
  flags.DEFINE_enum(
    "evaluate",
    "",
    ["", "behind", "beside"],
    "An evaluation job for each run: behind (once the run has ended) or beside it (with --follow).",
  )
  flags.DEFINE_string(
    "evaluate_flags", "", "Flags of the evaluation jobs: '--recipes=rtn_w4a4 --methods=rtn,gptq'."
  )
  flags.DEFINE_bool(
    "report", False, "Also write a report, ROOT/report, once all other jobs have ended."
  )
  flags.DEFINE_bool("dry_run", False, "Print what would be done, and start nothing.")


def of_flags(*, here: bool = False) -> list[Job]:
  """The jobs that the shared flags describe. here: they run with this process's variables, so JAX
  settings are checked too. Errors: ConfigError, as `describe` and `recorded.check_settings`."""
  given = flags.FLAGS
  listed = describe(
    given.config,
    given.root,
    given.where,
    given.overrides,
    given.evaluate,
    given.report,
    _evaluation(given.evaluate_flags, given.evaluate),
  )
  if here:
    recorded.check_settings(job.workdir for job in listed if job.kind == "train")
  return listed


def describe(
  config: str,
  root: str,
  where: Sequence[str] = (),
  overrides: str = "",
  evaluate: str = "",
  report: bool = False,
  evaluate_flags: Sequence[str] = (),
) -> list[Job]:
  """Jobs of the sweep in a config file: trainings, then evaluations, then the report.

  config: the file, with size and overrides after a colon, as for `main`. where: "key=value"
  conditions. overrides: an analysis's file. evaluate: "" for none, "behind" for after each
  training, "beside" for during it (--follow). Errors: ConfigError, as `runs` and recorded.py."""
  path, _, argument = config.partition(":")
  fixed = recorded.found(overrides, path, argument) if overrides else {}
  names = short_names(runs(path, (), fixed))  # of all runs, so that --where does not change them
  trainings, evaluations = [], []
  for run, values in runs(path, where, fixed).items():
    workdir = os.path.join(root, run)
    recorded.check_same_run(workdir, path, argument, values)
    settings = (f"--config={path}:{argument}", f"--workdir={workdir}", *_flags_of(values))
    train = Job(f"train-{names[run]}", "train", "beyond_outliers.main", settings, workdir)
    trainings.append(train)
    beside = evaluate == "beside"
    evaluations.append(
      Job(
        f"eval-{names[run]}",
        "evaluate",
        "beyond_outliers.evaluate",
        (f"--workdir={workdir}", *(("--follow",) if beside else ()), *evaluate_flags),
        workdir,
        () if beside else (train.name,),
      )
    )
  listed = trainings + (evaluations if evaluate else [])
  if report:
    page = (f"--root={root}", f"--out={os.path.join(root, 'report')}")
    others = tuple(job.name for job in listed)
    listed.append(Job("report", "report", "beyond_outliers.analysis", page, root, others))
  return listed


def runs(path: str, where: Sequence[str], fixed: sweeps.Overrides) -> dict[str, sweeps.Overrides]:
  """{run name: overrides} of the sweep in a config file, with the `fixed` values in all.

  Errors: ConfigError if the file has no sweep, `where` leaves no run of it, or two different runs
  have the same name."""
  conditions = [_condition(text) for text in where]
  require_once("--where", [key for key, _ in conditions])
  wanted = dict(conditions)
  make_sweep = runpy.run_path(path).get("get_hyper")
  if make_sweep is None:
    raise ConfigError(f"--config={path}: has no sweep, get_hyper(h); give one of the files that do")
  chosen: dict[str, sweeps.Overrides] = {}
  swept: set[str] = set()
  for values in make_sweep(sweeps):
    values = {**values, **fixed}
    swept |= values.keys()
    if any(values.get(key) != value for key, value in wanted.items()):
      continue
    name = sweeps.run_name(values)
    if set(_flags_of(chosen.setdefault(name, values))) != set(_flags_of(values)):
      raise ConfigError(
        f"--config={path}: its sweep has two runs for the folder {name}: {chosen[name]} and "
        f"{values}; give them values that differ in letters or digits"
      )
  if not chosen:
    raise ConfigError(
      f"--where={','.join(where)}: no run of {path}'s sweep has these values; it sweeps "
      f"{sorted(swept)}"
    )
  return chosen


def _flags_of(values: sweeps.Overrides) -> list[str]:
  return [f"--config.{key}={value}" for key, value in values.items()]


def _condition(text: str) -> tuple[str, object]:
  key, _, value = text.partition("=")
  try:
    return key, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    raise ConfigError(
      f"--where={text}: expected key=value, the value written as in Python: seed=0, name='x'"
    ) from None


def short_names(run_names: Iterable[str]) -> dict[str, str]:
  """{run name: unique name of [a-z0-9-]}, with a digest where the name had to be cut or would not
  be unique."""
  longest = NAME_LENGTH - len("train-")
  plain = {name: re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") for name in run_names}
  often = collections.Counter(plain.values())
  return {
    name: short
    if 0 < len(short) <= longest and often[short] == 1
    else _with_digest(short, name, longest)
    for name, short in plain.items()
  }


def title(config: str, root: str) -> str:
  """A name for the sweep, such as soap-qat-1f3a90c2, on systems shared with other sweeps."""
  path, _, _ = config.partition(":")
  stem, _ = os.path.splitext(os.path.basename(path))
  plain = re.sub("[^a-z0-9]+", "-", stem.lower()).strip("-")
  return _with_digest(
    plain if plain[:1].isalpha() else f"sweep-{plain}",
    root if "://" in root else os.path.abspath(root),
    30,
  )


def local_folder(config: str, root: str) -> str:
  """Folder for a launcher's logs and scripts: the root, or runs/TITLE if that is in a store."""
  return os.path.join("runs", title(config, root)) if "://" in root else root


def _with_digest(short: str, of: str, longest: int) -> str:
  digest = hashlib.sha256(of.encode()).hexdigest()[:8]
  return f"{short[: longest - 9].strip('-')}-{digest}".lstrip("-")


def _evaluation(text: str, evaluate: str) -> list[str]:
  """The flags in --evaluate_flags. Errors: ConfigError for those that evaluation jobs would refuse,
  perhaps days later."""
  try:
    words = shlex.split(text)
  except ValueError as error:
    raise ConfigError(f"--evaluate_flags={text}: {error}; close it") from None
  if not words:
    return []
  if not evaluate:
    raise ConfigError(f"--evaluate_flags={text}: for which job? give --evaluate=behind or beside")
  from beyond_outliers.evaluate import __main__ as command  # its flags are not the launcher's

  known = flags.FlagValues()
  for flag in flags.FLAGS.flags_by_module_dict()[command.__name__]:
    known[flag.name] = flag
  try:
    rest = known(["evaluate", "--workdir=.", *words])[1:]
  except flags.Error as error:
    raise ConfigError(f"--evaluate_flags={text}: {error}") from None
  of_launcher = known["workdir"].present > 1 or known["follow"].present
  if not of_launcher and (problem := cli.given_again(known)):
    raise ConfigError(f"--evaluate_flags={text}: {problem}")
  if rest or of_launcher:
    raise ConfigError(
      f"--evaluate_flags={text}: expected --flag=value for each, without --workdir and --follow, "
      "which the launcher gives"
    )
  command.check_measured()
  return words


def left_out(job: Job) -> bool:
  """Whether there is nothing to start: a training that has ended, or an evaluation that waits for
  one that has not."""
  ended = status_of(job.workdir) in ENDED
  return ended if job.kind == "train" else job.kind == "evaluate" and bool(job.after) and not ended


def status_of(workdir: str) -> str:
  """Status of a run from its status.json; else "not started" or "unreadable"."""
  try:
    file = os.path.join(workdir, "status.json")
    return read_json(file, WorkdirError, "", {"status": str})["status"]
  except (FileNotFoundError, NotADirectoryError):
    return "not started"
  except WorkdirError:
    return "unreadable"
