"""Runs packed into one file: all that a report reads of them, without checkpoints, datasets, or
where on which machine they were.

A compressed tar of the workdirs, which `tar -xf` opens too. The same runs give the same bytes."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import lzma
import os
import pathlib
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from beyond_outliers import runs as runs_lib
from beyond_outliers.config.files import cache_root, make_folder, read_json
from beyond_outliers.config.sums import digest, replaced, sealed
from beyond_outliers.errors import ConfigError, WorkdirError
from beyond_outliers.types import Json, PathLike

SUFFIX = ".tar.xz"
NOT_PACKED = ("command", "host")  # keys of manifests and cells
REMEDY = "restore it from a copy, or leave the run out"


def pack_runs(runs: Sequence[runs_lib.Run], path: PathLike) -> str:
  """Writes runs into a file, each at its path below the folder that holds them all; says what is in
  it. Errors: WorkdirError for a damaged run; ConfigError for a name without SUFFIX."""
  if not str(path).endswith(SUFFIX):
    raise ConfigError(f"--pack = {path}: give a name that ends in {SUFFIX}")
  folders = [pathlib.Path(run.path) for run in runs]
  root = folders[0].parent if len(runs) == 1 else pathlib.Path(os.path.commonpath(folders))
  files = 0
  with (
    replaced(path) as temporary,
    tarfile.open(
      temporary, "w:xz", format=tarfile.PAX_FORMAT, preset=9 | lzma.PRESET_EXTREME
    ) as archive,
  ):
    for run, folder in sorted(zip(runs, folders, strict=True), key=lambda pair: pair[1]):
      for name, text in _contents(run, folder):
        entry = tarfile.TarInfo(f"{folder.relative_to(root)}/{name}")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
        files += 1
  return f"{path}: {len(runs)} runs, {files} files, {os.path.getsize(path) / 1e6:.2f} MB"


def archive_of(root: PathLike) -> pathlib.Path | None:
  """The file that a path is, or leads into."""
  path = pathlib.Path(os.path.abspath(os.path.expanduser(root)))
  return next((above for above in (path, *path.parents) if above.is_file()), None)


def find_runs(root: PathLike) -> list[runs_lib.Run]:
  """The runs below a folder or an address in a store, or in a packed file or a folder of it, such
  as `ladder.tar.xz/0.3m`.

  Errors: WorkdirError for a folder or a file that cannot be read."""
  path, archive = pathlib.Path(os.path.abspath(os.path.expanduser(root))), archive_of(root)
  if archive is None:
    return runs_lib.find(root)
  opened = _opened(str(archive))
  found = runs_lib.find(os.path.join(opened, path.relative_to(archive)))
  return [
    runs_lib.Run(run.path, os.path.join(archive, os.path.relpath(run.path, opened)))
    for run in found
  ]


def _contents(run: runs_lib.Run, folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """(name, text) of a run's files, as they are packed."""
  read = functools.partial(read_json, refusal=WorkdirError, remedy=REMEDY)
  places = {run.config.data.directory: "datasets", f"{folder.parent}/": ""}
  places[os.path.dirname(run.trained_on["directory"])] = "datasets"
  config = _without_places(read(folder / "config.json"), places)
  yield "config.json", _text(config, places)
  manifest = read(folder / "manifest.json")
  manifest |= {"identity": run.identity} | (
    {"config": digest(config)} if "config" in manifest else {}
  )
  yield "manifest.json", _text(manifest, places)
  yield "status.json", _text(run.status, places)
  if (folder / "metrics.jsonl").exists():
    yield "metrics.jsonl", (folder / "metrics.jsonl").read_bytes()
  for cell in sorted((folder / "eval").glob("*.json")):
    yield f"eval/{cell.name}", _text(read(cell), places)


def _text(value: Json, places: Mapping[str, str]) -> bytes:
  return f"{json.dumps(sealed(_without_places(value, places)), indent=1)}\n".encode()


def _without_places(value: Any, places: Mapping[str, str]) -> Any:
  """The value without NOT_PACKED, and with other words for these folders."""
  if isinstance(value, dict):
    return {k: _without_places(each, places) for k, each in value.items() if k not in NOT_PACKED}
  if isinstance(value, list):
    return [_without_places(each, places) for each in value]
  if isinstance(value, str):
    for place, word in places.items():
      value = value.replace(place, word)
  return value


@functools.cache
def _opened(path: str) -> str:
  """The folder that a packed file is opened into, in the user's cache, once for all."""
  content = pathlib.Path(path).read_bytes()
  parent = os.path.join(cache_root(), "packed_runs")
  make_folder(parent, WorkdirError, "set BEYOND_OUTLIERS_CACHE to a folder that can be written")
  name = os.path.basename(path).removesuffix(SUFFIX)
  folder = os.path.join(parent, f"{name}-{hashlib.sha256(content).hexdigest()[:12]}")
  if os.path.isdir(folder):
    return folder
  with tempfile.TemporaryDirectory(dir=parent) as temporary:
    opened = os.path.join(temporary, "opened")
    try:
      with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as archive:
        archive.extractall(opened, filter="data")  # which refuses names that leave the folder
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
      raise WorkdirError(
        f"{path} is no whole file of packed runs ({error}); get it again, or pack the runs anew"
      ) from None
    try:
      os.rename(opened, folder)
    except OSError:  # another process was first
      if not os.path.isdir(folder):
        raise
  return folder
