"""What a run leaves in its workdir: rows that survive a kill, a lock that does not, and lines for a
person."""

import io
import json
import math
import os
import pathlib
import struct
import subprocess
import sys

import jax
import pytest
from etils import epath

from beyond_outliers import workdir as workdir_lib
from beyond_outliers import writers

ROOT = pathlib.Path(__file__).parent.parent
TRAIN = {
  "step": 30,
  "train/loss": 5.25,
  "tokens_per_second": 1234.5,
  "flops_per_second": 2e9,
  "peak_share": 0.5,
  "seconds_left": 61.2,
}
EVAL = {
  "step": 30,
  "eval/loss": 5.0,
  "eval/loss_stderr": 0.125,
  "eval/perplexity": math.exp(5.0),
  "eval/bits_per_byte": 1.5,
  "eval/documents": 10,
  "eval/seconds": 2.0,
}


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluations_of_averages_say_of_what_they_are():
  file = io.StringIO()
  console = writers.Console(200, file)
  for name, more in (("eval/ema", {}), ("eval/last", {"eval/last/checkpoints": 3})):
    console.write({key.replace("eval", name): value for key, value in EVAL.items()} | more)
  first, second = file.getvalue().splitlines()
  assert "moving average: validation loss 5.0000 ± 0.1250 nats" in first
  assert "mean of 3 checkpoints: validation loss 5.0000" in second


def test_metrics_are_one_row_a_line_on_disk_at_once(tmp_path):
  path = epath.Path(tmp_path / "metrics.jsonl")
  lines = writers.JsonLines(workdir_lib.Workdir(tmp_path), 0)
  lines.write({"step": 1, "train/loss": 2.5, "eval/bits_per_byte": None})
  assert rows(path) == [{"step": 1, "train/loss": 2.5, "eval/bits_per_byte": None}], "not flushed"
  lines.write({"step": 2, "train/loss": math.nan, "gradient_norm": math.inf, "skipped": 3})
  lines.close()
  assert "NaN" not in path.read_text() and "Infinity" not in path.read_text(), "not JSON"
  assert rows(path)[1] == {"step": 2, "train/loss": None, "gradient_norm": None, "skipped": 3}


def test_a_resumed_run_drops_the_rows_it_will_write_again_and_a_torn_line(tmp_path):
  path = epath.Path(tmp_path / "metrics.jsonl")
  path.write_text(
    '{"step": 10, "train/loss": 3.0}\n{"step": 20, "eval/loss": 2.0}\n'
    '{"step": 30, "train/loss": 1.0}\n'
    '{"step": 40, "tra'
  )
  lines = writers.JsonLines(workdir_lib.Workdir(tmp_path), 20)
  lines.write({"step": 30, "train/loss": 1.5})
  lines.close()
  assert rows(path) == [
    {"step": 10, "train/loss": 3.0},
    {"step": 20, "eval/loss": 2.0},
    {"step": 30, "train/loss": 1.5},
  ]
  assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_files_of_a_workdir_are_replaced_whole(tmp_path):
  workdir = workdir_lib.Workdir(tmp_path / "runs" / "one")
  assert workdir.read("config.json") is None
  workdir.write("config.json", {"steps": 3, "nested": {"a": [1, None]}})
  workdir.write("config.json", {"steps": 4})
  assert workdir.read("config.json") == {"steps": 4}
  workdir.set_status("preempted", 12, "asked to stop")
  status = workdir.read("status.json")
  assert (status["status"], status["step"], status["reason"]) == ("preempted", 12, "asked to stop")
  assert sorted(os.listdir(workdir.path)) == ["config.json", "status.json"], "no temporary files"
  assert workdir.checkpoints == workdir.path / "checkpoints"


def test_a_run_shows_that_it_goes_on_and_fails_but_once(tmp_path):
  workdir = workdir_lib.Workdir(tmp_path)
  heartbeat = writers.Heartbeat(workdir, 20)
  heartbeat.write({"step": 30, "train/loss": 1.5})
  status = workdir.read("status.json")
  assert (status["status"], status["step"], status["first"]) == ("running", 30, 20)
  workdir.set_failed(20, "process 1 of 2: OSError")
  workdir.set_failed(20, "another")
  status = workdir.read("status.json")
  assert (status["status"], status["reason"]) == ("failed", "process 1 of 2: OSError")


