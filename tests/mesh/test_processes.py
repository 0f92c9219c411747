"""Processes of one run that disagree, fail, are killed or never arrive: how the others end.

They are real processes, which join but do not train."""

import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from beyond_outliers import config
from beyond_outliers.config import cluster
from beyond_outliers.errors import DataError, Failure
from beyond_outliers.mesh import processes

# argv: address, index, file for last words, what it does. Each shows on stdout that it has joined.
CHILD = """
import pathlib, sys, time
import jax, numpy as np
from beyond_outliers import cli, config, mesh
from beyond_outliers.config import cluster
from beyond_outliers.mesh import processes

address, index, words, what = sys.argv[1:]
patience = config.Distributed(5, 2 if what == "come alone" else 60, 5)
if what == "stop when asked":
  cli.end_when_asked("asked to stop", cli.killed_by)
processes.join(
  patience,
  cluster.Membership("the test", address, 2, int(index)),
  stops=what != "stop when asked",
)
if what == "stop when asked":
  cli.tell_when_asked(processes.tell)
try:
  rate = 0.1 if what == "disagree" else 0.003
  processes.agree("configuration", lambda: {"seed": 0, "optimizer.learning_rate": rate})
  print("joined", flush=True)
  with processes.last_words(pathlib.Path(words).write_text):
    if what == "hold rows":
      grid = np.array(jax.devices()).reshape(2, -1).T.reshape(-1, 1, 1)  # by turns one of each
      made = jax.sharding.Mesh(grid, ("data", "fsdp", "model"))
      index, count = mesh.share_of_rows(made)
      batch = mesh.put_batch(np.arange(16).reshape(count, -1)[index], made, 16)
      shards = sorted(batch.addressable_shards, key=lambda shard: shard.index[0].start)
      print([[shard.index[0].start, *shard.data.tolist()] for shard in shards])
      sys.exit()
    if what.startswith("end"):
      time.sleep(2 if what == "end later" else 0)
      print("done")
      processes.end(42)
    if what.startswith("share"):
      folder = pathlib.Path(words).parent / ("both" if what == "share" else index)
      folder.mkdir(exist_ok=True)
      mesh.SEEN_SECONDS = 0.5
      mesh.check_shared(folder, "set --workdir to another")
      processes.end(0)
    if what == "stop when asked":
      time.sleep(2)  # so that both are there
      mesh.from_first("in a collective") if index == "0" else time.sleep(120)
    if what == "lose the other":
      raise jax.errors.JaxRuntimeError("Gloo: Connection reset by peer")
    if what == "refuse":
      raise config.ConfigError("the workdir cannot be written")
    if what == "fail":
      raise OSError(27, "File too large")
    time.sleep(120)
except Exception as error:
  processes.leave(error)
"""


