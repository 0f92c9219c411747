"""An evaluation job's cells as a table for people, and as scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from beyond_outliers import cli
from beyond_outliers.evaluate import metrics, results
from beyond_outliers.evaluate.results import Result
from beyond_outliers.types import Json

OWN_REFERENCE = (
  "method none: difference, KL and agreement are to the same parameters with nothing quantized, "
  "not to another run"
)


def scalars(cell: Result) -> dict[str, float]:
  """Values of a cell by name, without intervals."""
  numbers = {**cell["metrics"], **results.task_scores(cell)}
  return {name: value for name, value in numbers.items() if isinstance(value, int | float)}


def results_table(cells: Sequence[Result]) -> str:
  """One line per cell, with task scores and their standard errors; below the table, how many
  examples these are over, and averages of fewer checkpoints than asked for. The loss's difference,
  with its interval, is to the same parameters in full precision, even for a run that was trained
  quantized, about which a line below the table warns."""
  names = (name for cell in cells for name in results.task_scores(cell))
  accuracies = [name for name in dict.fromkeys(names) if "stderr" not in name]
  titles = (
    *("step", "recipe", "method", "loss", "difference", f"{metrics.CONFIDENCE:.0%} interval"),
    *("bits per byte", "KL", "agreement", "MiB", *accuracies, "seconds"),
  )
  lines = cli.aligned([titles, *(_row(cell, accuracies) for cell in cells)])
  lines += dict.fromkeys(line for line in map(of_fewer, cells) if line)
  if any(cell["method"] == "none" and "kl" in cell["metrics"] for cell in cells):
    lines.append(OWN_REFERENCE)
  return "\n".join([*lines, *_examples(cells)])


def shown(value: float | None, style: str = ".4f") -> str:
  """A formatted value; empty for None, a value that was not finite."""
  return "" if value is None else format(value, style)


def of_fewer(cell: Result) -> str:
  """A line about an average of the last COUNT checkpoints, where there were fewer; else empty."""
  name, steps = cell["settings"].get("average", ""), cell.get("averaged", [])
  count = name.partition(":")[2]  # empty for `ema`
  if not count or len(steps) >= int(count):
    return ""
  of = ", ".join(map(str, steps))
  return f"step {cell['step']}: {name} is the mean of only {len(steps)}, of steps {of}"


def _examples(cells: Sequence[Result]) -> list[str]:
  """How many examples the scores are over, in one line where that is the same for all cells."""
  lines: dict[str, list[str]] = {}
  for cell in cells:
    line = ", ".join(_counted(task, counts) for task, counts in cell.get("examples", {}).items())
    lines.setdefault(line, []).append(f"{cell['step']} {cell['recipe']} {cell['method']}")
  lines.pop("", None)
  return [
    f"examples{' of ' + '; '.join(found) if len(lines) > 1 else ''}: {line}"
    for line, found in lines.items()
  ]


def _counted(task: str, counts: Json) -> str:
  scored, left_out, truncated = (counts[name] for name in ("scored", "left_out", "truncated"))
  return (
    f"{task} {scored}{f' of {scored + left_out}' if left_out else ''} ({counts['split']}"
    f"{f', {truncated} without their beginning' if truncated else ''})"
  )


def _score(numbers: dict[str, float], name: str) -> str:
  stderr = shown(numbers.get(f"{name}_stderr"))
  return f"{shown(numbers.get(name))} ± {stderr}" if stderr else shown(numbers.get(name))


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
    shown(found.get("bits_per_byte")),
    shown(found.get("kl")),
    shown(found.get("agreement"), ".1%"),
    f"{cell['size_bytes'] / 2**20:.2f}",
    *(_score(numbers, name) for name in accuracies),
    f"{sum(cell['seconds'].values()):.1f}",
  )
