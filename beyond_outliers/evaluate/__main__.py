"""Evaluation job: checkpoints as trained, and quantized by every method under every recipe.

  python -m beyond_outliers.evaluate --workdir=runs/adamw-nano \
      --recipes=rtn_w4a4,rtn_w4a16 --methods=rtn,gptq
  python -m beyond_outliers.evaluate --workdir=runs/adamw-50m --recipes=rtn_w4a4 --follow
  python -m beyond_outliers.evaluate --hf=OLMo-2-0425-1B --data=datasets/NAME --recipes=rtn_w4a16

Writes one JSON file per (step, recipe, method) into <workdir>/eval, and resumes where it stopped.
The run itself is only read. A cell that cannot be measured, or whose result is gone, is reported
and skipped, and makes the exit code 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import app, flags

from beyond_outliers import cli, config, stores
from beyond_outliers.config.checks import require
from beyond_outliers.config.cluster import membership
from beyond_outliers.errors import CheckpointError
from beyond_outliers.evaluate import offline_tasks

if TYPE_CHECKING:  # what imports JAX is imported after the flags are parsed: --help is fast
  from beyond_outliers.evaluate.job import Job, Progress
  from beyond_outliers.evaluate.target import Target
  from beyond_outliers.evaluate.text import TextOptions
  from beyond_outliers.types import Json

DAY = 86400.0  # seconds
# Flags that may differ between processes: where each finds things, and which of several it is.
PLACES = ("workdir", "hf", "checkpoint", "data", "task_folders", "out", "distributed")

WORKDIR = cli.path_flag("workdir", None, "Folder of a run, or its address in a store.")
HF = cli.path_flag("hf", None, "Hugging Face directory of an OLMo2 or Llama model; needs --data.")
CHECKPOINT = cli.path_flag("checkpoint", None, "One checkpoint, RUN/checkpoints/N.")
AVERAGE = flags.DEFINE_string(
  "average",
  "",
  "Evaluate an average of the parameters in their place: 'ema' (of a run with average.decay), or "
  "'last:COUNT', the mean of that many checkpoints up to the step; 'last': of average.last.",
)
STEPS = flags.DEFINE_list(
  "steps", [], "Steps of the checkpoints, or 'all'; by default the newest, and all with --follow."
)
RECIPE_NAMES = flags.DEFINE_list(
  "recipes", [], "Recipes, rows of quant.RECIPES; if empty, only the model as it was trained."
)
METHOD_NAMES = flags.DEFINE_list(
  "methods", ["rtn"], "Methods, rows of quant.METHODS, with numbers as in gptq(damping=0.1)."
)
TASKS = flags.DEFINE_list(
  "tasks",
  [],
  "Tasks of lm-evaluation-harness (extra: eval), of --task_folders (evaluate.offline_tasks makes "
  "the study's), or "
  + " and ".join(offline_tasks.HELD_OUT)
  + ", which are made of the validation text.",
)
TASK_FOLDERS = cli.paths_flag("task_folders", [], "Folders with the YAML files of further tasks.")
TRUST_TASK_CODE = flags.DEFINE_bool(
  "trust_task_code",
  False,
  "Run the Python that files of --task_folders name: functions, classes, metrics, templates.",
)
CALIBRATION = flags.DEFINE_integer(
  "calibration", 32, "Training windows for the methods that calibrate on some.", lower_bound=1
)
PROPAGATION = flags.DEFINE_bool(
  "propagation",
  False,
  "Decompose the error of every cell that quantizes: R_L, and how it grows (propagation.py).",
)
DATA = cli.path_flag("data", None, "Folder of a prepared dataset, instead of the run's.")
CONTEXT = flags.DEFINE_integer(
  "context",
  None,
  "Tokens per window; by default the run's, or with --hf 1024, and no more than the model is for.",
  lower_bound=1,
)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", None, "Windows per batch; by default the run's, or 8.", lower_bound=1
)
DOCUMENTS = flags.DEFINE_integer(
  "documents", None, "Validation documents, 0: all; by default the run's.", lower_bound=0
)
FOLLOW = flags.DEFINE_bool(
  "follow", False, "Evaluate checkpoints as they land, until the run ends or all --steps are done."
)
POLL = flags.DEFINE_float("poll", 10.0, "Seconds between two looks at the run.")
OUT = cli.path_flag("out", None, "Folder of the results; by default eval/ in --workdir or --hf.")
DISTRIBUTED = cli.distributed_flag()
JSON = flags.DEFINE_bool("json", False, "Print all cells as one JSON object instead of a table.")


def open_target(progress: Progress) -> Target:
  """The target that the flags select. Errors: ConfigError, WorkdirError, DataError."""
  from beyond_outliers.evaluate.job import wait_for_run
  from beyond_outliers.evaluate.target import HuggingFaceModel, OneCheckpoint, RunCheckpoints

  options: TextOptions = {
    "dataset": DATA.value or "",
    "context": CONTEXT.value or 0,
    "batch_size": BATCH_SIZE.value or 0,
    "documents": DOCUMENTS.value,
  }
  if HF.value:
    require(
      not AVERAGE.value,
      "--average",
      AVERAGE.value,
      "works only with a run's checkpoints; leave it out",
    )
    require(
      not FOLLOW.value and not STEPS.value,
      "--hf",
      HF.value,
      "holds one model only; leave --follow and --steps out",
    )
    return HuggingFaceModel(HF.value, warn=progress.line, **options)
  if CHECKPOINT.value:
    require(
      not FOLLOW.value and not STEPS.value,
      "--checkpoint",
      CHECKPOINT.value,
      "is of one step only; leave --follow and --steps out, or give --workdir",
    )
    return OneCheckpoint(CHECKPOINT.value, AVERAGE.value, **options)
  workdir = str(WORKDIR.value)
  if FOLLOW.value:
    wait_for_run(workdir, progress, POLL.value)
  return RunCheckpoints(workdir, AVERAGE.value, **options)


def chosen_steps(asked: Sequence[str], known: list[int]) -> list[int]:
  """The steps that the flags choose. Errors: ConfigError."""
  if list(asked) == ["all"]:
    return known
  require(
    all(step.isdigit() for step in asked),
    "--steps",
    ",".join(asked),
    "expected 'all', or numbers of steps: 100,200",
  )
  for step in asked:
    require(
      FOLLOW.value or int(step) in known,
      "--steps",
      step,
      f"there is no such checkpoint; there are {known}",
    )
  return [int(step) for step in asked]


def evaluate_steps(job: Job, steps: list[int]) -> list[int] | None:
  """Runs the job as the flags say; returns the steps whose results count, None for all."""
  if FOLLOW.value:
    wanted = None if STEPS.value in ([], ["all"]) else steps  # None: all, future ones included
    job.follow(wanted)
    return wanted
  if STEPS.value:
    job.once(steps)
    return steps
  return job.newest()


def check_measured() -> None:
  """Refuses recipes and methods that cannot be measured. Errors: ConfigError."""
  from beyond_outliers.evaluate.plan import check_names

  check_names(RECIPE_NAMES.value, METHOD_NAMES.value)
  require(
    bool(RECIPE_NAMES.value) or not flags.FLAGS["methods"].present,
    "--methods",
    ",".join(METHOD_NAMES.value),
    "under which recipe? give --recipes too, such as rtn_w4a4",
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  cli.end_when_asked(
    "asked to stop; what was measured is kept, and the same command resumes", cli.killed_by
  )
  for address in (WORKDIR.value, CHECKPOINT.value):
    stores.check_address(address or "")
  joining = membership(DISTRIBUTED.value, os.environ) if DISTRIBUTED.value else None
  from beyond_outliers.mesh import processes

  if joining is not None:
    processes.join(config.Distributed(), joining, stops=False)
    cli.tell_when_asked(processes.tell)
  try:
    failed = evaluate()
  except BaseException as error:
    processes.leave(error)
  processes.end(1 if failed else 0)


def evaluate() -> bool:
  """Runs the job that the flags describe; returns whether a cell could not be measured."""
  from beyond_outliers.evaluate.evaluator import Evaluator
  from beyond_outliers.evaluate.job import Job, Progress
  from beyond_outliers.evaluate.plan import plan_cells
  from beyond_outliers.evaluate.table import results_table
  from beyond_outliers.mesh import jax_settings, processes

  jax_settings.check_usable()  # first, since --follow may wait for a run for a day
  check_measured()
  processes.agree("command", _deciding)
  progress = Progress()
  target = open_target(progress)
  if not FOLLOW.value and not target.steps():
    raise CheckpointError(
      f"{target.name}: no checkpoint; train first, or wait for one with --follow"
    )
  steps = chosen_steps(STEPS.value, target.steps())
  evaluator = Evaluator(
    target,
    plan_cells(target, RECIPE_NAMES.value, METHOD_NAMES.value),
    OUT.value,
    tasks=TASKS.value,
    task_folders=TASK_FOLDERS.value,
    trust_task_code=TRUST_TASK_CODE.value,
    calibration_windows=CALIBRATION.value,
    propagation=PROPAGATION.value,
    say=progress,
    warn=progress.line,
  )
  job = Job(target, evaluator, progress, POLL.value)
  counted = evaluate_steps(job, steps)
  evaluator.close()
  results = evaluator.results(counted)
  if not results and not job.failed and not job.evaluated:
    raise CheckpointError(
      f"{target.name}: no checkpoint could be evaluated: {job.skipped or 'the run left none'}"
    )
  job.check_results(counted or ())
  if not processes.is_first():
    return job.failed
  if JSON.value:
    print(json.dumps({"cells": results, "skipped": job.skipped}))
  else:
    if results:
      print(results_table(results))
    for step, reasons in job.skipped.items():
      print("\n".join(f"step {step} skipped: {reason}" for reason in reasons))
  return job.failed


def _deciding() -> Json:
  """What the processes of a job must agree on: code, and flags except PLACES, whose contents are
  compared once they are open."""
  from beyond_outliers import workdir

  own = flags.FLAGS.get_flags_for_module(flags.FLAGS.find_module_defining_flag(JSON.name))
  given = {f"--{flag.name}": flag.value for flag in own if flag.name not in PLACES}
  return config.flatten({**given, **workdir.code()})


flags.register_multi_flags_validator(
  ["workdir", "hf", "checkpoint"],
  lambda values: sum(map(bool, values.values())) == 1,
  "expected one of --workdir, --hf, --checkpoint",
)

flags.register_validator(
  "poll", lambda value: 0.01 <= value <= DAY, f"expected 0.01 to {DAY:.0f} seconds"
)

if __name__ == "__main__":
  cli.take_huge_pages()
  cli.run_command(main)
