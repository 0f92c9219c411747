"""Files of a Hugging Face directory: tensors, their index, config.json and its companions."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

from beyond_outliers.config.checks import require
from beyond_outliers.config.files import make_folder, read_json
from beyond_outliers.config.sums import check_folder, file_sha256, replaced, write_folder_sums
from beyond_outliers.errors import ConfigError
from beyond_outliers.ops.tensor_files import repeated_name, write_tensors
from beyond_outliers.types import Json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
ADAPTER = "adapter_config.json"  # of LoRA and similar methods, written by peft
# Files that generating text needs besides the weights: no code, and nothing that runs when read.
COMPANIONS = (
  GENERATION,
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
)
IGNORED = ".rotary_emb.inv_freq"  # in old Llama files; determined by the rotary base


def require_file(directory: pathlib.Path, name: str) -> None:
  """Refuses a directory without the file. Errors: ConfigError, as for all functions below."""
  require(
    (directory / name).is_file(),
    "directory",
    str(directory),
    f"holds no {name}; give a whole Hugging Face model, as safetensors",
  )


def require_model(directory: pathlib.Path) -> None:
  """Refuses a directory without a model, or with an adapter that would change its weights."""
  require(
    not (directory / ADAPTER).exists(),
    "directory",
    str(directory),
    f"holds {ADAPTER}, an adapter of a model's weights, which would be left out; merge it into "
    "them (peft: merge_and_unload, then save_pretrained), or remove it",
  )
  require_file(directory, CONFIG)


def json_object(file: pathlib.Path) -> Json:
  """The object in a JSON file."""
  try:
    return read_json(file, ConfigError, "fetch it again")
  except (FileNotFoundError, NotADirectoryError) as error:
    raise ConfigError(f"{file}: {error.strerror}; fetch it again") from None


def open_tensors(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
  """Every tensor, unread, by name, from the single file or from those that the index names."""
  places = {} if (directory / SINGLE).exists() else _read_index(directory)
  tensors: dict[str, Any] = {}
  found: dict[str, str] = {}
  for file in sorted(set(places.values())) or [SINGLE]:
    require_file(directory, file)
    try:
      handle = stack.enter_context(safetensors.safe_open(directory / file, framework="numpy"))
    except (safetensors.SafetensorError, OSError) as error:
      raise ConfigError(
        f"directory = '{directory}': {file} is not a whole safetensors file ({error}); "
        "fetch it again"
      ) from error
    if repeated := repeated_name(directory / file):
      raise ConfigError(
        f"directory = '{directory}': {repeated} appears twice in {file}; fetch it again"
      )
    for name in handle.keys():
      if name in found:
        raise ConfigError(
          f"directory = '{directory}': {name} is in {found[name]} and in {file}; keep one"
        )
      found[name], tensors[name] = file, handle.get_slice(name)
  for name, file in places.items():
    if found.get(name) != file:
      raise ConfigError(
        f"directory = '{directory}': {INDEX} puts {name} into {file}, which lacks it; "
        "fetch both again"
      )
  return {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}


def _read_index(directory: pathlib.Path) -> dict[str, str]:
  """{tensor: its file's name, in the same directory}; empty if there is no index."""
  if not (directory / INDEX).exists():
    return {}
  places: Any = json_object(directory / INDEX).get("weight_map")
  field = f"{directory / INDEX}: weight_map"
  listed = isinstance(places, dict) and bool(places)
  require(listed, field, places, "expected {tensor: file}; fetch it again")
  for name, file in places.items():
    require(
      isinstance(file, str) and pathlib.PurePath(file).name == file,
      f"{field}: {name}",
      file,
      "expected the name of a file beside it",
    )
  return places


def companions(directory: pathlib.Path) -> dict[str, bytes]:
  """Contents of the COMPANIONS that a directory has, by name."""
  check_folder(directory, (CONFIG, *COMPANIONS))
  files = {name: directory / name for name in COMPANIONS}
  return {name: file.read_bytes() for name, file in files.items() if file.is_file()}


def write_directory(
  directory: pathlib.Path,
  described: Json,
  tensors: Iterable[tuple[str, np.ndarray]],
  shard_bytes: int,
  beside: Mapping[str, bytes],
) -> None:
  """Writes tensors, which are made lazily so that one file at a time is in memory; the files
  `beside`; SHA-256 sums of all files, which other programs ignore; and last `described`, as
  config.json.

  Errors: ConfigError for a directory that already holds files of a model, or cannot be written."""
  make_folder(directory, ConfigError, "choose another", "directory")
  # Any of COMPANIONS, written here or not: those in a model's directory count as the model's.
  taken = sorted(
    path.name
    for path in directory.iterdir()
    if path.name in (CONFIG, *COMPANIONS) or ".safetensors" in path.name
  )
  if taken:
    raise ConfigError(
      f"directory = '{directory}': already holds {', '.join(taken)}; remove them or choose another"
    )

  parts, total = [], 0
  for shard in _shards(tensors, shard_bytes):
    part = directory / f"part-{len(parts)}.safetensors"  # final names contain the number of files
    write_tensors(part, shard, {"format": "pt"})
    parts.append((part, list(shard)))
    total += sum(array.nbytes for array in shard.values())
  weight_map = {}
  for i, (part, names) in enumerate(parts):
    file = SINGLE if len(parts) == 1 else f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
    part.rename(directory / file)
    weight_map.update(dict.fromkeys(names, file))
  if len(parts) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    beside = {INDEX: as_json(index), **beside}
  for name, content in beside.items():
    with replaced(directory / name) as temporary:
      temporary.write_bytes(content)
  # Last, and atomically: what a crash leaves behind does not pass for a model.
  with replaced(directory / CONFIG) as temporary:
    temporary.write_bytes(as_json(described))
    names = sorted({*weight_map.values(), *beside})
    sums = {name: file_sha256(directory / name) for name in names}
    write_folder_sums(directory, {**sums, CONFIG: file_sha256(temporary)})


def as_json(value: Json) -> bytes:
  """`value` as the content of a JSON file."""
  return (json.dumps(value, indent=2) + "\n").encode()


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
