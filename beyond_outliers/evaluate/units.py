"""Units of a network, recorded in full precision and quantized: what error analysis decomposes.

A unit is a linear layer, a norm, an activation function, a residual add, attention, or a block;
within attention, also what lies between its projections: scores, softmax, values. Both runs of a
block are recorded as they are (quantized matrices have their own dot_general), and a quantized unit
is replayed alone on the other run's inputs.

Legend: B batch, L length, F features; K contraction, O outputs; H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers import config
from beyond_outliers.model import attention, layers
from beyond_outliers.params import KERNEL
from beyond_outliers.quant import qmatrix, quantizers
from beyond_outliers.quant.qmatrix import QuantizedMatrix
from beyond_outliers.quant.spec import LayerRecipe
from beyond_outliers.types import Params

# Modules that are units, and their kinds. The block's own path is empty.
UNIT_KINDS = {
  layers.Block: "block",
  layers.Attention: "attention",
  layers.Linear: "linear",
  layers.RmsNorm: "norm",
  layers.ReluSquared: "activation",
  layers.GatedSilu: "activation",
  layers.Add: "add",
}


# Units between the projections of a block's attention, in this order.
OPENED = ("scores", "softmax", "values")


def of_block(c: config.Model) -> dict[str, str]:
  """{path: kind} of a block's units in execution order; the block itself, "", is the last."""
  qk_norms = dict.fromkeys(("attention/q_norm", "attention/k_norm"), "norm")
  sublayers = {
    "attention": {
      **dict.fromkeys(("attention/q", "attention/k", "attention/v"), "linear"),
      **(qk_norms if c.qk_norm == "rms" else {}),
      **{f"attention/{stage}": stage for stage in OPENED},
      "attention/o": "linear",
      "attention": "attention",
    },
    "mlp": {
      **dict.fromkeys(("mlp/up", "mlp/gate") if c.mlp == "swiglu" else ("mlp/up",), "linear"),
      "mlp/activation": "activation",
      "mlp/down": "linear",
    },
  }
  found: dict[str, str] = {}
  for name, inside in sublayers.items():
    norm = {f"{name}_norm": "norm"}
    found |= inside | norm if c.norm_placement == "post" else norm | inside
    found[f"{name}_add"] = "add"
  return {**found, "": "block"}


class Matrices(NamedTuple):
  """The matrix of a linear layer and its quantization error, in the basis of the input."""

  weight: jax.Array  # W, [K, O], float32 or wider
  error: jax.Array | None  # E; None: exactly zero

  @property
  def midpoint(self) -> jax.Array:
    """W + E/2, the average of both runs' matrices: what an incoming error passes through."""
    return self.weight if self.error is None else self.weight + self.error / 2

  def spectral_ratio(self) -> float:
    """(‖W + E/2‖₂ / ‖W‖₂)², on the host: Lanczos takes a hundredth of the time of a full SVD."""
    if self.error is None:
      return 1.0
    return float((_spectral_norm(self.midpoint) / _spectral_norm(self.weight)) ** 2)


def _spectral_norm(w_KxO: jax.Array) -> float:
  """‖W‖₂; NaN if the matrix has a value that is not finite, or only zeros."""
  import scipy.sparse.linalg  # slow to import, and few evaluations need it

  w = np.asarray(w_KxO)
  if not np.isfinite(w).all() or not w.any():
    return np.nan
  start = np.random.default_rng(0).standard_normal(min(w.shape), w.dtype)
  return scipy.sparse.linalg.svds(w, k=1, v0=start, return_singular_vectors=False)[0]


class Unit(NamedTuple):
  """One unit in both runs. h: full precision, hq: quantized."""

  inputs: tuple[jax.Array, ...]  # h, [B, L, F] each
  q_inputs: tuple[jax.Array, ...]
  output: jax.Array  # f(h), [B, L, F]
  q_output: jax.Array  # f^q(hq)
  # (f, f^q) as functions of the inputs; None: they are equal, so there is nothing to replay.
  replay: tuple[Callable[..., jax.Array], Callable[..., jax.Array]] | None = None
  matrices: Matrices | None = None  # of a linear layer


class Call(NamedTuple):
  """A call of a module, with all that is needed to repeat it."""

  module: Any  # unbound
  variables: Any
  arguments: tuple[Any, ...]
  result: jax.Array

  def on(self, *inputs: jax.Array) -> jax.Array:
    """The module on other inputs, which come first among its arguments."""
    return _array(self.module.apply(self.variables, *inputs, *self.arguments[len(inputs) :]))


def recorded(module: Any, params: Params, *arguments: Any) -> dict[str, Call]:
  """{path within the module: call} of every unit, in the order in which the calls return."""
  calls: dict[str, Call] = {}

  def watch(next_function, args, kwargs, context):
    result = next_function(*args, **kwargs)
    if context.method_name == "__call__" and type(context.module) in UNIT_KINDS:
      unbound, variables = context.module.unbind()
      calls["/".join(context.module.path)] = Call(unbound, variables, args, _array(result))
    return result

  with nn.intercept_methods(watch):
    module.apply({"params": params}, *arguments)
  return calls


