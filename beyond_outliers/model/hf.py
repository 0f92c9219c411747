"""Reads and writes Hugging Face directories (config.json and safetensors files) of OLMo2 and Llama.

They hold one tensor per layer, with matrices as (out, in); here layers are stacked, with kernels as
(in, out).
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers import config
from beyond_outliers.config.checks import require
from beyond_outliers.config.sums import check_folder
from beyond_outliers.mesh import shardings
from beyond_outliers.model import hf_config, hf_files, hf_tensors, transformer
from beyond_outliers.model.hf_files import INDEX, SINGLE
from beyond_outliers.params import (
  all_finite,
  check_floats,
  check_params,
  float_type,
  is_kernel,
  is_stacked,
  leaves_by_path,
  path_of,
)
from beyond_outliers.types import Json, Params, PathLike

__all__ = ["INDEX", "SINGLE", "Entry", "description", "entries", "load", "save", "tensor"]

Reader = Callable[[tuple[slice, ...]], np.ndarray]


class Entry(NamedTuple):
  """One tensor of the files."""

  name: str
  shape: tuple[int, ...]
  path: str  # of our parameter that holds it
  depth: int | None  # index of the slice of that parameter; None: all of it


def load(
  directory: PathLike, *, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None
) -> tuple[transformer.Transformer, Params]:
  """A Hugging Face directory as (Transformer, its parameters).

  dtype: of the parameters, whatever the files', and of `model.config.dtype`: float32, bfloat16 or,
    under jax_enable_x64, float64. To compute in bfloat16 with float32 parameters, load float32 and
    replace the config's dtype.
  mesh: devices for the parameters, split by `mesh.shardings`; a process reads only what its devices
    hold. Without it, the default device.
  Only one stacked parameter at a time is in host memory. Settings that such a directory does not
  have get the plainest value: blockwise attention, no unrolling, no remat. The model keeps the
  directory as its `origin`.
  Errors: ConfigError for a config.json that asks for what the model can't do, for tensors that
    don't fit or are not finite in dtype, for an adapter in the directory, and for files that differ
    from those that `save` wrote there."""
  directory, dtype = pathlib.Path(directory), float_type(dtype)
  hf_files.require_model(directory)
  check_folder(directory)
  family, c = hf_config.read_config(directory / hf_files.CONFIG, dtype.name)
  with contextlib.ExitStack() as stack:
    tensors = hf_tensors.of_family(hf_files.open_tensors(directory, stack))
    require(
      c.blocks <= len(tensors),
      f"{directory / hf_files.CONFIG}: num_hidden_layers",
      c.blocks,
      f"the files hold {len(tensors)} tensors; check it against them",
    )
    if c.tied:
      tensors = hf_tensors.without_head(directory, tensors)
    model = transformer.Transformer(c, origin=os.path.abspath(directory))
    boxed = transformer.boxed_shapes(model)
    leaves, treedef = jax.tree.flatten(nn.unbox(boxed))
    places = [None] * len(leaves) if mesh is None else jax.tree.leaves(shardings(boxed, mesh))
    expected = entries(family, c)
    hf_tensors.check_tensors(directory, tensors, {entry.name: entry.shape for entry in expected})
    sources = collections.defaultdict(list)
    for entry in expected:
      sources[entry.path].append((f"{directory}: {entry.name}", tensors[entry.name]))
    return model, treedef.unflatten(
      _place(_reader(path, sources[path], shape, dtype), shape, place)
      for (path, shape), place in zip(_shapes(c).items(), places, strict=True)
    )


def save(
  model: transformer.Transformer,
  params: Params,
  directory: PathLike,
  *,
  context: int | None = None,
  bos_token_id: int | None = None,
  eos_token_id: int | Sequence[int] | None = None,
  like: PathLike | None = None,
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a directory that transformers and `load` can read, in the parameters' own dtype, with
  one file at a time in memory.

  context: the longest window the model was trained on. bos_token_id, eos_token_id: tokens that
    begin and end a text. For a run, **run.generation gives all three.
  like: a Hugging Face directory of such a model; by default the one it was loaded from. Kept from
    it: other fields of config.json, the tokenizer, chat template and generation_config
    (hf_files.COMPANIONS), and the three above unless given. Without it there are no such tokens,
    and transformers assumes windows of 2048 tokens.
  shard_bytes: the size limit of a file, except for one larger tensor; if there are several files,
    an index is written.
  Errors: ConfigError for a model trained quantized, whose products the files can't represent, an
  architecture that neither family has, parameters that are another model's or not finite floats,
  `like` with another vocabulary or other widths, and a directory that already holds a model."""
  _check_plain(model)
  check_floats(params)
  leaves = leaves_by_path(params)
  given = hf_config.given(context, bos_token_id, eos_token_id)
  described, beside = description(model, jnp.result_type(*leaves.values()).name, given, like)
  _check_params(model, params)
  every = entries(hf_config.FAMILIES[described["model_type"]], model.config)
  tensors = ((entry.name, tensor(leaves[entry.path], entry)) for entry in every)
  hf_files.write_directory(pathlib.Path(directory), described, tensors, shard_bytes, beside)


