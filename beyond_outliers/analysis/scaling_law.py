"""Scaling laws of the loss over model and data sizes, and the effective model size under a recipe.

    study      L = A / (N rho)^alpha + E, at one ratio of tokens to parameters
    two_term   L = A / (rho_N N)^alpha + B / (rho_D D)^beta + E

N are parameters, D tokens. A model under a recipe is worth a full-precision model with a share rho
of its parameters (arXiv 2509.23500, section 5). In two_term (arXiv 2602.07712), each optimizer and
recipe has its rho_N and rho_D, which are 1 for the reference; all else is shared, since a law of
one optimizer alone is ill-conditioned. For that reason the study's law shares E and alpha by
default; `shared=()` is the paper's fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from beyond_outliers.analysis import identification
from beyond_outliers.analysis.huber_regression import Problem
from beyond_outliers.analysis.law_design import Design, Pair, design
from beyond_outliers.analysis.law_intervals import between_seeds, bootstrap_refits, profile_interval
from beyond_outliers.analysis.law_points import SAME_RATIO, Table, read_points, with_references
from beyond_outliers.analysis.statistics import check_confidence
from beyond_outliers.analysis.tables import markdown_table
from beyond_outliers.config.checks import nearest, require
from beyond_outliers.errors import ConfigError

LAWS = ("study", "two_term")
SHAREABLE = ("A", "alpha", "E")
DEFAULT_SHARED = ("E", "alpha")


class Interval(NamedTuple):
  """A confidence interval; NaN where none was made."""

  low: float
  high: float


class LawIntervals(NamedTuple):
  """Two confidence intervals of one parameter."""

  profile: Interval
  bootstrap: Interval


class Efficiency(NamedTuple):
  """Effective shares of parameters and of tokens under an optimizer and recipe."""

  N: float
  D: float


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
  """A fitted law. Names of parameters: `alpha`, or `alpha(muon)` if it is an optimizer's own;
  `rho(muon, quest_w4a4)`, or for two_term `rho_N(...)` and `rho_D(...)`."""

  law: str
  reference: Pair
  params: dict[str, float]
  rho: dict[Pair, float | Efficiency]  # by (optimizer, recipe); 1 for what it is relative to
  intervals: dict[str, LawIntervals]
  confidence: float
  resampling: str  # what the bootstrap resampled
  identified: dict[str, bool]  # whether the data determine a parameter
  reasons: dict[str, str]  # why not, and what would be needed; empty if they do
  left_out: list[str]
  # Standard deviations of log losses around the law, and of seeds around their mean. If the former
  # is well above the latter, the law does not hold, which the bootstrap's intervals don't reflect.
  residual: float
  between_seeds: float  # NaN if every cell has one seed
  runs: int
  tokens_per_parameter: float  # at which the study's law holds; NaN for two_term
  embedding: bool  # whether N counts the embedding

  def predict(
    self,
    N: float | np.ndarray,
    D: float | np.ndarray | None = None,
    *,
    optimizer: str | None = None,
    recipe: str | None = None,
  ) -> np.ndarray:
    """Losses in nats at N parameters (counted as in the fit) and D tokens, broadcast together.

    optimizer, recipe: by default the reference's. D: needed by two_term.
    Errors: ConfigError for an optimizer or recipe that was not fitted, sizes that are not above
      zero, and with the study's law for another D/N."""
    pair = optimizer or self.reference[0], recipe or self.reference[1]
    require(
      pair in self.rho, "(optimizer, recipe)", pair, nearest(str(pair), list(map(str, self.rho)))
    )
    N = np.asarray(N, float)
    for name, value in (("N", N), ("D", 1.0 if D is None else np.asarray(D, float))):
      require(bool(np.all(value > 0)), name, np.asarray(value).tolist(), "expected above zero")
    A, alpha, E = (self._of(name, pair[0]) for name in ("A", "alpha", "E"))
    if self.law == "study":
      self._check_ratio(N, D)
      return A / (N * self._share("rho", pair)) ** alpha + E
    require(D is not None, "D", D, 'the law "two_term" needs the number of tokens')
    N, D = N * self._share("rho_N", pair), np.asarray(D, float) * self._share("rho_D", pair)
    return A / N**alpha + self.params["B"] / D ** self.params["beta"] + E

  def _of(self, name: str, optimizer: str) -> float:
    return self.params[name if name in self.params else f"{name}({optimizer})"]

  def _share(self, name: str, pair: Pair) -> float:
    return self.params.get(f"{name}({', '.join(pair)})", 1.0)

  def _check_ratio(self, N: np.ndarray, D: float | np.ndarray | None) -> None:
    if D is None:
      return
    ratio = np.asarray(D) / N if self.embedding else np.full(1, np.nan)
    require(
      bool(np.all(np.abs(ratio / self.tokens_per_parameter - 1) <= 2 * SAME_RATIO)),
      "D",
      D,
      f'the law "study" holds at {self.tokens_per_parameter:.3g} tokens per parameter, the '
      'embedding\'s included; leave D out, or fit law="two_term"',
    )

  def table(self) -> str:
    """Every parameter with its intervals and whether it is identified, in Markdown; and what was
    left out."""

    def shown(interval: Interval) -> str:
      return "none" if math.isnan(interval.low) else f"{interval.low:.4g} to {interval.high:.4g}"

    percent = f"{100 * self.confidence:g} %"
    rows = markdown_table(
      {
        "parameter": lambda name: name,
        "value": lambda name: f"{self.params[name]:.4g}",
        f"profile, {percent}": lambda name: shown(self.intervals[name].profile),
        f"bootstrap, {percent}": lambda name: shown(self.intervals[name].bootstrap),
        "identified": lambda name: "yes" if self.identified[name] else "no",
      },
      self.params,
    )
    counted = "with" if self.embedding else "without"
    notes = [
      f"law {self.law}, N {counted} the embedding, reference {', '.join(self.reference)}; "
      f"{self.runs} runs, log losses ± {self.residual:.2g} around it, ± {self.between_seeds:.2g} "
      f"between seeds; bootstrap of {self.resampling}"
    ]
    for reason in dict.fromkeys(filter(None, self.reasons.values())):
      names = [name for name in self.params if self.reasons[name] == reason]
      notes.append(f"not identified: {', '.join(names)}: {reason}")
    notes += ["left out:", *self.left_out] if self.left_out else []
    return rows + "\n\n" + "\n".join(notes)


