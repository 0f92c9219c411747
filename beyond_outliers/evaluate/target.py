"""Targets of an evaluation job: what it evaluates, with the text that it is evaluated on."""

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

WINDOW = 1024  # tokens, of a model that no run describes
ENDED = ("done", "diverged", "failed")  # what was preempted is started again, by schedulers too


class GoneError(CheckpointError):
  """A checkpoint that was read, but that the run has replaced since, or is about to replace."""


class Target(Protocol):
  """A trained model at some steps, and the text that it is evaluated on."""

  name: str
  model: transformer.Transformer  # in full precision
  run: Any  # whose checkpoints they are, a runs.Run, or None
  average: runs.AverageOfRun | None  # in the place of the run's parameters
  recipe: str  # that it was trained under, by quant.recipes.name_of
  trained_under: quant.Recipe | None  # the same with the run's rules; None if nothing was quantized
  text: Text
  identity: str  # tells this training's results from every other's, wherever it lies
  origin: Json  # where it comes from, for whoever reads a result
  results_folder: epath.Path
  tensorboard: epath.Path | None  # where TensorBoard is to find the results, if at all

  def steps(self) -> list[int]:
    """Steps that have a checkpoint now, oldest first."""
    ...

  def written(self, step: int) -> Any:
    """Stamp of a step's checkpoint; differs once it was saved anew."""
    ...

  def params(self, step: int) -> Params:
    """Parameters of a step. Errors: CheckpointError, OSError."""
    ...

  def digest(self, step: int) -> str:
    """Digest of the parameters that a step has now, empty where it is not known. It shows whether a
    result is of other parameters."""
    ...

  def check_read(self, step: int) -> str:
    """Digest of the parameters that were last read of a step, empty where it is not known.

    Errors: GoneError where these are no longer the training's."""
    ...

  def ended(self) -> bool:
    """Whether no more steps will come."""
    ...

  def status(self) -> str:
    """State of the training, in words."""
    ...

  def last_write(self) -> Any:
    """Stamp of the training's last sign of life; differs once it gave another."""
    ...

  def check(self) -> None:
    """Errors: WorkdirError where another training has taken its place."""
    ...


class RunCheckpoints:
  """A run's checkpoints, as they land, or an average of its parameters as of these.

  Errors: WorkdirError, DataError, ConfigError for data of another tokenizer, an average that the
  run does not have, or dtypes that JAX does not hold now."""

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
    # Apart from the run's own events, which TensorBoard would take for the same run.
    self.tensorboard = run.path / "tensorboard" / "eval" if run.config.log.tensorboard else None
    # The step that was last read -> its files then, its digest, and what `_turns_before` it found.
    self._read: dict[int, tuple[list[Any], str, list[str]]] = {}

  # What changes while the run goes on is as process 0 sees it, so that all go the same way.

  def steps(self) -> list[int]:
    return mesh_lib.from_first(self.run.steps)  # opening them takes all processes

  def written(self, step: int) -> list[Any]:
    return mesh_lib.found_by_first(lambda: sorted(map(list, self.run.written(step))))

  def params(self, step: int) -> Params:
    self._read = {step: (self.written(step), self.digest(step), self._turns_before(step))}
    return self.run.params(step, average=self.average.name if self.average else "")

  def digest(self, step: int) -> str:
    return mesh_lib.found_by_first(lambda: self.run.digest(step))

  def check_read(self, step: int) -> str:
    if step not in self._read:  # the parameters come from elsewhere
      return ""
    was, digest, turns = self._read[step]
    now = self.written(step)
    # One that has been sealed since, or is being deleted, has files that it had.
    is_another = was and now and not any(file in was for file in now)
    # checkpoint.keep never deletes the newest.
    is_missing = max(mesh_lib.from_first(self.run.steps), default=-1) < step
    if is_another or is_missing or not set(self._turns_before(step)) <= set(turns):
      raise GoneError("the run went back to before it, or saved it anew, while it was measured")
    return digest

  def _turns_before(self, step: int) -> list[str]:
    """Folders into which the run has set what came after an earlier step aside (train/rewind.py):
    by them a step is known to be another's though that is deleted, too, by now."""

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

  By default windows of WINDOW tokens, or of the model's positions where these are fewer; 8 at once,
  of all validation documents.

  Errors: DataError, ConfigError for what hf.load refuses, windows longer than the model's
  positions, and a dataset of another tokenizer than the directory's; where that holds none, the
  dataset's is taken for it, which puts nothing before a text, and `warn` gets a line about it."""

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
    return ""  # it is in the identity

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
  """Fingerprint of a model, distinct from another's of equal parameters too."""
  sums = hashlib.sha256(repr(model.config).encode())
  for leaf in jax.tree.leaves(params):
    sums.update(np.asarray(leaf).tobytes())
  return sums.hexdigest()