def longest_window(directory: PathLike) -> int:
  """The longest window of a directory's model, in tokens. Errors: ConfigError."""
  directory = pathlib.Path(directory)
  hf_files.require_model(directory)
  return hf_config.positions(hf_files.json_object(directory / hf_files.CONFIG))


def description(
  model: Any, dtype: str, given: Json, like: PathLike | None
) -> tuple[Json, dict[str, bytes]]:
  """(config.json, {name: content} of its companion files) of a Transformer.

  given: as in `hf_config.to_json`.

  Errors: ConfigError, as there."""
  origin = model.origin if like is None else like
  if origin is None:
    return hf_config.to_json(model.config, dtype, None, given), {}
  source = pathlib.Path(origin)
  require(
    (source / hf_files.CONFIG).is_file(),
    "like",
    str(source),
    f"holds no {hf_files.CONFIG}; give the directory that the model was loaded from, where it lies "
    "now, or save model.clone(origin=None)",
  )
  fields = hf_files.json_object(source / hf_files.CONFIG)
  beside = hf_files.companions(source)
  described = hf_config.to_json(model.config, dtype, fields, given)
  tokens = {name: value for name, value in given.items() if name in hf_config.TOKENS}
  if hf_files.GENERATION in beside:  # its tokens take precedence over config.json's
    generation = {**hf_files.json_object(source / hf_files.GENERATION), **tokens}
    hf_config.check_token_ids(model.config, generation, f"like: {hf_files.GENERATION}: ")
    if tokens:
      beside[hf_files.GENERATION] = hf_files.as_json(generation)
  return described, beside


def entries(family: hf_config.Family, c: config.Model) -> list[Entry]:
  """All tensors of the model's files, by depth within each parameter."""
  every = []
  for path, shape in _shapes(c).items():
    template = family.names[path]
    depths = range(shape[0]) if is_stacked(path) else [None]
    shape = shape[1:] if is_stacked(path) else shape
    shape = shape[::-1] if is_kernel(path) else shape
    every += [Entry(template.format(depth), shape, path, depth) for depth in depths]
  return every


def _shapes(c: config.Model) -> dict[str, tuple[int, ...]]:
  """{path: shape} of our parameters, in the order of the tree's leaves."""
  shapes = transformer.shapes(transformer.Transformer(c))
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  return {path_of(keys): leaf.shape for keys, leaf in leaves}


def _check_plain(model: Any) -> None:
  """Refuses a model whose products are not the plain ones that the files imply."""
  own = model.dot_general_for or (lambda path: None)
  quantized = next((path for path in model.contractions() if own(path) is not None), None)
  require(
    quantized is None,
    "model",
    f"quantized at {quantized}",
    "the files would hold its float weights, whose loss is another; give "
    "model.clone(dot_general_for=None) to write these, or write what the model computes with "
    "quant.quantized and its save, or export.compressed_tensors",
  )


def _check_params(model: Any, params: Params) -> None:
  check_params(model, params)
  for path, leaf in leaves_by_path(params).items():  # `load` would not read it again
    remedy = "NaN or infinity; use another checkpoint"
    require(bool(all_finite(leaf)), f"params: {path}", "not finite", remedy)


def _reader(
  path: str, sources: Sequence[tuple[str, Any]], shape: tuple[int, ...], dtype: np.dtype
) -> Reader:
  """A function from an index to that part of our parameter, which reads only the necessary parts of
  the tensors.

  sources: (name for messages, tensor), by depth."""

  def one(named, index):
    name, source = named
    part = source[index[::-1]].T if is_kernel(path) else source[index]
    with np.errstate(over="ignore"):  # reported below
      part = part.astype(dtype, copy=False)
    remedy = f"NaN, or beyond {dtype.name}; choose another checkpoint, or a wider dtype"
    require(bool(np.isfinite(part).all()), name, "not finite", remedy)
    return part

  def read(index):
    if not is_stacked(path):
      return one(sources[0], index)
    depths, *within = index
    sizes = [len(range(*cut.indices(size))) for cut, size in zip(index, shape, strict=True)]
    parts = np.empty(sizes, dtype)
    for part, source in zip(parts, sources[depths], strict=True):
      part[...] = one(source, tuple(within))
    return parts

  return read


def _place(
  read: Reader, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None
) -> jax.Array:
  if sharding is None:
    return jnp.asarray(read((slice(None),) * len(shape)))
  # pyrefly: ignore[bad-argument-type]  (JAX says Index | None; a shard has an index)
  return jax.make_array_from_callback(shape, sharding, read)


def tensor(leaf: Any, entry: Entry) -> np.ndarray:
  """The array to store under the entry's name.

  Kernels are transposed; the embedding is (vocabulary, width) in both formats."""
  array = np.asarray(leaf if entry.depth is None else leaf[entry.depth])
  return np.ascontiguousarray(array.T if is_kernel(entry.path) else array)
