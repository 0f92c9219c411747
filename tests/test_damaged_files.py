"""Damage on the disk: every kind of file that is written, when flipped, cut, deleted or replaced by
another of its kind, is refused or changes nothing that is read."""

import dataclasses
import fnmatch
import functools
import hashlib
import io
import json
import pathlib
import pickle
import shutil
import types

import commands
import jax
import numpy as np
import pytest
import small_models

from beyond_outliers import checkpoint, config, data, runs, workdir, writers
from beyond_outliers.analysis import report
from beyond_outliers.config import sums
from beyond_outliers.config.sums import SUMS
from beyond_outliers.data import sums as data_sums
from beyond_outliers.errors import Refusal, WorkdirError
from beyond_outliers.evaluate import results
from beyond_outliers.model import hf, transformer
from beyond_outliers.quant import storage
from beyond_outliers.train import step as step_lib
from configs import adamw
from launch import recorded

DATASET = config.Data(
  source="jsonl",
  path="x.jsonl",
  field="text",
  tokenizer="bytes",
  vocab=300,
  separator="eot",
  validation="newest:3",
  mask_documents=False,
  reader="shards",
  directory="datasets",
  seed=0,
  shard_tokens=200,
  readers=1,
  prefetch=1,
)
LLAMA = dataclasses.replace(
  small_models.MODELS["llama"],
  **{"vocab": 16, "blocks": 1, "heads": 1, "kv_heads": 1, "d_head": 2, "d_model": 2},
  mlp_hidden=2,
  tied=False,
)


def write_dataset(folder, number, reader):
  """number 1: another, whose files have the same sizes."""
  folder.mkdir()
  texts = [f"{i} " + "ab"[number] * (7 + i % 5) for i in range(30)]
  (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  letters = {letter: i for i, letter in enumerate(sorted({*"".join(texts), "ab"[1 - number]}))}
  words = {**letters, "<unk>": len(letters), "</s>": len(letters) + 1 + number}
  special = {"id": words["</s>"], "content": "</s>", "special": True}
  described = {
    "version": "1.0",
    "added_tokens": [{**special, **dict.fromkeys(FLAGS, False)}],
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated"},
    "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
  }
  described["pre_tokenizer"]["invert"] = False
  (folder / "tokenizer.json").write_text(json.dumps(described))
  cfg = dataclasses.replace(
    DATASET,
    path=str(folder / "x.jsonl"),
    tokenizer=f"huggingface:{folder / 'tokenizer.json'}",
    directory=str(folder / "datasets"),
    reader=reader,
  )
  return pathlib.Path(data.prepare(cfg, log=lambda text: None).directory)


FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def state_of(number):
  zero = np.zeros((), np.int32)
  kernel = np.full((4, 64), number, np.float32)
  return step_lib.TrainState(zero, {"kernel": kernel}, {"mu": kernel}, zero, zero)


OPTIONS = config.Checkpoint(every=1, keep=1, keep_every=0, verify=True)
RESULTS = [(2, "rtn_w4a4", "rtn", {"version": 2, "trained": str(i)}) for i in range(2)]


def write_workdir(folder, number):
  """As a run and an evaluation job leave it, without either."""
  at, c = workdir.Workdir(folder), config.resolve(adamw.get_config(f"nano,steps=2,seed={number}"))
  settings = config.to_dict(c)
  fingerprints = {"directory": "x", "fingerprint": str(number), "tokenizer": "x"}
  manifest = {"id": str(number), "time": "", "config": sums.digest(settings), "resumed": []}
  manifest["data"] = fingerprints
  at.write("config.json", settings)
  at.write("manifest.json", manifest)
  at.write("wandb.json", {"id": f"run {number}", "of": manifest["id"]})
  rows = writers.JsonLines(at, 0)
  for step in (1, 2):
    rows.write({"step": step, "train/loss": 2.5 + number})
  record = {"config": settings, "data": fingerprints, "manifest": manifest, "rows": rows.sha256()}
  checkpoints = checkpoint.Checkpoints(at.checkpoints, OPTIONS)
  checkpoints.save(2, state_of(number), {"batches": 2}, {"seconds": 1.0, "tokens": 8.0}, record)
  checkpoints.close()
  at.set_status("done", 2, "", rows.sha256())
  rows.close()
  identity = dict(zip(("step", "recipe", "method", "settings"), RESULTS[number], strict=True))
  cell = {**identity, "metrics": {"loss": 2.5 + number}, "size_bytes": 4, "tasks": {}}
  results.ResultStore(folder / "eval").write(*RESULTS[number], cell)
  return folder


def read_workdir(folder):
  """What readers of a run find, and a start that goes on with it."""

  def refuse(text):
    raise WorkdirError(text)

  run, at = runs.open(folder), workdir.Workdir(folder)
  if run.status["status"] == "not started":
    refuse(f"{folder}: not started, says every table of runs")
  cell = results.ResultStore(folder / "eval", refuse).read(*RESULTS[0])
  if cell is None:
    refuse(f"{folder}: no such result, so that it is measured again")
  known = at.read("wandb.json")
  if known is None or known["of"] != run.manifest["id"]:
    refuse(f"{folder}: wandb.json is none of it, says `Wandb`, or Weights & Biases: a new run")
  checkpoints = checkpoint.Checkpoints(at.checkpoints, read_only=True)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state_of(0)
  )
  step, state, *where = checkpoints.restore(abstract)
  record = checkpoints.run_of(step)
  at.check()
  if not writers.check_rows(at, step, record["rows"]):
    refuse(f"{folder}: its rows are gone, says the start")
  arrays = jax.tree.map(lambda x: np.asarray(x).tolist(), state)
  described = run.config, run.manifest, run.status, run.metrics().to_dict(), known, record
  return described, cell, step, arrays, where


