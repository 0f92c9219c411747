"""Reads and writes Hugging Face directories (config.json and safetensors files) of OLMo2 and Llama.

There one tensor per layer, matrices as (out, in); here stacked layers and (in, out) kernels.
"""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from beyond_outliers import config
from beyond_outliers.mesh import shardings
from beyond_outliers.model import hf_config, transformer
from beyond_outliers.ops.tensor_files import write_tensors
from beyond_outliers.params import is_kernel, is_stacked, path_of
from beyond_outliers.types import Json, Params, PathLike

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
IGNORED = ".rotary_emb.inv_freq"  # in old Llama files; follows from the rotary base

Reader = Callable[[tuple[slice, ...]], np.ndarray]


class Entry(NamedTuple):
  """One tensor of the files."""

  name: str
  shape: tuple[int, ...]
  path: str  # of the parameter of ours that holds it
  depth: int | None  # which slice of that one; None: all of it


def load(
  directory: PathLike, *, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None
) -> tuple[transformer.Transformer, Params]:
  """A Hugging Face directory as (model, parameters), under the model contract.

  dtype: of the parameters, in the place of that of the files, and `model.config.dtype`: float32,
    bfloat16 or, under jax_enable_x64, float64. To compute in bfloat16 on float32 parameters, load
    float32 and replace the config's dtype.
  mesh: devices for the parameters, split as `mesh.shardings` says; a process reads only what its
    devices hold. Without it, the default device.
  One stacked parameter at a time is in host memory. Settings that no such directory has get the
  plainest value: blockwise attention, no unrolling, no remat.
  Errors: ConfigError for what config.json asks of the model and it can't do, ValueError for tensors
    that don't fit."""
  directory, dtype = pathlib.Path(directory), jnp.dtype(dtype)
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise ValueError(
      f"dtype = {dtype.name}: jax holds it only under jax_enable_x64; set that, or load float32"
    )
  _require_file(directory, "config.json")
  family, c = hf_config.read_config(directory / "config.json", dtype.name)
  model = transformer.Transformer(c)
  boxed = transformer.boxed_shapes(model)
  leaves, treedef = jax.tree.flatten(nn.unbox(boxed))
  places = [None] * len(leaves) if mesh is None else jax.tree.leaves(shardings(boxed, mesh))
  with contextlib.ExitStack() as stack:
    tensors = _open(directory, stack)
    expected = entries(family, c)
    _check_tensors(directory, tensors, expected)
    sources = collections.defaultdict(list)
    for entry in expected:
      sources[entry.path].append(tensors[entry.name])
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
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a directory that transformers and `load` read, in the parameters' own dtype, one file at
  a time in memory.

  context: the longest window the model was trained on; left out, transformers takes 2048 tokens.
  shard_bytes: the most that a file holds, a larger single tensor excepted; several files have an
    index.
  Errors: ConfigError for an architecture that neither family has, ValueError for parameters of
  another model and for a directory that already holds one."""
  leaves = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
  described = hf_config.to_json(model.config, jnp.result_type(*leaves.values()).name, context)
  _check_params(model.config, leaves)
  every = entries(hf_config.FAMILIES[described["model_type"]], model.config)
  tensors = ((entry.name, tensor(leaves[entry.path], entry)) for entry in every)
  write_directory(directory, described, tensors, shard_bytes)


def write_directory(
  directory: PathLike, described: Json, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
  """The files of `save`, from tensors made lazily. Errors: as `save`, for the directory."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  taken = sorted(
    path.name
    for path in directory.iterdir()
    if path.name == "config.json" or ".safetensors" in path.name
  )
  if taken:
    raise ValueError(
      f"directory = '{directory}': already holds {', '.join(taken)}; remove them or choose another"
    )

  parts, total = [], 0
  for shard in _shards(tensors, shard_bytes):
    part = directory / f"part-{len(parts)}.safetensors"  # the final name holds their number
    write_tensors(part, shard, {"format": "pt"})
    parts.append((part, list(shard)))
    total += sum(array.nbytes for array in shard.values())
  weight_map = {}
  for i, (part, names) in enumerate(parts):
    file = SINGLE if len(parts) == 1 else f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
    part.rename(directory / file)
    weight_map.update(dict.fromkeys(names, file))
  if len(parts) > 1:
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
  # Last: the remains of a crash do not pass for a model.
  _write_json(directory / "config.json", described)


