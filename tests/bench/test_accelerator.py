"""The accelerator's check: parts are isolated, kept and resumed; its table; and the whole command
on tiny models."""

import json
import subprocess
import sys

import commands
import pytest

from beyond_outliers import quant
from beyond_outliers.bench.accelerator import (
  correctness,
  driver,
  nano,
  parts,
  quantization,
  updates,
  utilization,
)
from beyond_outliers.bench.study_configs import study_config

# Runs made-up parts in a process that has not asked for devices, twice, and prints both tables.
MADE_UP = """
import json, os, pathlib, signal, sys, time
from beyond_outliers.bench.accelerator import driver
from beyond_outliers.bench.accelerator.parts import CheckPart

folder = pathlib.Path(sys.argv[1])
mended = folder / "mended"

def count(name):
  with open(folder / "calls", "a") as file:
    file.write(name + "\\n")
  return {"value": name}

def unless_mended(act):
  def measure():
    if not mended.exists():
      act()
    return count("mended")
  return measure

def fail():
  raise ArithmeticError("no such product\\nmore of it")

def fill():
  raise MemoryError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

def cells(found, others):
  return [(row, figures["value"], "") for row, figures in found.items()]

def part(*measures):
  def rows(scale, found):
    for number, measure in enumerate(measures):
      yield f"row {number}", measure
  return CheckPart(rows, cells, 1)

PARTS = {
  "right": part(lambda: count("right")),
  "fails": part(lambda: count("before"), unless_mended(fail), lambda: count("behind")),
  "fills": part(unless_mended(fill)),
  "dies": part(lambda: count("lived"), unless_mended(lambda: os.kill(os.getpid(), signal.SIGKILL))),
  "hangs": part(lambda: count("quick"), unless_mended(lambda: time.sleep(600))),
  "wrong": part(lambda: {"value": "off", "right": mended.exists()}),
}
driver.measure_accelerator(["hangs"], folder / "out", "tiny", 0.15, PARTS)
for names in (PARTS.keys() - {"hangs"}, PARTS):
  files = driver.measure_accelerator(names, folder / "out", "tiny", 9, PARTS)
  print(json.dumps([files, driver.failures(files), driver.accelerator_table(files, PARTS)]))
  mended.touch()
"""


