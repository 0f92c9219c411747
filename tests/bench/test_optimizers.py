"""The timing table of optimizers: what is measured, what is compared with what, and how it is
shown."""

import json

import numpy as np
import pytest

from beyond_outliers import optim
from beyond_outliers.bench import kernels, optimizers
from beyond_outliers.bench.timed_optimizers import TIMED_OPTIMIZERS, WITHOUT_PEER, TimedOptimizer
from beyond_outliers.bench.torch_optimizers import EMBEDDING

M, N, V = 32, 96, 160
TINY = {"square": (M, M), "tall": (N, M), EMBEDDING: (V, M)}
PARAMETERS = M * M + N * M + V * M
SQUARES = 2 * M * M + (N * N + M * M) + (V * V + M * M)  # of the lengths of all axes


@pytest.mark.parametrize(
  ("name", "expected"),
  {
    "adamw": 8,
    "optax_adamw": 8,
    "torch_adamw": 8,
    "torch_kron": 4 + 4 * SQUARES / PARAMETERS,
    "torch_soap": 8 + 8 * SQUARES / PARAMETERS,
    "torch_dash": 8 + 8 * SQUARES / PARAMETERS,
  }.items(),
)
def test_state_is_counted_to_the_byte(name, expected):
  """Only counters of steps may be added. Peers that do the same work keep the same state."""
  peer = TIMED_OPTIMIZERS[name].peer
  if peer:
    pytest.importorskip(peer.replace("-", "_"), reason="needs the extra 'peers'")
  figures = optimizers.measure_optimizer(TIMED_OPTIMIZERS[name], TINY, repeats=1)
  excess = figures["state_bytes_per_parameter"] * PARAMETERS - expected * PARAMETERS
  assert 0 <= excess < 50
  assert 0 < figures["ordinary_seconds"] <= figures["slowest_seconds"]
  assert (figures["compile_seconds"] is None) == name.startswith("torch")
  assert figures.get("floor_seconds", 0) > 0 if not peer else "floor_seconds" not in figures


class Clock:
  """Steps that take what they are told."""

  state_bytes, compile_seconds = 8, 0.5

  def __init__(self, seconds, params, gradients):
    self.seconds, self.values = iter(seconds), params

  def step(self, number):
    return next(self.seconds)

  def finite(self):
    return all(np.isfinite(x).all() for x in self.values.values())


def test_steps_of_a_period_are_told_apart():
  """A slow warm-up and one disturbed step in three periods change nothing."""
  seconds = [100, 100, 100, *(1, 2, 9, 1), *(1, 2, 9, 77), *(1, 2, 9, 1)]
  figures = optimizers.measure_optimizer(
    TimedOptimizer("family", seconds, period=4, steps=Clock), {"x": (2, 2)}, repeats=9
  )
  assert figures == {
    "ordinary_seconds": 1.5,
    "slowest_seconds": 9,
    "amortised_seconds": 13 / 4,
    "compile_seconds": 0.5,
    "state_bytes_per_parameter": 2,
  }


def test_time_for_nonsense_is_refused(monkeypatch):
  monkeypatch.setattr(Clock, "finite", lambda self: False)
  with pytest.raises(FloatingPointError, match="not finite"):
    optimizers.measure_optimizer(
      TimedOptimizer("family", [1] * 4, steps=Clock), {"x": (2, 2)}, repeats=1
    )


def figures(ordinary, slowest, amortised, compile_seconds=None):
  return {
    "ordinary_seconds": ordinary,
    "slowest_seconds": slowest,
    "amortised_seconds": amortised,
    "compile_seconds": compile_seconds,
    "state_bytes_per_parameter": 8.0,
  }


RESULT = {
  "tree": "full",
  "parameters": 27525120,
  "repeats": 8,
  "versions": {"jax": "1.2.3"},
  "kernels": {"eigh 1024": 0.1},
  "rows": {
    "shampoo": {**figures(1.0, 4.0, 2.0, 0.5), "floor_seconds": 1.6},
    "torch_dash": figures(2.0, 5.0, 4.0),
    "torch_shampoo": figures(3.0, 4.0, 5.0),
    "soap": figures(0.1, 0.2, 0.3, 0.5),
    "torch_soap": {"missing": "pip install pytorch-optimizer"},
    "psgd": {"failed": "MemoryError"},
    "torch_kron": figures(0.1, 0.2, 0.3),
  },
}


def test_the_best_of_peers_is_the_least_of_each_figure():
  best = {"ordinary_seconds": 2.0, "slowest_seconds": 4.0, "amortised_seconds": 4.0}
  assert optimizers.best_of_peers(RESULT["rows"], "shampoo") == best
  assert optimizers.best_of_peers(RESULT["rows"], "soap") == {}


def test_the_table_shows_multiples_and_what_is_missing():
  lines = [" ".join(line.split()) for line in optimizers.optimizers_table(RESULT).splitlines()]
  assert "kernels: eigh 1024 100.0 ms" in lines and "with jax 1.2.3" in lines
  assert "shampoo 1,000.0 0.50 4,000.0 1.00 2,000.0 0.50 1,600.0 1.25 4.00 8.00 0.5" in lines
  assert "torch_shampoo 3,000.0 1.50 4,000.0 1.00 5,000.0 1.25 1.33 8.00" in lines
  assert "soap 100.0 200.0 300.0 2.00 8.00 0.5" in lines
  assert (
    "torch_soap missing: pip install pytorch-optimizer" in lines
    and "psgd failed: MemoryError" in lines
  )


def test_rows_cover_the_optimizers_and_every_family_has_a_peer():
  families = {row.family for row in TIMED_OPTIMIZERS.values()}
  timed = {family.split()[0] for family in families}
  assert timed == set(optim.OPTIMIZERS), (
    f"{sorted(timed ^ set(optim.OPTIMIZERS))}: give each optimizer of optim.OPTIMIZERS a row in "
    "TIMED_OPTIMIZERS (bench/timed_optimizers.py), and no others"
  )
  alone = families - {row.family for row in TIMED_OPTIMIZERS.values() if row.peer}
  assert alone == set(WITHOUT_PEER) and all(WITHOUT_PEER.values()), (
    f"{sorted(alone ^ set(WITHOUT_PEER))}: in bench/timed_optimizers.py, a family has a row with a "
    "peer from PyPI, or its name in WITHOUT_PEER with the reason; never both"
  )
  sizes = sorted(optimizers.TREES["full"].values())
  assert sizes == sorted([(768, 768)] * 12 + [(768, 2304)] * 4 + [(2304, 768)] * 4 + [(8192, 768)])


def test_rows_run_in_processes_of_their_own(monkeypatch):
  monkeypatch.setattr(optimizers, "versions", lambda: {})
  result = optimizers.measure_optimizers(["adamw", "torch_adamw"], "small", 1)
  assert set(result["kernels"]) == set(kernels.KERNELS) and all(
    x > 0 for x in result["kernels"].values()
  )
  assert result["rows"]["torch_adamw"] == {"missing": "pip install torch"}
  assert result["rows"]["adamw"]["state_bytes_per_parameter"] == pytest.approx(8, abs=1e-4)
  assert optimizers.optimizers_table(json.loads(json.dumps(result)))


def test_a_process_that_fails_is_told_of():
  assert optimizers.in_process("nobody", "small", 1) == {"failed": "KeyError: 'nobody'"}