def _array(result: Any) -> jax.Array:
  """A module's result as an array: blocks return a pair, for their scan."""
  return result[0] if isinstance(result, tuple) else result


def units_of_block(
  calls: dict[str, Call], q_calls: dict[str, Call], recipes: dict[str, LayerRecipe | None]
) -> dict[str, Unit]:
  """Units of a block by their paths in it, from its calls in both runs.

  recipes: of its linear layers, by path."""
  found = {}
  for path, call in calls.items():
    q_call, kind = q_calls[path], UNIT_KINDS[type(call.module)]
    # Masks and positions are arguments that carry no error.
    count = 1 if kind in ("block", "attention") else len(call.arguments)
    prefix = f"{path}/" if path else ""
    quantized = any(
      layer is not None and (linear == path or linear.startswith(prefix))
      for linear, layer in recipes.items()
    )
    found[path] = Unit(
      call.arguments[:count],
      q_call.arguments[:count],
      call.result,
      q_call.result,
      (call.on, q_call.on) if quantized else None,
      matrices(_kernel(call), _kernel(q_call), recipes[path]) if kind == "linear" else None,
    )
  return found


def _kernel(call: Call) -> Any:
  return call.variables["params"][KERNEL]


def matrices(
  kernel: jax.Array, q_kernel: Any, layer: LayerRecipe | None, scale: jax.Array | None = None
) -> Matrices:
  """The matrix [K, O] of a linear layer and its error, from the kernels of both runs.

  scale: a learned one, for a matrix that is only quantized when it is multiplied."""
  weight_KxO = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
  if layer is None or layer.weights is None:
    return Matrices(weight_KxO, None)
  if not isinstance(q_kernel, QuantizedMatrix):  # a tied head's, quantized when multiplied
    rotated_KxO = qmatrix.in_quantized_basis(weight_KxO, layer)
    scale = quantizers.scale_of(rotated_KxO, layer.weights, 0) if scale is None else scale
    q, _ = quantizers.forward(rotated_KxO, scale, layer.weights)
    q_kernel = QuantizedMatrix(*q)
  return Matrices(weight_KxO, qmatrix.reconstruct(q_kernel, layer) - weight_KxO)


def opened_attention(
  c: config.Model,
  calls: dict[str, Call],
  q_calls: dict[str, Call],
  counts_BxL: jax.Array,
  measure: Callable[[Unit, jax.Array], Any],
) -> dict[str, Any]:
  """{path: measure of the unit} for the scores, softmax and values of a block's attention.

  All heads' scores are the widest array of a network, so windows are taken one at a time. None of
  the three is quantized. measure: takes a unit of one window, and which of its tokens count, as
  arrays [1, ...]."""
  _, segment_ids, positions = calls["attention"].arguments
  runs = [_projections(of_run) for of_run in (calls, q_calls)]
  scales = [of_run["attention"].variables["params"].get("scale") for of_run in (calls, q_calls)]
  B, L, _ = runs[0][0].shape
  if segment_ids is None:
    segment_ids = jnp.ones((B, L), jnp.int32)

  def of_window(window):
    (run, q_run), counts_1xL, masks = jax.tree.map(lambda x: x[None], window)
    stages, q_stages = _attend(c, run, scales[0], *masks), _attend(c, q_run, scales[1], *masks)
    found = {}
    for name, (inputs, output) in stages.items():
      unit = Unit(inputs, q_stages[name][0], output, q_stages[name][1])
      found[f"attention/{name}"] = measure(unit, counts_1xL)
    return found

  masks = segment_ids, jnp.broadcast_to(positions, (B, L))
  found = jax.lax.map(of_window, (runs, counts_BxL, masks))
  return jax.tree.map(lambda x: x[:, 0], found)


def _projections(calls: dict[str, Call]) -> tuple[jax.Array, ...]:
  """(q, k, v) as attention receives them, [B, L, heads·Dh]."""
  return tuple(
    calls.get(f"attention/{name}_norm", calls[f"attention/{name}"]).result for name in "qkv"
  )


def _attend(c: config.Model, projections, scale_H, segment_ids, positions):
  """{stage: (its inputs, its output)}, [B, L, F] each, with a token's heads and keys along the last
  axis. Masked scores are zero."""
  (q, k, v), dtype = projections, jnp.dtype(c.dtype)
  B, L, _ = v.shape
  q_BxLxHxDh, k_BxLxKxDh = layers.queries_and_keys(c, q, k, scale_H, positions)
  scores = attention.scores(q_BxLxHxDh, k_BxLxKxDh, segment_ids)
  softmax = jax.nn.softmax(scores, axis=-1).astype(dtype)
  values = attention.weighted_values(softmax, v.reshape(B, L, c.kv_heads, -1).astype(dtype))
  seen, weights, values = (
    x.reshape(B, L, -1)
    for x in (
      jnp.moveaxis(jnp.where(jnp.isneginf(scores), 0, scores), 3, 1),
      jnp.moveaxis(softmax, 3, 1),
      values,
    )
  )
  return {"scores": ((q, k), seen), "softmax": ((seen,), weights), "values": ((weights, v), values)}
