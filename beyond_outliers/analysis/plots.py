"""Figures (extra: report). Each takes what it shows and a path, and writes a PNG."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt

from beyond_outliers.analysis.protocol import Tuning

# One colour an optimizer in every figure (Okabe and Ito's palette, told apart by the colour-blind too).
COLORS = {"adamw": "#000000", "muon": "#0072B2", "psgd": "#CC79A7", "scion": "#56B4E9", "shampoo": "#D55E00", "soap": "#009E73"}


def loss_curves(tunings: Sequence[Tuning], path: Any) -> None:
  """Training loss of each optimizer's best run over the steps, and how the validation loss depends on the learning rate."""
  figure, (curves, rates) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
  for t in tunings:
    metrics = t.best[0].metrics()
    loss = metrics["train/loss"].dropna()
    color = COLORS.get(t.optimizer)
    curves.plot(loss.index, loss, linewidth=1.5, color=color, label=f"{t.optimizer}, {t.learning_rate:g}")
    evaluated = metrics["eval/loss"].dropna()
    curves.plot(evaluated.index, evaluated, "o", markersize=4, color=color)
    rates.plot(list(t.losses), list(t.losses.values()), "o-", markersize=4, linewidth=1.5, color=color)
    rates.plot([t.learning_rate], [t.losses[t.learning_rate]], "o", markersize=9, fillstyle="none", color=color)
  curves.set(xlabel="step", ylabel="loss (nats)", title="training (lines) and validation (points), best rate of each")
  rates.set(xlabel="learning rate", ylabel="validation loss (nats)", xscale="log", title="validation loss after the last step")
  curves.legend(frameon=False)
  finite = [loss for t in tunings for loss in t.losses.values() if loss < float("inf")]
  # First steps at rates that begin badly, and rates that lead nowhere, would flatten what the figure is about.
  curves.set_ylim(top=min(curves.get_ylim()[1], min(finite) + 4.0))
  rates.set_ylim(min(finite) - 0.1, min(min(finite) + 2.0, max(finite) + 0.1))
  for axes in (curves, rates):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
  figure.savefig(path, dpi=130)
  plt.close(figure)
