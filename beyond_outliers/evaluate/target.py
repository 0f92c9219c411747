"""Targets of an evaluation job: the models to evaluate, with the text to evaluate them on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any, Protocol, Unpack

import jax
import numpy as np
from etils import epath

from beyond_outliers import config, quant, runs, stores
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.config.checks import require
from beyond_outliers.errors import CheckpointError, ConfigError, WorkdirError
from beyond_outliers.evaluate import results
from beyond_outliers.evaluate.text import Text, TextOptions, dataset_for, section_of, text_of_run
from beyond_outliers.mesh import jax_settings
from beyond_outliers.model import hf, transformer
from beyond_outliers.types import Json, Params, PathLike
from beyond_outliers.workdir import ASIDE

WINDOW = 1024  # tokens, for a model that no run describes
ENDED = ("done", "diverged", "failed")  # not "preempted": such a run will be restarted


class GoneError(CheckpointError):
  """A checkpoint that was read and that the run has since replaced, or is about to."""


class Target(Protocol):
  """A trained model at some steps, and the text that it is evaluated on."""

  name: str
  model: transformer.Transformer  # in full precision
  run: Any  # the runs.Run that the checkpoints belong to, or None
  average: runs.AverageOfRun | None  # evaluated in place of the run's parameters
  recipe: str  # name of the recipe it was trained under, by quant.recipes.name_of
  trained_under: quant.Recipe | None  # that recipe with the run's rules; None: full precision
  text: Text
  identity: str  # tells this training's results from any other's, wherever it lies
  origin: Json  # where it comes from, for readers of a result
  results_folder: epath.Path
  tensorboard: epath.Path | None  # where to write results for TensorBoard, if at all

  def steps(self) -> list[int]:
    """Steps that have a checkpoint now, oldest first."""
    ...

  def written(self, step: int) -> Any:
    """Stamp of a step's checkpoint; changes when it is saved again."""
    ...

  def params(self, step: int) -> Params:
    """Parameters of a step. Errors: CheckpointError, OSError."""
    ...

  def digest(self, step: int) -> str:
    """Digest of the parameters that a step has now, by which results of other parameters are
    recognized; empty where it is not known."""
    ...

  def check_read(self, step: int) -> str:
    """The digest of the parameters last read for a step; empty where it is not known.

    Errors: GoneError if they are no longer the training's."""
    ...

  def ended(self) -> bool:
    """Whether no more steps will come."""
    ...

  def status(self) -> str:
    """State of the training, in words."""
    ...

  def last_write(self) -> Any:
    """Stamp of the training's last sign of life; changes with every new one."""
    ...

  def check(self) -> None:
    """Errors: WorkdirError if another training has replaced this one."""
    ...


class RunCheckpoints:
  """A run's checkpoints, as they are written, or an average of the run's parameters at each.

  Errors: WorkdirError; DataError; ConfigError for data of another tokenizer, an average that the
  run does not have, or dtypes that JAX is not set up for."""

  def __init__(self, workdir: PathLike, average: str = "", **options: Unpack[TextOptions]):
    run = runs.open(workdir)
    jax_settings.check_dtypes(run.config)
    recipe = quant.recipes.from_config(run.config.quant)
    self.run = run
    self.average = runs.AverageOfRun(run, average) if average else None
    self.name = run.name
    self.model = run.model.clone(dot_general_for=None)
    self.recipe = quant.recipes.name_of(run.config.quant)
    self.trained_under = recipe if recipe.quantizes else None
    self.text, self.identity = text_of_run(run, **options), run.identity
    self.origin: Json = {"workdir": run.name, "config": config.to_dict(run.config)}
    self.results_folder = run.path / "eval"
    # In a folder of its own, or TensorBoard would merge the results with the run's own events.
    self.tensorboard = run.path / "tensorboard" / "eval" if run.config.log.tensorboard else None
    # Step last read -> (its files then, its digest, the result of `_turns_before`).
    self._read: dict[int, tuple[list[Any], str, list[str]]] = {}

  # What changes while the run goes on is taken from process 0, so that all processes decide alike.

  def steps(self) -> list[int]:
    return mesh_lib.from_first(self.run.steps)  # all processes list: opening checkpoints needs all

  def written(self, step: int) -> list[Any]:
    return mesh_lib.found_by_first(lambda: sorted(map(list, self.run.written(step))))

  def params(self, step: int) -> Params:
    self._read = {step: (self.written(step), self.digest(step), self._turns_before(step))}
    return self.run.params(step, average=self.average.name if self.average else "")

  def digest(self, step: int) -> str:
    return mesh_lib.found_by_first(lambda: self.run.digest(step))

  def check_read(self, step: int) -> str:
    if step not in self._read:  # the parameters were not read here
      return ""
    was, digest, turns = self._read[step]
    now = self.written(step)
    # A checkpoint that has been sealed since, or is being deleted, keeps some of its files.
    is_another = was and now and not any(file in was for file in now)
    # checkpoint.keep never deletes the newest.
    is_missing = max(mesh_lib.from_first(self.run.steps), default=-1) < step
    if is_another or is_missing or not set(self._turns_before(step)) <= set(turns):
      raise GoneError("the run went back to before it, or saved it anew, while it was measured")
    return digest

  def _turns_before(self, step: int) -> list[str]:
    """Folders in which the run, rewound to an earlier step, put aside what came after it
    (train/rewind.py). They show that a step was replaced even if its files are gone by now."""

    def find() -> list[str]:
      found = [(path.name, ASIDE.fullmatch(path.name)) for path in self.run.path.glob("aside-*")]
      return sorted(name for name, aside in found if aside and int(aside[1]) < step)

    return mesh_lib.found_by_first(find)

  def ended(self) -> bool:
    return mesh_lib.found_by_first(lambda: self.run.status["status"]) in ENDED

  def status(self) -> str:
    status = mesh_lib.found_by_first(lambda: self.run.status)
    since = "from" if status["status"] == "running" else "at"
    text = f"{status['status']} {since} step {status.get('first', status['step'])}"
    return f"{text}: {status['reason']}" if status["reason"] else text

  def last_write(self) -> str | None:
    return mesh_lib.found_by_first(lambda: self.run.status.get("time"))

  def check(self) -> None:
    if other := mesh_lib.found_by_first(self.run.replaced_by):
      raise WorkdirError(
        f"{self.name} holds another training ({other[:12]}) than when this job began "
        f"({self.identity[:12]}), and the job ends; give the same command for the one that is "
        "there now"
      )


