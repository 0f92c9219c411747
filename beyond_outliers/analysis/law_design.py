"""The curves of scaling laws, with derivatives and starts; and which parameters are shared."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

Pair = tuple[str, str]  # optimizer, recipe

# Bounds of parameters, by the first word of their names; those of LOGARITHMIC are fitted as
# logarithms.
BOUNDS: Mapping[str, tuple[float, float]] = {
  "A": (1e-8, 1e40),
  "B": (1e-8, 1e40),
  "alpha": (1e-3, 4.0),
  "beta": (1e-3, 4.0),
  "E": (0.0, np.inf),  # the upper bound is the least loss
  "rho": (1e-4, 1e4),
  "rho_N": (1e-4, 1e4),
  "rho_D": (1e-4, 1e4),
}
LOGARITHMIC = ("A", "B", "rho", "rho_N", "rho_D")

# Starts: all combinations of exponents (by number of terms) and E, as a share of the least loss.
EXPONENTS = {1: (0.1, 0.2, 0.35, 0.6, 1.0), 2: (0.15, 0.3, 0.5, 0.8)}
FLOORS = (0.05, 0.4, 0.65, 0.85, 0.95)


class Term(NamedTuple):
  """amplitude · (efficiency · exp(x))^-exponent at each cell: x, and the parameters' indices, [C].

  An efficiency index of -1 stands for an efficiency of one."""

  x: np.ndarray
  amplitude: np.ndarray
  exponent: np.ndarray
  efficiency: np.ndarray


@dataclasses.dataclass(frozen=True)
class Design:
  """log(Σ terms + E) at cells, distinct (optimizer, recipe, N, D), as a curve of P parameters."""

  names: tuple[str, ...]
  terms: tuple[Term, ...]
  floor: np.ndarray  # index of E at each cell

  @property
  def logarithmic(self) -> np.ndarray:
    return np.array([name.split("(")[0] in LOGARITHMIC for name in self.names])

  def bounds(self, least_loss: float) -> tuple[np.ndarray, np.ndarray]:
    """(lower, upper) of the fitted parameters, [P] each."""
    limits = np.array([BOUNDS[name.split("(")[0]] for name in self.names])
    limits = np.minimum(limits, np.where(np.isinf(limits), least_loss, np.inf))
    lower, upper = np.where(self.logarithmic[:, None], np.log(np.maximum(limits, 1e-300)), limits).T
    return lower, upper

  def values(self, theta: np.ndarray) -> np.ndarray:
    """Values of the parameters from the fitted ones, some of which are logarithms: [..., P]."""
    return np.where(self.logarithmic, np.exp(np.where(self.logarithmic, theta, 0.0)), theta)

  def opened(self, ends_Px2: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Ends of intervals as values of the parameters; zero or infinity in place of a bound."""
    low, high = (self.values(ends_Px2[:, side]) for side in (0, 1))
    low = np.where(ends_Px2[:, 0] <= lower, 0.0, low)
    return np.stack([low, np.where(ends_Px2[:, 1] >= upper, np.inf, high)], axis=1)

  def curve(self, theta_BxP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log losses [B, C], their derivatives [B, C, P])."""
    B, P = theta_BxP.shape
    padded, cells = (
      np.concatenate([theta_BxP, np.zeros((B, 1))], axis=1),
      np.arange(len(self.floor)),
    )
    J = np.zeros((B, len(cells), P + 1))
    loss = padded[:, self.floor]
    J[:, cells, self.floor] = 1.0
    for term in self.terms:
      exponent, x = padded[:, term.exponent], term.x + padded[:, term.efficiency]
      size = np.exp(np.clip(padded[:, term.amplitude] - exponent * x, -700, 700))
      loss = loss + size
      J[:, cells, term.amplitude] += size
      J[:, cells, term.exponent] -= size * x
      J[:, cells, term.efficiency] -= size * exponent
    return np.log(loss), J[..., :P] / loss[..., None]

  def starts(self, loss_C: np.ndarray) -> np.ndarray:
    """Parameters from which to start a fit of losses, [S, P]: efficiencies of one, and amplitudes
    that are right on average, or for two terms by least squares."""
    grids = itertools.product(*[EXPONENTS[len(self.terms)]] * len(self.terms), FLOORS)
    found = []
    for *exponents, share in grids:
      theta = np.zeros(len(self.names) + 1)
      theta[self.floor] = share * loss_C.min()
      rest = loss_C - share * loss_C.min()
      powers = [np.exp(-e * t.x) for e, t in zip(exponents, self.terms, strict=True)]
      parts = np.full(len(powers), 1.0)
      if len(powers) > 1:
        parts = np.linalg.lstsq(np.stack(powers, axis=1) / rest[:, None], np.ones_like(rest))[0]
        # Neither term may start at zero.
        parts = np.maximum(parts, [0.1 * np.exp(np.mean(np.log(rest / p))) for p in powers])
      for term, exponent, power, part in zip(self.terms, exponents, powers, parts, strict=True):
        theta[term.exponent] = exponent
        for index in np.unique(term.amplitude):
          own = term.amplitude == index
          scale = np.mean(np.log(rest[own] / power[own])) if len(powers) == 1 else np.log(part)
          theta[index] = scale
      found.append(theta[:-1])
    return np.array(found)


def design(cells: pd.DataFrame, law: str, shared: tuple[str, ...], reference: Pair) -> Design:
  """The curve of a law at cells: rows with optimizer, recipe, N, D.

  shared: for the study's law, those of A, alpha and E that all optimizers share. An optimizer's own
  parameter is called `A(muon)`, an efficiency `rho(muon, quest_w4a4)`."""
  optimizers, pairs = list(cells.optimizer), list(zip(cells.optimizer, cells.recipe, strict=True))
  names: list[str] = []

  def indices(wanted: list[str]) -> np.ndarray:
    names.extend(dict.fromkeys(name for name in wanted if name and name not in names))
    # Index -1 reads the zero that is appended to the parameters: an efficiency's logarithm.
    return np.array([names.index(name) if name else -1 for name in wanted])

  def of_optimizer(name: str) -> np.ndarray:
    together = law == "two_term" or name in shared
    return indices([name if together else f"{name}({optimizer})" for optimizer in optimizers])

  def of_pair(name: str, is_one: list[bool]) -> np.ndarray:
    return indices(
      ["" if one else f"{name}({', '.join(pair)})" for one, pair in zip(is_one, pairs, strict=True)]
    )

  if law == "two_term" or "A" in shared:
    is_one = [pair == reference for pair in pairs]
  else:  # an optimizer's own amplitude covers its runs of the reference's recipe
    is_one = [recipe == reference[1] for _, recipe in pairs]
  log_N, log_D = np.log(cells.N.to_numpy(float)), np.log(cells.D.to_numpy(float))
  if law == "study":
    first = of_optimizer("A"), of_optimizer("alpha")
    floor = of_optimizer("E")
    terms = (Term(log_N, *first, of_pair("rho", is_one)),)
  else:
    first, second = (
      (of_optimizer("A"), of_optimizer("alpha")),
      (of_optimizer("B"), of_optimizer("beta")),
    )
    floor = of_optimizer("E")
    terms = (
      Term(log_N, *first, of_pair("rho_N", is_one)),
      Term(log_D, *second, of_pair("rho_D", is_one)),
    )
  return Design(tuple(names), terms, floor)
