"""Runs opened from their workdirs, for notebooks and tables, on any machine. Public.

Importing this loads neither Orbax, nor Grain, nor pandas: each comes with the first use of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from beyond_outliers import config as config_lib
from beyond_outliers import data, quant
from beyond_outliers import mesh as mesh_lib
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.errors import DataError
from beyond_outliers.model import transformer
from beyond_outliers.types import Batch, Json, Params, PathLike
from beyond_outliers.workdir import digest

if TYPE_CHECKING:
  import pandas as pd

  from beyond_outliers.checkpoint import Checkpoints


class Run:
  """One run by its workdir, read only. Nothing is loaded before it is asked for."""

  def __init__(self, workdir: PathLike):
    self._workdir = workdir_lib.Workdir(workdir)
    if self._workdir.read("config.json") is None:
      raise workdir_lib.WorkdirError(f"{self.path} holds no run: it has no config.json")

  def __repr__(self) -> str:
    status = self.status or {"status": "not started", "step": 0}
    return (
      f"Run({str(self.path)!r}, {status['status']} at step {status['step']} of {self.config.steps})"
    )

  @property
  def path(self) -> epath.Path:
    return self._workdir.path

  @functools.cached_property
  def config(self) -> config_lib.Config:
    return config_lib.resolve(self._workdir.read("config.json"))

  @property
  def manifest(self) -> Json:
    return self._workdir.read("manifest.json")

  @property
  def identity(self) -> str:
    """Digest of this training, unlike any other's, in any folder: a resumed run keeps it."""
    return digest({name: value for name, value in self.manifest.items() if name != "resumed"})

  @property
  def status(self) -> Json:
    return self._workdir.read("status.json")

  @property
  def steps(self) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    return self._checkpoints.steps()

  def written(self, step: int) -> set[tuple[str, int, int]]:
    """(name, bytes, time) of a checkpoint's files: others once it was saved anew."""
    return self._checkpoints.written(step)

  def metrics(self) -> pd.DataFrame:
    """metrics.jsonl, one row per logged or evaluated step, with `step` as the index."""
    import pandas as pd  # takes a while, and a warm start opens runs too

    lines = (self.path / "metrics.jsonl").read_text().splitlines()
    # The last may be half written.
    frame = pd.DataFrame([json.loads(line) for line in lines if line.endswith("}")])
    # A step that was both logged and evaluated wrote two lines.
    return frame.groupby("step").first() if len(frame) else frame

  @functools.cached_property
  def model(self) -> transformer.Transformer:
    """The model as it was trained: under the run's recipe, if it has one."""
    recipe = quant.recipes.from_config(self.config.quant)
    return transformer.Transformer(
      self.config.model, quant.dot_general_for(recipe, self.config.quant.backend)
    )

  def params(
    self, step: int | None = None, dtype: Any = None, mesh: jax.sharding.Mesh | None = None
  ) -> Params:
    """Parameters of a checkpoint (the newest intact one), on one device unless a mesh is given.

    Errors: CheckpointError."""
    mesh = mesh or mesh_lib.make_mesh(config_lib.Mesh(1, 1, 1), jax.local_devices()[:1])
    _, params = self.restore(mesh, step)
    return params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), params)

  def restore(self, mesh: jax.sharding.Mesh, step: int | None = None) -> tuple[int, Params]:
    """(step, parameters) of a checkpoint (the newest intact one), placed on the mesh.

    Errors: CheckpointError."""
    shardings = mesh_lib.shardings(transformer.boxed_shapes(self.model), mesh)
    return self._checkpoints.restore_params(
      mesh_lib.placed(transformer.shapes(self.model), shardings), step
    )

  @functools.cached_property
  def dataset(self) -> data.Dataset:
    return data.open(self.manifest["data"]["directory"])

  @property
  def tokenizer(self) -> Any:
    return self.dataset.tokenizer

  @property
  def generation(self) -> Json:
    """Arguments of `hf.save` and `export.compressed_tensors`: the window, and the token that
    stands between documents, which begins and ends a text."""
    token = getattr(self.tokenizer, self.config.data.separator)
    return {"context": self.config.context, "bos_token_id": token, "eos_token_id": token}

  def batches(self, split: str) -> Iterator[Batch]:
    """The batches that the run trained on, from its first (`train`), or those of its `validation`:
    numpy, [B, L] each. Errors: DataError for another split."""
    c = self.config
    if split == "validation":
      return iter(
        data.validation_batches(
          self.dataset,
          c.data,
          context=c.context,
          batch_size=c.eval.batch_size,
          documents=c.eval.documents,
        )
      )
    if split == "train":
      return data.train_batches(
        self.dataset, c.data, context=c.context, batch_size=c.batch_size, seed=c.seed
      )
    raise DataError(f"split = {split!r}: expected 'train' or 'validation'")

  @functools.cached_property
  def _checkpoints(self) -> Checkpoints:
    from beyond_outliers import checkpoint  # Orbax takes a second, and many only read numbers

    return checkpoint.Checkpoints(self._workdir.checkpoints, read_only=True)


def open(workdir: PathLike) -> Run:
  """The run in a workdir. Errors: WorkdirError when there is none."""
  return Run(workdir)


def find(root: PathLike) -> list[Run]:
  """Every run in a folder and the folders below it, by path."""
  found, pending = [], [epath.Path(root)]
  while pending:
    folder = pending.pop()
    if (folder / "config.json").exists() and (folder / "manifest.json").exists():
      found.append(Run(folder))
    else:
      pending.extend(entry for entry in folder.iterdir() if entry.is_dir())
  return sorted(found, key=lambda run: str(run.path))
