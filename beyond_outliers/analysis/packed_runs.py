"""Runs packed into one file: all that a report reads, without checkpoints, datasets, or names of
the machine and its folders.

A compressed tar of the workdirs, which `tar -xf` opens too. The same runs give the same bytes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import lzma
import os
import pathlib
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from beyond_outliers import config
from beyond_outliers import runs as runs_lib
from beyond_outliers.config.files import cache_root, make_folder, read_json
from beyond_outliers.config.resolve import PATHS
from beyond_outliers.config.sums import (
  SUMS,
  digest,
  file_sha256,
  files_below,
  folder_mismatch,
  replaced,
  sealed,
  write_folder_sums,
)
from beyond_outliers.errors import ConfigError, WorkdirError
from beyond_outliers.types import Json, PathLike

SUFFIX = ".tar.xz"
NOT_PACKED = ("command", "host")  # keys of manifests and cells that are left out
DATASETS = "datasets"  # replaces the folder of datasets
# Matches a path only as a whole, not as part of a longer one.
WHOLE = r"(?<![\w.*-]){}(?:(?<=/)|(?![\w-]|\.\w))"
REMEDY = "restore it from a copy, or leave the run out"


def pack_runs(runs: Sequence[runs_lib.Run], path: PathLike) -> str:
  """Writes runs into a file, each at its path below their common folder, and reads them back before
  replacing an existing file; returns a line on what is in it.

  Errors: WorkdirError for a damaged run, or one that would not be read back the same; ConfigError
  for a name without SUFFIX."""
  if not str(path).endswith(SUFFIX):
    raise ConfigError(f"--pack = {path}: give a name that ends in {SUFFIX}")
  folders = {pathlib.Path(run.path): run for run in runs}
  root = pathlib.Path(os.path.commonpath(folders))
  root = root.parent if root in folders else root
  packed = {
    f"{folder.relative_to(root)}/{name}": text
    for folder, run in sorted(folders.items())
    for name, text in _contents(run, folder)
  }
  with replaced(path) as temporary:
    with (
      lzma.open(temporary, "w", preset=9 | lzma.PRESET_EXTREME) as compressed,
      tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
      for name, text in packed.items():
        entry = tarfile.TarInfo(name)
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
    named = {os.path.relpath(folder, root): run for folder, run in folders.items()}
    if problem := _misread(temporary, packed, named):
      raise WorkdirError(f"--pack = {path}: {problem}; nothing was written; leave that run out")
  return f"{path}: {len(folders)} runs, {len(packed)} files, {os.path.getsize(path) / 1e6:.2f} MB"


def archive_of(root: PathLike) -> pathlib.Path | None:
  """The file that a path is, or leads into; None if there is none."""
  path = pathlib.Path(os.path.abspath(os.path.expanduser(root)))
  return next((above for above in (path, *path.parents) if above.is_file()), None)


def find_runs(root: PathLike) -> list[runs_lib.Run]:
  """The runs below a folder or a store's address, or in a packed file or a folder inside one, such
  as `ladder.tar.xz/0.3m`.

  Errors: WorkdirError for a folder or a file that cannot be read."""
  path, archive = pathlib.Path(os.path.abspath(os.path.expanduser(root))), archive_of(root)
  if archive is None:
    return runs_lib.find(root)
  opened = _opened(archive)
  found = runs_lib.find(opened / path.relative_to(archive))
  return [
    runs_lib.Run(run.path, os.path.join(archive, os.path.relpath(run.path, opened)))
    for run in found
  ]


def _misread(
  path: pathlib.Path, packed: Mapping[str, bytes], runs: Mapping[str, runs_lib.Run]
) -> str:
  """The first file or run that cannot be read back from a packed file, and why; empty if none."""
  with tempfile.TemporaryDirectory() as opened:
    try:
      _extract(path.read_bytes(), path, opened)
      found = {os.path.relpath(run.path, opened): run for run in runs_lib.find(opened)}
      configs = {name: run.config for name, run in found.items()}
    except WorkdirError as error:
      return f"the file could not be read back ({error})"
    for name, text in packed.items():
      if pathlib.Path(opened, name).read_bytes() != text:
        return f"{name} would differ in the file"
    for name in found.keys() ^ runs.keys():
      return f"{name} would {'' if name in found else 'not '}be a run in the file"
    for name, run in runs.items():
      other = sorted(config.differences(run.config, configs[name]).keys() - PATHS.keys())
      if other or found[name].identity != run.identity:
        return f"{run.name} would have another {', '.join(other) or 'identity'} in the file"
  return ""


def _contents(run: runs_lib.Run, folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """(name, text) of a run's files, as they are packed."""
  read = functools.partial(read_json, refusal=WorkdirError, remedy=REMEDY)
  text = functools.partial(_text, places=_places(run, folder))
  c = read(folder / "config.json")
  c["data"]["directory"] = DATASETS
  c = _without_places(c, _places(run, folder))
  yield "config.json", text(c)
  manifest = read(folder / "manifest.json")
  for start in (manifest, *manifest.get("resumed", [])):
    if dataset := start.get("data"):
      name = os.path.basename(os.path.normpath(dataset["directory"]))
      dataset["directory"] = f"{DATASETS}/{name}"
  manifest |= {"identity": run.identity} | ({"config": digest(c)} if "config" in manifest else {})
  yield "manifest.json", text(manifest)
  yield "status.json", text(run.status)
  if (folder / "metrics.jsonl").exists():
    yield "metrics.jsonl", (folder / "metrics.jsonl").read_bytes()
  for path in sorted((folder / "eval").glob("*.json")):
    cell = read(path)
    trained = cell.get("source", {}).get("config", {})  # empty if the model is not from a run
    if "data" in trained:
      trained["data"]["directory"] = DATASETS
    yield f"eval/{path.name}", text(cell)