def write_rates(folder, number):
  folder.mkdir()
  found = types.SimpleNamespace(
    optimizer="adamw", overrides={"optimizer.learning_rate": 0.001 + number}
  )
  c = config.resolve(adamw.get_config())
  report.write_overrides(folder / "tuned.json", c, [found])
  return folder


def read_rates(folder):
  return recorded.found(str(folder / "tuned.json"), "configs/adamw.py", "")


def read_dataset(folder, reader):
  dataset = data.open(str(folder))
  cfg = dataclasses.replace(DATASET, reader=reader)
  batches = data.train_batches(dataset, cfg, context=8, batch_size=2, seed=0)
  try:
    train = [next(batches)["tokens"].tolist() for _ in range(30)]
  finally:
    batches.close()
  validation = data.validation_batches(dataset, cfg, context=8, batch_size=2, documents=0)
  scored = [batch["targets"].tolist() for batch in validation]
  dataset.sums.wait()  # as a run does before it is done
  described = dataset.meta, dataset.fingerprint, dataset.tokenizer.fingerprint
  counted = [
    dataset.bytes(split, 2) for split in ("validation", "train")[: 1 + (reader == "shards")]
  ]
  return train, scored, described, counted, dataset.first_bytes(2)


def write_quantized(folder, number):
  tensors = {"a/codes": np.full(8, number, np.uint8), "a/scale": np.full(2, number, np.float32)}
  model = {"class": "beyond_outliers.model.transformer.Transformer", "config": {}}
  described = {"version": 1, "model": model, "method": f"rtn{number}", "recipe": [], "matrices": {}}
  storage.write_model(folder, tensors, described)
  return folder


def read_quantized(folder):
  tensors, description = storage.read_model(folder)
  return {name: array.tolist() for name, array in tensors.items()}, description


def write_hugging_face(folder, number):
  model = transformer.Transformer(LLAMA)
  params = jax.tree.map(
    lambda leaf: np.full(leaf.shape, number, leaf.dtype), transformer.shapes(model)
  )
  hf.save(model, params, folder / "source", context=32 + number)
  (folder / "source" / "tokenizer.json").write_text(json.dumps({"number": number}))
  hf.save(model, params, folder / "model", like=folder / "source", shard_bytes=200)
  return folder / "model"


def read_hugging_face(folder):
  model, params = hf.load(folder)
  return model.config, jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), params)


