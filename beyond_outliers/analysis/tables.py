"""Tables in Markdown, every number of them read from workdirs."""
from __future__ import annotations

from collections.abc import Sequence

from beyond_outliers.analysis.protocol import Tuning, last


def tuning(tunings: Sequence[Tuning]) -> str:
  """What each optimizer's sweep came to: the best rate, its neighbours, and whether anything went wrong at it."""
  rows: list[Sequence[str]] = [("optimizer", "learning rate", "validation loss", "next lower rate", "next higher rate",
                                "skipped updates", "roots kept", "training seconds")]
  for t in tunings:
    rates = sorted(t.losses)
    at = rates.index(t.learning_rate)
    beside = [f"{t.losses[rates[i]]:.4f} at {rates[i]:g}" if 0 <= i < len(rates) else "edge of the grid"
              for i in (at - 1, at + 1)]
    counts = [f"{max(last(run, metric) for run in t.best):.0f}" for metric in ("skipped", "roots/kept", "seconds")]
    rows.append((t.optimizer, f"{t.learning_rate:g}", f"{t.losses[t.learning_rate]:.4f}", *beside, *counts))
  return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """The first row is the head."""
  lines = ["| " + " | ".join(row) + " |" for row in rows]
  return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])
