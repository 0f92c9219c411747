"""Each optimizer's own section of the configuration: a frozen dataclass a row, with the rules that
its values obey.

Fields are the arguments of the optimizer's factory in `optim`; None leaves an argument to the
optimizer. Those with a default are younger than the others: runs recorded without them had it.
"""

from __future__ import annotations

import dataclasses
import math

from beyond_outliers.config.checks import at_least, below_one, fraction, one_of, require

REFRESHES = ("together", "staggered")
ITERATION_DTYPES = ("float32", "bfloat16")
ITERATION_TABLES = ("quintic", "polar_express")
# Shampoo: the only values beside eigenvalue_correction, which has no roots and a step length of its
# own.
WITH_EIGENVALUE_CORRECTION = {
  "eps_mode": "absolute",
  "grafting": "none",
  "momentum": "gradient",
  "root": "eigh",
  "preconditioner_dtype": "float32",
  "packed": False,
}
LEAST_UPDATE_PROBABILITY = 0.03  # PSGD: where its schedule ends
MAX_BFLOAT16_B2 = (
  0.99  # Shampoo: bfloat16 has 8 bits, so that an average rounds a change of less than 1/512 away
)


class Section:
  """What every section tells beside its fields."""

  @property
  def period(self) -> int:
    """Steps after which what the optimizer costs repeats."""
    return 1


@dataclasses.dataclass(frozen=True)
class AdamW(Section):
  """Hyperparameters of `optim.adamw`."""

  name: str
  learning_rate: float
  b1: float
  b2: float
  eps: float
  weight_decay: float

  def __post_init__(self):
    at_least(self, "optimizer.", learning_rate=0, eps=0, weight_decay=0)
    below_one(self, "optimizer.", "b1", "b2")  # at 1 the bias correction divides by zero


@dataclasses.dataclass(frozen=True)
class Muon(Section):
  """Hyperparameters of `optim.muon`."""

  name: str
  learning_rate: float
  momentum: float
  nesterov: bool
  nesterov_bias_correction: bool
  ns_steps: int
  ns_coefficients: str
  ns_dtype: str
  ns_gram: bool
  scale: str
  weight_decay: float
  adam_learning_rate: float
  adam_b1: float
  adam_b2: float
  adam_eps: float

  def __post_init__(self):
    at_least(
      self,
      "optimizer.",
      learning_rate=0,
      ns_steps=1,
      weight_decay=0,
      adam_learning_rate=0,
      adam_eps=0,
    )
    below_one(self, "optimizer.", "momentum", "adam_b1", "adam_b2")
    one_of(
      self,
      "optimizer.",
      ns_coefficients=ITERATION_TABLES,
      ns_dtype=ITERATION_DTYPES,
      scale=("original", "match_rms_adamw"),
    )


@dataclasses.dataclass(frozen=True)
class Scion(Section):
  """Hyperparameters of `optim.scion`."""

  name: str
  learning_rate: float
  momentum: float
  norm: str
  scale: float
  normalized: bool | None
  clamp: bool
  constrained: bool
  weight_decay: float
  ns_steps: int
  ns_coefficients: str
  ns_dtype: str
  ns_gram: bool

  def __post_init__(self):
    at_least(self, "optimizer.", learning_rate=0, scale=0, weight_decay=0, ns_steps=1)
    below_one(self, "optimizer.", "momentum")
    one_of(
      self,
      "optimizer.",
      norm=("auto", "spectral", "sign", "col", "row", "rms"),
      ns_coefficients=ITERATION_TABLES,
      ns_dtype=ITERATION_DTYPES,
    )


@dataclasses.dataclass(frozen=True)
class Psgd(Section):
  """Hyperparameters of `optim.psgd`."""

  name: str
  learning_rate: float
  momentum: float
  max_size_triangular: int
  preconditioner_lr: float
  preconditioner_init: float
  update_probability: float | None
  balance_probability: float
  clip_rms: float
  clip_eps: float
  noise: str
  weight_decay: float
  cache: bool
  seed: int

  def __post_init__(self):
    at_least(
      self,
      "optimizer.",
      learning_rate=0,
      max_size_triangular=0,
      preconditioner_lr=0,
      preconditioner_init=0,
      clip_rms=0,
      clip_eps=0,
      weight_decay=0,
      seed=0,
    )
    below_one(self, "optimizer.", "momentum")
    fraction(self, "optimizer.", "balance_probability")
    one_of(self, "optimizer.", noise=("both", "preconditioner", "none"))
    require(
      self.update_probability is None or 0 < self.update_probability <= 1,
      "optimizer.update_probability",
      self.update_probability,
      "expected a number above 0, at most 1, or None for the schedule",
    )

  @property
  def period(self) -> int:
    return math.ceil(1 / (self.update_probability or LEAST_UPDATE_PROBABILITY))