# How a folder is written and read, and the kinds of its files.
FOLDERS = {
  **{
    f"dataset, {reader}": (
      functools.partial(write_dataset, reader=reader),
      functools.partial(read_dataset, reader=reader),
      ["meta.json", "tokenizer.json", "validation.starts", "validation.bytes", *kinds],
    )
    for reader, kinds in {
      "shards": ["train.starts", "train.bytes", "train-*.bin", "validation-*.bin"],
      "tfds": ["validation-*.bin", "records/*.json", "records/*.array_record-*"],
    }.items()
  },
  "quantized": (write_quantized, read_quantized, ["model.safetensors", "quantized.json", SUMS]),
  "Hugging Face": (
    write_hugging_face,
    read_hugging_face,
    [
      *("config.json", "model.safetensors.index.json", "model-*.safetensors", "tokenizer.json"),
      SUMS,
    ],
  ),
  "workdir": (
    write_workdir,
    read_workdir,
    [
      *("config.json", "manifest.json", "status.json", "metrics.jsonl", "wandb.json"),
      *("eval/*.json", "checkpoints/**"),
    ],
  ),
  "rates": (write_rates, read_rates, ["tuned.json"]),
}


def flipped(at):
  def flip(path, other):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)

  return flip


def digit_flipped(path, other):
  """The middle one of a text's digits, by one bit: still a number, and JSON."""
  content = bytearray(path.read_bytes())
  digits = [i for i, byte in enumerate(content) if byte in b"2345678"]
  if digits:
    content[digits[len(digits) // 2]] ^= 1
    path.write_bytes(content)


DAMAGES = {
  **{f"flipped at {at}": flipped(at) for at in (0, 0.6, 1)},
  "digit flipped": digit_flipped,
  "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
  "emptied": lambda path, other: path.write_bytes(b""),
  "deleted": lambda path, other: path.unlink(),
  "replaced": lambda path, other: path.write_bytes(other.read_bytes()),
}


class Touching:
  """What leaves a file where it is unpickled."""

  def __init__(self, file):
    self._file = file

  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path(self._file),)


def programs(file):
  """Contents that numpy and pickle would run, to be taken for others."""
  objects = np.array([Touching(file)], object)
  npy, npz = io.BytesIO(), io.BytesIO()
  np.save(npy, objects, allow_pickle=True)
  np.savez(npz, objects=objects)
  return pickle.dumps(Touching(file)), npy.getvalue(), npz.getvalue()


# A file that a flag names: which one is meant is said by whoever gives it.
NAMED = {("tuned.json", "replaced")}


def files(folder):
  """Relative paths; a lock holds nothing that anybody reads."""
  found = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
  return sorted(str(path.relative_to(folder)) for path in found)


def of_kind(folder, kind):
  """The files of a kind that are damaged: the first, and of ** all."""
  return fnmatch.filter(files(folder), kind)[: None if kind.endswith("**") else 1]


def counterpart(other, name):
  """The file in the place of `name`: of the same folder, where Orbax names files by chance."""
  found = files(other)
  parent = str(pathlib.PurePath(name).parent)
  return other / (name if name in found else fnmatch.filter(found, f"{parent}/*")[0])


def is_same_json(one, other):
  try:
    return json.loads(one.read_bytes()) == json.loads(other.read_bytes())
  except (ValueError, FileNotFoundError):
    return False


SLOW = ("workdir",)  # of many files


@pytest.fixture(
  scope="module",
  params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FOLDERS],
)
def written(request, tmp_path_factory):
  write, read, kinds = FOLDERS[request.param]
  root = tmp_path_factory.mktemp("written")
  return write(root / "a", 0), write(root / "b", 1), read, kinds


def test_every_file_that_is_written_is_of_a_kind_that_is_damaged_here(written):
  folder, _, _, kinds = written
  found = files(folder)
  assert all(any(fnmatch.fnmatch(name, kind) for kind in kinds) for name in found), found
  assert all(fnmatch.filter(found, kind) for kind in kinds), found


# What commands leave that none of them reads.
NOT_READ = {
  "run/lock": "says who holds the folder, and counts by being locked",
  "run/tensorboard/**": "for TensorBoard",
  "run/profile/**": "for TensorBoard, or Perfetto",
  "datasets/*.lock": "counts by being locked",
  "report/**": "for people",
}


