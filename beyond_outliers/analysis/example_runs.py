"""Runs for notebooks: read from folders, or small ones trained here as examples.

The small ones are for trying out the analysis: models so small and so briefly trained say nothing
about which optimizer is ahead in the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from etils import epath

from beyond_outliers import config
from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis import packed_runs
from beyond_outliers.config.sweeps import run_name
from beyond_outliers.errors import WorkdirError
from beyond_outliers.mesh import jax_settings


class ConfigFile(Protocol):
  """A module of configs/."""

  def get_config(self, arg: str = "") -> Any: ...


class Example(NamedTuple):
  """The size and number of runs that are trained here."""

  overrides: str  # for config files, after the size and its steps
  steps: dict[str, int]  # by size, the default one first; tokens per parameter are equal
  most: int  # optimizers, and methods, at most: the first of those asked for
  outliers_every: int  # log.outliers_every, for runs of the default size in full precision


BYTES = "data.tokenizer=bytes,data.vocab=264,eval.documents=1,checkpoint.keep=8"
# Rows by the name that a notebook gives in place of a folder.
SMALL_RUNS = {
  # Half a minute per run on two cores.
  "colab": Example(
    f"context=128,batch_size=8,eval.batch_size=64,{BYTES}",
    {"0.6m": 82, "0.3m": 24, "1m": 163},
    6,
    10,
  ),
  # For tests: most of it is compiling.
  "tiny": Example(
    "context=32,batch_size=4,eval.batch_size=256,model.d_head=8,model.unroll=1,eval.every=24,"
    f"checkpoint.every=12,{BYTES}",
    {"0.6m": 24, "0.3m": 10, "1m": 48},
    1,
    12,
  ),
}


def find_or_train(
  where: str,
  config_files: Sequence[ConfigFile],
  recipes: Sequence[str] = ("none",),
  *,
  ladder: bool = False,
) -> list[runs_lib.Run]:
  """The runs in the folders or packed files `where`, separated by commas; or, for a row of
  SMALL_RUNS, a run of each config file under each recipe in runs/<row>, trained on this machine
  unless it is there already.

  ladder: of every size, not only the default one.
  Errors: WorkdirError for a folder that is missing or has no runs; those of `train.run`."""
  if where not in SMALL_RUNS:
    return [run for folder in where.split(",") for run in _find(folder)]
  example = SMALL_RUNS[where]
  sizes = list(example.steps)
  return [
    _trained(where, module.get_config(_argument(example, size, recipe)))
    for recipe in recipes
    for size in (sizes if ladder else sizes[:1])
    for module in config_files[: example.most]
  ]


def _argument(example: Example, size: str, recipe: str) -> str:
  """The argument for config files. Outliers are only measured where a notebook reads them, since
  that takes longer to compile than all the rest."""
  usual = size == next(iter(example.steps)) and recipe == "none"
  every = example.outliers_every if usual else 0
  return (
    f"{size},steps={example.steps[size]},quant.recipe={recipe},log.outliers_every={every},"
    f"{example.overrides}"
  )


def _find(folder: str) -> list[runs_lib.Run]:
  there = epath.Path(folder).exists() or packed_runs.archive_of(folder)
  found = packed_runs.find_runs(folder) if there else []
  if not found:
    rows = ", ".join(SMALL_RUNS)
    raise WorkdirError(
      f"{folder} holds no run; give a folder that holds some, or one of {rows}, which makes small "
      "ones"
    )
  return found


def _trained(where: str, given: Any) -> runs_lib.Run:
  """The finished run of a configuration. Errors: ConfigError if its folder holds another's,
  WorkdirError if it was trained under other JAX settings."""
  c = config.resolve(given)
  path = epath.Path(
    "runs",
    where,
    run_name({"optimizer": c.optimizer.name, "recipe": c.quant.recipe, "size": c.size}),
  )
  if (path / "config.json").exists() and runs_lib.open(path).status["status"] == "done":
    run = runs_lib.open(path)
    if run.config != c:
      from beyond_outliers.train import initialize

      initialize.check_same_run(run.config, c, path)
    jax_settings.check_recorded(run.manifest)
    return run
  from beyond_outliers import train  # imports all of training, which existing runs don't need

  train.run(c, path, say=print)
  return runs_lib.open(path)


def measure_cells(
  where: str,
  runs: Sequence[runs_lib.Run],
  recipes: Sequence[str],
  methods: Sequence[str] = ("rtn",),
  *,
  every_checkpoint: bool = False,
  propagation: bool = False,
) -> None:
  """Measures cells of runs that `find_or_train` trained: quantized by every method under every
  recipe, at the last checkpoint or at all. Does nothing to runs read from a folder.

  propagation: also decompose the error of each."""
  if where not in SMALL_RUNS:
    return
  from beyond_outliers.evaluate.evaluator import Evaluator
  from beyond_outliers.evaluate.job import Job, Progress
  from beyond_outliers.evaluate.plan import plan_cells
  from beyond_outliers.evaluate.target import RunCheckpoints

  for run in runs:
    target, progress = RunCheckpoints(run.path), Progress()
    cells = plan_cells(target, recipes, methods[: SMALL_RUNS[where].most])
    evaluator = Evaluator(target, cells, propagation=propagation, say=progress)
    job = Job(target, evaluator, progress)
    if every_checkpoint:
      job.once(target.steps())
    else:
      job.newest()
    evaluator.close()