def test_a_manifest_says_where_and_with_what(tmp_path):
  manifest = json.loads(json.dumps(workdir_lib.manifest({"data": {"fingerprint": "abc"}})))
  assert manifest["data"] == {"fingerprint": "abc"}
  assert manifest["packages"]["jax"] == jax.__version__ and set(manifest["packages"]) == set(
    workdir_lib.PACKAGES
  )
  assert manifest["devices"] == {"kind": "cpu", "count": 8, "processes": 1, "backend": "cpu"}
  assert manifest["python"] == sys.version.split()[0] and manifest["command"][1:] == sys.argv
  if (ROOT / ".git").exists():
    commit = subprocess.run(
      ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert manifest["git"]["commit"] == commit and isinstance(manifest["git"]["changed"], bool)


HOLDER = """
import sys
from beyond_outliers import workdir as workdir_lib
workdir = workdir_lib.Workdir(sys.argv[1])
with workdir.lock():
  print("locked", flush=True)
  sys.stdin.read()
"""


def test_a_second_process_is_kept_out_by_name_and_a_dead_one_is_not_in_the_way(tmp_path):
  holder = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(tmp_path)],
    cwd=ROOT,
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  try:
    assert holder.stdout.readline() == "locked\n"
    held = rf"{tmp_path} is in use by process {holder.pid} on .*; .*--workdir"
    with pytest.raises(workdir_lib.WorkdirError, match=held), workdir_lib.Workdir(tmp_path).lock():
      pass
  finally:
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
  other = workdir_lib.Workdir(tmp_path)
  with workdir_lib.Workdir(tmp_path).lock():
    text = (tmp_path / "lock").read_text()
    assert text.startswith(f"process {os.getpid()} on ") and str(holder.pid) not in text.replace(
      str(os.getpid()), ""
    )
    with pytest.raises(workdir_lib.WorkdirError, match=f"process {os.getpid()}"), other.lock():
      pass
  with other.lock():
    pass


def test_the_address_of_an_object_store_is_refused():
  with pytest.raises(workdir_lib.WorkdirError, match=r"gs://bucket/run: .* give a mounted folder"):
    workdir_lib.Workdir("gs://bucket/run")


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_elsewhere_than_on_a_terminal_progress_is_plain_lines():
  file = io.StringIO()
  console = writers.Console(200, file)
  console.write(TRAIN)
  console.write(EVAL)
  console.write({"step": 31})
  console.close()
  train, evaluation = file.getvalue().splitlines()
  assert (
    train
    == "step     30/200 · loss 5.2500 · 1,234 tokens/s · 2 GFLOP/s (50% of peak) · 0:01:01 left"
  )
  assert evaluation == (
    "step     30 · validation loss 5.0000 ± 0.1250 nats · perplexity 148.41 · "
    "1.5000 bits per byte · 10 documents, 2.0 s"
  )


def test_on_a_terminal_one_line_is_redrawn_and_others_start_below_it():
  file = Terminal()
  console = writers.Console(200, file)
  console.write(TRAIN)
  console.write(TRAIN | {"step": 200})
  console.write(EVAL)
  console.line("saved")
  console.write(TRAIN)
  console.close()
  first, second, third = file.getvalue().split("\r\x1b[K")[1:]
  assert first.startswith("━" * 4 + "─" * 20 + " 30/200 · loss 5.2500") and "\n" not in first
  assert second.startswith("━" * 24 + " 200/200")
  assert (
    second.splitlines()[1].startswith("step     30 · validation loss")
    and second.splitlines()[2] == "saved"
  )
  assert third.endswith("left\n") or third.endswith("left\n\n"), (
    "the shell's prompt must not stand behind the line"
  )


@pytest.mark.parametrize("terminal", [io.StringIO, Terminal])
def test_a_row_with_what_is_not_known_can_still_be_shown(terminal):
  file = terminal()
  console = writers.Console(200, file)
  console.write(EVAL | {"eval/bits_per_byte": None, "eval/loss_stderr": math.nan})
  console.write(TRAIN | {"train/loss": math.nan})
  console.close()
  assert "5.0000" in file.getvalue() and "loss nan" in file.getvalue()


def test_tensorboard_gets_every_number_under_its_name_and_step(tmp_path):
  pytest.importorskip("tensorboardX", reason="needs the extra 'tensorboard'")
  from tensorboardX.proto import event_pb2

  writer = writers.TensorBoard(epath.Path(tmp_path), 7)
  writer.write({"step": 8, "train/loss": 2.5, "eval/bits_per_byte": None})
  writer.close()
  (path,) = tmp_path.iterdir()
  data, events = path.read_bytes(), []
  while data:  # records: length, its checksum, event, its checksum
    (length,) = struct.unpack("<Q", data[:8])
    events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  assert [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value] == [
    (8, "train/loss", 2.5)
  ]
  assert any(e.session_log.status == event_pb2.SessionLog.START and e.step == 8 for e in events), (
    "later rows are not purged"
  )
