"""Evaluates checkpoints: as they were trained, and quantized after training by every method under every recipe.

  python -m beyond_outliers.evaluate --workdir=runs/adamw-nano --recipes=rtn_w4a4,rtn_w4a16 --methods=rtn,gptq
  python -m beyond_outliers.evaluate --workdir=runs/adamw-50m --recipes=rtn_w4a4 --follow          # beside the training job
  python -m beyond_outliers.evaluate --hf=OLMo-2-0425-1B --data=datasets/NAME --recipes=rtn_w4a16

Writes one JSON a (step, recipe, method) into <workdir>/eval, and goes on where it stopped. It only reads the run.
"""
from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import app, flags
from etils import epath

from beyond_outliers import cells, checkpoint, command, config, data, quant, runs, writers
from beyond_outliers.checks import require
from beyond_outliers.data import tokenizers
from beyond_outliers.model import hf

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
HF = flags.DEFINE_string("hf", None, "Hugging Face directory of an OLMo2 or Llama model; needs --data.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "One checkpoint, RUN/checkpoints/N.")
STEPS = flags.DEFINE_list("steps", [], "Steps of the checkpoints, or 'all'; by default the newest, and all with --follow.")
RECIPES = flags.DEFINE_list("recipes", [], "Rows of quant.RECIPES. None: only the model as it was trained.")
METHODS = flags.DEFINE_list("methods", ["rtn"], "Rows of quant.METHODS.")
TASKS = flags.DEFINE_list("tasks", [], "Tasks of lm-evaluation-harness (extra: eval).")
CALIBRATION = flags.DEFINE_integer("calibration", 32, "Training windows for the methods that look at some.", lower_bound=1)
DATA = flags.DEFINE_string("data", None, "Folder of a prepared dataset, in the place of the run's.")
CONTEXT = flags.DEFINE_integer("context", None, "Tokens a window; by default the run's, or 1024.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Windows at once; by default the run's, or 8.", lower_bound=1)
DOCUMENTS = flags.DEFINE_integer("documents", None, "Validation documents, 0: all; by default the run's.", lower_bound=0)
FOLLOW = flags.DEFINE_bool("follow", False, "Evaluate checkpoints as they land, until the run is done.")
POLL = flags.DEFINE_float("poll", 10.0, "Seconds between two looks at the run.", lower_bound=0.01)
OUT = flags.DEFINE_string("out", None, "Folder of the results; by default eval/ in --workdir or --hf.")
JSON = flags.DEFINE_bool("json", False, "Print all cells as one JSON object instead of a table.")

ENDED = ("done", "diverged")       # a run that was preempted or failed may be resumed
RECORDS = ("config.json", "manifest.json", "status.json")       # in the order in which a run writes them


class Opened(NamedTuple):
  """What is evaluated, and where its checkpoints come from."""
  source: cells.Source
  folder: Any                                # of the results
  steps: Callable[[], list[int]]             # that have a checkpoint now
  params: Callable[[int], Any]
  ended: Callable[[], bool]                  # whether no more will come
  sinks: list[writers.Writer]


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


def open_run(workdir: epath.Path) -> Opened:
  """Errors: WorkdirError, ConfigError, DataError."""
  run = runs.open(workdir)
  c, trained_on = run.config, run.manifest["data"]
  dataset = data.open(DATA.value or trained_on["directory"])
  require(dataset.tokenizer.fingerprint == trained_on["tokenizer"], "--data" if DATA.value else "data", dataset.directory,
          f"its tokenizer is {dataset.tokenizer.fingerprint[:12]}, and the run was trained with {trained_on['tokenizer'][:12]}; "
          "prepare the documents with the run's tokenizer")
  require(bool(DATA.value) or dataset.fingerprint == trained_on["fingerprint"], "data", dataset.directory,
          f"holds data {dataset.fingerprint[:12]}, and the run was trained on {trained_on['fingerprint'][:12]}; restore them, or "
          "say with --data that these are meant")
  recipe = quant.recipes.from_config(c.quant)
  source = cells.Source(
    model=run.model.clone(dot_general_for=None), recipe=c.quant.recipe,
    trained_under=recipe if any(layer for _, layer in recipe.rules) else None,
    dataset=dataset, data=dataclasses.replace(c.data, reader=_reader(dataset), vocab=c.model.vocab),
    context=CONTEXT.value or c.context, batch_size=BATCH_SIZE.value or c.eval.batch_size,
    documents=c.eval.documents if DOCUMENTS.value is None else DOCUMENTS.value,
    described={"workdir": str(run.path), "config": config.to_dict(c), "trained_with": run.manifest["packages"]},
    trained=run.manifest["time"])
  tensorboard = run.path / "tensorboard" / "eval"             # beside the run's own files: a run of its own for TensorBoard
  return Opened(source, OUT.value or run.path / "eval", lambda: run.steps, run.params, lambda: run.status["status"] in ENDED,
                [writers.TensorBoard(tensorboard, None)] if c.log.tensorboard else [])


def open_hugging_face(directory: str) -> Opened:
  """Its parameters stand for step 0. Errors: ConfigError, DataError."""
  own = os.path.join(directory, "tokenizer.json")
  require(DATA.value is not None, "--data", DATA.value, "give the folder of documents that python -m beyond_outliers.prepare "
          f"made with data.tokenizer=huggingface:{own}")
  require(not FOLLOW.value and not STEPS.value, "--hf", directory, "holds one model; leave --follow and --steps out")
  dataset = data.open(str(DATA.value))
  if os.path.exists(own):
    expected, found = tokenizers.load(f"huggingface:{own}").fingerprint, dataset.tokenizer.fingerprint
    require(found == expected, "--data", DATA.value, f"its tokenizer is {found[:12]}, and the model's {expected[:12]}; prepare "
            f"the documents with data.tokenizer=huggingface:{own}")
  try:
    model, params = hf.load(directory)
  except ValueError as error:
    raise config.ConfigError(f"--hf = {directory!r}: {error}") from None
  require(dataset.tokenizer.vocab_size <= model.config.vocab, "--data", DATA.value, f"its tokenizer has "
          f"{dataset.tokenizer.vocab_size} tokens, and the model {model.config.vocab}; prepare it with the model's")
  section = config.Data(**dict[str, Any]({
    **dataset.meta["settings"], "reader": _reader(dataset), "directory": os.path.dirname(dataset.directory),
    "vocab": model.config.vocab, "mask_documents": False, "readers": 8, "prefetch": 4}))
  source = cells.Source(
    model=model, recipe="none", trained_under=None, dataset=dataset, data=section, context=CONTEXT.value or 1024,
    batch_size=BATCH_SIZE.value or 8, documents=DOCUMENTS.value or 0,
    described={"hf": os.path.abspath(directory), "model": dataclasses.asdict(model.config)}, trained="")
  return Opened(source, OUT.value or os.path.join(directory, "eval"), lambda: [0], lambda step: params, lambda: True, [])


def _reader(dataset: data.Dataset) -> str:
  return "shards" if dataset.meta["records"] is None else "tfds"


def wait_for_run(workdir: epath.Path, progress: Progress) -> None:
  if not all((workdir / name).exists() for name in RECORDS):
    progress.line(f"waiting for a run in {workdir}")
  while not all((workdir / name).exists() for name in RECORDS):
    time.sleep(POLL.value)


class Job:
  """Checkpoint after checkpoint through an `Evaluator`; those that cannot be read are reported and left alone."""

  def __init__(self, opened: Opened, evaluator: cells.Evaluator, progress: Progress):
    self._opened, self._evaluator, self._progress = opened, evaluator, progress
    self.skipped: dict[int, str] = {}

  def once(self, steps: list[int]) -> None:
    for i, step in enumerate(steps):
      self._evaluate(step, later=steps[i + 1 :])

  def newest(self) -> list[int]:
    """The steps that were evaluated: the newest one, or the one before it where that is damaged."""
    for step in self._opened.steps()[::-1]:
      if self._evaluate(step):
        return [step]
    return []

  def follow(self, wanted: Callable[[int], bool]) -> None:
    """Until the run has ended and all its checkpoints are evaluated. One that was set aside and saved again is new."""
    seen: set[int] = set()
    while True:
      ended = self._opened.ended()           # asked first: what was written until then is in the list
      steps = [step for step in self._opened.steps() if wanted(step)]
      seen &= set(steps)
      waiting = [step for step in steps if step not in seen]
      if waiting:
        # One a turn: others may go meanwhile.
        self._evaluate(waiting[0], later=waiting[1:])
        seen.add(waiting[0])
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
      params = self._opened.params(step)
    except (checkpoint.CheckpointError, OSError) as error:
      time.sleep(1.0)                        # a deletion under way looks like damage
      gone = step not in self._opened.steps()
      self.skipped[step] = "deleted before it could be read (checkpoint.keep)" if gone else str(error)
      self._progress.line(f"step {step} · skipped: {self.skipped[step]}")
      return False
    to_go = len(missing) + sum(len(self._evaluator.missing(other)) for other in later)
    for i, cell in enumerate(missing, 1):
      self._progress.begin(f"step {step} · {cell.recipe} · {cell.method}")
      start = time.perf_counter()
      metrics = self._evaluator.measure(step, params, cell)["metrics"]
      text = f"loss {cells.shown(metrics['loss'])}"
      if "kl" in metrics:
        text += f" ({cells.shown(metrics['loss_difference'], '+.4f')}) · KL {cells.shown(metrics['kl'])}"
      self._progress.done(text, time.perf_counter() - start, to_go - i)
    return True


def chosen_steps(asked: list[str], known: list[int]) -> list[int]:
  """Errors: ConfigError."""
  if asked == ["all"]:
    return known
  require(all(step.isdigit() for step in asked), "--steps", ",".join(asked), "expected 'all', or numbers of steps: 100,200")
  for step in asked:
    require(FOLLOW.value or int(step) in known, "--steps", step, f"there is no such checkpoint; there are {known}")
  return [int(step) for step in asked]


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  # Names first: a run that --follow waits for may begin tomorrow.
  for name in RECIPES.value:
    quant.recipes.named(name, "--recipes")
  for name in METHODS.value:
    quant.ptq.named(name, "--methods")
  require(bool(RECIPES.value) or not flags.FLAGS["methods"].present, "--methods", ",".join(METHODS.value),
          "under which recipe? give --recipes too, such as rtn_w4a4")
  progress, asked = Progress(), STEPS.value
  path = epath.Path(str(HF.value or WORKDIR.value or CHECKPOINT.value)).absolute()
  if HF.value:
    opened = open_hugging_face(HF.value)
  else:
    if CHECKPOINT.value:
      require(path.name.isdigit() and path.parent.name == "checkpoints", "--checkpoint", CHECKPOINT.value,
              "expected RUN/checkpoints/N in the folder of its run, whose config.json says what model it is")
      require(not asked, "--steps", ",".join(asked), "--checkpoint is of one step; give --workdir")
      path, asked = path.parent.parent, [path.name]
    if FOLLOW.value:
      wait_for_run(path, progress)
    opened = open_run(path)
  if not FOLLOW.value and not opened.steps():
    raise checkpoint.CheckpointError(f"{path}: no checkpoint; train first, or wait for one with --follow")
  steps = chosen_steps(asked, opened.steps())
  evaluator = cells.Evaluator(opened.source, cells.plan(opened.source, RECIPES.value, METHODS.value), opened.folder,
                              tasks=TASKS.value, windows=CALIBRATION.value, sinks=opened.sinks, say=progress)
  job = Job(opened, evaluator, progress)
  if FOLLOW.value:
    job.follow(lambda step: asked in ([], ["all"]) or step in steps)
    steps = None
  elif asked:
    job.once(steps)
  else:
    steps = job.newest()
  for sink in opened.sinks:
    sink.close()
  results = evaluator.results(steps)
  if not results:
    raise checkpoint.CheckpointError(f"{path}: no checkpoint could be evaluated: {job.skipped or 'the run left none'}")
  if JSON.value:
    print(json.dumps({"cells": results, "skipped": job.skipped}))
  else:
    print(cells.table(results))
    for step, reason in job.skipped.items():
      print(f"step {step} skipped: {reason}")


flags.register_multi_flags_validator(
  ["workdir", "hf", "checkpoint"], lambda values: sum(map(bool, values.values())) == 1,
  "expected one of --workdir, --hf, --checkpoint")

if __name__ == "__main__":
  command.run(main)
