"""Rotations that cost nothing when the model runs, because matrices take them in (arXiv 2404.00456,
section 4).

What can be rotated for free hangs on the architecture:
  the values of every head, from v to o         always: attention only mixes them over tokens
  the residual stream, from each matrix that     where norms stand before their blocks: what a norm sees is rotated, and its gain
  writes to it to each that reads it              goes into the matrices behind it
Where norms stand behind (the study's, OLMo2), their gains scale what is added to the stream,
feature by feature: a rotated stream would need rotated gains, which are no gains. There the inputs
of q, k, v, up and gate have to be rotated as they come in, and so has that of down everywhere,
behind a nonlinearity. The paper also rotates o's inputs across heads as they come in; not so here.

Legend: N layers, D model width, H heads, Dh head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers.quant import rotations


def fuse(model: Any, params: Any) -> tuple[Any, Any, frozenset[str]]:
  """(model, parameters, linear layers whose inputs now are rotated), the same function as before.

  Their paths are those within a block, and `head`. A tied head is parted from the embedding where
  the stream is rotated: the last norm's gain goes into it alone."""
  c = model.config
  layers, done = _rotated_values(params["layers"], c.d_head), {"attention/o"}
  params = {**params, "layers": layers}
  if c.norm_placement == "pre":
    params, done = (
      _rotated_stream(params, c),
      done | {"attention/q", "attention/k", "attention/v", "mlp/up", "mlp/gate", "head"},
    )
    model = model.clone(config=dataclasses.replace(c, tied=False))
  return model, params, frozenset(done)


def _rotated_values(layers: Any, d_head: int) -> Any:
  attention = layers["attention"]
  v_NxDxHDh, o_NxHDhxD = attention["v"]["kernel"], attention["o"]["kernel"]
  N, D, _ = v_NxDxHDh.shape
  v = rotations.rotate(v_NxDxHDh.reshape(N, D, -1, d_head), "hadamard", 3).reshape(v_NxDxHDh.shape)
  o = rotations.rotate(o_NxHDhxD.reshape(N, -1, d_head, D), "hadamard", 2).reshape(o_NxHDhxD.shape)
  return {**layers, "attention": {**attention, "v": {"kernel": v}, "o": {"kernel": o}}}


def _rotated_stream(params: Any, c: Any) -> Any:
  r_DxD, layers = orthogonal(c.d_model), params["layers"]

  def reads(kernel, gain):
    return {"kernel": _product(r_DxD.T, gain[..., None] * kernel)}

  def writes(kernel):
    return {"kernel": _product(kernel, r_DxD)}

  attention, mlp, ones = (
    layers["attention"],
    layers["mlp"],
    jax.tree.map(jnp.ones_like, layers["attention_norm"]),
  )
  attention_gain, mlp_gain = layers["attention_norm"]["gain"], layers["mlp_norm"]["gain"]
  fused = {
    "attention": {
      **attention,
      **{name: reads(attention[name]["kernel"], attention_gain) for name in "qkv"},
      "o": writes(attention["o"]["kernel"]),
    },
    "mlp": {
      **mlp,
      **{name: reads(mlp[name]["kernel"], mlp_gain) for name in ("up", "gate") if name in mlp},
      "down": writes(mlp["down"]["kernel"]),
    },
    "attention_norm": ones,
    "mlp_norm": ones,
  }
  head = params["embedding"].T if c.tied else params["head"]["kernel"]
  return {
    **params,
    "embedding": _product(params["embedding"], r_DxD),
    "layers": {**layers, **fused},
    "final_norm": jax.tree.map(jnp.ones_like, params["final_norm"]),
    "head": reads(head, params["final_norm"]["gain"]),
  }


def _product(a, b):
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def orthogonal(width: int) -> jax.Array:
  """A Hadamard matrix of the whole width with signs drawn for its rows, or, where the width is no
  power of two, a random one."""
  draw = np.random.default_rng(0)
  if width & (width - 1) == 0:
    return jnp.asarray(
      rotations.hadamard(width) * draw.choice([-1.0, 1.0], (width, 1)), jnp.float32
    )
  return jnp.asarray(np.linalg.qr(draw.normal(size=(width, width)))[0], jnp.float32)
