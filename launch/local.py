"""Local launcher: a config file's sweep on this machine, one run after another.

The same command goes on where it stopped.

  python -m launch.local --config=configs/shampoo.py --root=runs/tuning/shampoo --where=seed=0

Values found for the optimizer in another sweep replace this one's, with --overrides=FILE:

  python -m beyond_outliers.analysis --root=runs/tuning --overrides=tuned.json
  python -m launch.local --config=configs/shampoo_qat.py --root=runs/qat/shampoo \
    --overrides=tuned.json

Every run is a process of its own in <root>/<what it overrides>; a run that diverges doesn't stop
the others.
"""

from __future__ import annotations

import ast
import pathlib
import runpy
import signal
import subprocess
import sys
from typing import Any

from absl import flags

from beyond_outliers import cli
from beyond_outliers.config import sweeps
from beyond_outliers.config.files import read_json
from beyond_outliers.errors import ConfigError, WorkdirError

CONFIG = cli.path_flag(
  "config", None, "Config file that has a sweep; size and overrides behind a colon.", required=True
)
ROOT = cli.path_flag("root", None, "Folder of the workdirs.", required=True)
WHERE = flags.DEFINE_list(
  "where", [], "key=value,...: only the runs of the sweep that have these values."
)
OVERRIDES = cli.path_flag(
  "overrides", "", "File of an analysis: values that replace the sweep's, by optimizer."
)
RESTARTS = flags.DEFINE_integer(
  "restarts", 0, "How often a run that failed is started again, from its newest checkpoint.", 0
)
LIST = flags.DEFINE_bool(
  "list", False, "Print the workdirs and what they override, and start nothing."
)

ENDED = ("done", "diverged")  # status of runs that are left alone when the command is given again
PREEMPTED = 42  # exit code of a run that was asked to stop, and of this command
FINAL = (0, 2, 3, PREEMPTED)  # exit codes after which nothing is started again: done, refused, ...


def runs(path: str, where: list[str], fixed: sweeps.Overrides) -> dict[str, sweeps.Overrides]:
  """{run name: overrides} of the sweep in a config file, with the `fixed` values in all. Errors:
  ConfigError when the file has no sweep, or `where` leaves no run of it."""
  wanted = dict(map(_condition, where))
  make_sweep = runpy.run_path(path).get("get_hyper")
  if make_sweep is None:
    raise ConfigError(f"--config={path}: has no sweep, get_hyper(h); give one of the files that do")
  sweep = [{**overrides, **fixed} for overrides in make_sweep(sweeps)]
  chosen = [
    overrides
    for overrides in sweep
    if all(overrides.get(key) == value for key, value in wanted.items())
  ]
  if not chosen:
    raise ConfigError(
      f"--where={','.join(where)}: no run of {path}'s sweep has these values; it sweeps "
      f"{sorted(sweep[0])}"
    )
  return {sweeps.run_name(overrides): overrides for overrides in chosen}


def _condition(text: str) -> tuple[str, object]:
  key, _, value = text.partition("=")
  try:
    return key, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    raise ConfigError(
      f"--where={text}: expected key=value, the value as Python has it: seed=0, name='x'"
    ) from None


def found(file: str, path: str, argument: str) -> sweeps.Overrides:
  """Overrides that `file` has for the config's optimizer. Errors: ConfigError when it is of another
  size, or lacks the optimizer."""
  remedy = "give what analysis --overrides=FILE wrote"
  try:
    saved = read_json(file, ConfigError, remedy, {"size": str, "overrides": dict})
  except (FileNotFoundError, NotADirectoryError):
    raise ConfigError(f"--overrides={file}: there is no such file; {remedy}") from None
  c = runpy.run_path(path)["get_config"](argument)
  if saved["size"] != c.size:
    raise ConfigError(
      f"--overrides={file}: found at size {saved['size']}, and this is {c.size}; tune at that size"
    )
  if c.optimizer.name not in saved["overrides"]:
    raise ConfigError(
      f"--overrides={file}: nothing about {c.optimizer.name}; "
      f"it has {', '.join(saved['overrides'])}"
    )
  return saved["overrides"][c.optimizer.name]


def status_of(workdir: pathlib.Path) -> str:
  """Status of a run by its status.json, "not started", or "unreadable"."""
  try:
    return read_json(workdir / "status.json", WorkdirError, "", {"status": str})["status"]
  except (FileNotFoundError, NotADirectoryError):
    return "not started"
  except WorkdirError:
    return "unreadable"


class Runner:
  """Runs commands one after another, and hands on the signals that ask to stop."""

  def __init__(self):
    self._process: subprocess.Popen | None = None
    self.asked = False  # to stop

  def run(self, command: list[str], restarts: int = 0) -> int:
    """Exit code; the last, of a command that failed and was started again."""
    for left in range(restarts, -1, -1):
      code = self._run_once(command)
      if code in FINAL or not left or self.asked:
        break
      print(f"exit code {code}: starting it again, {left} left: {' '.join(command)}", flush=True)
    return code

  def _run_once(self, command: list[str]) -> int:
    """The command has a process group of its own: a terminal's Ctrl-C comes to it from here, once,
    and it has all the time that it needs to save."""
    if self.asked:
      return PREEMPTED
    self._process = subprocess.Popen(command, process_group=0)
    if self.asked:  # while it was being started
      self._process.terminate()
    code = self._process.wait()
    self._process = None
    return code

  def hand_on(self, number: int, frame: Any) -> None:
    self.asked = True
    if self._process is not None:
      self._process.send_signal(number)


def launch(argv: list[str]) -> None:
  """Runs the sweep but for runs that ended. Exits with 1 if one is neither done nor diverged, with
  42 if it was asked to stop."""
  del argv
  path, _, argument = CONFIG.value.partition(":")
  failed, runner = [], Runner()
  for number in cli.STOP_SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, runner.hand_on)
  sweep = runs(path, WHERE.value, found(OVERRIDES.value, path, argument) if OVERRIDES.value else {})
  for number, (name, overrides) in enumerate(sweep.items(), 1):
    workdir = pathlib.Path(ROOT.value) / name
    print(f"[{number}/{len(sweep)}] {workdir}: {status_of(workdir)}", flush=True)
    if LIST.value or status_of(workdir) in ENDED:
      continue
    command = [
      sys.executable,
      "-m",
      "beyond_outliers.main",
      f"--config={path}:{argument}",
      f"--workdir={workdir}",
    ]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    code = runner.run(command, RESTARTS.value)
    if runner.asked:
      print(f"asked to stop; {workdir}: {status_of(workdir)}; the same command goes on", flush=True)
      sys.exit(PREEMPTED)
    if status_of(workdir) not in ENDED:
      failed.append(f"{workdir} (exit code {code})")
  if failed:
    sys.exit("not done: " + ", ".join(failed))


if __name__ == "__main__":
  cli.run_command(launch)
