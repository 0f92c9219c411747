"""A pool of jobs on one machine: what runs when, on which cores, and how it is stopped."""

import json
import os
import signal
import sys

import pytest

from launch import jobs, pool, table

# A run, or a job after it: prints when it starts and ends, and ends as its arguments say.
PROGRAM = """
import json, os, pathlib, signal, sys, time
name, do = sys.argv[1:3]
workdir = pathlib.Path(sys.argv[3])
workdir.mkdir(exist_ok=True)
asked = []

def say(what):
  cores = sorted(os.sched_getaffinity(0))
  with open(workdir.parent / "events", "a") as file:
    file.write(json.dumps([name, what, cores, sys.argv[4:]]) + chr(10))

if do != "follow":
  signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
say("start")
until = time.monotonic() + (60 if do in ("wait", "follow") else 0.3)
while not asked and time.monotonic() < until:
  time.sleep(0.01)
say("saved" if asked else "end")
if asked:
  sys.exit(42)
if do == "kill":
  os.kill(os.getpid(), signal.SIGKILL)
code = int(do) if do.isdigit() else 0
if name.startswith("train"):
  status = {0: "done", 3: "diverged"}.get(code, "failed")
  (workdir / "status.json").write_text(json.dumps({"status": status}))
sys.exit(code)
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
  """made(name, do, after) -> a job of the program; events() -> what these said."""
  (tmp_path / "program.py").write_text(PROGRAM)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))

  def job(name, do="0", after=(), extra=()):
    kind = {"train": "train", "eval": "evaluate", "report": "report"}[name.partition("-")[0]]
    workdir = str(tmp_path / name.partition("-")[2])
    return jobs.Job(name, kind, "program", (name, do, workdir, *extra), workdir, tuple(after))

  def events():
    return [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]

  return job, events


def run(listed, stop_at=None, events=None, **options):
  said = []
  runner = pool.Pool(listed, sys.executable, say=said.append, **options)

  def look():
    if stop_at and not runner.asked:
      try:
        started = sum(what == "start" for _, what, *_ in events())
      except FileNotFoundError:
        return
      if started == stop_at:
        runner.hand_on(signal.SIGTERM, None)

  runner.run(look)
  return runner, said


def test_some_at_a_time_on_cores_of_their_own_each_evaluated_behind_its_training(made):
  job, events = made
  listed = [job(f"train-{i}") for i in range(3)]
  listed += [job(f"eval-{i}", after=[f"train-{i}"]) for i in range(3)]
  listed.append(job("report-all", after=[each.name for each in listed]))
  runner, _ = run(listed, parallel=2)
  assert [pool.well(task) for task in runner.tasks] == 7 * [True]
  running, order = {}, []
  for name, what, cores, _ in events():
    order.append((name, what))
    if what == "end":
      del running[name]
      continue
    assert len(running) < 2, f"{name} is a third beside {running}"
    if len(os.sched_getaffinity(0)) > 1:
      assert not set(cores) & set().union(*running.values())
    running[name] = set(cores)
  for i in range(3):
    assert order.index((f"train-{i}", "end")) < order.index((f"eval-{i}", "start"))
  assert order.index(("eval-0", "start")) < order.index(("train-2", "end")), "results come early"
  assert order[-2:] == [("report-all", "start"), ("report-all", "end")]


def test_an_evaluation_beside_is_started_with_its_training_and_never_left_waiting(made):
  """The evaluation of a killed training would follow it forever."""
  job, events = made
  listed = [job("train-0"), job("train-1", "kill"), job("eval-0"), job("eval-1", "follow")]
  runner, _ = run(listed)
  codes = {task.job.name: task.code for task in runner.tasks}
  assert codes == {"train-0": 0, "train-1": -9, "eval-0": 0, "eval-1": -signal.SIGTERM}
  order = [(name, what) for name, what, *_ in events()]
  assert order.index(("eval-0", "start")) < order.index(("train-0", "end"))
  assert order.index(("eval-1", "start")) < order.index(("train-1", "end"))


def test_what_is_asked_to_stop_saves_and_nothing_else_is_started(made):
  job, events = made
  listed = [job(f"train-{i}", "wait") for i in range(3)] + [job("eval-0", after=["train-0"])]
  runner, _ = run(listed, 2, events, parallel=2, restarts=1)
  assert runner.asked and [task.code for task in runner.tasks] == [42, 42, None, None]
  assert sorted(what for _, what, *_ in events()) == ["saved", "saved", "start", "start"]


def test_a_run_that_ended_is_left_alone_and_still_evaluated(made):
  job, events = made
  run([job("train-0", "3")])
  runner, said = run([job("train-0"), job("eval-0", after=["train-0"])])
  assert [name for name, what, *_ in events() if what == "start"] == ["train-0", "eval-0"]
  assert said[0].endswith("diverged") and all(map(pool.well, runner.tasks))


def test_what_is_not_trained_is_not_evaluated(made):
  job, _ = made
  runner, said = run([job("train-0", "1"), job("eval-0", after=["train-0"])])
  assert [task.code for task in runner.tasks] == [1, None] and "is not evaluated" in said[-1]


def test_processes_of_a_run_meet_on_a_free_port(made):
  job, events = made
  run([job("train-0"), job("eval-0", after=["train-0"])], processes=2, parallel=2)
  given = sorted(arguments for name, what, _, arguments in events() if what == "start")
  assert given[0] == [] and len(given) == 3, "an evaluation is one process"
  meetings = [argument.split(",") for (argument,) in given[1:]]
  assert [meeting[1:] for meeting in meetings] == [["2", "0"], ["2", "1"]]
  assert meetings[0][0] == meetings[1][0] and ":0" not in meetings[0][0]


@pytest.mark.parametrize("codes, code", [([0, 0], 0), ([42, 42], 42), ([1, -9], 1), ([2, 2], 2)])
def test_the_exit_code_of_several_processes(codes, code):
  assert pool.code_of(codes) == code and pool.code_of(codes[::-1]) in codes


@pytest.mark.parametrize("do, times", [("1", 3), ("kill", 3), ("2", 1), ("3", 1), ("42", 1)])
def test_what_failed_is_started_again_and_what_was_refused_is_not(made, do, times):
  job, events = made
  _, said = run([job("train-0", do)], restarts=2)
  assert sum(what == "start" for _, what, *_ in events()) == times
  assert sum("starting it again" in line for line in said) == times - 1


def test_what_ends_as_it_is_asked_to_stop_is_not_said_to_be_started_again(made):
  """As a run that is asked to stop before it can save, while it compiles."""
  job, events = made
  runner, said = run([job("train-0", "follow")], 1, events, restarts=2)
  assert runner.tasks[0].code == -signal.SIGTERM and len(said) == 1


def test_output_of_each_job_has_a_file_of_its_own(made, tmp_path):
  job, _ = made
  _, said = run([job("train-0", "no number")], logs=str(tmp_path / "a b" / "logs"))
  assert (tmp_path / "a b/logs/train-0.txt").exists() and said[-1].endswith("done (exit code 0)")


def test_shares_of_cores(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 4, 7, 8})
  assert pool.shares_of_cores(2) == [{1, 3}, {4, 7, 8}]
  assert pool.shares_of_cores(5) == [{1}, {3}, {4}, {7}, {8}]
  assert pool.shares_of_cores(1) == [set()] and pool.shares_of_cores(6) == 6 * [set()]


def test_a_terminal_shows_a_table_of_what_runs_below_the_lines(made, monkeypatch, capsys):
  job, _ = made
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  said = []
  runner = pool.Pool([job("train-:smile:[b]")], sys.executable, say=said.append)
  with table.live(runner, True) as look:
    runner.run(look)
  shown = capsys.readouterr().out
  assert "/:smile:[b]: not started" in shown and "1 running" in shown and said == []
  assert table.summary(runner.tasks) == "1 over, 0 of them failed · 0 running · 0 to go"
  other = pool.Pool([], sys.executable, say=said.append)
  with table.live(other, False):
    other.say("as it was")
  assert said == ["as it was"]


def test_rows_of_the_table_are_what_the_run_wrote_last(tmp_path):
  assert table.progress(str(tmp_path)) == ("", "", "")
  (tmp_path / "config.json").write_text(json.dumps({"steps": 40}))
  rows = [{"step": i, "train/loss": 5.0 - i, "tokens_per_second": 1234.5} for i in range(1, 4)]
  text = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 3, "eval/loss": 2.0}])
  (tmp_path / "metrics.jsonl").write_text(text)
  assert table.progress(str(tmp_path)) == ("3/40", "2.0000", "1,234")
  (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "tra')
  assert table.progress(str(tmp_path)) == ("3/40", "2.0000", "1,234")
