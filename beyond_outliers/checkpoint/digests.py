"""Digests of arrays, taken from their bits where the arrays live, before these are written.

The sums of a checkpoint's files say that they are those that were committed; these digests, saved
with the arrays, that what is read is what was to be written. A digest is a sum over all elements,
modulo 2^32, of a hash of an element's bits and its place: the same on every mesh, whatever the
order, and never the same where one element differs; where more do, but for one case in 2^32.

What is not finite is neither saved nor gone on from.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

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


def record(arrays: Any, texts: Mapping[str, Any]) -> Json:
  """What a checkpoint of these arrays and of texts, which are JSON, keeps to be compared with."""
  return {
    "arrays": of_arrays(arrays),
    "texts": {name: digest(text) for name, text in texts.items()},
  }


def difference(recorded: Json, arrays: Any, texts: Mapping[str, Any] | None = None) -> str:
  """The first array or text that is not what was recorded, or nothing. arrays: some of those that
  were; texts: all, unless None are compared."""
  if texts is not None:
    now = {name: digest(text) for name, text in texts.items()}
    for name in sorted(recorded["texts"].keys() | now.keys()):
      if now.get(name) != recorded["texts"].get(name):
        return name
  for path, found in of_arrays(arrays).items():
    written = recorded["arrays"].get(path)
    if isinstance(found, list) and isinstance(written, list):
      # Behind the blocks that both hold, padding was cut or grown.
      written, found = written[: len(found)], found[: len(written)]
    if found != written:
      return path
  return ""


def of_arrays(tree: Any) -> dict[str, Any]:
  """{path: digest} of a tree of arrays, in hexadecimal; of an optimizer's blocks one per block.

  Where several processes share the arrays, all call this."""
  sums = _run(_sums, tree, frozenset(blocks.block_paths(tree)))
  return {
    path: f"{x:08x}" if x.ndim == 0 else [f"{row:08x}" for row in x] for path, x in sums.items()
  }


def first_not_finite(tree: Any) -> str:
  """Path of the first array with a NaN or an infinity, or nothing; what an optimizer's state tells
  of its roots may hold one. Where several processes share the arrays, all call this."""
  flags = _run(_are_finite, tree, frozenset(metrics.paths_of_state(tree)))
  return min((path for path, finite in flags.items() if not finite), default="")


def precompile(tree: Any) -> None:
  """Compiles what both run. tree: ShapeDtypeStructs with shardings."""
  for function, paths in ((_sums, blocks.block_paths), (_are_finite, metrics.paths_of_state)):
    program, found = _program(function, tree)
    # jit, asked for the same, does not compile it again.
    program.lower(found, frozenset(paths(tree))).compile()


def _run(function: Any, tree: Any, paths: frozenset[str]) -> dict[str, Any]:
  program, found = _program(function, tree)
  return jax.device_get(program(found, paths))


def _program(function: Any, tree: Any) -> tuple[Any, dict[str, Any]]:
  """(the function, jitted, its first argument: arrays by path)."""
  found = {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  shardings = (getattr(x, "sharding", None) for x in found.values())
  meshes: list[Any] = [each.mesh for each in shardings if isinstance(each, NamedSharding)]
  return _jitted(function, mesh.replicated(meshes[0]) if meshes else None), found


@functools.cache
def _jitted(function: Any, everywhere: NamedSharding | None) -> Any:
  return jax.jit(function, static_argnums=1, out_shardings=everywhere)


def _are_finite(found: Mapping[str, jax.Array], left_out: frozenset[str]) -> dict[str, jax.Array]:
  return {
    path: jnp.isfinite(x).all()
    for path, x in found.items()
    if path not in left_out and jnp.issubdtype(x.dtype, jnp.inexact)
  }


def _sums(found: Mapping[str, jax.Array], in_blocks: frozenset[str]) -> dict[str, jax.Array]:
  return {path: _sum(x, by_row=path in in_blocks) for path, x in found.items()}


def _sum(x: jax.Array, *, by_row: bool) -> jax.Array:
  """uint32; by_row: one for every index of the first axis."""
  words = _words(x)
  place = np.uint32(zlib.crc32(str(x.dtype).encode()))
  for axis, length in enumerate(words.shape):
    along = _hash(jax.lax.iota(jnp.uint32, length) + np.uint32(axis << 28))
    place = place + jnp.expand_dims(along, [i for i in range(words.ndim) if i != axis])
  return jnp.sum(_hash(words + place), range(by_row, words.ndim), dtype=jnp.uint32)


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