@pytest.fixture
def start(tmp_path):
  """start({index: what it does}) -> the processes of a pair, by index."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    unused = free.getsockname()[1]
  started = []

  def start(what, errors=subprocess.PIPE, port=unused):
    for index, each in what.items():
      words = str(tmp_path / str(index))
      arguments = [f"127.0.0.1:{port}", str(index), words, each]
      started.append(
        subprocess.Popen(
          [sys.executable, "-c", CHILD, *arguments],
          stdout=subprocess.PIPE,
          stderr=errors,
          text=True,
        )
      )
    return started

  yield start
  for process in started:
    process.kill()
    process.communicate()


def wait(process, code):
  _, errors = process.communicate(timeout=60)
  assert process.returncode == code, errors
  return errors


def test_processes_that_were_started_otherwise_are_refused(start):
  one, other = start({0: "wait", 1: "disagree"})
  difference = "optimizer.learning_rate: 0.003 on process 0, 0.1 on process 1"
  assert difference in wait(other, 2) and difference in wait(one, 2)


@pytest.mark.parametrize("later", [0, 1])
def test_one_that_is_done_waits_for_the_others(start, later):
  pair = start({later: "end later", 1 - later: "end"})
  for process in pair:
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 42 and said == "joined\ndone\n", errors


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_ends_the_other(start, tmp_path, failing):
  pair = start({failing: "fail", 1 - failing: "wait"})
  assert "Traceback" in wait(pair[0], 1)
  wait(pair[1], 1)
  reason = f"process {failing} of 2: OSError: [Errno 27] File too large"
  assert (tmp_path / str(1 - failing)).read_text() == reason


def test_a_refusal_ends_another_whose_collective_fails_for_it_in_one_line(start):
  one, other = start({0: "lose the other", 1: "refuse"})
  assert wait(other, 2).endswith("error: the workdir cannot be written\n")
  said = wait(one, 2)
  assert "error: process 1 of 2: the workdir" in said and "Traceback" not in said, said


def test_a_port_that_another_listens_at_is_refused_without_a_crash(start):
  """JAX's service either crashes there or shares the port, and the other run's processes end."""
  with socket.create_server(("", 0), reuse_port=True) as taken:  # as of another run
    with pytest.raises(Failure, match="cannot listen on port"):
      cluster.check_free(f"here:{taken.getsockname()[1]}")
    (one,) = start({0: "wait"}, port=taken.getsockname()[1])
    assert "Address already in use" in wait(one, 1)


@pytest.mark.slow
@pytest.mark.parametrize("what, code", [("share", 0), ("share not", 2)])
def test_a_folder_that_is_not_the_same_on_all_processes_is_refused(start, tmp_path, what, code):
  said = [wait(process, code) for process in start({0: what, 1: what})]
  assert code == 0 or all("is not the same folder on all processes" in each for each in said)
  folder = tmp_path / ("0" if code else "both")
  assert list(folder.iterdir()) == [], "what it was found by is left"


def test_what_one_process_alone_may_have_met_is_raised(monkeypatch):
  """Such as damaged data, since each process reads its own. If all refuse something, they go on."""
  damaged, unfit = DataError("its file is gone"), config.ConfigError("a method")
  processes.raise_alone(damaged)  # of a single process
  monkeypatch.setattr(processes, "_peers", "some")
  processes.raise_alone(unfit)
  for error in (damaged, MemoryError()):
    with pytest.raises(type(error)):
      processes.raise_alone(error)


def test_an_error_on_one_ends_another_that_cannot_write_its_last_words(start, tmp_path):
  """On a disk that is full, for instance, which both of them write to."""
  (tmp_path / "0").mkdir()
  one, other = start({0: "wait", 1: "fail"})
  said = wait(one, 1)
  assert "error: process 1 of 2: OSError" in said and "Traceback" in wait(other, 1)
  assert said.count("error: ") == 1, "it was JAX that ended it"


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_an_error_ends_both_where_nothing_can_be_said(start, tmp_path):
  with open("/dev/full", "w") as full:
    pair = start({0: "fail", 1: "wait"}, errors=full)
  assert [process.wait(60) for process in pair] == [1, 1]
  assert "process 0 of 2: OSError" in (tmp_path / "1").read_text(), "it was JAX that ended it"


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_that_is_asked_to_stop_has_the_others_stop(start, asked, number):
  """With one line each, and one exit code, though another waits in a collective for it."""
  pair = start({0: "stop when asked", 1: "stop when asked"})
  for process in pair:
    assert process.stdout.readline() == "joined\n"
  time.sleep(2.5)
  began = time.monotonic()
  pair[asked].send_signal(number)
  said = [wait(process, 128 + number).splitlines()[1:] for process in pair]
  assert said[asked] == ["asked to stop"]
  assert said[1 - asked] == [f"error: process {asked} of 2: asked to stop"]
  assert time.monotonic() - began < 15


def test_one_that_is_asked_to_stop_waits_for_no_other_that_stands_still(start):
  pair = start({0: "stop when asked", 1: "stop when asked"})
  for process in pair:
    assert process.stdout.readline() == "joined\n"
  pair[0].send_signal(signal.SIGSTOP)
  pair[1].send_signal(signal.SIGTERM)
  assert wait(pair[1], 128 + signal.SIGTERM).splitlines()[-1] == "asked to stop"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_is_killed_or_stands_still_ends_the_other(start, tmp_path, victim, number):
  pair = start({0: "wait", 1: "wait"})
  for process in pair:
    assert process.stdout.readline() == "joined\n"
  time.sleep(2)  # so that both have shown their lives
  pair[victim].send_signal(number)
  wait(pair[1 - victim], 1)
  assert (
    (tmp_path / str(1 - victim))
    .read_text()
    .startswith(f"process {victim} of 2 was killed, is stuck or cannot be reached")
  )


@pytest.mark.slow
def test_one_that_waits_in_vain_says_so(start):
  (alone,) = start({1: "come alone"})
  assert "distributed.initialization_seconds = 2" in wait(alone, 1)


def test_the_first_process_never_misses_itself():
  """Even if the other's last sign of life is recent: JAX may know before it becomes old."""
  program = (
    "from beyond_outliers.mesh import processes\n"
    "processes.Peers._look = lambda self: None\n"
    "processes.Peers(None, 0, 2).missing()"
  )
  process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert process.returncode == 1
  assert process.stderr.startswith("error: process 1 of 2 was killed"), process.stderr


