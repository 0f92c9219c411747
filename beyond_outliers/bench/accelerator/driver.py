"""The accelerator's check: every part in a process of its own, within a few minutes in total.

  python -m beyond_outliers.bench --accelerator --out=DIR [--only=ceilings,updates] [--minutes=8]

A part's figures are in DIR/<part>.json, which is rewritten after each row, so that nothing else is
lost if a row fails, a part is killed or time runs out. The same command continues with what is
missing, failed or was stopped; figures of other code, versions or GPUs are measured again.
This process never asks JAX for devices, since whichever process does takes the GPU's memory: it
imports everything, and forks the parts one after the other.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import shlex
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from beyond_outliers import cli
from beyond_outliers.bench.accelerator.parts import CHECK_PARTS, CheckPart
from beyond_outliers.config.checks import require
from beyond_outliers.config.files import make_folder, read_json, standard_json
from beyond_outliers.config.sums import replaced
from beyond_outliers.errors import ConfigError
from beyond_outliers.types import Json

ROOT = pathlib.Path(__file__).parents[3]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "aqtp", "numpy")
# Share of a GPU's memory; JAX's default of 0.75 is too little for the larger models.
MEMORY_FRACTION = "0.92"
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
UNMEASURED = ("failed", "does_not_fit")  # keys of a row without figures


def measure_accelerator(
  names: Iterable[str],
  out: str | None,
  scale: str | None,
  minutes: float,
  parts: Mapping[str, CheckPart] = CHECK_PARTS,
) -> Json:
  """Measures these parts; returns {part: its file} for all parts that are in the folder.

  scale: a row of CHECK_SCALES; None: full on an accelerator, tiny on a CPU. minutes: for all parts
    together. Errors: ConfigError without a folder, or for one with damaged or other files."""
  if out is None:
    raise ConfigError("--out: the folder that --accelerator writes its figures to; give --out=DIR")
  require(math.isfinite(minutes) and minutes > 0, "--minutes", minutes, "expected more than 0")
  make_folder(out, ConfigError, "give another --out")
  folder, identity = pathlib.Path(out), {"code": code_digest(), "versions": versions()}
  identity |= {"scale": scale, "gpus": gpus()}
  files = {name: _read(folder, name, identity) for name in parts}
  end = time.monotonic() + 60 * minutes
  missing = [name for name in parts if name in names and files[name].get("status") != "done"]
  for place, name in enumerate(missing):
    share = sum(parts[later].seconds for later in missing[place + 1 :]) / _seconds(parts)
    seconds = end - time.monotonic() - 60 * minutes * share
    _run(folder, name, parts[name], identity, seconds)
    files[name] = _read(folder, name, identity)
  return {name: file for name, file in files.items() if file}


def _seconds(parts: Mapping[str, CheckPart]) -> int:
  return sum(part.seconds for part in parts.values())


def code_digest() -> str:
  """SHA-256 of all sources that the check may run."""
  folders = "beyond_outliers", "configs"
  paths = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
  digest = hashlib.sha256()
  for path in sorted(paths):
    digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
  return digest.hexdigest()


def versions() -> dict[str, str]:
  return {name: importlib.metadata.version(name) for name in PACKAGES}


def gpus() -> list[str]:
  """NVIDIA's names of this machine's GPUs, without asking JAX for them."""
  files = sorted(pathlib.Path("/proc/driver/nvidia/gpus").glob("*/information"))
  return [line for file in files for line in file.read_text().splitlines() if "Model" in line]


def _read(folder: pathlib.Path, name: str, identity: Mapping[str, Any]) -> Json:
  """A part's file; empty if there is none with this `identity`. Errors: ConfigError for a damaged
  one."""
  kinds = {"status": str, "reason": str, "identity": dict, "rows": dict}
  remedy = "give another --out, or remove the file"
  try:
    file = read_json(folder / f"{name}.json", ConfigError, remedy, kinds)
  except FileNotFoundError:
    return {}
  return file if file["identity"] == identity else {}


def _run(folder: pathlib.Path, name: str, part: CheckPart, identity: Json, seconds: float) -> None:
  """Runs one part in its own process, which is killed when its time is up."""
  print(f"{name}: {max(seconds, 0):.0f} s at most", file=sys.stderr, flush=True)
  if seconds <= 0:
    return
  arguments = folder, name, part, identity, time.monotonic() + seconds
  process = multiprocessing.get_context("fork").Process(target=_measure, args=arguments)
  process.start()
  process.join(seconds)
  reason = ""
  if process.is_alive():
    process.kill()
    process.join()
    reason = f"killed after {seconds:.0f} s, in the middle of a row"
  elif process.exitcode:
    reason = f"its process ended with code {process.exitcode}"
  if reason:
    file = _read(folder, name, identity) or {"identity": identity, "rows": {}}
    _write(folder, name, {**file, "status": "killed", "reason": reason})


def _measure(
  folder: pathlib.Path, name: str, part: CheckPart, identity: Json, deadline: float
) -> None:
  """Measures one part's rows, in a process that has not asked for devices yet."""
  begun = time.monotonic()
  if not any(name in os.environ for name in FRACTIONS):
    os.environ[FRACTIONS[0]] = MEMORY_FRACTION
  # Stripped, since XLA takes a value with a leading blank for a file's name.
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {part.xla_flags}".strip()
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  device = describe_device()
  scale = identity["scale"] or ("tiny" if device["platform"] == "cpu" else "full")
  before = _read(folder, name, identity)
  rows = {
    row: figures
    for row, figures in before.get("rows", {}).items()
    if before["device"] == device and not _wrong(figures)
  }
  file: Json = {
    "part": name,
    "status": "stopped",
    "reason": "",
    "identity": identity,
    "scale": scale,
    "device": device,
    "command": shlex.join(sys.orig_argv),
    "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    "seconds": before.get("seconds", 0.0) if rows else 0.0,
    "rows": rows,
  }
  earlier, longest = file["seconds"], 0.0
  _write(folder, name, file)
  for row, measure in part.rows(scale, rows):
    if row in rows:
      continue
    began = time.monotonic()
    if began + longest > deadline:
      file["reason"] = f"no time was left for {row} and what follows"
      break
    rows[row] = _figures(f"{name}, {row}", measure)
    longest = max(longest, time.monotonic() - began)
    file["seconds"] = earlier + time.monotonic() - begun
    _write(folder, name, file)
  else:
    file["status"] = "failed" if any(map(_wrong, rows.values())) else "done"
  _write(folder, name, file)