def fit(
  points: Table,
  *,
  law: str = "study",
  shared: Sequence[str] = DEFAULT_SHARED,
  reference: Pair = ("adamw", "none"),
  embedding: bool = True,
  delta: float = 1e-3,
  confidence: float = 0.95,
  resamples: int = 400,
  seed: int = 0,
) -> ScalingLaw:
  """The law fitted to runs: Huber regression of log losses, the best of many starts.

  points: a pandas.DataFrame, or what makes one, with one row per run: optimizer, recipe,
    parameters, tokens, loss (nats), seed; embedding (number of its parameters) if N is to exclude
    it; optionally status, and columns that all runs must agree on, such as `tokenizer`.
  shared: for the study's law, which of E, alpha and A all optimizers share. If A is not shared, an
    optimizer's rho is relative to its own runs under the reference's recipe; if it is, to the
    reference.
  delta: where the loss of a log residual turns linear; 1e-3 as in arXiv 2203.15556, appendix D.3.
  resamples: of the bootstrap; 0: none. seed: of its draws.

  Intervals. `profile`: by profile likelihood (`law_intervals.profile_interval`), for normal log
  losses of equal spread. `bootstrap`: percentiles over refits to resampled seeds
  (`law_intervals.bootstrap_refits`); none if the runs' sizes do not identify a parameter. Both
  treat runs as independent: if seeds share the data's order between recipes, rho is known better
  than they say.
  Errors: ConfigError for tables, laws, parameters and references that do not fit."""
  shared = _check(law, shared, delta, confidence, resamples)
  table, left_out = read_points(points, embedding)
  if table.empty:
    raise ConfigError(
      f"points: none of {len(left_out)} runs is done and has a loss; the first: {left_out[:1]}"
    )
  table, alone = with_references(table, law, shared, reference)
  distinct = ["optimizer", "recipe", "N", "D"]
  cells = table.drop_duplicates(distinct).reset_index(drop=True)
  cell_M = table.groupby(distinct, sort=False).ngroup().to_numpy()
  plan = design(cells, law, shared, reference)
  P, M = len(plan.names), len(table)
  require(
    M > P,
    "points",
    f"{M} runs",
    f"the law has {P} parameters ({', '.join(plan.names)}) and needs at least {P + 1} runs",
  )
  values_M = table.log_loss.to_numpy()
  lower, upper = plan.bounds(math.exp(values_M.min()))
  problem = Problem(plan.curve, cell_M, lower, upper, delta)
  theta_P, ends_Px2 = _best(problem, plan, values_M, confidence)
  draws, resampling = bootstrap_refits(problem, values_M, theta_P, confidence, resamples, seed)
  tail = 50 * (1 - confidence)
  limits = (
    np.percentile(draws, [tail, 100 - tail], axis=0) if resamples else np.full((2, P), np.nan)
  )
  value_P = plan.values(theta_P)
  profile_Px2, bootstrap_Px2 = (plan.opened(ends, lower, upper) for ends in (ends_Px2, limits.T))
  by_design = identification.by_design(plan, cells, theta_P, law)
  by_noise = identification.by_noise(plan, cells, theta_P, profile_Px2, law, M / len(cells))
  reasons = {name: by_design[name] or by_noise[name] for name in plan.names}
  # Refits start at the fit, so in a valley without a minimum they would stay near it.
  bootstrap_Px2[[bool(by_design[name]) for name in plan.names]] = np.nan
  return ScalingLaw(
    law=law,
    reference=reference,
    params=dict(zip(plan.names, value_P.tolist(), strict=True)),
    rho=_efficiencies(plan, cells, value_P, law),
    intervals={
      name: LawIntervals(Interval(*profile.tolist()), Interval(*bootstrap.tolist()))
      for name, profile, bootstrap in zip(plan.names, profile_Px2, bootstrap_Px2, strict=True)
    },
    confidence=confidence,
    resampling=resampling,
    identified={name: not reasons[name] for name in plan.names},
    reasons=reasons,
    left_out=[*left_out, *alone],
    residual=problem.noise(values_M, theta_P),
    between_seeds=between_seeds(values_M, cell_M),
    runs=M,
    tokens_per_parameter=float(table.tokens_per_parameter.median()) if law == "study" else math.nan,
    embedding=embedding,
  )