@pytest.mark.slow
def test_a_share_of_a_batch_lies_where_the_mesh_has_a_processes_devices(start, monkeypatch):
  """As on a torus, where the devices of a host are not neighbours in the mesh."""
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
  said = [process.communicate(timeout=200) for process in start({0: "hold rows", 1: "hold rows"})]
  held = [out.splitlines()[-1:] for out, _ in said]
  assert held == [
    ["[[0, 0, 1], [4, 2, 3], [8, 4, 5], [12, 6, 7]]"],
    ["[[2, 8, 9], [6, 10, 11], [10, 12, 13], [14, 14, 15]]"],
  ], said


def test_a_collective_that_fails_for_want_of_a_process_names_it():
  """Gloo's error, which comes before JAX misses it, names an address."""
  program = (
    "from beyond_outliers.mesh import processes\n"
    "import jax\n"
    "processes.POLL_SECONDS = 0.01\n"
    "processes.Peers._look = lambda self: None\n"
    "reset = 'Connection reset by peer'\n"
    "barrier, unwritten = TimeoutError('a barrier'), OSError('could not be written')\n"
    "unwritten.__cause__ = barrier  # Orbax's, of a save\n"
    "print(processes.reason_of(jax.errors.JaxRuntimeError(reset)))\n"
    "processes._peers = processes.Peers(None, 0, 3)\n"
    "print(processes.reason_of(OSError('no space')))\n"
    "print(processes.reason_of(jax.errors.JaxRuntimeError(reset)))\n"
    "print(processes.reason_of(ValueError('Gloo AllGather failed')))  # where a result is read\n"
    "print(processes.reason_of(barrier))\n"
    "print(processes.reason_of(unwritten), flush=True)\n"
    "processes.leave(ValueError('in an evaluation'))"
  )
  ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  alone, own, *lost = ended.stdout.splitlines()
  assert alone == "JaxRuntimeError: Connection reset by peer" and own == "OSError: no space"
  lost.append(ended.stderr.splitlines()[-1].removeprefix("error: "))
  assert [each.startswith("process 1 of 3 was killed") for each in lost] == 5 * [True], lost
  ends = [alone, "AllGather failed", ": a barrier", "could not be written", "in an evaluation"]
  assert all(each.endswith(end) for each, end in zip(lost, ends, strict=True)), lost
  assert ended.returncode == 1


@pytest.mark.parametrize("until, said", [("float('inf')", "says why above"), ("0", "late")])
def test_an_abort_while_they_meet_is_put_down_to_the_others_only_once_time_is_up(until, said):
  program = f"""
from beyond_outliers.mesh import processes

processes._wait = {until}, "late"
processes._aborted(6)
"""
  ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert (ended.returncode, ended.stderr.count("\n")) == (1, 1) and said in ended.stderr, ended
