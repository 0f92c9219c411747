"""The report's sections, in order: a row of SECTIONS each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from beyond_outliers.analysis.page import landing_section, law_section, summary, task_section
from beyond_outliers.analysis.page import propagation_sections as propagation
from beyond_outliers.analysis.page import quantization_sections as quantization
from beyond_outliers.analysis.page import training_sections as training
from beyond_outliers.analysis.page.evidence import Evidence, RunGroup
from beyond_outliers.analysis.page.section import PageSection, Part


class Row(NamedTuple):
  """One section: its heading, its question, and the function that makes its part for each group of
  runs, or its parts for all runs."""

  title: str
  question: str
  of_group: Callable[[Evidence, RunGroup], Part] | None = None
  of_all: Callable[[Evidence], list[Part]] | None = None


# By their addresses in the page.
SECTIONS: dict[str, Row] = {
  "answer": Row(
    "The answer in a few numbers",
    "What does quantization cost each optimizer: trained in it, and after training?",
    summary.answer,
  ),
  "runs": Row(
    "What was run",
    "Which models, data, optimizers, learning rates and seeds, and how did the runs end?",
    training.what_was_run,
  ),
  "tuning": Row(
    "Learning rates",
    "Which learning rate is best for each optimizer, and does the grid bracket it?",
    training.tuned_rates,
  ),
  "losses": Row(
    "Losses",
    "How do the losses fall, and how do they depend on the learning rate?",
    training.loss_curves,
  ),
  "degradation": Row(
    "Quantization after training (PTQ)",
    "What does it cost, by recipe, method and optimizer?",
    quantization.degradation,
  ),
  "tasks": Row(
    "Tasks",
    "What do models score at tasks, as they were trained and quantized?",
    task_section.scored_tasks,
  ),
  "depth": Row(
    "The error along depth",
    "How large is the error of quantization after each layer, norm and sum of the network?",
    propagation.error_along_depth,
  ),
  "parts": Row(
    "What the error is made of",
    "R = A + B + C: how much of a layer's error came in (A), and how much did it add (B)?",
    propagation.error_parts,
  ),
  "gains": Row(
    "Gains and alignment",
    "Does a kind of layer amplify the error that comes in, or dampen it, and why?",
    propagation.gains,
  ),
  "predictors": Row(
    "What predicts degradation",
    "Do optimizers with larger outliers lose more, or those with a larger error at the end?",
    quantization.predictors_of_degradation,
  ),
  "gap": Row(
    "Training under a recipe (QAT)",
    "How much higher is the loss that a run ends at under a recipe?",
    training.training_gap,
  ),
  "law": Row(
    "Scaling law",
    "What share rho of its parameters does a recipe leave a model, over sizes?",
    of_all=law_section.laws,
  ),
  "along": Row(
    "Along training",
    "How does δ = CE(quantized)/CE − 1 move with the learning rate?",
    quantization.along_training,
  ),
  "landings": Row(
    "Models of equal loss",
    "Trained to one common loss, what do optimizers lose, and does it matter how they came there?",
    landing_section.landings,
  ),
  "left_out": Row(
    "What is missing or was left out",
    "Which runs and measurements are in none of the numbers above, and why?",
  ),
}


def make_sections(evidence: Evidence) -> list[PageSection]:
  """Every section, its parts by group of runs, smallest models first; the last is of the others."""
  made = []
  for key, row in SECTIONS.items():
    if row.of_group:
      parts = [row.of_group(evidence, group) for group in evidence.groups]
    else:
      parts = row.of_all(evidence) if row.of_all else [summary.left_out(evidence, made)]
    made.append(PageSection(key, row.title, row.question, parts))
  return made