def _figures(name: str, measure: Any) -> Json:
  """A row's figures, or why there are none. Device memory of a failed row is freed."""
  began, said = time.monotonic(), ""
  try:
    figures = standard_json(measure())
  except Exception as error:
    said = str(error)
    reason = f"{type(error).__name__}: {(said.splitlines() or [''])[0]}"
    memory = "RESOURCE_EXHAUSTED" in said or isinstance(error, MemoryError)
    figures = {"does_not_fit" if memory else "failed": reason}
    if not memory:
      traceback.print_exc()
  jax.clear_caches()
  gc.collect()
  print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
  return figures


def _wrong(row: Mapping[str, Any]) -> bool:
  return "failed" in row or row.get("right") is False


def _write(folder: pathlib.Path, name: str, file: Json) -> None:
  with replaced(folder / f"{name}.json") as temporary:
    temporary.write_text(json.dumps(standard_json(file), indent=1) + "\n")


def describe_device() -> Json:
  """The first device, the number of devices, and versions of the platform and driver."""
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "kind": device.device_kind,
    "count": jax.device_count(),
    "platform_version": device.client.platform_version,
    "driver": _driver(),
    "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
  }


def _driver() -> str:
  """Version of NVIDIA's kernel module, if there is one: JAX only reports CUDA's."""
  path = pathlib.Path("/proc/driver/nvidia/version")
  return path.read_text().splitlines()[0] if path.exists() else ""


def failures(files: Mapping[str, Json]) -> bool:
  """Whether a row failed or was wrong, or a part's process died or was killed."""
  return any(file["status"] in ("failed", "killed") for file in files.values())


def accelerator_table(
  files: Mapping[str, Json], parts: Mapping[str, CheckPart] = CHECK_PARTS
) -> str:
  """One line per result, with its aim; and what did not run, with the reason."""
  measured = {
    name: {
      row: figures
      for row, figures in file["rows"].items()
      if not any(key in figures for key in UNMEASURED)
    }
    for name, file in files.items()
  }
  lines = [("part", "what", "figure", "aim")]
  for name, file in files.items():
    cells = parts[name].cells(measured[name], measured)
    cells += [
      (row, f"{key.replace('_', ' ')}: {figures[key]}"[:120], "")
      for row, figures in file["rows"].items()
      for key in UNMEASURED
      if key in figures
    ]
    if file["reason"]:
      cells.append((file["status"], file["reason"], ""))
    lines += [(name if not place else "", *cell) for place, cell in enumerate(cells)]
  return "\n".join([_title(files), *cli.aligned(lines)])


def _title(files: Mapping[str, Json]) -> str:
  known = [file for file in files.values() if "device" in file]
  if not known:
    return "nothing was measured"
  device, identity = known[-1]["device"], known[-1]["identity"]
  named = ", ".join(f"{name} {version}" for name, version in identity["versions"].items())
  seconds = sum(file["seconds"] for file in known)
  return (
    f"{device['count']} × {device['kind']} ({' '.join(device['platform_version'].split())}) · "
    f"{known[-1]['scale']} · {named} · {seconds:.0f} s"
  )