@dataclasses.dataclass(frozen=True)
class Shampoo(Section):
  """Hyperparameters of `optim.shampoo`."""

  name: str
  learning_rate: float
  b1: float
  b2: float
  eps: float
  eps_mode: str
  weight_decay: float
  bias_correction: bool
  grafting: str
  graft_granularity: str
  grafting_b2: float
  grafting_eps: float
  momentum: str
  root: str
  exponent: float | None
  max_residual: float
  precondition_frequency: int
  refresh: str
  start_step: int | None
  block_size: int
  long_axes: str
  merge_dims: bool
  preconditioner_dtype: str
  packed: bool
  eigenvalue_correction: bool = False

  def __post_init__(self):
    at_least(
      self,
      "optimizer.",
      learning_rate=0,
      eps=0,
      weight_decay=0,
      grafting_eps=0,
      max_residual=0,
      precondition_frequency=1,
      block_size=1,
    )
    below_one(self, "optimizer.", "b1", "grafting_b2")
    fraction(self, "optimizer.", "b2")  # at 1 the factors are sums
    one_of(
      self,
      "optimizer.",
      eps_mode=("absolute", "relative"),
      grafting=("none", "sgd", "adam", "rmsprop"),
      graft_granularity=("block", "parameter"),
      momentum=("gradient", "update"),
      root=("eigh", "newton", "denman_beavers", "qr"),
      refresh=(*REFRESHES, "together_from_first"),
      long_axes=("block", "skip"),
      preconditioner_dtype=("float32", "bfloat16"),
    )
    if self.eigenvalue_correction:
      for name, value in WITH_EIGENVALUE_CORRECTION.items():
        require(
          getattr(self, name) == value,
          f"optimizer.{name}",
          getattr(self, name),
          f"optimizer.eigenvalue_correction works with {value!r} only",
        )
      one_of(self, "optimizer.", refresh=REFRESHES)
    require(
      self.preconditioner_dtype == "float32" or self.b2 <= MAX_BFLOAT16_B2,
      "optimizer.b2",
      self.b2,
      f"averages in bfloat16 stand still above {MAX_BFLOAT16_B2}; choose a smaller one, or "
      "preconditioner_dtype=float32",
    )
    require(
      self.exponent is None or self.exponent > 0,
      "optimizer.exponent",
      self.exponent,
      "expected above 0, or None",
    )
    require(
      self.start_step is None or self.start_step >= 1,
      "optimizer.start_step",
      self.start_step,
      "expected at least 1, or None for precondition_frequency",
    )

  @property
  def period(self) -> int:
    return self.precondition_frequency


@dataclasses.dataclass(frozen=True)
class Soap(Section):
  """Hyperparameters of `optim.soap`."""

  name: str
  learning_rate: float
  b1: float
  b2: float
  shampoo_beta: float | None
  eps: float
  weight_decay: float
  precondition_frequency: int
  refresh: str
  max_dim: int
  normalize_gradients: bool
  bias_correction: bool
  count_skipped_step: bool
  block_size: int | None = None

  def __post_init__(self):
    at_least(
      self,
      "optimizer.",
      learning_rate=0,
      eps=0,
      weight_decay=0,
      precondition_frequency=1,
      max_dim=0,
    )
    below_one(self, "optimizer.", "b1", "b2")
    one_of(self, "optimizer.", refresh=REFRESHES)
    require(
      self.block_size is None or self.block_size >= 1,
      "optimizer.block_size",
      self.block_size,
      "expected at least 1, or None for whole matrices",
    )
    require(
      self.shampoo_beta is None or 0 <= self.shampoo_beta < 1,
      "optimizer.shampoo_beta",
      self.shampoo_beta,
      "expected a number from 0 to below 1, or None for b2",
    )

  @property
  def period(self) -> int:
    return self.precondition_frequency


OPTIMIZERS: dict[str, type] = {
  "adamw": AdamW,
  "muon": Muon,
  "psgd": Psgd,
  "scion": Scion,
  "shampoo": Shampoo,
  "soap": Soap,
}
