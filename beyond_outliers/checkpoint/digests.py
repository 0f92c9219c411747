"""Digests of arrays, computed from their bits on the devices that hold them, before writing.

A checkpoint's file sums prove that the files are those that were committed; these digests, saved
with the arrays, prove that what is read is what was meant to be written. A digest is the sum,
modulo 2^32, over all elements, of a hash of the element's bits and position. It is the same on
every mesh and in any order. It always changes if one element differs; if several do, it fails to
change in one of 2^32 cases.

The same pass finds non-finite values, which are neither saved nor resumed from.
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
  """What one pass over the bits of a tree of arrays finds.

  digests: {path: digest}, in hexadecimal; for an optimizer's blocks, a list with one per block.
  not_finite: path of the first array with a NaN or an infinity, or ""; metrics in an optimizer's
    state are exempt."""

  digests: dict[str, str | list[str]]
  not_finite: str


def record(of_arrays: Mapping[str, Any], texts: Mapping[str, Any]) -> Json:
  """What a checkpoint stores for later comparison, given its arrays' digests and its JSON items."""
  return {"arrays": dict(of_arrays), "texts": {name: digest(text) for name, text in texts.items()}}


def of_params(text: bytes) -> str:
  """One digest of all parameters of a run's checkpoint, from the JSON text of a `record`; "" for
  any other text."""
  try:
    return of_params_among(json.loads(text)["arrays"])
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return ""


def of_params_among(of_arrays: Mapping[str, Any]) -> str:
  """One digest of all parameters, from the digests of a run's state; "" if it has no parameters."""
  found = {path: each for path, each in of_arrays.items() if path.startswith("params/")}
  return digest(found) if found else ""


def difference(
  recorded: Json, of_arrays: Mapping[str, Any], texts: Mapping[str, Any] | None = None
) -> str:
  """The first array or text that differs from what was recorded, or "".

  of_arrays: digests of some of the recorded arrays. texts: all JSON items; None: not compared."""
  if texts is not None:
    now = {name: digest(text) for name, text in texts.items()}
    for name in sorted(recorded["texts"].keys() | now.keys()):
      if now.get(name) != recorded["texts"].get(name):
        return name
  for path, found in of_arrays.items():
    written = recorded["arrays"].get(path)
    if isinstance(found, list) and isinstance(written, list):
      # Only the blocks that both hold: after them, padding may have been cut or grown.
      written, found = written[: len(found)], found[: len(written)]
    if found != written:
      return path
  return ""


def examine(tree: Any) -> Contents:
  """The digests of a tree of arrays, and what in it is not finite. All processes that share the
  arrays must call this."""
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
  program.lower(found, in_blocks).compile()  # jit does not compile the same again


def _program(tree: Any) -> tuple[Any, dict[str, Any], frozenset[str]]:
  """(`_examined`, jitted; and its arguments: arrays by path, paths of those in blocks)."""
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


@functools.partial(jax.jit, static_argnames="by_row")  # many arrays are alike, and traced once
def _examine(x: jax.Array, *, by_row: bool) -> tuple[jax.Array, jax.Array]:
  """(digest, whether anything is not finite); by_row: for each index of the first axis."""
  words = _words(x)
  place = np.uint32(zlib.crc32(str(x.dtype).encode()))
  for axis, length in enumerate(words.shape):
    along = _hash(jax.lax.iota(jnp.uint32, length) + np.uint32(axis << 28))
    place = place + jnp.expand_dims(along, [i for i in range(words.ndim) if i != axis])
  bad = ~jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.zeros(x.shape, bool)
  bad = jnp.broadcast_to(jnp.expand_dims(bad, range(bad.ndim, words.ndim)), words.shape)
  # As one reduction XLA makes one loop of it: on CPUs a fourth of the time of the sum alone.
  return jax.lax.reduce(
    (_hash(words + place), bad), (np.uint32(0), np.False_), _merged, range(by_row, words.ndim)
  )


def _merged(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
  return one[0] + other[0], one[1] | other[1]


def _hash(x: jax.Array) -> jax.Array:
  """The last steps of MurmurHash3, a bijection since the factors are odd."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
  """The bits of every element as uint32; wider elements give several, along a further axis."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  bits = min(jax.dtypes.itemsize_bits(x.dtype), 32)
  return jax.lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)
