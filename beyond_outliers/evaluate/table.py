"""Table of an evaluation job's cells, for a person, and their scalars, for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from beyond_outliers import cli
from beyond_outliers.evaluate import metrics, results
from beyond_outliers.evaluate.results import Result

OWN_REFERENCE = (
  "method none: difference, KL and agreement are to the same parameters with nothing quantized, "
  "not to another run"
)


def scalars(cell: Result) -> dict[str, float]:
  """Values of a cell by name, without intervals."""
  numbers = {**cell["metrics"], **results.task_scores(cell)}
  return {name: value for name, value in numbers.items() if isinstance(value, int | float)}


def results_table(cells: Sequence[Result]) -> str:
  """One line per cell. The difference of the loss is to the same parameters in full precision, with
  its interval; a run that was trained quantized has no others, which a line below says."""
  names = (name for cell in cells for name in results.task_scores(cell))
  accuracies = [name for name in dict.fromkeys(names) if "stderr" not in name]
  titles = (
    *("step", "recipe", "method", "loss", "difference", f"{metrics.CONFIDENCE:.0%} interval"),
    *("bits per byte", "KL", "agreement", "MiB", *accuracies, "seconds"),
  )
  lines = cli.aligned([titles, *(_row(cell, accuracies) for cell in cells)])
  trained_quantized = any(cell["method"] == "none" and "kl" in cell["metrics"] for cell in cells)
  return "\n".join([*lines, OWN_REFERENCE] if trained_quantized else lines)


def shown(value: float | None, style: str = ".4f") -> str:
  """Formatted value; empty where it was not finite."""
  return "" if value is None else format(value, style)


def _row(cell: Result, accuracies: Sequence[str]) -> tuple[str, ...]:
  found, numbers = cell["metrics"], scalars(cell)
  low, high = found.get("loss_difference_interval", (None, None))
  return (
    str(cell["step"]),
    cell["recipe"],
    cell["method"],
    shown(found["loss"]),
    shown(found.get("loss_difference"), "+.4f"),
    "" if None in (low, high) else f"{low:+.4f} … {high:+.4f}",
    shown(found["bits_per_byte"]),
    shown(found.get("kl")),
    shown(found.get("agreement"), ".1%"),
    f"{cell['size_bytes'] / 2**20:.2f}",
    *(shown(numbers.get(name)) for name in accuracies),
    f"{sum(cell['seconds'].values()):.1f}",
  )
