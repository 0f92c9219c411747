"""What a run does between its steps, as it is timed."""

import pytest

from beyond_outliers.bench import loop


@pytest.mark.slow
def test_the_loop_and_saving_are_timed(monkeypatch):
  monkeypatch.setattr(loop, "STEPS", 20)
  figures = loop.measure_loop("0.3m", repeats=1)
  assert figures["host_seconds"] > 0 and figures["state_bytes"] >= 295_203 * 12
  assert figures["save_ratio"] > 0
  assert f"saving {figures['size']} (" in loop.loop_table(figures)
