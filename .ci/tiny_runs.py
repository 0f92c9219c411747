"""Tiny runs of a commit by its commands, and what they leave; .ci/same.py compares that.

Whatever shapes the results stands in this file, so its text is part of their key in the cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import pickle
import platform
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / ".guard"
# Imported once and forked, since every command needs them. None of this package, nor of a device.
LIBRARIES = (
  "jax",
  "jax.numpy",
  "flax.linen",
  "optax",
  "orbax.checkpoint",
  "grain",
  "pandas",
  "scipy.special",
  "ml_collections.config_flags",
  "aqt.jax.v2.aqt_dot_general",
)
XLA_FLAGS = (
  "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",  # or devices deadlock
  "--xla_backend_optimization_level=0",  # of LLVM alone: a third of the time is saved
  "--xla_dump_hlo_as_text",
  "--xla_dump_hlo_module_re=.*",
  "--xla_dump_large_constants",
)
TIMES = {
  "tokens_per_second",
  "flops_per_second",
  "peak_share",
  "seconds_per_step",
  "seconds",
  "seconds_left",
  "memory_bytes",
  "eval/seconds",
  "outliers/seconds",
}
# Of one start of a command: in manifest.json made constant before eval/ hashes them.
OF_A_START = ("id", "command", "time", "host", "git")
QAT = "_qat"  # behind an optimizer's name: its config with a recipe
LARGE = 50  # lines from which a program is compared; below are single ops

SETTINGS = {
  "context": 32,
  "batch_size": 8,
  "steps": 12,
  "log.every": 1,
  "eval.every": 6,
  "checkpoint.every": 6,
  "data.source": "text",
  "data.path": "text/*.txt",
  "data.tokenizer": "bytes",
  "data.vocab": 264,
  "data.directory": "datasets",
  "data.validation": "newest:4",
  "optimizer.learning_rate": 3e-3,
  "model.blocks": 2,
}
ONE = {"model.heads": 6, "model.d_head": 8}
# QuEST's rotations need a multiple of 128 numbers on each of two devices.
EIGHT = {
  "model.heads": 4,
  "model.kv_heads": 2,
  "model.d_head": 64,
  "model.mlp_hidden": 256,
  "model.unroll": 1,
  "mesh.data": 2,
  "mesh.fsdp": 2,
  "mesh.model": 2,
}
# So that preconditioners are made anew several times, and matrices are cut, or an axis is too long.
OF_OPTIMIZER = {
  "psgd": {"optimizer.balance_probability": 0.5, "optimizer.max_size_triangular": 260},
  "shampoo": {"optimizer.precondition_frequency": 3, "optimizer.block_size": 128},
  "soap": {"optimizer.precondition_frequency": 3, "optimizer.max_dim": 260},
}
OF_RUN = {
  "adamw-1": {"log.outliers_every": 6, "log.update_statistics": True},
  "adamw_qat-1": {"data.mask_documents": True, "model.attention": "plain"},
  "muon-1": {"log.update_statistics": True, "micro_batches": 2},
  "scion_qat-1": {"quant.rules.first.paths": "layers/0/.*", "quant.rules.first.recipe": "lsq_w4a4"},
  "shampoo-1": {"optimizer.block_size": 32, "log.update_statistics": True},
  "shampoo_qat-8": {"optimizer.refresh": "staggered"},
  "soap-8": {"optimizer.refresh": "staggered"},
}


@dataclasses.dataclass(frozen=True)
class Run:
  """Command to run, and the name of its result."""

  name: str
  workdir: str
  devices: int
  module: str
  arguments: tuple[str, ...]
  after: str | None = None  # run whose workdir it needs


def git(*words: str) -> bytes:
  return subprocess.run(["git", *words], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout


def optimizers_of(revision: str) -> list[str]:
  """Optimizers of a commit or, for ".", of the working tree: those with a config of either kind."""
  if revision == ".":
    files = {path.name for path in (ROOT / "configs").iterdir()}
  else:
    files = set(git("ls-tree", "--name-only", f"{revision}:configs").decode().split())
  names = {name.removesuffix(".py") for name in files}
  return sorted(name for name in names if name + QAT in names)


def plan(optimizers: list[str], quick: bool) -> list[Run]:
  """Runs that commits are compared by; the longest first."""
  runs = []
  for devices, optimizer, suffix in itertools.product((8, 1), optimizers[::-1], (QAT, "")):
    name = f"{optimizer}{suffix}-{devices}"
    settings = {
      **SETTINGS,
      **(ONE if devices == 1 else EIGHT),
      **OF_OPTIMIZER.get(optimizer, {}),
      **OF_RUN.get(name, {}),
    }
    overrides = ",".join(["nano", *(f"{key}={value}" for key, value in settings.items())])
    config = f"--config={{tree}}/configs/{optimizer}{suffix}.py:{overrides}"
    if devices == 1 or not quick:
      runs.append(Run(name, name, devices, "main", (config, f"--workdir={name}")))
  if "adamw" in optimizers and not quick:
    runs.append(
      Run(
        "adamw-ptq",
        "adamw-1",
        1,
        "evaluate",
        (
          "--workdir=adamw-1",
          "--recipes=rtn_w4a4",
          "--methods=rtn,gptq,hadamard+gptq",
          "--calibration=8",
        ),
        after="adamw-1",
      )
    )
  return runs


def write_corpus(folder: pathlib.Path) -> None:
  """Documents of a few words, the same each time."""
  draw = random.Random(0)
  folder.mkdir()
  for i in range(40):
    words = [draw.choice(["the", "of", "and", "that", "it"]) for _ in range(draw.randint(40, 160))]
    (folder / f"{i:02d}.txt").write_text(" ".join(words) + ".\n")


def results(revision: str, runs: list[Run], jobs: int) -> dict[str, dict]:
  """{name of a run: its parts} of a commit or, for ".", of the working tree."""
  if revision == "." and not git("status", "--porcelain"):
    revision = "HEAD"
  with tempfile.TemporaryDirectory(prefix="guard-") as temporary:
    scratch = pathlib.Path(temporary)
    if revision == ".":
      tree, kept = ROOT, scratch / "results"
    else:
      commit = git("rev-parse", f"{revision}^{{commit}}").decode().strip()
      tree, kept = scratch / "tree", CACHE / commit / environment()
    kept.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if not (kept / run.name).exists()]
    needed = [run.after for run in missing]
    missing += [run for run in runs if run.name in needed and run not in missing]
    if missing:
      if revision != ".":
        tree.mkdir()
        subprocess.run(["tar", "-x"], cwd=tree, input=git("archive", commit), check=True)
      write_corpus(scratch / "text")
      execute(missing, tree, scratch, kept, jobs)
    return {run.name: pickle.loads((kept / run.name).read_bytes()) for run in runs}


def environment() -> str:
  """Hash of all that results depend on besides the commit."""
  versions = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
  known = [pathlib.Path(__file__).read_text(), *versions, sys.version, *platform.uname()]
  return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


def execute(
  runs: list[Run], tree: pathlib.Path, scratch: pathlib.Path, kept: pathlib.Path, jobs: int
) -> None:
  """All runs, a core each, since sums round differently on other numbers of cores."""
  for key in [key for key in os.environ if key.startswith(("JAX_", "XLA_"))]:
    del os.environ[key]
  os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of LAPACK: several on one core spin
  for library in LIBRARIES:
    importlib.import_module(library)
  cores = sorted(os.sched_getaffinity(0))[:jobs]
  waiting, running, ended = list(runs), {}, set()
  while waiting or running:
    ready = [run for run in waiting if run.after is None or run.after in ended]
    if ready and cores:
      waiting.remove(ready[0])
      core, pid = cores.pop(), os.fork()
      if not pid:
        child(ready[0], core, tree, scratch, kept)
      running[pid] = ready[0], core, time.perf_counter()
      continue
    pid, status, used = os.wait4(-1, 0)
    run, core, began = running.pop(pid)
    cores.append(core)
    spent = f"{time.perf_counter() - began:6.1f} s, {used.ru_utime + used.ru_stime:6.1f} of a core"
    print(f"  {run.name:<14} {spent}", file=sys.stderr, flush=True)
    if status:
      for other in running:
        os.kill(other, signal.SIGKILL)
      print((scratch / f"{run.name}.log").read_text()[-4000:], file=sys.stderr)
      print(f"error: {run.name} failed", file=sys.stderr)
      sys.exit(2)
    ended.add(run.name)


def child(
  run: Run, core: int, tree: pathlib.Path, scratch: pathlib.Path, kept: pathlib.Path
) -> None:
  """One run, in a process of its own, which it ends."""
  try:
    os.sched_setaffinity(0, {core})
    os.chdir(scratch)  # every path in what the run writes is relative to it
    with open(f"{run.name}.log", "w") as log:
      os.dup2(log.fileno(), 1)
      os.dup2(log.fileno(), 2)
    dump = scratch / "dump" / run.name
    os.environ["XLA_FLAGS"] = " ".join([*XLA_FLAGS, f"--xla_dump_to={dump}"])
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", run.devices)
    sys.path.insert(0, str(tree))
    sys.argv = [run.module, *(word.format(tree=tree) for word in run.arguments)]
    try:
      runpy.run_module(f"beyond_outliers.{run.module}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
      assert not end.code, f"exit code {end.code}"
    assert pathlib.Path(str(sys.modules["beyond_outliers"].__file__)).is_relative_to(tree)
    found = collect(run, pathlib.Path(run.workdir), dump)
    (scratch / f"{run.name}.result").write_bytes(pickle.dumps(found))
    shutil.move(scratch / f"{run.name}.result", kept / run.name)
    shutil.rmtree(dump)
    os._exit(0)
  except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def collect(run: Run, workdir: pathlib.Path, dump: pathlib.Path) -> dict:
  """{part: {name of a thing: the thing}} of what a run left."""

  def read(path):
    found = json.loads(path.read_text())
    found.pop("sha256", None)  # of times, too
    found.pop("rows", None)
    return found

  texts = [
    (path.name.split(".")[1], normalized(path.read_text()))
    for path in sorted(dump.glob("*.cpu_after_optimizations.txt"))
  ]
  hlo = [(name, text) for name, text in texts if text.count("\n") >= LARGE]
  if run.module == "evaluate":
    cells = {}
    for path in sorted((workdir / "eval").iterdir()):
      cell = read(path) | dict.fromkeys(OF_A_START, "") | {"name of the file": path.name}
      del cell["seconds"], cell["source"]["workdir"]
      cells[path.stem.rpartition("-")[0]] = cell  # by the name without the hash
    return {"hlo": hlo, "eval": flat(cells)}
  status, manifest = read(workdir / "status.json"), read(workdir / "manifest.json")
  assert status["status"] == "done", status
  manifest |= dict.fromkeys((*OF_A_START, "config"), "")
  (workdir / "manifest.json").write_text(json.dumps(manifest))
  arrays, place = arrays_of(workdir / "checkpoints", SETTINGS["steps"])
  stored = sorted(path.relative_to(workdir) for path in workdir.rglob("*"))
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  metrics = {
    f"row {i}, step {row['step']}, {name}": value
    for i, row in enumerate(rows)
    for name, value in row.items()
    if name not in TIMES
  }
  return {
    "hlo": hlo,
    "metrics": metrics,
    "arrays": arrays,
    "workdir": flat(
      {
        # Below `state`, Orbax names files by chance.
        "files": {str(path): "" for path in stored if "state" not in path.parts[:-1]},
        "config.json": read(workdir / "config.json"),
        "manifest.json": manifest,
        "status.json": {**status, "time": ""},
        "data": place,
      }
    ),
  }


def arrays_of(directory: pathlib.Path, step: int) -> tuple[dict, dict]:
  """({path: array} of the state, where the data stand), by Orbax alone."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
  with ocp.CheckpointManager(directory.absolute(), item_handlers=handlers) as manager:
    found = manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(), data=ocp.args.JsonRestore())
    )
  leaves = jax.tree_util.tree_leaves_with_path(found.state)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in leaves
  }, found.data


def flat(tree: object, path: str = "") -> dict:
  """{path: leaf} of nested dictionaries."""
  if not isinstance(tree, dict):
    return {path: tree}
  return {
    name: leaf
    for key, value in tree.items()
    for name, leaf in flat(value, f"{path}: {key}" if path else key).items()
  }


def normalized(text: str) -> str:
  """An optimized program without names, places in the source, and lists of those."""
  head, _, rest = text.partition("\n")
  lines = itertools.dropwhile(lambda line: not line.startswith(("%", "ENTRY")), rest.split("\n"))
  body = re.sub(r', metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*"|\{[^{}]*\})*\}', "", "\n".join(lines))

  def signature(line):
    return re.sub(r"[\w.\-]+: ", "", line[0])

  body = re.sub(r"^(?:%|ENTRY ).*\{$", signature, body, flags=re.MULTILINE)
  numbers: dict[str, str] = {}
  body = re.sub(r"%[\w.\-]+", lambda name: numbers.setdefault(name[0], f"%{len(numbers)}"), body)
  return re.sub(r"^HloModule [^,]*", "HloModule", head) + "\n" + body