def _shards(
  tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
  shard, size = {}, 0
  for name, array in tensors:
    if shard and size + array.nbytes > shard_bytes:
      yield shard
      shard, size = {}, 0
    shard[name] = array
    size += array.nbytes
  yield shard


def entries(family: hf_config.Family, c: config.Model) -> list[Entry]:
  """All tensors of the model's files, depths in order."""
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


def _open(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
  """Every tensor by name, not yet read, of the single file or of those that the index names."""
  files = [SINGLE]
  if not (directory / SINGLE).exists() and (directory / INDEX).exists():
    files = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
  tensors = {}
  for file in files:
    _require_file(directory, file)
    try:
      handle = stack.enter_context(safetensors.safe_open(directory / file, framework="numpy"))
    except safetensors.SafetensorError as error:
      raise ValueError(
        f"directory = '{directory}': {file} is not a whole safetensors file ({error}); "
        "fetch it again"
      ) from error
    names = handle.keys()
    tensors.update((name, handle.get_slice(name)) for name in names if not name.endswith(IGNORED))
  return tensors


def _require_file(directory: pathlib.Path, name: str) -> None:
  if not (directory / name).exists():
    raise ValueError(
      f"directory = '{directory}': holds no {name}; give a whole Hugging Face model, as safetensors"
    )


def _check_tensors(
  directory: pathlib.Path, tensors: Mapping[str, Any], expected: Sequence[Entry]
) -> None:
  shapes = {entry.name: entry.shape for entry in expected}
  missing, unexpected = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
  for problem, names in (("missing", missing), ("not of this model", unexpected)):
    if names:
      listed = ", ".join(sorted(names)[:4])
      listed += f" and {len(names) - 4} more" if len(names) > 4 else ""
      raise ValueError(
        f"directory = '{directory}': tensors {problem}: {listed}; "
        "check config.json against the files"
      )
  for name, shape in shapes.items():
    found, dtype = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
    if found != shape:
      raise ValueError(
        f"directory = '{directory}': {name} has shape {found}, config.json makes it {shape}; "
        "check config.json against the files"
      )
    if dtype not in DTYPES:
      raise ValueError(
        f"directory = '{directory}': {name} is of type {dtype}, expected one of "
        f"{', '.join(DTYPES)}; choose a checkpoint that is not quantized"
      )


def _check_params(c: config.Model, leaves: Mapping[str, Any]) -> None:
  expected, found = _shapes(c), {path: leaf.shape for path, leaf in leaves.items()}
  for path in sorted(expected.keys() | found.keys()):
    here, there = (str(shapes.get(path, "absent")) for shapes in (found, expected))
    if here != there:
      raise ValueError(
        f"params: {path} is {here}, model.config makes it {there}; give this model's, unboxed"
      )


def _reader(path: str, sources: Sequence[Any], shape: tuple[int, ...], dtype: np.dtype) -> Reader:
  """index -> that part of our parameter, reading only the parts of the tensors that hold it."""

  def one(source, index):
    return source[index[::-1]].T if is_kernel(path) else source[index]

  def read(index):
    if not is_stacked(path):
      return one(sources[0], index).astype(dtype)
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
  """The array that a file holds under the entry's name.

  The embedding is (vocabulary, width) there and here."""
  array = np.asarray(leaf if entry.depth is None else leaf[entry.depth])
  return np.ascontiguousarray(array.T if is_kernel(entry.path) else array)


def _write_json(file: pathlib.Path, value: Json) -> None:
  file.write_text(json.dumps(value, indent=2) + "\n")
