"""Runs opened from their workdirs, for notebooks and tables, on any machine. Public.

Importing this module loads neither Orbax nor Grain nor pandas: each is loaded when first needed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from beyond_outliers import config as config_lib
from beyond_outliers import data, quant, stores, writers
from beyond_outliers import mesh as mesh_lib
from beyond_outliers import params as params_lib
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.config.checks import require
from beyond_outliers.config.files import folders_with
from beyond_outliers.data.moved import find_dataset
from beyond_outliers.errors import DataError
from beyond_outliers.mesh import jax_settings
from beyond_outliers.model import transformer
from beyond_outliers.types import Batch, Json, Params, PathLike

if TYPE_CHECKING:
  import pandas as pd

  from beyond_outliers.checkpoint import Checkpoints

OWN_FOLDER = re.compile(r"checkpoints|eval|tensorboard|profile|wandb|aside-.*")  # in a run's folder


class Run:
  """One run, opened read-only from its workdir. Nothing large is loaded before it is asked for.

  name: the run's name in tables, and by which others find it. For an address in a store, `path` is
  a local copy, refreshed when it is used."""

  def __init__(self, workdir: PathLike, name: str = ""):
    self._copy = stores.Copy(os.fspath(workdir)) if stores.is_address(workdir) else None
    self._folder = workdir_lib.Workdir(self._copy.folder if self._copy else workdir)
    self.name = name or (self._copy.address if self._copy else str(self.path))
    if self._workdir.read("config.json") is None:
      raise workdir_lib.WorkdirError(f"{self.name} holds no run: it has no config.json")

  def __repr__(self) -> str:
    status, step = self.status["status"], self.status["step"]
    return f"Run({self.name!r}, {status} at step {step} of {self.config.steps})"

  @property
  def path(self) -> epath.Path:
    return self._folder.path

  @property
  def _workdir(self) -> workdir_lib.Workdir:
    if self._copy:
      self._copy.refresh()
    return self._folder

  def publish(self) -> None:
    """Uploads what evaluation jobs wrote into `path`, if that is a copy. Errors: StoreError."""
    if self._copy:
      self._copy.publish()

  @functools.cached_property
  def config(self) -> config_lib.Config:
    """The configuration. Errors: WorkdirError for a damaged file, as in `manifest` and `status`."""
    _ = self._known  # read together, so that both belong to the same training
    found = self._workdir.read_config(checked=True)
    assert found is not None  # checked when the run was opened
    return found

  @property
  def manifest(self) -> Json:
    return self._read_manifest()

  def _read_manifest(self, kinds: Mapping[str, Any] | None = None) -> Json:
    found = self._workdir.read("manifest.json", kinds)
    if found is None:
      raise workdir_lib.WorkdirError(
        f"{self.path} has no manifest.json: the run ended before its training began; start it again"
      )
    return found

  @property
  def identity(self) -> str:
    """Digest that is unique to this training, whatever its folder; a resumed run keeps it."""
    return self._known or workdir_lib.identity_of(self.manifest)

  @functools.cached_property
  def _known(self) -> str:
    """The identity when it was first asked for; "" if there was no manifest."""
    return self._identity_now()

  def _identity_now(self) -> str:
    found = self._workdir.read("manifest.json")
    return workdir_lib.identity_of(found) if found else ""

  def replaced_by(self) -> str:
    """Identity of another training that began in the folder since this run was opened, or ""."""
    now = self._identity_now()
    return now if now not in ("", self.identity) else ""

  @property
  def status(self) -> Json:
    found = self._workdir.read("status.json")
    return {"status": "not started", "step": 0, "reason": "", **(found or {})}

  @property
  def steps(self) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    return self._copy.steps() if self._copy else self._checkpoints.steps()

  def written(self, step: int) -> set[tuple[str, int, int]]:
    """(name, bytes, time) of a checkpoint's files; they change if it is saved anew."""
    if self._copy:
      return self._copy.stamps(step)
    return workdir_lib.stamps(self._folder.checkpoints / str(step))

  def digest(self, step: int) -> str:
    """Digest of the parameters in a checkpoint as it is now; it changes with them. "" if the
    checkpoint has no digests (checkpoint.verify=False), or is gone."""
    name, text = f"checkpoints/{step}/digests/metadata", b""
    if self._copy:
      text = self._copy.read(name)
    else:
      with contextlib.suppress(OSError):
        text = (self.path / name).read_bytes()
    if not text:
      return ""
    from beyond_outliers.checkpoint import digests  # imports Orbax, which a report may not need

    return digests.of_params(text)

  def metrics(self) -> pd.DataFrame:
    """metrics.jsonl, one row per logged or evaluated step, with `step` as the index.

    Errors: WorkdirError."""
    import pandas as pd  # takes a while, and a warm start, which opens a run, does not need it

    if not (self._workdir.path / "metrics.jsonl").exists():
      raise workdir_lib.WorkdirError(f"{self.path} has no metrics.jsonl; restore it from a copy")
    writers.check_last_rows(self._workdir)
    frame = pd.DataFrame([row for _, row in self._workdir.read_rows()])
    # A step that was both logged and evaluated wrote two lines.
    return frame.groupby("step").first() if len(frame) else frame

  @functools.cached_property
  def model(self) -> transformer.Transformer:
    """The model as it was trained, under the run's recipe if it has one. Errors: ConfigError for a
    dtype that JAX would narrow."""
    jax_settings.check_dtypes(self.config)
    recipe = quant.recipes.from_config(self.config.quant)
    return transformer.Transformer(
      self.config.model, quant.dot_general_for(recipe, self.config.quant.backend)
    )

  def params(
    self,
    step: int | None = None,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    average: str = "",
  ) -> Params:
    """Parameters of a checkpoint (default: the newest intact one), on one device without a mesh.

    average: that average instead, see `AverageOfRun`. Errors: CheckpointError, ConfigError."""
    dtype = dtype and params_lib.float_type(dtype)
    mesh = mesh or mesh_lib.make_mesh(config_lib.Mesh(1, 1, 1), jax.local_devices()[:1])
    if average:
      params = AverageOfRun(self, average).restore(mesh, step)
    else:
      _, params = self.restore(mesh, step)
    return params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), params)

  def restore(
    self, mesh: jax.sharding.Mesh, step: int | None = None, field: str = "params"
  ) -> tuple[int, Params]:
    """(step, parameters) of a checkpoint (by default the newest intact one), placed on the mesh; or
    instead another field of the state that is like them.

    Errors: CheckpointError, also for a checkpoint that another training saved here; StoreError."""
    if self._copy:
      self._copy.fetch_checkpoint(step)
    shardings = mesh_lib.shardings(transformer.boxed_shapes(self.model), mesh)
    return self._checkpoints.restore_params(
      mesh_lib.placed(transformer.shapes(self.model), shardings), step, field, self._known
    )

  @property
  def trained_on(self) -> Json:
    """The folder in which the dataset was, its fingerprint, and its tokenizer's fingerprint."""
    return self._read_manifest(workdir_lib.DATA)["data"]

  @property
  def parameter_counts(self) -> Json:
    """Numbers of parameters: `total`, in the `embedding`, and `other`."""
    return self._read_manifest(workdir_lib.PARAMETERS)["parameters"]

  @functools.cached_property
  def dataset(self) -> data.Dataset:
    """The dataset that the run was trained on, found where it was then, or moved with the run.

    Errors: DataError."""
    return find_dataset(self.trained_on, self.path)

  @property
  def tokenizer(self) -> Any:
    return self.dataset.tokenizer

  @property
  def generation(self) -> Json:
    """Arguments for `hf.save` and `export.compressed_tensors`: the window, and the token between
    documents, which begins and ends a text."""
    token = getattr(self.tokenizer, self.config.data.separator)
    return {"context": self.config.context, "bos_token_id": token, "eos_token_id": token}

  def batches(self, split: str) -> Iterator[Batch]:
    """The batches that the run trained on, from its first (split `train`), or its `validation`
    batches: numpy, [B, L] each. Errors: DataError for another split."""
    c = self.config
    if split == "validation":
      options = dict(context=c.context, batch_size=c.eval.batch_size, documents=c.eval.documents)
      return iter(data.validation_batches(self.dataset, c.data, **options))
    if split == "train":
      options = dict(context=c.context, batch_size=c.batch_size, seed=c.seed)
      return data.train_batches(self.dataset, c.data, **options)
    raise DataError(f"split = {split!r}: expected 'train' or 'validation'")

  @functools.cached_property
  def _checkpoints(self) -> Checkpoints:
    from beyond_outliers import checkpoint  # importing Orbax takes a second; few need it

    return checkpoint.Checkpoints(self._folder.checkpoints, read_only=True)