@pytest.mark.slow
def test_every_file_that_commands_leave_is_of_a_kind_that_is_damaged_here(tiny, tmp_path):
  """Or of one that no command reads."""
  settings = {"steps": 2, "log.profile_step": 2, "log.profile_steps": 1, "log.tensorboard": True}
  argument = tiny(**settings, **{"model.blocks": 1, "data.directory": tmp_path / "datasets"})
  chosen, run, made = f"--config=configs/adamw.py:{argument}", tmp_path / "run", tmp_path / "report"
  made.mkdir()
  for name, *flags in (
    ("main", chosen, f"--workdir={run}"),
    ("evaluate", f"--workdir={run}", "--recipes=rtn_w4a4", "--documents=1"),
    ("analysis", f"--root={run}", f"--out={made / 'page'}"),
  ):
    ((code, said),), _ = commands.answers(
      f"{name}.__main__" if name in ("evaluate", "analysis") else name, [flags]
    )
    assert code == 0, said
  kinds = {
    *NOT_READ,
    *(f"datasets/*/{kind}" for kind in FOLDERS["dataset, shards"][-1]),
    *(f"run/{kind}" for kind in FOLDERS["workdir"][-1]),
  }
  found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
  unknown = [name for name in found if not any(fnmatch.fnmatch(name, kind) for kind in kinds)]
  assert not unknown, "rows of FOLDERS or of NOT_READ are missing"
  unmet = {kind for kind in kinds if not fnmatch.filter(found, kind)}
  assert unmet <= {"run/wandb.json", "datasets/*/tokenizer.json"}, "nobody leaves these"


@pytest.mark.parametrize(
  "at_opening", [data_sums.AT_OPENING, pytest.param(0, marks=pytest.mark.slow)]
)
def test_no_damage_is_silent(written, at_opening, tmp_path, monkeypatch):
  """at_opening 0: of a dataset too large to be compared as it is opened."""
  monkeypatch.setattr(data_sums, "AT_OPENING", at_opening)
  folder, other, read, kinds = written
  if not at_opening and "meta.json" not in kinds:
    pytest.skip("no dataset")
  sound, silent, unseen = read(folder), [], []
  for name in [name for kind in kinds for name in of_kind(folder, kind)]:
    for damage, spoil in DAMAGES.items():
      copy = tmp_path / "copy"
      shutil.copytree(folder, copy)
      spoil(copy / name, counterpart(other, name))
      try:
        if read(copy) != sound:
          silent.append((name, damage))
        elif name not in files(copy) or (copy / name).read_bytes() != (folder / name).read_bytes():
          unseen.append((name, damage, is_same_json(copy / name, folder / name)))
      except Refusal as error:
        assert "\n" not in str(error) and str(copy) in str(error), (name, damage, str(error))
      shutil.rmtree(copy)
  assert set(silent) <= NAMED
  # White space of JSON, and a folder without sums, which is one from before there were any.
  unseen = [(name, damage) for name, damage, is_same in unseen if not is_same]
  assert {(pathlib.PurePath(name).name, damage) for name, damage in unseen} <= {
    (SUMS, "deleted")
  }, unseen


def test_a_pickle_in_the_place_of_a_file_is_not_run(written, tmp_path):
  """Also where the sums are the pickle's own."""
  folder, _, read, kinds = written
  run = tmp_path / "run"
  for kind in kinds:
    name = fnmatch.filter(files(folder), kind)[0]
    for content in programs(run):
      copy = tmp_path / "copy"
      shutil.copytree(folder, copy)
      (copy / name).write_bytes(content)
      if name not in (SUMS, "meta.json"):
        (copy / SUMS).unlink(missing_ok=True)
        if (copy / "meta.json").exists():
          meta = json.loads((copy / "meta.json").read_text())
          digest = hashlib.sha256(content).hexdigest()
          meta["files"][name] = {"bytes": len(content), "sha256": digest}
          meta.pop("sha256")
          (copy / "meta.json").write_text(json.dumps(meta))
      try:
        read(copy)
      except Refusal as error:
        assert "\n" not in str(error), (name, str(error))
      else:
        assert name == "tokenizer.json" and "config.json" in kinds, "nobody reads that one"
      assert not run.exists(), name
      shutil.rmtree(copy)
  pickle.loads(programs(run)[0])
  assert run.exists(), "or this would test nothing"
