"""Identification: which parameters of a law the runs determine, and what the others would need."""

from __future__ import annotations

import numpy as np
import pandas as pd

from beyond_outliers.analysis.law_design import Design
from beyond_outliers.analysis.law_points import SAME_RATIO

# Distinct values of N, and for two_term of D too, that a power law with a floor needs.
NEEDED = 3
# A parameter counts as determined if its interval is at most this many times as wide as its value.
WIDEST = 1.0
MOST = 100  # reasons ask for this many times as many seeds at most: nobody would train more


def by_design(plan: Design, cells: pd.DataFrame, theta_P: np.ndarray, law: str) -> dict[str, str]:
  """{parameter: why the cells would not determine it even without noise, and what would}; empty
  where they do.

  Either there are too few sizes, or parameters can change together in a direction that changes no
  loss, a null vector of the curve's derivatives. Two sizes in two recipes give the study's law as
  many equations as unknowns, but then everything depends on rho being the same at both; they count
  as too few."""
  free = _free(plan, theta_P)
  found = {}
  for name, is_free in zip(plan.names, free, strict=True):
    own = _cells_of(name, plan, cells)
    found[name] = _too_few(own, law) or (
      f"others make up for any change of it: {_wider(own, law)}" if is_free else ""
    )
  return found


def by_noise(
  plan: Design,
  cells: pd.DataFrame,
  theta_P: np.ndarray,
  interval_Px2: np.ndarray,
  law: str,
  seeds: float,
) -> dict[str, str]:
  """As `by_design`, but where the profile interval is open, or wider than the value."""
  found = {}
  for name, value, (low, high) in zip(plan.names, plan.values(theta_P), interval_Px2, strict=True):
    found[name] = _wide(value, low, high, _cells_of(name, plan, cells), law, seeds)
  return found


def _cells_of(name: str, plan: Design, cells: pd.DataFrame) -> pd.DataFrame:
  """The cells that a parameter depends on: only its optimizer's own, if that shares neither E nor
  alpha."""
  optimizer = name.partition("(")[2].rstrip(")").partition(", ")[0]
  alone = f"E({optimizer})" in plan.names and f"alpha({optimizer})" in plan.names
  return cells[cells.optimizer == optimizer] if alone else cells


def _too_few(cells: pd.DataFrame, law: str) -> str:
  for name, words in (("N", ("size", "sizes")), ("D", ("number of tokens", "numbers of tokens"))):
    values = sorted(set(cells[name]))
    if len(values) < NEEDED and (name == "N" or law == "two_term"):
      listed = ", ".join(f"{value:.3g}" for value in values)
      return (
        f"{len(values)} {words[len(values) > 1]} ({name} = {listed}): needs at least {NEEDED}, "
        "better more, over a factor of ten"
      )
  if law == "two_term":
    ratio = cells.tokens_per_parameter
    if ratio.max() <= (1 + SAME_RATIO) * ratio.min():
      return (
        f"D/N = {ratio.median():.3g} in all runs, so that N and D change together: needs "
        f"sizes with at least {NEEDED} ratios, as 10, 20 and 80"
      )
  return ""


def _free(plan: Design, theta_P: np.ndarray) -> np.ndarray:
  """Whether a parameter takes part in a direction along which no loss changes, [P]."""
  J_CxP = plan.curve(theta_P[None])[1][0]
  scale = np.linalg.norm(J_CxP, axis=0)
  J_CxP = J_CxP / np.where(scale > 0, scale, 1)
  _, sizes, vectors = np.linalg.svd(J_CxP, full_matrices=True)
  sizes = np.concatenate([sizes, np.zeros(len(vectors) - len(sizes))])
  null = vectors[sizes <= 1e-9 * sizes.max()]
  return np.linalg.norm(null, axis=0) > 1e-3


def _wide(
  value: float, low: float, high: float, cells: pd.DataFrame, law: str, seeds: float
) -> str:
  if np.isfinite(high) and high - low <= WIDEST * value:
    return ""
  if not np.isfinite(high):
    return f"flat profile: all from {low:.3g} up fit as well: {_wider(cells, law)}"
  if low <= 0:
    return f"flat profile: all below {high:.3g} fit as well: {_wider(cells, law)}"
  wide = f"its interval is {(high - low) / value:.2g} times as wide as its value"
  times = float(np.ceil(((high - low) / (WIDEST * value)) ** 2))
  more = f", or some {times:.0f} times the {seeds:.2g} seeds a point" if times <= MOST else ""
  return f"{wide}: {_wider(cells, law)}{more}"


def _wider(cells: pd.DataFrame, law: str) -> str:
  """What a law would need, given the ranges that the runs have."""
  parts = []
  for name in ("N", "D") if law == "two_term" else ("N",):
    values = cells[name]
    parts.append(
      f"{values.nunique()} values of {name} over a factor of {values.max() / values.min():.2g}"
    )
  if law == "two_term":
    ratio = cells.tokens_per_parameter
    parts.append(f"D/N over a factor of {ratio.max() / ratio.min():.2g}")
  return "needs a wider range than " + ", ".join(parts)
