"""The table of a step: which steps are timed, and how figures are shown."""

import pytest

from beyond_outliers import hardware
from beyond_outliers.bench import step

FIGURES = {
  "config": "nano",
  "dtype": "float32",
  "device": "cpu",
  "devices": 2,
  "peak_flops/float32": 400e9,
  "peak_flops/bfloat16": 300e9,
  "compile_seconds": 4.56,
  "temporary_bytes": 100 * 2**20,
  "forward_seconds": 0.5,
  "period": 1,
  "step_seconds": 2.0,
  "mean_step_seconds": 2.5,
  "longest_step_seconds": 4.0,
  "backward_seconds": 1.0,
  "optimizer_seconds": 0.5,
  "optimizer_amortised_seconds": 1.0,
  "input_seconds": 0.001,
  "loop_overhead": 0.017,
  "reading_tokens_per_cpu_second": 13e6,
  "peak_source": "measured",
  "tokens_per_second": 857.0,
  "flops_per_second": 280e9,
  "peak_share": 0.7,
  "peak_memory_bytes": 3 * 2**30,
}


def lines(figures):
  return [" ".join(line.split()) for line in step.step_table(figures).splitlines()]


def test_whole_periods_are_timed_after_the_first(monkeypatch):
  """At least five steps are two periods of three; the costly first step of the warm-up counts for
  nothing."""
  seconds = iter([100, 1, 1, 4, 1, 1, 10, 1, 1])
  monkeypatch.setattr(
    hardware, "seconds_of", lambda call, count: [call() or next(seconds) for _ in range(count)]
  )
  assert step.whole_periods(lambda: None, period=3, repeats=5) == {
    "period": 3,
    "step_seconds": 1,
    "mean_step_seconds": 3,
    "longest_step_seconds": 10,
  }


def test_reading_counts_tokens_by_cpu_time():
  assert step.reading(iter(int, 1), tokens=1000, seconds=0.01) > 1000


def test_parts_are_shares_of_the_step():
  shown = lines(FIGURES)
  assert "device 2 × cpu" in shown and "compile 4.6 s" in shown
  assert shown[4:8] == [
    "step, float32 2,000.0 ms",
    "forward 500.0 ms 25.0%",
    "backward 1,000.0 ms 50.0%",
    "optimizer 500.0 ms 25.0%",
  ]
  assert "model FLOP/s 280 GFLOP/s, 70.0% of peak (measured)" in shown
  assert not any("longest step" in line for line in shown)


def test_a_period_has_a_mean_and_a_longest_step():
  shown = lines(FIGURES | {"period": 20})
  assert "optimizer, mean of 20 steps 1,000.0 ms" in shown and "longest step 4,000.0 ms" in shown


@pytest.mark.slow
def test_a_run_s_step_is_measured(tiny_config):
  figures = step.measure_step(tiny_config(), repeats=1)
  assert set(figures) == set(FIGURES) and step.step_table(figures)
  assert figures["forward_seconds"] > 0 and figures["devices"] == 8
