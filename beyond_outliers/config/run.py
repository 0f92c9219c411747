"""Configuration of a run: all sections together, and the rules between them."""

from __future__ import annotations

import dataclasses

from beyond_outliers.config.checks import require, require_at_least
from beyond_outliers.config.sections import (
  Average,
  Checkpoint,
  Data,
  Distributed,
  Eval,
  Log,
  Mesh,
  Model,
  OptimizerGroups,
  Quant,
  QuantRule,
  Schedule,
  Spikes,
)

# What runs did that were recorded before these sections existed.
PATIENT = Distributed()
WITH_SPIKES = Spikes()
UNAVERAGED = Average()
UNQUANTIZED = Quant("none", "aqt", {"head": QuantRule("head", "none")})


@dataclasses.dataclass(frozen=True)
class Config:
  """A run's configuration: its own numbers, and its sections."""

  size: str
  seed: int
  steps: int
  batch_size: int
  micro_batches: int
  context: int
  tokens_per_parameter: int
  max_skipped_updates: int
  warm_start: str
  mesh: Mesh
  model: Model
  data: Data
  optimizer: OptimizerGroups
  schedule: Schedule
  checkpoint: Checkpoint
  eval: Eval
  log: Log
  quant: Quant = UNQUANTIZED
  distributed: Distributed = PATIENT
  average: Average = UNAVERAGED
  spikes: Spikes = WITH_SPIKES
  max_gradient_norm: float = 0.0

  def __post_init__(self):
    names = {self.quant.recipe, *(rule.recipe for rule in self.quant.rules.values())}
    require(
      self.model.dtype != "float64" or self.quant.backend == "jax" or names == {"none"},
      "quant.backend",
      self.quant.backend,
      "AQT multiplies in float32; with model.dtype = 'float64' take 'jax'",
    )
    require_at_least(self, "", max_gradient_norm=0)
    require(
      self.batch_size % self.micro_batches == 0,
      "micro_batches",
      self.micro_batches,
      f"must divide batch_size ({self.batch_size})",
    )
    require(
      self.data.vocab == self.model.vocab,
      "model.vocab",
      self.model.vocab,
      f"must equal data.vocab ({self.data.vocab}); set only data.vocab: this one follows it",
    )
    require(
      self.average.last <= self.checkpoint.keep,
      "average.last",
      self.average.last,
      f"only checkpoint.keep = {self.checkpoint.keep} checkpoints are kept; raise that to at least "
      "as many",
    )
    require(
      not self.log.profile_step or self.log.profile_step + self.log.profile_steps - 1 <= self.steps,
      "log.profile_step",
      self.log.profile_step,
      f"with log.profile_steps = {self.log.profile_steps} the trace must end by step {self.steps}",
    )
    if self.data.reader == "tfds":
      require(
        self.batch_size % self.data.readers == 0,
        "data.readers",
        self.data.readers,
        f"must divide batch_size ({self.batch_size})",
      )