def _places(run: runs_lib.Run, folder: pathlib.Path) -> dict[str, str]:
  """{path on this machine: what replaces it in the packed file}, the longest first."""
  datasets = (run.config.data.directory, os.path.dirname(run.trained_on["directory"]))
  places = {f"{folder.parent}/": ""} | {place.rstrip("/"): DATASETS for place in datasets}
  # Relative paths may be any word, and like the root say nothing about the machine.
  named = [place for place in places if os.path.isabs(place) and place.strip("/")]
  return {place: places[place] for place in sorted(named, key=len, reverse=True)}


def _text(value: Json, places: Mapping[str, str]) -> bytes:
  return f"{json.dumps(sealed(_without_places(value, places)), indent=1)}\n".encode()


def _without_places(value: Any, places: Mapping[str, str]) -> Any:
  """The value without NOT_PACKED, and with these paths replaced."""
  if isinstance(value, dict):
    return {k: _without_places(each, places) for k, each in value.items() if k not in NOT_PACKED}
  if isinstance(value, list):
    return [_without_places(each, places) for each in value]
  if isinstance(value, str):
    for place, word in places.items():
      if place in value:
        value = re.sub(WHOLE.format(re.escape(place)), word, value)
  return value


def _opened(path: pathlib.Path) -> pathlib.Path:
  """The folder in the user's cache that a packed file is extracted into; again if files there were
  altered or removed, as cleaners of caches do."""
  content = path.read_bytes()
  parent = os.path.join(cache_root(), "packed_runs")
  make_folder(parent, WorkdirError, "set BEYOND_OUTLIERS_CACHE to a folder that can be written")
  name = path.name.removesuffix(SUFFIX)
  folder = pathlib.Path(parent, f"{name}-{hashlib.sha256(content).hexdigest()[:12]}")
  if (folder / SUMS).is_file() and not folder_mismatch(folder):
    return folder
  with tempfile.TemporaryDirectory(dir=parent) as temporary:
    opened = pathlib.Path(temporary, "opened")
    _extract(content, path, opened)
    write_folder_sums(opened, {name: file_sha256(opened / name) for name in files_below(opened)})
    with contextlib.suppress(FileNotFoundError):
      folder.rename(pathlib.Path(temporary, "former"))
    try:
      opened.rename(folder)
    except OSError:  # another process was faster
      if not folder.is_dir():
        raise
  return folder


def _extract(content: bytes, path: pathlib.Path, folder: PathLike) -> None:
  """Extracts a packed file's bytes into a folder. Errors: WorkdirError with the file's path."""
  try:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as archive:
      archive.extractall(folder, filter="data")  # the filter refuses names outside the folder
  except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
    raise WorkdirError(
      f"{path} is not a complete file of packed runs ({error}); get it again, or pack the runs anew"
    ) from None
