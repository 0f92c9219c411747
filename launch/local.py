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
import json
import pathlib
import runpy
import subprocess
import sys

from absl import app, flags

from beyond_outliers.config import sweeps

CONFIG = flags.DEFINE_string(
  "config", None, "Config file that has a sweep; size and overrides behind a colon.", required=True
)
ROOT = flags.DEFINE_string("root", None, "Folder of the workdirs.", required=True)
WHERE = flags.DEFINE_list(
  "where", [], "key=value,...: only the runs of the sweep that have these values."
)
OVERRIDES = flags.DEFINE_string(
  "overrides", "", "File of an analysis: values that replace the sweep's, by optimizer."
)
LIST = flags.DEFINE_bool(
  "list", False, "Print the workdirs and what they override, and start nothing."
)

ENDED = ("done", "diverged")  # status of runs that are left alone when the command is given again


def runs(path: str, where: list[str], fixed: sweeps.Overrides) -> dict[str, sweeps.Overrides]:
  """{run name: overrides} of the sweep in a config file, with the `fixed` values in all. Errors:
  ValueError when `where` leaves none."""
  wanted = {
    key: ast.literal_eval(value)
    for key, _, value in (condition.partition("=") for condition in where)
  }
  sweep = [{**overrides, **fixed} for overrides in runpy.run_path(path)["get_hyper"](sweeps)]
  chosen = [
    overrides
    for overrides in sweep
    if all(overrides.get(key) == value for key, value in wanted.items())
  ]
  if not chosen:
    raise ValueError(
      f"--where={','.join(where)}: no run of {path}'s sweep has these values; it sweeps "
      f"{sorted(sweep[0])}"
    )
  return {sweeps.run_name(overrides): overrides for overrides in chosen}


def found(file: str, path: str, argument: str) -> sweeps.Overrides:
  """Overrides that `file` has for the config's optimizer. Errors: ValueError when it is of another
  size, or lacks the optimizer."""
  saved = json.loads(pathlib.Path(file).read_text())
  c = runpy.run_path(path)["get_config"](argument)
  if saved["size"] != c.size:
    raise ValueError(
      f"--overrides={file}: found at size {saved['size']}, and this is {c.size}; tune at that size"
    )
  if c.optimizer.name not in saved["overrides"]:
    raise ValueError(
      f"--overrides={file}: nothing about {c.optimizer.name}; "
      f"it has {', '.join(saved['overrides'])}"
    )
  return saved["overrides"][c.optimizer.name]


def status_of(workdir: pathlib.Path) -> str:
  """Status of a run by its status.json, or "not started"."""
  path = workdir / "status.json"
  return json.loads(path.read_text())["status"] if path.exists() else "not started"


def launch(argv: list[str]) -> None:
  """Runs the sweep but for runs that ended. Exits with 1 if one is neither done nor diverged."""
  del argv
  path, _, argument = CONFIG.value.partition(":")
  failed = []
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
    code = subprocess.run(
      command + [f"--config.{key}={value}" for key, value in overrides.items()]
    ).returncode
    if status_of(workdir) not in ENDED:
      failed.append(f"{workdir} (exit code {code})")
  if failed:
    sys.exit("not done: " + ", ".join(failed))


if __name__ == "__main__":
  app.run(launch)
