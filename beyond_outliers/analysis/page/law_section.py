"""Section on scaling laws: losses over sizes, and a model's effective size under a recipe."""

from __future__ import annotations

import functools
import math

import pandas as pd

from beyond_outliers.analysis import plots
from beyond_outliers.analysis.page.evidence import Evidence, Law
from beyond_outliers.analysis.page.section import Drawing, Part, Table, frame_table, unique
from beyond_outliers.analysis.page.text import number
from beyond_outliers.analysis.scaling_law import ScalingLaw


def laws(evidence: Evidence) -> list[Part]:
  """A part per scaling law, which is over all sizes of one data set."""
  return [_law_part(law) for law in evidence.laws]


def _law_part(law: Law) -> Part:
  fit, sizes = law.law.value, law.points.get("size", pd.Series(dtype=str)).nunique()
  command = "python -m launch.local --config=configs/adamw.py:2m --root=RUNS"
  if fit is None or sizes == 1:
    why = "all runs are of one size; a law takes three or more" if sizes == 1 else law.law.problem
    return Part(law.title, law.runs, missing=why, command=command, left_out=law.left_out)
  sentences = [
    f"{fit.runs} runs of {sizes} size{'s' * (sizes != 1)}; log losses ± {fit.residual:.2g} around "
    f"the law, ± {number(fit.between_seeds, '.2g')} between seeds. Bootstrap of {fit.resampling}."
  ]
  for reason in unique(filter(None, fit.reasons.values())):
    names = [name for name in fit.params if fit.reasons[name] == reason]
    sentences.append(f"Not identified: {', '.join(names)}: {reason}.")
  return Part(
    law.title,
    law.runs,
    sentences,
    [
      Drawing(
        "law",
        "Left: runs, and the law through their losses. Right: rho, the share of its parameters "
        "that a recipe leaves a model.",
        functools.partial(plots.plot_scaling_law, fit, points=law.points),
      )
    ],
    [_parameters_table(fit)],
    command="analysis.scaling_law.fit(analysis.law_points.of_runs(runs)[0]), from Python",
    left_out=[*law.left_out, *fit.left_out],
  )


def _parameters_table(fit: ScalingLaw) -> Table:
  """Every parameter with its two intervals, efficiencies first."""
  rows = pd.DataFrame(
    [
      {
        "parameter": name,
        "value": value,
        "profile_low": fit.intervals[name].profile.low,
        "profile_high": fit.intervals[name].profile.high,
        "bootstrap_low": fit.intervals[name].bootstrap.low,
        "bootstrap_high": fit.intervals[name].bootstrap.high,
        "identified": "yes" if fit.identified[name] else "no",
      }
      for name, value in sorted(fit.params.items(), key=lambda item: not item[0].startswith("rho"))
    ]
  )

  def interval(kind: str):
    def text(row) -> str:
      low, high = getattr(row, f"{kind}_low"), getattr(row, f"{kind}_high")
      return "none" if math.isnan(low) else f"{low:.4g} to {high:.4g}"

    return text

  percent = f"{100 * fit.confidence:g} %"
  return frame_table(
    "law",
    f"L = A / (N rho)^alpha + E, losses in nats; intervals at {percent}.",
    rows,
    {
      "parameter": lambda row: row.parameter,
      "value": lambda row: f"{row.value:.4g}",
      "profile": interval("profile"),
      "bootstrap": interval("bootstrap"),
      "identified": lambda row: row.identified,
    },
  )