def _check(
  law: str, shared: Sequence[str], delta: float, confidence: float, resamples: int
) -> tuple[str, ...]:
  """`shared` as a tuple, with all settings checked. Errors: ConfigError."""
  require(law in LAWS, "law", law, nearest(law, LAWS))
  shared = (shared,) if isinstance(shared, str) else tuple(shared)
  for name in shared:
    require(name in SHAREABLE, "shared", name, nearest(name, SHAREABLE))
  if law == "two_term":
    require(
      set(shared) in (set(DEFAULT_SHARED), set(SHAREABLE)),
      "shared",
      shared,
      'the law "two_term" shares all but rho; leave `shared` out, or fit law="study"',
    )
  elif "A" in shared:
    require("alpha" in shared, "shared", shared, "A has alpha's unit: share alpha too")
  require(0 < delta < math.inf, "delta", delta, "expected a number above zero, such as 1e-3")
  check_confidence(confidence)
  require(resamples >= 0, "resamples", resamples, "expected at least 0")
  return shared


def _best(
  problem: Problem, plan: Design, values_M: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
  """(parameters as fitted [P], ends of their profiles [P, 2])."""
  counts = np.bincount(problem.cell_M)
  starts = plan.starts(np.exp(np.bincount(problem.cell_M, values_M) / counts))
  thetas, sums = problem.solve(values_M[None], starts)
  theta = thetas[np.argmin(sums)]
  # A profile searches far around the fit; if it meets a lower minimum, the fit moves there.
  for _ in range(3):
    ends, met = profile_interval(problem, values_M, theta, confidence)
    (better,), (low,) = problem.solve(values_M[None], met[None])
    if low >= problem.objective(values_M[None], theta[None])[0] * (1 - 1e-6):
      break
    theta = better
  return theta, ends


def _efficiencies(
  plan: Design, cells: pd.DataFrame, value_P: np.ndarray, law: str
) -> dict[Pair, float | Efficiency]:
  found = dict(zip(plan.names, value_P.tolist(), strict=True))
  pairs = dict.fromkeys(zip(cells.optimizer, cells.recipe, strict=True))
  if law == "study":
    return {pair: found.get(f"rho({', '.join(pair)})", 1.0) for pair in pairs}
  return {
    pair: Efficiency(*(found.get(f"rho_{x}({', '.join(pair)})", 1.0) for x in "ND"))
    for pair in pairs
  }