class AverageOfRun:
  """An average of a run's parameters, by name: `ema`, the moving average in its checkpoints;
  `last:COUNT`, the mean of its last COUNT checkpoints; `last`, with COUNT = average.last.

  Errors: ConfigError for another name, and for an average that the run does not have."""

  def __init__(self, run: Run, name: str):
    c, found = run.config.average, re.fullmatch(r"ema|last(?::([1-9]\d*))?", name)
    require(found is not None, "average", name, "expected 'ema', 'last' or 'last:COUNT'")
    assert found is not None
    remedy = (
      f"{run.path} kept no moving average (average.decay = 0); 'last:COUNT' works without one"
    )
    require(name != "ema" or c.decay > 0, "average", name, remedy)
    remedy = f"the mean of how many checkpoints? {run.path} has average.last = 0; give 'last:COUNT'"
    require(name != "last" or c.last > 0, "average", name, remedy)
    self._run, self._count = run, 1 if name == "ema" else int(found[1] or c.last)
    self.name = name if name == "ema" else f"last:{self._count}"
    self._restored: dict[int, list[int]] = {}

  def steps(self, step: int) -> list[int]:
    """Steps of the checkpoints in the average as of `step`, oldest first; fewer if there are not
    enough. Once the average has been restored, the answer stays, even if the run deletes them."""
    known = [known for known in self._run.steps if known <= step][-self._count :]
    return self._restored.get(step, known)

  def restore(self, mesh: jax.sharding.Mesh, step: int | None = None) -> Params:
    """The average as of a checkpoint (by default the newest intact one), placed on the mesh.

    Errors: CheckpointError."""
    newest, params = self._run.restore(mesh, step, "average" if self.name == "ema" else "params")
    known = mesh_lib.from_first(self._run.steps)
    before = [step for step in known if step < newest]
    earlier = before[max(len(before) - self._count + 1, 0) :]
    each = (self._run.restore(mesh, known)[1] for known in earlier[::-1])
    mean, _ = params_lib.mean(itertools.chain([params], each))
    self._restored[newest] = [*earlier, newest]
    return mean


def open(workdir: PathLike) -> Run:
  """The run in a workdir. Errors: WorkdirError when there is none."""
  return Run(workdir)


def find(root: PathLike) -> list[Run]:
  """All runs in a folder and below it, sorted by path, including those inside another run's folder;
  each once, even if links lead to it. For an address in a store, all runs below it.

  Errors: WorkdirError for a folder that cannot be read."""
  if stores.is_address(root):
    return [Run(address) for address in stores.addresses_below(os.fspath(root))]
  names = ("config.json", "manifest.json")
  found = map(Run, folders_with(names, root, OWN_FOLDER, workdir_lib.WorkdirError))
  return sorted(found, key=lambda run: str(run.path))