class OneCheckpoint(RunCheckpoints):
  """One checkpoint of a run, RUN/checkpoints/N. Options and errors: as RunCheckpoints."""

  def __init__(self, directory: PathLike, average: str = "", **options: Unpack[TextOptions]):
    found = os.fspath(directory).rstrip("/")
    path = found if stores.is_address(found) else os.path.abspath(found or "/")
    run, folder, name = ["", "", *path.rsplit("/", 2)][-3:]
    require(
      name.isdigit() and folder == "checkpoints",
      "--checkpoint",
      str(directory),
      "expected RUN/checkpoints/N in the folder of its run, whose config.json describes the model",
    )
    super().__init__(run or "/", average, **options)
    self._step = int(name)

  def steps(self) -> list[int]:
    return [step for step in super().steps() if step == self._step]


class HuggingFaceModel:
  """An OLMo2 or Llama model, at step 0.

  Defaults: windows of WINDOW tokens, or as many as the model has positions if these are fewer; 8
  windows at once; all validation documents. If the directory has no tokenizer, the dataset's is
  used, with nothing put before a text, and `warn` receives a line about it.

  Errors: DataError; ConfigError for what hf.load refuses, more tokens per window than the model has
  positions, and a dataset of another tokenizer than the directory's."""

  def __init__(
    self,
    directory: str,
    *,
    warn: Callable[[str], None] = results.warn,
    **options: Unpack[TextOptions],
  ):
    dataset, bos = dataset_for(directory, options.get("dataset", ""), warn)
    try:
      longest = hf.longest_window(directory)
      context = options.get("context") or min(WINDOW, longest)
      remedy = f"max_position_embeddings of config.json is {longest}; give at most that"
      require(context <= longest, "--context", context, remedy)
      model, params = hf.load(directory)
    except ConfigError as error:
      raise ConfigError(f"--hf = {directory!r}: {error}") from None
    remedy = (
      f"its tokenizer has {dataset.tokenizer.vocab_size} tokens, and the model "
      f"{model.config.vocab}; prepare the documents with the model's tokenizer"
    )
    fits = dataset.tokenizer.vocab_size <= model.config.vocab
    require(fits, "--data", options.get("dataset"), remedy)
    self._params = params
    self.name = directory
    self.model = model
    self.run = None
    self.average = None
    self.recipe = "none"
    self.trained_under = None
    self.text = Text(
      dataset,
      section_of(dataset, model.config.vocab),
      context,
      options.get("batch_size") or 8,
      options.get("documents") or 0,
      prefix=dataset.meta["separator"]["id"] if bos is None else bos,
      bos=bos is not None,
    )
    self.identity = _fingerprint(model, params)
    self.origin: Json = {
      "hf": os.path.abspath(directory),
      "model": dataclasses.asdict(model.config),
    }
    self.results_folder = epath.Path(directory).absolute() / "eval"
    self.tensorboard = None

  def steps(self) -> list[int]:
    return [0]

  def written(self, step: int) -> None:
    return None

  def params(self, step: int) -> Params:
    return self._params

  def digest(self, step: int) -> str:
    return ""  # the identity covers the parameters

  def check_read(self, step: int) -> str:
    return ""

  def ended(self) -> bool:
    return True

  def status(self) -> str:
    return "done"

  def last_write(self) -> None:
    return None

  def check(self) -> None:
    pass


def _fingerprint(model: transformer.Transformer, params: Params) -> str:
  """Fingerprint of a model: of its configuration and its parameters."""
  sums = hashlib.sha256(repr(model.config).encode())
  for leaf in jax.tree.leaves(params):
    sums.update(np.asarray(leaf).tobytes())
  return sums.hexdigest()
