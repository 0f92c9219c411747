"""The short form of the fault suite: a round of some faults, each on one kind of run.

All of them, on every kind: python -m tests.faults."""

import pytest

from tests.faults import faults, processes, trial
from tests.faults.__main__ import table

# Number of the round, from which the kind of run follows.
ROUNDS = {
  "kill -9 at three random moments": 1,
  "kill -9 inside a save": 0,
  "kill -9 of process 1 of two": 0,
  "SIGTERM": 0,
  "full disk": 12,  # of process 1 of two
  "NaN in a moment": 0,
  "bit flipped in the newest checkpoint": 0,
  "another run's file, or all, in its place": 0,
  "damage of every checkpoint": 0,
  "damage of the workdir's other files": 0,
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
  return trial.Suite(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ROUNDS)
def test_a_run_ends_as_if_nothing_had_befallen_it(fault, suite):
  result = trial.Trial(suite, fault, ROUNDS[fault], seed=0).run()
  assert not result.problem, result


def test_a_round_is_what_its_seed_draws(tmp_path):
  """On a kind of run that takes part, so that it can be done again alone."""
  for fault, row in faults.FAULTS.items():
    one, again, other = (trial.Trial(trial.Suite(tmp_path), fault, 3, seed) for seed in (0, 0, 1))
    draws = [each.draw.random() for each in (one, again, other)]
    assert draws[0] == draws[1] != draws[2]
    assert one.kind == other.kind and one.kind.processes in row.processes
  drawn = {trial.Trial(trial.Suite(tmp_path), "SIGTERM", i, 0).kind.name for i in range(20)}
  assert drawn == {kind.name for kind in processes.KINDS}


def test_the_table_counts_what_was_silent_apart():
  result = trial.Result("SIGTERM", 0, 0, "adamw, 1 process", outcome="told", lost=2, same=True)
  silent = trial.Result("SIGTERM", 1, 0, "", outcome="harmless", problem="another end: x, SILENT")
  last = table([result, silent]).splitlines()[-1]
  assert last == "| SIGTERM | 2 | 1 | 0 | 1 | 2 | 0 | 1 of 2 |"
