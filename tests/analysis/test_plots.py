"""Figures by themselves: what their ticks, legends and colours say; and a law's reasons."""

import warnings

import numpy as np
import pandas as pd

from beyond_outliers.analysis import identification, plots, scaling_law
from beyond_outliers.analysis.plots import style


def test_a_figure_without_a_path_is_drawn_and_not_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  rows = {"optimizer": ["adamw", "muon"], "recipe": "rtn_w4a4", "method": "rtn", "seed": 0}
  frame = pd.DataFrame({**rows, "loss_difference": [0.1, float("inf")]})
  figure = plots.plot_degradation(frame)
  assert figure.axes and not list(tmp_path.iterdir())
  plots.plot_degradation(frame, tmp_path / "a.png")
  assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_ring_is_at_the_rate_of_the_least_loss_in_every_panel():
  frame = pd.DataFrame(
    [
      ("adamw", 0.1, "a", "rtn", 4.09, 0.15),
      ("adamw", 0.3, "b", "rtn", 4.07, 2.77),
      ("adamw", 1.0, "c", "rtn", 4.30, np.inf),
      ("muon", 0.01, "d", "rtn", 4.03, 0.2),
      ("muon", 0.03, "e", "rtn", 4.06, 0.1),
    ],
    columns=[
      "optimizer",
      "learning_rate",
      "run",
      "method",
      "full_precision_loss",
      "loss_difference",
    ],
  ).assign(recipe="rtn_w4a4")
  figure = plots.plot_by_learning_rate(frame)
  for axes in figure.axes:
    rings = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert rings == [[0.3], [0.01]]
  lost = figure.axes[1].lines[0]
  assert lost.get_ydata().tolist() == [0.15, 2.77], "what is not finite has no point"


def test_a_deep_network_has_a_tick_per_block_that_none_covers(tmp_path):
  rows = [
    {"name": name, "R": 0.1, "recipe": "rtn_w4a4", "method": "rtn", "optimizer": "adamw"}
    for name in [*(f"layers/{block}" for block in range(12)), "final_norm", "head"]
  ]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    figure = plots.plot_error_along_depth(pd.DataFrame(rows))
  labels = figure.axes[0].get_xticklabels()
  assert [label.get_text() for label in labels[-3:]] == ["11", "final_norm", "head"]
  assert {label.get_rotation() for label in labels} == {90}


def test_optimizers_of_ones_own_have_colours_that_differ():
  names = [*plots.COLORS, "lion", "sophia", "ademamix"]
  assert len({style.color_of(name) for name in names}) == len(names)


def test_the_figure_of_a_law_says_what_lines_are(tmp_path):
  rng, rows = np.random.default_rng(0), []
  for N in (3e5, 1e6, 4e6):
    for recipe, rho in (("none", 1.0), ("quest_w4a4", 0.7)):
      for seed in range(2):
        loss = 40 / (rho * N) ** 0.25 + 1.7 + 0.001 * rng.standard_normal()
        sizes = {"parameters": N, "embedding": 0, "tokens": 20 * N, "seed": seed, "loss": loss}
        rows.append({"optimizer": "adamw", "recipe": recipe, **sizes})
  points = pd.DataFrame(rows)
  figure = plots.plot_scaling_law(scaling_law.fit(points, resamples=0), points=points)
  figure.canvas.draw()
  assert [text.get_text() for text in figure.legends[0].get_texts()] == [
    *("adamw", "full precision", "quest_w4a4")
  ]
  ticks = {label.get_text() for label in figure.axes[0].get_xticklabels()}
  assert "1M" in ticks and not any("e+" in tick for tick in ticks)


def test_a_reason_names_no_number_of_seeds_that_nobody_trains():
  cells = pd.DataFrame({"N": [3e5, 1e6, 4e6]})
  few = identification._wide(1.0, 0.1, 3.0, cells, "study", 2.0)
  assert few.endswith("or some 9 times the 2 seeds a point")
  assert "seeds" not in identification._wide(1.0, 0.1, 1e15, cells, "study", 2.0)
