"""Outliers in a model: metrics of every linear layer's input, of the residual stream, of weights.

The model is unchanged: interceptors see the input of every linear layer and the residual stream
(the embedding's output, and the result of every residual add) and reduce them on the spot.

Legend: B batch, L length, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers import mesh as mesh_lib
from beyond_outliers.config.checks import require
from beyond_outliers.evaluate.outlier_metrics import (
  METRICS,
  Statistics,
  merged,
  metrics_of,
  statistics,
)
from beyond_outliers.model import layers, stack, transformer
from beyond_outliers.model.forward import Forward
from beyond_outliers.params import at_depth, is_kernel, is_stacked, leaves_by_path, parent, slice_at
from beyond_outliers.quant import QuantSpec
from beyond_outliers.types import Batch, Params

if TYPE_CHECKING:
  import pandas as pd

# The study's PTQ of activations and of weights.
ACTIVATIONS, WEIGHTS = QuantSpec(4, granularity="token"), QuantSpec(4)


def measurement(
  forward: Forward, spec: QuantSpec = ACTIVATIONS
) -> Callable[[Params, Batch], dict[str, Statistics]]:
  """(params, batch) -> {path: statistics}, for jit; below `layers/` they are stacked by depth in
  their first axis. Padding does not count."""

  def measure_batch(params: Params, batch: Batch) -> dict[str, Statistics]:
    counts_T = batch["segment_ids"].reshape(-1) > 0

    def sow(module, x, name="outliers"):
      found = statistics(x.reshape(-1, x.shape[-1]), counts_T, spec)
      module.sow("statistics", name, found, init_fn=lambda: None, reduce_fn=lambda old, new: new)

    def watch(next_function, args, kwargs, context):
      module, method = context.module, context.method_name
      if method == "__call__" and isinstance(module, layers.Linear):
        sow(module, args[0])
      elif method == "__call__" and isinstance(module, stack.Stack):
        sow(module.parent, args[0], "embedding")
      elif (
        method == "logits" and isinstance(module, transformer.Transformer) and module.config.tied
      ):
        sow(module, args[0], "head")  # an untied head is a linear layer, seen above
      result = next_function(*args, **kwargs)
      if method == "__call__" and isinstance(module, layers.Add):
        sow(module, result)
      return result

    with nn.intercept_methods(watch):
      _, sown = forward(params, batch, mutable=["statistics"])
    flat = leaves_by_path(sown["statistics"])
    return {
      path.removesuffix("/outliers"): found
      for path, found in flat.items()
      if isinstance(found, Statistics)
    }

  return measure_batch


def weight_measurement(params: Params, spec: QuantSpec = WEIGHTS) -> dict[str, Statistics]:
  """{path: statistics} of every matrix, for jit; output channels take the place of an activation's
  tokens, and input channels that of its features."""

  def of_matrix(w_OxI: jax.Array) -> Statistics:
    return statistics(w_OxI, jnp.ones(w_OxI.shape[0], bool), spec)

  found = {}
  for path, leaf in leaves_by_path(params).items():
    if path == "embedding":
      found[path] = of_matrix(leaf)  # [V, D], which is [out, in] of a tied head
    elif is_kernel(path):
      found[parent(path)] = (
        jax.vmap(lambda w_IxO: of_matrix(w_IxO.T))(leaf) if is_stacked(path) else of_matrix(leaf.T)
      )
  return found


def collect(batches: Iterable[Mapping[str, Statistics]]) -> pd.DataFrame:
  """Table with one row per tensor, over all batches: path (with its depth), depth (NaN outside the
  layers), kind, tokens, METRICS, and zero_medians, the share of tokens that max_to_median leaves
  out. Errors: ConfigError for no batch."""
  import pandas as pd  # slow to import, and not every run measures

  total: Any = None
  for batch in batches:
    new = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(dict(batch)))
    total = new if total is None else {path: merged(total[path], new[path]) for path in new}
  require(
    total is not None,
    "batches",
    [],
    "expected at least one batch; an iterator can be read only once",
  )
  rows = []
  for path, found in total.items():
    kind = _kind(path)
    if not is_stacked(path):
      rows.append({"path": path, "depth": np.nan, "kind": kind, **metrics_of(found)})
      continue
    for depth in range(found.power.shape[0]):
      of_depth = metrics_of(slice_at(found, depth))
      rows.append({"path": at_depth(path, depth), "depth": depth, "kind": kind, **of_depth})
  return pd.DataFrame(sorted(rows, key=_order))


def _order(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
  """Sort key: the embedding first, then by depth, the head last."""
  return row["path"] == "head", row["path"] != "embedding", row["depth"]


def _kind(path: str) -> str:
  """Kind of a tensor. `activation` is the output of the MLP's activation function: mostly zeros for
  a ReLU, and unlike any other layer's input."""
  if path.endswith("mlp/down"):
    return "activation"
  return "residual" if path == "embedding" or path.endswith("_add") else "linear"


def summary(frame: pd.DataFrame) -> dict[str, float]:
  """{<metric>/<kind>: mean over the tensors of that kind}: a row of metrics.jsonl."""
  means = frame.groupby("kind")[list(METRICS)].mean()
  return {
    f"{metric}/{kind}": float(means.loc[kind, metric]) for metric in METRICS for kind in means.index
  }


def on_documents(
  forward: Forward, batches: Any, mesh: jax.sharding.Mesh
) -> Callable[[Params, Params], dict[str, float]]:
  """(params, params with plain matrices) -> `summary` of activations, on these batches, and of
  weights."""
  everywhere = mesh_lib.replicated(mesh)
  activations = jax.jit(measurement(forward), out_shardings=everywhere)
  matrices = jax.jit(weight_measurement, out_shardings=everywhere)

  def measure_documents(params: Params, plain: Params) -> dict[str, float]:
    seen = collect(
      activations(params, mesh_lib.put_batch(batch, mesh, batches.batch_size)) for batch in batches
    )
    return {**summary(seen), **summary(collect([matrices(plain)]).assign(kind="weights"))}

  return measure_documents
