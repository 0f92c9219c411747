"""Fusion of rotations into weights, so that they cost nothing when the model runs.

arXiv 2404.00456, section 4. Rotations that cannot be fused are made online (methods.py).

The architecture decides what can be rotated for free:

  the values of every head, from v to o    always: attention only mixes them over tokens
  the residual stream, from each matrix    with norms before attention and MLP: a norm's input is
    that writes to it to each that reads   rotated, and its gain moves into the next matrices; or
                                           with a single gain per norm, which commutes with a
                                           rotation (arXiv 2506.19697)

Norms with a gain per feature after attention and MLP (the study's, OLMo2) scale what is added to
the stream: a rotated stream would need rotated gains, which are no longer gains. There the inputs
of q, k, v, up and gate have to be rotated online. down's input, which follows a nonlinearity,
always has to be. The paper also rotates o's inputs across heads online; this module does not.

Legend: N layers, D model width, H heads, Dh head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers import config
from beyond_outliers.params import kernel_path, leaves_by_path, with_leaves
from beyond_outliers.quant import rotations
from beyond_outliers.types import LanguageModel, Params

# For each part of a block: the matrices that read the stream, and the one that writes to it.
STREAM_READERS = {"attention": ("q", "k", "v"), "mlp": ("up", "gate")}
STREAM_WRITERS = {"attention": "o", "mlp": "down"}


def fuse(model: LanguageModel, params: Params) -> tuple[LanguageModel, Params, frozenset[str]]:
  """(model, parameters, linear layers whose inputs are now rotated); the function is the same.

  The layers' paths are those within a block, and `head`. A tied head is separated from the
  embedding if the last norm's gains move into it, since they must not enter the embedding."""
  c = model.config
  params, rotated = _with_rotated_values(params, c.d_head), {"attention/o"}
  if c.norm_gain == "channel" and c.norm_placement == "pre":
    params, c = _without_gains(params, c), dataclasses.replace(c, tied=False)
  elif c.norm_gain == "channel":
    return model, params, frozenset(rotated)
  rotated |= {f"{part}/{name}" for part, names in STREAM_READERS.items() for name in names}
  return model.clone(config=c), _with_rotated_stream(params, c), frozenset(rotated | {"head"})


def _with_rotated_values(params: Params, d_head: int) -> Params:
  v_path, o_path = (kernel_path(f"layers/attention/{name}") for name in "vo")
  leaves = leaves_by_path(params)
  v_NxDxHDh, o_NxHDhxD = leaves[v_path], leaves[o_path]
  N, D, _ = v_NxDxHDh.shape
  v = rotations.rotate(v_NxDxHDh.reshape(N, D, -1, d_head), "hadamard", 3).reshape(v_NxDxHDh.shape)
  o = rotations.rotate(o_NxHDhxD.reshape(N, -1, d_head, D), "hadamard", 2).reshape(o_NxHDhxD.shape)
  return with_leaves(params, {v_path: v, o_path: o})


def _without_gains(params: Params, c: config.Model) -> Params:
  """Parameters with the norms' gains moved into the matrices that follow; the norms have gain 1."""
  leaves = leaves_by_path(params)
  head, gain = params["embedding"].T if c.tied else leaves["head/kernel"], leaves["final_norm/gain"]
  moved = {"head/kernel": gain[:, None] * head, "final_norm/gain": jnp.ones_like(gain)}
  for part, path in _readers(leaves):
    norm = f"layers/{part}_norm/gain"
    moved[path] = leaves[norm][..., None] * leaves[path]
    moved[norm] = jnp.ones_like(leaves[norm])
  return with_leaves(params, moved)


def _with_rotated_stream(params: Params, c: config.Model) -> Params:
  r_DxD, leaves = orthogonal(c.d_model), leaves_by_path(params)
  rotated = {"embedding": _product(params["embedding"], r_DxD)}
  reading = [path for _, path in _readers(leaves)] + ([] if c.tied else ["head/kernel"])
  rotated |= {path: _product(r_DxD.T, leaves[path]) for path in reading}
  for part, name in STREAM_WRITERS.items():
    path = kernel_path(f"layers/{part}/{name}")
    rotated[path] = _product(leaves[path], r_DxD)
  return with_leaves(params, rotated)


def _readers(leaves) -> list[tuple[str, str]]:
  """(part of a block, path) of each kernel that reads the stream; some models lack a gate."""
  named = [(part, name) for part, names in STREAM_READERS.items() for name in names]
  paths = [(part, kernel_path(f"layers/{part}/{name}")) for part, name in named]
  return [(part, path) for part, path in paths if path in leaves]


def _product(a, b):
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def orthogonal(width: int) -> jax.Array:
  """A Hadamard matrix of the full width with random signs for its rows; if the width is not a power
  of two, a random orthogonal matrix."""
  draw = np.random.default_rng(0)
  if width & (width - 1) == 0:
    signs = draw.choice([-1.0, 1.0], (width, 1))
    return jnp.asarray(rotations.hadamard(width) * signs, jnp.float32)
  return jnp.asarray(np.linalg.qr(draw.normal(size=(width, width)))[0], jnp.float32)