def test_what_breaks_a_part_is_told_and_loses_nothing_else(tmp_path):
  process = subprocess.run(
    [sys.executable, "-c", MADE_UP, str(tmp_path)],
    cwd=commands.ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert process.returncode == 0, process.stderr
  (files, failed, table), (again, failed_again, _) = map(json.loads, process.stdout.splitlines())
  status = {name: file["status"] for name, file in files.items()}
  assert failed and status == {
    "right": "done",
    "fails": "failed",
    "fills": "done",
    "dies": "killed",
    "hangs": "killed",
    "wrong": "failed",
  }
  assert files["fails"]["rows"] == {
    "row 0": {"value": "before"},
    "row 1": {"failed": "ArithmeticError: no such product"},
    "row 2": {"value": "behind"},
  }
  assert files["fills"]["rows"]["row 0"].keys() == {"does_not_fit"}
  assert files["dies"]["rows"] == {"row 0": {"value": "lived"}} and "-9" in files["dies"]["reason"]
  assert files["hangs"]["rows"] == {"row 0": {"value": "quick"}}
  for said in (
    "failed: ArithmeticError: no such product",
    "does not fit: ",
    "code -9",
    "killed after",
  ):
    assert said in table
  # The second time, only what failed, died or hung is measured; what did not fit is kept.
  assert not failed_again and {file["status"] for file in again.values()} == {"done"}
  assert again["fails"]["rows"]["row 1"] == {"value": "mended"}
  calls = (tmp_path / "calls").read_text().split()
  assert calls == ["quick", "right", "before", "behind", "lived", *["mended"] * 3]


def test_files_of_other_code_are_made_anew_and_others_are_refused(tmp_path):
  identity = {"code": "a"}
  driver._write(tmp_path, "x", {"status": "done", "reason": "", "identity": identity, "rows": {}})
  assert driver._read(tmp_path, "x", identity)["status"] == "done"
  assert driver._read(tmp_path, "x", {"code": "b"}) == {}
  for text in ("[]", "{", '{"status": 1}'):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(driver.ConfigError, match=r"x\.json: .*remove the file"):
      driver._read(tmp_path, "x", identity)


def setting(size, windows, mfu, **change):
  row = {"size": size, "setting": ["fused", "none", windows], "mfu": mfu}
  return {**row, "flops_per_second": mfu * 1e15, "tokens_per_second": 2e5, **change}


def test_the_search_goes_on_from_the_best_so_far():
  rows, found, order = utilization.part_rows("full", found := {}), found, []
  for name, _ in rows:
    size, attention, _, windows = name.split("/")
    order.append(name)
    found[name] = setting(size, int(windows), 0.5 if windows == "16" else 0.4)
    found[name]["setting"][0] = attention
  assert order[:2] == ["760m/fused/none/8", "350m/fused/none/16"]
  assert order.index("760m/fused/none/16") < order.index("760m/blockwise/none/16")
  assert utilization.best_of(found, "760m")["setting"][2] == 16


def test_aims_are_met_or_missed():
  """At 460 TFLOP/s a step of 760m takes 5 s: half a second more is 10 % on top of AdamW's."""
  found = {
    "ceilings": {"product/bfloat16": {"flops_per_second": 8e14, "data_sheet": 1e15}},
    "utilization": {
      "a": setting("760m", 8, 0.46),
      "b": setting("760m", 16, 0.44),
      "c": setting("350m", 8, 0.51),
    },
    "updates": {
      name: {
        "amortised_seconds": seconds,
        "ordinary_seconds": 0.01,
        "longest_seconds": 9.0,
        "model_flops": 5 * 4.6e14,
      }
      for name, seconds in (("adamw", 0.01), ("shampoo", 0.6), ("shampoo, mild", 0.5))
    },
    "recipes": {
      "quest_w4a4": {"ratio": 1.31, "seconds": 0.2, "plain_seconds": 0.1, "dtype": "bfloat16"}
    },
  }
  shown = {
    what: (figure, aim)
    for name in found
    for what, figure, aim in parts.CHECK_PARTS[name].cells(found[name], found)
  }
  assert shown["760m, best of 2: fused, remat none, 8 windows"] == (
    "MFU 46.0%, 57% of the product; 200,000 tokens/s",
    "≥ 50%, missed",
  )
  assert shown["350m, best of 1: fused, remat none, 8 windows"][1] == "≥ 50%, met"
  assert "+11.8% over AdamW" in shown["shampoo"][0] and shown["shampoo"][1] == "≤ +10%, missed"
  assert shown["shampoo, mild"][1] == "≤ +10%, met" and shown["adamw"][1] == ""
  assert shown["quest_w4a4 over plain, bfloat16"][1] == "≤ 1.3 ×, missed"


def test_time_of_parts_is_that_of_the_whole():
  assert sum(part.seconds for part in parts.CHECK_PARTS.values()) == 8 * 60


def test_recorded_losses_are_far_from_chance_and_rounding_is_small():
  for scale in parts.CHECK_SCALES:
    losses, tolerance = nano.recorded_losses(scale)
    assert len(losses) == nano.STEPS and losses[0] - losses[-1] > 10 * tolerance > 0


@pytest.mark.parametrize(
  "arguments, said",
  [
    ([], "--out: the folder"),
    (["--out=/dev/null/x"], "/dev/null/x"),
    (["--out=x", "--only=nothing"], "--only = 'nothing': expected some of ceilings"),
    (["--out=x", "--minutes=0"], "--minutes = 0"),
    (["--out=x", "--minutes=nan"], "--minutes = nan"),
    (["--out=x", "--repeats=2"], "--repeats = 2: changes nothing of --accelerator"),
  ],
)
def test_bad_input_is_refused_in_a_line(arguments, said, refusals):
  code, text = refusals[tuple(arguments)]
  assert code == 2 and text.startswith("error: ") and text.count("\n") == 1 and said in text, text


@pytest.fixture(scope="module")
def refusals():
  (mark,) = test_bad_input_is_refused_in_a_line.pytestmark
  given = [arguments for arguments, _ in mark.args[1]]
  told, _ = commands.answers("bench.__main__", [["--accelerator", *words] for words in given])
  return {tuple(words): answer for words, answer in zip(given, told, strict=True)}


@pytest.mark.slow
def test_the_whole_command_at_tiny_models(tmp_path):
  arguments = ["--accelerator", f"--out={tmp_path}"]
  first = commands.run("beyond_outliers.bench", *arguments, "--only=ceilings")
  assert first.returncode == 0, first.stderr
  before = (tmp_path / "ceilings.json").read_bytes()
  assert [path.name for path in tmp_path.glob("*.json")] == ["ceilings.json"]
  process = commands.run("beyond_outliers.bench", *arguments)
  assert process.returncode == 0, process.stdout + process.stderr
  assert (tmp_path / "ceilings.json").read_bytes() == before
  files = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
  assert files.keys() == parts.CHECK_PARTS.keys()
  for file in files.values():
    assert file["status"] == "done" and file["scale"] == "tiny" and file["rows"]
    assert file["device"]["platform"] == "cpu" and "--accelerator" in file["command"]
  title, head, *lines = process.stdout.splitlines()
  assert "× cpu" in title and head.split() == ["part", "what", "figure", "aim"]
  assert [line.split()[0] for line in lines if line[0] != " "] == list(parts.CHECK_PARTS)
  assert "MISSED" not in process.stdout


def test_all_that_is_measured_resolves():
  """Also at full scale, which no test runs."""
  for size, start in utilization.STARTS["full"].items():
    for field, values in utilization.ALTERNATIVES["full"].items():
      for value in values:
        changed = int(start.windows * value) if field == "windows" else value
        argument = start._replace(**{field: changed}).argument(size)
        assert study_config("adamw", argument).size == size
  for optimizer, settings in updates.TIMED_UPDATES.values():
    c = study_config(optimizer, f"760m,{settings}".rstrip(","))
    assert c.optimizer.groups["hidden"].optimizer.name == optimizer
  for argument in (quantization.QUANTIZED_STEPS["full"], f"125m,{quantization.EVALUATED['full']}"):
    assert study_config("adamw", argument).model.attention == "fused"
  assert {*quantization.STEP_RECIPES["full"], *correctness.LAYERS["full"]} <= quant.RECIPES.keys()
