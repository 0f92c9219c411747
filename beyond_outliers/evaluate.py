"""Evaluates checkpoints: as they were trained, and quantized after training by every method under every recipe.

  python -m beyond_outliers.evaluate --workdir=runs/adamw-nano --recipes=rtn_w4a4,rtn_w4a16 --methods=rtn,gptq
  python -m beyond_outliers.evaluate --workdir=runs/adamw-50m --recipes=rtn_w4a4 --follow          # beside the training job
  python -m beyond_outliers.evaluate --hf=OLMo-2-0425-1B --data=datasets/NAME --recipes=rtn_w4a16

Writes one JSON a (step, recipe, method) into <workdir>/eval, and goes on where it stopped. It only reads the run. What cannot be
measured is told and left out, and makes the exit code 1.
"""
from __future__ import annotations

import datetime
import json
import math
import sys
import time
import traceback
from collections.abc import Collection, Sequence
from typing import Any

from absl import app, flags
from etils import epath

from beyond_outliers import cells, checkpoint, command, sources, zero_shot_tasks
from beyond_outliers.checks import ConfigError, require

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
HF = flags.DEFINE_string("hf", None, "Hugging Face directory of an OLMo2 or Llama model; needs --data.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "One checkpoint, RUN/checkpoints/N.")
STEPS = flags.DEFINE_list("steps", [], "Steps of the checkpoints, or 'all'; by default the newest, and all with --follow.")
RECIPES = flags.DEFINE_list("recipes", [], "Rows of quant.RECIPES. None: only the model as it was trained.")
METHODS = flags.DEFINE_list("methods", ["rtn"], "Rows of quant.METHODS, with numbers as in gptq(damping=0.1).")
TASKS = flags.DEFINE_list("tasks", [], "Tasks of lm-evaluation-harness (extra: eval), of --task_folders, or "
                          + " and ".join(zero_shot_tasks.HELD_OUT) + ", which are made of the validation text.")
TASK_FOLDERS = flags.DEFINE_list("task_folders", [], "Folders with the YAML files of further tasks.")
CALIBRATION = flags.DEFINE_integer("calibration", 32, "Training windows for the methods that look at some.", lower_bound=1)
DATA = flags.DEFINE_string("data", None, "Folder of a prepared dataset, in the place of the run's.")
CONTEXT = flags.DEFINE_integer("context", None, "Tokens a window; by default the run's, or 1024.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Windows at once; by default the run's, or 8.", lower_bound=1)
DOCUMENTS = flags.DEFINE_integer("documents", None, "Validation documents, 0: all; by default the run's.", lower_bound=0)
FOLLOW = flags.DEFINE_bool("follow", False, "Evaluate checkpoints as they land, until the run ends or all --steps are done.")
POLL = flags.DEFINE_float("poll", 10.0, "Seconds between two looks at the run.", lower_bound=0.01)
OUT = flags.DEFINE_string("out", None, "Folder of the results; by default eval/ in --workdir or --hf.")
JSON = flags.DEFINE_bool("json", False, "Print all cells as one JSON object instead of a table.")

SILENCE = 1800.0                  # seconds without a word from the run, after which that is told
RECORDS = ("config.json", "manifest.json", "status.json")       # in the order in which a run writes them


class Progress:
  """For a person, on stderr: redrawn on a terminal, elsewhere a line a cell, and now and then one within a long one."""

  def __init__(self, every: float = 30.0):
    self._redraw, self._every, self._last, self._what = sys.stderr.isatty(), every, time.monotonic(), ""
    self._spent, self._measured = 0.0, 0

  def begin(self, what: str) -> None:
    self._what, self._last = what, time.monotonic()

  def __call__(self, text: str) -> None:
    if self._redraw:
      print(f"\r\x1b[K{self._what} · {text}", end="", file=sys.stderr, flush=True)
    elif time.monotonic() - self._last > self._every:
      self.line(f"{self._what} · {text}")

  def done(self, text: str, seconds: float, cells_left: int) -> None:
    self._spent, self._measured = self._spent + seconds, self._measured + 1
    left = datetime.timedelta(seconds=round(self._spent / self._measured * cells_left))
    self.line(f"{self._what} · {text} · {seconds:.1f} s · {cells_left} to go, {left} left")

  def line(self, text: str) -> None:
    print(("\r\x1b[K" if self._redraw else "") + text, file=sys.stderr, flush=True)
    self._last = time.monotonic()


def wait_for_run(workdir: epath.Path, progress: Progress) -> None:
  if not all((workdir / name).exists() for name in RECORDS):
    progress.line(f"waiting for a run in {workdir}")
  while not all((workdir / name).exists() for name in RECORDS):
    time.sleep(POLL.value)


class Watch:
  """Tells a person what becomes of a run that is followed. One that was killed looks like one that takes long for a step."""

  def __init__(self, source: sources.Source, progress: Progress):
    self._source, self._progress = source, progress
    self._status, self._wrote, self._since = "", None, time.monotonic()

  def look(self) -> None:
    status, wrote = self._source.news()
    if status != self._status:
      self._progress.line(f"run: {status}")
    if (status, wrote) != (self._status, self._wrote):
      self._status, self._wrote, self._since = status, wrote, time.monotonic()
    elif time.monotonic() - self._since > SILENCE:
      self._progress.line(f"run: {status}, and silent for {SILENCE / 60:.0f} minutes; if it was killed, resume it or end this")
      self._since = math.inf


class Job:
  """Checkpoint after checkpoint through an `Evaluator`; those that cannot be read are reported and left alone."""

  def __init__(self, source: sources.Source, evaluator: cells.Evaluator, progress: Progress):
    self._source, self._evaluator, self._progress = source, evaluator, progress
    self.skipped: dict[int, list[str]] = {}  # step -> why it was, or cells of it were
    self.failed = False                      # whether a cell could not be measured of a checkpoint that could be read

  def once(self, steps: list[int]) -> None:
    for i, step in enumerate(steps):
      self._evaluate(step, later=steps[i + 1 :])

  def newest(self) -> list[int]:
    """The steps that were evaluated: the newest one, or the one before it where that is damaged."""
    for step in self._source.steps()[::-1]:
      if self._evaluate(step):
        return [step]
    return []

  def follow(self, wanted: Collection[int] | None = None) -> None:
    """Until all that are wanted are evaluated, or the run has ended and all its checkpoints are. One that was skipped and
    then saved anew is tried again."""
    seen: dict[int, Any] = {}                # step -> what had been written of it
    left = {step for step in wanted or () if self._evaluator.missing(step)}
    watch = Watch(self._source, self._progress)
    while wanted is None or left:
      watch.look()
      ended = self._source.ended()           # asked first: what was written until then is in the list
      steps = [step for step in self._source.steps() if wanted is None or step in wanted]
      seen = {step: written for step, written in seen.items() if step in steps}
      waiting = [step for step in steps
                 if step not in seen or (step in self.skipped and self._source.written(step) != seen[step])]
      if waiting:
        # One a turn: others may go meanwhile.
        seen[waiting[0]] = self._source.written(waiting[0])
        if self._evaluate(waiting[0], later=waiting[1:]):
          left.discard(waiting[0])
      elif ended:
        return
      else:
        time.sleep(POLL.value)

  def _evaluate(self, step: int, later: Sequence[int] = ()) -> bool:
    """Whether it could be read."""
    missing = self._evaluator.missing(step)
    self.skipped.pop(step, None)
    if not missing:
      return True
    self._progress.begin(f"step {step}")
    try:
      params = self._source.params(step)
    except (checkpoint.CheckpointError, OSError) as error:
      time.sleep(1.0)                        # a deletion under way looks like damage
      gone = step not in self._source.steps()
      self._skip(step, "deleted before it could be read (checkpoint.keep)" if gone else str(error))
      return False
    to_go = len(missing) + sum(len(self._evaluator.missing(other)) for other in later)
    for i, cell in enumerate(missing, 1):
      self._progress.begin(f"step {step} · {cell.recipe} · {cell.method}")
      start = time.perf_counter()
      try:
        metrics = self._evaluator.measure(step, params, cell)["metrics"]
      except Exception as error:             # no memory, a checkpoint that a method cannot take, a task: the others may be well
        if not isinstance(error, ConfigError):
          traceback.print_exc()
        self.failed = True
        self._skip(step, f"{cell.recipe}, {cell.method}: {type(error).__name__}: {' '.join(str(error).split())}")
        continue
      text = f"loss {cells.shown(metrics['loss'])}"
      if "kl" in metrics:
        text += f" ({cells.shown(metrics['loss_difference'], '+.4f')}) · KL {cells.shown(metrics['kl'])}"
      self._progress.done(text, time.perf_counter() - start, to_go - i)
    return True

  def _skip(self, step: int, reason: str) -> None:
    self.skipped.setdefault(step, []).append(reason)
    self._progress.line(f"step {step} · skipped: {reason}")


def chosen_steps(asked: Sequence[str], known: list[int]) -> list[int]:
  """Errors: ConfigError."""
  if list(asked) == ["all"]:
    return known
  require(all(step.isdigit() for step in asked), "--steps", ",".join(asked), "expected 'all', or numbers of steps: 100,200")
  for step in asked:
    require(FOLLOW.value or int(step) in known, "--steps", step, f"there is no such checkpoint; there are {known}")
  return [int(step) for step in asked]


def opened(progress: Progress) -> sources.Source:
  """What the flags name. Errors: ConfigError, WorkdirError, DataError, CheckpointError."""
  options: Any = dict(dataset=DATA.value or "", context=CONTEXT.value or 0, batch_size=BATCH_SIZE.value or 0,
                      documents=DOCUMENTS.value)
  if HF.value:
    require(not FOLLOW.value and not STEPS.value, "--hf", HF.value, "holds one model; leave --follow and --steps out")
    return sources.of_hugging_face(HF.value, **options)
  if CHECKPOINT.value:
    require(not FOLLOW.value and not STEPS.value, "--checkpoint", CHECKPOINT.value, "is of one step: leave --follow and --steps "
            "out, or give --workdir")
    return sources.of_checkpoint(CHECKPOINT.value, **options)
  if FOLLOW.value:
    wait_for_run(epath.Path(str(WORKDIR.value)), progress)
  return sources.of_run(WORKDIR.value, **options)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  # Names first: a run that --follow waits for may begin tomorrow.
  cells.check_names(RECIPES.value, METHODS.value)
  require(bool(RECIPES.value) or not flags.FLAGS["methods"].present, "--methods", ",".join(METHODS.value),
          "under which recipe? give --recipes too, such as rtn_w4a4")
  progress = Progress()
  source = opened(progress)
  if not FOLLOW.value and not source.steps():
    raise checkpoint.CheckpointError(f"{source.name}: no checkpoint; train first, or wait for one with --follow")
  steps = chosen_steps(STEPS.value, source.steps())
  evaluator = cells.Evaluator(source, cells.plan(source, RECIPES.value, METHODS.value), OUT.value, tasks=TASKS.value,
                              task_folders=TASK_FOLDERS.value, windows=CALIBRATION.value, say=progress)
  job = Job(source, evaluator, progress)
  if FOLLOW.value:
    steps = None if STEPS.value in ([], ["all"]) else steps          # None: all that will ever be
    job.follow(steps)
  elif STEPS.value:
    job.once(steps)
  else:
    steps = job.newest()
  evaluator.close()
  results = evaluator.results(steps)
  if not results:
    raise checkpoint.CheckpointError(f"{source.name}: no checkpoint could be evaluated: {job.skipped or 'the run left none'}")
  if JSON.value:
    print(json.dumps({"cells": results, "skipped": job.skipped}))
  else:
    print(cells.table(results))
    for step, reasons in job.skipped.items():
      print("\n".join(f"step {step} skipped: {reason}" for reason in reasons))
  if job.failed:
    sys.exit(1)


flags.register_multi_flags_validator(
  ["workdir", "hf", "checkpoint"], lambda values: sum(map(bool, values.values())) == 1,
  "expected one of --workdir, --hf, --checkpoint")

if __name__ == "__main__":
  command.run(main)
