"""Digests of arrays, taken from their bits where the arrays live, before these are written.

The sums of a checkpoint's files show that the files are those that were committed; these digests,
saved with the arrays, show that what is read is what was to be written. A digest is a sum over all
elements, modulo 2^32, of a hash of an element's bits and its place: the same on every mesh,
whatever the order; always different where one element differs, and where more do, except in one
case of 2^32.

The same pass finds what is not finite, which is neither saved nor resumed from.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from beyond_outliers import mesh
from beyond_outliers.config.sums import digest
from beyond_outliers.optim import blocks, metrics
from beyond_outliers.params import path_of
from beyond_outliers.types import Json

DIGEST_KINDS = {"arrays": dict, "texts": dict}


class Contents(NamedTuple):
  """What one pass over the bits of a tree of arrays tells.

  digests: {path: digest}, in hexadecimal; of an optimizer's blocks one per block. not_finite: path
  of the first array with a NaN or an infinity, or nothing; what an optimizer's state tells of its
  roots may hold one."""

  digests: dict[str, str | list[str]]
  not_finite: str


def record(of_arrays: Mapping[str, Any], texts: Mapping[str, Any]) -> Json:
  """The record that a checkpoint keeps, to be compared with what is read: the digests of its arrays
  and of its texts, which are JSON."""
  return {"arrays": dict(of_arrays), "texts": {name: digest(text) for name, text in texts.items()}}


def of_params(text: bytes) -> str:
  """One digest of the parameters of a run's checkpoint, from the text of what `record` made; none
  from another text."""
  try:
    return of_params_among(json.loads(text)["arrays"])
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return ""


def of_params_among(of_arrays: Mapping[str, Any]) -> str:
  """One digest of the parameters, from the digests of a run's state; empty if it has none."""
  found = {path: each for path, each in of_arrays.items() if path.startswith("params/")}
  return digest(found) if found else ""


def difference(
  recorded: Json, of_arrays: Mapping[str, Any], texts: Mapping[str, Any] | None = None
) -> str:
  """The first array or text that is not what was recorded, or nothing. of_arrays: digests of some
  of those that were; texts: all, unless None are compared."""
  if texts is not None:
    now = {name: digest(text) for name, text in texts.items()}
    for name in sorted(recorded["texts"].keys() | now.keys()):
      if now.get(name) != recorded["texts"].get(name):
        return name
  for path, found in of_arrays.items():
    written = recorded["arrays"].get(path)
    if isinstance(found, list) and isinstance(written, list):
      # Behind the blocks that both hold, padding was cut or grown.
      written, found = written[: len(found)], found[: len(written)]
    if found != written:
      return path
  return ""


def examine(tree: Any) -> Contents:
  """The digests of a tree of arrays, and what in it is not finite. Where several processes share
  the arrays, all call this."""
  program, found, in_blocks = _program(tree)
  examined = jax.device_get(program(found, in_blocks))
  digests = {
    path: f"{x:08x}" if x.ndim == 0 else [f"{row:08x}" for row in x]
    for path, (x, _) in examined.items()
  }
  bad = {path for path, (_, flags) in examined.items() if flags.any()}
  return Contents(digests, min(bad.difference(metrics.paths_of_state(tree)), default=""))


def precompile(tree: Any) -> None:
  """Compiles what `examine` runs. tree: ShapeDtypeStructs with shardings."""
  program, found, in_blocks = _program(tree)
  program.lower(found, in_blocks).compile()  # jit, asked for the same, does not compile it again


def _program(tree: Any) -> tuple[Any, dict[str, Any], frozenset[str]]:
  """(_examined, jitted, its arguments: arrays by path, paths of those in blocks)."""
  found = {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  shardings = (getattr(x, "sharding", None) for x in found.values())
  meshes: list[Any] = [each.mesh for each in shardings if isinstance(each, NamedSharding)]
  everywhere = mesh.replicated(meshes[0]) if meshes else None
  return _jitted(everywhere), found, frozenset(blocks.block_paths(tree))


@functools.cache
def _jitted(everywhere: NamedSharding | None) -> Any:
  return jax.jit(_examined, static_argnums=1, out_shardings=everywhere)


def _examined(
  found: Mapping[str, jax.Array], in_blocks: frozenset[str]
) -> dict[str, tuple[jax.Array, jax.Array]]:
  return {path: _examine(x, by_row=path in in_blocks) for path, x in found.items()}


@functools.partial(jax.jit, static_argnames="by_row")  # many are alike, and traced once
def _examine(x: jax.Array, *, by_row: bool) -> tuple[jax.Array, jax.Array]:
  """(uint32, whether something is not finite); by_row: one for every index of the first axis."""
  words = _words(x)
  place = np.uint32(zlib.crc32(str(x.dtype).encode()))
  for axis, length in enumerate(words.shape):
    along = _hash(jax.lax.iota(jnp.uint32, length) + np.uint32(axis << 28))
    place = place + jnp.expand_dims(along, [i for i in range(words.ndim) if i != axis])
  bad = ~jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.zeros(x.shape, bool)
  bad = jnp.broadcast_to(jnp.expand_dims(bad, range(bad.ndim, words.ndim)), words.shape)
  # One reduction: XLA makes one loop of it, on CPUs of a fourth of the time of the sum alone.
  return jax.lax.reduce(
    (_hash(words + place), bad), (np.uint32(0), np.False_), _merged, range(by_row, words.ndim)
  )


def _merged(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
  return one[0] + other[0], one[1] | other[1]


def _hash(x: jax.Array) -> jax.Array:
  """One to one: the last steps of MurmurHash3, of factors that are odd."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
  """The bits of every element as uint32, of wider ones as some along a further axis."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  bits = min(jax.dtypes.itemsize_bits(x.dtype), 32)
  return jax.lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)
