"""Description of a prepared dataset: reads its meta.json, and refuses one that is damaged."""

from __future__ import annotations

import os
from typing import Any

from beyond_outliers.config.files import misfit, read_json
from beyond_outliers.config.sums import stays_inside
from beyond_outliers.errors import DataError, remedy_for
from beyond_outliers.types import Json

FORMAT = 1  # of a dataset's folder, and part of its name; other formats are refused
REMEDY = "delete the folder and prepare again"

FILE_KINDS = {"bytes": int, "sha256": str}
SPLIT_KINDS: dict[str, Any] = {
  **dict.fromkeys(("documents", "tokens", "bytes"), int | None),
  "shards": list | None,
}
RECORD_KINDS = {"path": str, "field": str, "count": int, "held_out": int | float}
META_KINDS = {
  **{"format": int, "settings.vocab": int, "dtype": str, "records": dict | None, "files": dict},
  **{"inputs.files": int, "inputs.bytes": int, "inputs.sha256": str},
  **{"tokenizer.stored": str, "tokenizer.fingerprint": str, "separator.id": int},
  **{
    f"splits.{split}.{name}": kind
    for split in ("train", "validation")
    for name, kind in SPLIT_KINDS.items()
  },
}


def remedy_in(directory: str, error: OSError) -> str:
  """The remedy for a file of a dataset's folder that cannot be read. If the whole folder is gone or
  not mounted, nothing need be damaged."""
  if not os.path.exists(os.path.join(directory, "meta.json")):
    return f"all of {directory} is gone or not mounted: give the same command once it is back"
  return remedy_for(error, REMEDY)


def read_meta(directory: str) -> Json:
  """The meta.json of a folder.

  Errors: DataError if it is missing, of another format, or damaged."""
  path = os.path.join(directory, "meta.json")
  try:
    meta = read_json(path, DataError, REMEDY, {"format": int})
  except (FileNotFoundError, NotADirectoryError):
    raise DataError(
      f"{directory!r}: not a prepared dataset (no meta.json); run python -m beyond_outliers.prepare"
    ) from None
  if meta["format"] != FORMAT:
    raise DataError(f"{path}: format {meta['format']}, this version reads {FORMAT}; {REMEDY}")
  if problem := misfit(meta, META_KINDS) or _problem(meta):
    raise DataError(f"{path}: {problem}; {REMEDY}")
  return meta


def _problem(meta: Json) -> str:
  """What is wrong with a description whose values have the right types; empty if nothing is."""
  if meta["dtype"] not in ("<u2", "<u4"):
    return f"dtype is {meta['dtype']!r}, not '<u2' or '<u4'"
  for name, described in meta["files"].items():
    if not stays_inside(name):
      return f"files names {name!r}, outside of the folder"
    if found := misfit(described, FILE_KINDS):
      return f"entry {name}: {found}"
  for split, counts in meta["splits"].items():
    if counts["shards"] is None:
      continue
    needed = [*counts["shards"], f"{split}.starts", f"{split}.bytes"]
    if missing := [name for name in needed if name not in [*meta["files"]]]:
      return f"files lacks {missing[0]} of the {split} split"
    size = sum(meta["files"][name]["bytes"] for name in counts["shards"])
    if None in counts.values() or size != int(meta["dtype"][-1]) * counts["tokens"]:
      return (
        f"the {split} split counts {counts['tokens']} tokens, which is not what its shards hold"
      )
    for name in (f"{split}.starts", f"{split}.bytes"):
      if meta["files"][name]["bytes"] != 8 * (counts["documents"] + 1):
        return (
          f"the {split} split counts {counts['documents']} documents, which is not what {name} "
          "holds"
        )
  if meta["records"] is not None:
    if found := misfit(meta["records"], RECORD_KINDS):
      return f"entry records: {found}"
    path = meta["records"]["path"]
    inside = path.startswith("{directory}/") and stays_inside(path)
    if not os.path.isabs(path) and not inside:
      return f"records.path is {path!r}, neither in the folder nor absolute"
  first = meta.get("first_bytes", {})
  if not isinstance(first, dict) or not all(
    number.isdecimal() and isinstance(size, int) for number, size in first.items()
  ):
    return "first_bytes is not of the form that prepare writes"
  return ""
