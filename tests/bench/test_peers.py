"""Alternating steps: their order, figures from their times, and contenders that cannot start."""

import dataclasses
import json
import subprocess
import sys
import types

import numpy as np
import pytest

from beyond_outliers.bench import peer_works, peers


def figures(seconds, memory=100):
  return {"seconds": seconds, "cpu_seconds": seconds / 2, "memory_bytes": memory, "result": 1.0}


class Told:
  """A contender that notes when it is told to step."""

  def __init__(self, name, log):
    told = [name]
    self.stdin = types.SimpleNamespace(write=lambda text: log.append((*told, text)), flush=list)
    self.stdout = types.SimpleNamespace(readline=lambda: json.dumps(figures(1.0)) + "\n")


def test_every_second_round_goes_backwards_and_one_runs_at_a_time():
  log = []
  taken = peers.alternate({name: Told(name, log) for name in "abc"}, 3)
  assert log == [(name, "go\n") for name in "abccbaabc"]
  assert {name: len(steps) for name, steps in taken.items()} == {"a": 3, "b": 3, "c": 3}


def test_one_that_ends_early_is_left_out_and_the_others_go_on(tmp_path):
  """Its failure, after minutes of compiling, does not lose the others' figures."""
  steps = (
    "import sys\nprint('x')\nfor number, _ in enumerate(sys.stdin):\n  if number == {}: 1 / 0\n"
  )
  line = f"  print({json.dumps(json.dumps(figures(1.0)))}, flush=True)\n"
  pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
  running = {
    name: subprocess.Popen([sys.executable, "-c", steps.format(last) + line], **pipes)
    for name, last in (("whole", -1), ("brief", 1))
  }
  taken = peers.alternate(running, 3)
  assert {name: len(times) for name, times in taken.items()} == {"whole": 3}
  for process in running.values():
    process.communicate()


def test_ratios_are_of_the_same_round():
  """Both are twice as slow in the second round: only a ratio of medians would show that."""
  ours = [figures(1.0), figures(2.0), figures(1.2, memory=300)]
  theirs = [figures(2.0), figures(4.0), figures(2.0, memory=200)]
  found = peers.figures_of(figures(8.0), theirs, (figures(6.0), ours))
  assert found["ratio"] == pytest.approx([0.5, 0.5, 0.6])
  assert found["cpu_ratio"] == pytest.approx([0.5, 0.5, 0.6])
  assert (found["first_seconds"], found["first_ratio"]) == (8.0, 0.75)
  assert (found["seconds"], found["memory_bytes"], found["memory_ratio"]) == (2.0, 200, 1.5)
  assert "ratio" not in peers.figures_of(figures(8.0), theirs, None), "ours did not run"


def test_a_piece_of_work_that_takes_long_is_done_in_few_rounds(monkeypatch):
  log = []
  monkeypatch.setattr(peers, "alternate", lambda running, rounds: log.append(rounds) or {})
  for most in (3, 10):
    peers.measure_work(peer_works.Work(lambda folder: {}, {}, rounds=most), 6, sys.executable)
  assert log == [3, 6]


def work_of(told, **contenders):
  """Work for contenders of one kind, which need no files."""
  return peer_works.Work(lambda folder: told, contenders)


def test_a_contender_that_cannot_start_is_told_with_its_last_line(tmp_path):
  """Not by an exception, after the others have compiled for minutes."""
  work = work_of({}, torch=peer_works.torch_step("none", False))
  python = tmp_path / "python"
  python.write_text("#!/bin/sh\necho a reason >&2\necho the last >&2\nexit 1\n")
  python.chmod(0o755)
  assert peers.measure_work(work, 6, str(python))["contenders"] == {"torch": {"failed": "the last"}}
  ours = peers.figures_of(figures(1.0), [figures(1.0)], None)
  table = peers.peers_table({"machine": peers.machine(), "rows": {"50m_float32": {
    "contenders": {"torch": {"failed": "the last"}, "ours": ours}, "load": 0.0,
  }}})  # fmt: skip
  assert "failed: the last" in table and "ours" in table


def test_memory_is_not_that_of_the_program_that_started_it():
  """Linux's ru_maxrss would include that."""
  held = np.ones(50_000_000)
  program = "from beyond_outliers.bench import contenders; print(contenders.peak_memory())"
  said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert 0 < int(said.stdout) < held.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["huggingface", "sentencepiece"])
def test_preparing_gives_as_many_tokens_as_the_library(tmp_path, tokenizer):
  """The ids themselves are compared in tests/data; here both must do the same work."""
  if tokenizer == "huggingface":
    pytest.importorskip("tokenizers", reason="the extra hf is not installed")
  told = peer_works.speeches(tmp_path, tokenizer)
  lines = (tmp_path / "documents.jsonl").read_text().splitlines(keepends=True)
  (tmp_path / "documents.jsonl").write_text("".join(lines[:12]))
  found = peers.measure_work(work_of(told, **peer_works.ENCODING), 1, sys.executable)["contenders"]
  assert found["ours"]["result"] == found["the library"]["result"] > 10_000, found


@pytest.mark.slow
@pytest.mark.parametrize("module", ["ours", "bare"])
def test_our_contenders_take_the_same_step(module, tmp_path):
  """A loss near ln 2048, that falls."""
  told = peer_works.a_step(tmp_path, size="nano", dtype="float32")
  work = work_of(told, ours=peer_works.Contender(module, {"recipe": "none"}))
  found = peers.measure_work(work, 2, sys.executable)["contenders"]["ours"]
  assert found["ratio"] == [1.0, 1.0, 1.0] and 4.0 < found["result"] < 7.6, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scoring", "cell"])
def test_ours_does_the_work_again(name, monkeypatch):
  prepare = peer_works.preparation.prepare
  brief = dict(validation="newest:1")
  monkeypatch.setattr(
    peer_works.preparation, "prepare", lambda c: prepare(dataclasses.replace(c, **brief))
  )
  row = peer_works.WORKS[name]
  row = row._replace(contenders={"ours": row.contenders["ours"]})
  assert "ratio" in peers.measure_work(row, 2, sys.executable)["contenders"]["ours"]
