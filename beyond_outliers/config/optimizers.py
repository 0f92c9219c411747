"""Each optimizer's section of the configuration: the only definition of its hyperparameters.

Fields are the arguments of the optimizer's factory in `optim`, whose defaults are the official
values; None leaves a choice to the optimizer. Official implementations are torch (AdamW),
KellerJordan/Muon 857d1ad, LIONS-EPFL/scion f58a393, evanatyourservice/kron_torch 884427c (PSGD),
facebookresearch/optimizers 1ff09af (Shampoo) and nikhilvyas/SOAP a1e5535.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from beyond_outliers.config.checks import LARGEST_SEED
from beyond_outliers.config.hyperparameters import (
  Section,
  above_zero,
  at_least,
  below_one,
  fraction,
  is_number,
  official,
  one_of,
)

BASIS_REFRESHES = ("together", "staggered")  # for methods with bases; with roots there is a third
ITERATION_DTYPES = ("float32", "bfloat16", "float64")
ITERATION_TABLES = ("quintic", "polar_express")
# Shampoo: values that eigenvalue_correction requires, as it has no roots and its own step length.
WITH_EIGENVALUE_CORRECTION = {
  "eps_mode": "absolute",
  "grafting": "none",
  "momentum": "gradient",
  "root": "eigh",
  "preconditioner_dtype": "float32",
  "packed": False,
}
LEAST_UPDATE_PROBABILITY = 0.03  # PSGD: at which its schedule ends
MAX_BFLOAT16_B2 = 0.99  # an average in bfloat16 rounds off relative changes of less than 1/512
_STORED = one_of("float32", "bfloat16")

_MOMENTUM = below_one(
  ", the average's decay; implementations that take the new gradient's weight call one minus it "
  "momentum"
)


@dataclasses.dataclass(frozen=True)
class AdamW(Section):
  """Hyperparameters of `optim.adamw`."""

  b1: float = official(0.9, "decay of the first moment", below_one())
  b2: float = official(0.999, "decay of the second moment", below_one())
  eps: float = official(1e-8, "added to the second moment's root", at_least(0))
  weight_decay: float = official(0.01, "decoupled, of all leaves", at_least(0))


@dataclasses.dataclass(frozen=True)
class Muon(Section):
  """Hyperparameters of `optim.muon`."""

  momentum: float = official(
    0.95, "decay of the average of gradients, not bias-corrected; 0 keeps none", _MOMENTUM
  )
  nesterov: bool = official(True, "mix the latest gradient in once more")
  nesterov_bias_correction: bool = official(
    False, "correct average and gradient each before they are mixed, as optax.contrib.muon does"
  )
  ns_steps: int = official(5, "Newton-Schulz steps", at_least(1))
  ns_coefficients: str = official(
    "quintic", "their polynomials; also triples (a, b, c), one per step", one_of(*ITERATION_TABLES)
  )
  ns_dtype: str = official("bfloat16", "of their operands", one_of(*ITERATION_DTYPES))
  ns_gram: bool = official(False, "iterate on the small Gram matrix: faster if long, less exact")
  scale: str = official(
    "original",
    "sqrt(max(1, fan_out / fan_in)), or 0.2 sqrt(max(fan_out, fan_in)): AdamW's update RMS",
    one_of("original", "match_rms_adamw"),
  )
  weight_decay: float = official(0.0, "decoupled, of all leaves, unscaled", at_least(0))
  adam_learning_rate: float = official(3e-4, "of leaves that are not matrices", at_least(0))
  adam_b1: float = official(0.9, "likewise", below_one())
  adam_b2: float = official(0.95, "likewise", below_one())
  adam_eps: float = official(1e-10, "likewise", at_least(0))


@dataclasses.dataclass(frozen=True)
class Scion(Section):
  """Hyperparameters of `optim.scion`."""

  momentum: float = official(
    0.0,
    "decay of the average of gradients, not bias-corrected; 0 keeps none; officially one minus it",
    _MOMENTUM,
  )
  norm: str = official(
    "auto",
    "spectral: sqrt(fan_out / fan_in) times the orthogonalised matrix; sign: signs over fan_in; "
    "col: each input's weights over their RMS; row: each output's weights over their L2 norm and "
    "sqrt(fan_in); rms: a slice over its RMS; auto: spectral for matrices, rms for others",
    one_of("auto", "spectral", "sign", "col", "row", "rms"),
  )
  scale: float = official(1.0, "radius of the ball", at_least(0))
  normalized: bool | None = official(None, "whether fan_in counts; None: in all norms but col")
  clamp: bool = official(False, "spectral: a factor of at least 1 (officially max=True)")
  constrained: bool = official(
    True, "decay by the learning rate itself, so that weights stay in the ball (algorithm 2)"
  )
  weight_decay: float = official(0.0, "decoupled, on top of that", at_least(0))
  ns_steps: int = official(5, "as of Muon", at_least(1))
  ns_coefficients: str = official("quintic", "as of Muon", one_of(*ITERATION_TABLES))
  ns_dtype: str = official("bfloat16", "as of Muon", one_of(*ITERATION_DTYPES))
  ns_gram: bool = official(False, "as of Muon")

  def conflicts(self) -> Iterator[tuple[str, str]]:
    if self.clamp and self.norm not in ("auto", "spectral"):
      yield (
        "clamp",
        f"norm = {self.norm!r} has no factor to clamp; leave it False, or take norm = 'spectral'",
      )


@dataclasses.dataclass(frozen=True)
class Psgd(Section):
  """Hyperparameters of `optim.psgd`."""

  momentum: float = official(
    0.9,
    "decay of the average of gradients, bias-corrected, which factors learn from; 0 keeps none",
    _MOMENTUM,
  )
  max_size_triangular: int = official(
    8192, "longer axes have a diagonal factor, as have vectors and scalars", at_least(0)
  )
  preconditioner_lr: float = official(0.1, "of the factors' update", at_least(0))
  preconditioner_init: float = official(1.0, "product of all factors at first", at_least(0))
  update_probability: float | None = official(
    None,
    "one over the steps between updates of factors, never drawn by chance; None: "
    "min(1, exp((500 - n) / 1000)) at the n-th step, at least 0.03",
    above_zero("the share of steps that update factors", 1),
  )
  balance_probability: float = official(0.01, "of evening out a block's factors", fraction())
  clip_rms: float = official(1.1, "largest RMS of a slice's direction", at_least(0, infinite=True))
  clip_eps: float = official(
    1e-12, "added to the RMS before it is compared (pytorch_optimizer: 1e-6)", at_least(0)
  )
  noise: str = official(
    "both",
    "whether updates of factors add a little of V to H: both, in that step's direction too "
    "(kron_torch); preconditioner, not there (psgd_jax); none (pytorch_optimizer)",
    one_of("both", "preconditioner", "none"),
  )
  weight_decay: float = official(0.0, "decoupled, of matrices only", at_least(0))
  cache: bool = official(True, "keep QᵀQ between updates: twice their state, half the products")
  seed: int = official(0, "of V and of balancing", at_least(0, most=LARGEST_SEED))

  @property
  def period(self) -> int:
    return math.ceil(1 / (self.update_probability or LEAST_UPDATE_PROBABILITY))


@dataclasses.dataclass(frozen=True)
class Shampoo(Section):
  """Hyperparameters of `optim.shampoo`."""

  b1: float = official(0.9, "decay of the momentum", below_one())
  b2: float = official(1.0, "decay of the factors G Gᵀ; 1 sums them", fraction())
  eps: float = official(1e-12, "added to a factor's eigenvalues", at_least(0))
  eps_mode: str = official(
    "absolute",
    "relative: eps times the largest eigenvalue, and factors start at eps I (Google)",
    one_of("absolute", "relative"),
  )
  weight_decay: float = official(0.0, "decoupled, of all leaves", at_least(0))
  bias_correction: bool = official(
    True, "of momentum, factors and Adam's second moment (Meta); False: of none (Google)"
  )
  grafting: str = official(
    "none",
    "method that sets the length of a step, and whose own step is taken before start_step and by "
    "blocks without roots; none: these take a plain average of gradients, which has another scale",
    one_of("none", "sgd", "adam", "rmsprop"),
  )
  graft_granularity: str = official(
    "block",
    "what grafting rescales: every block (Meta), or every slice of a parameter (Google)",
    one_of("block", "parameter"),
  )
  grafting_b2: float = official(0.999, "decay of its second moment", below_one())
  grafting_eps: float = official(1e-10, "added to that moment's root", at_least(0))
  momentum: str = official(
    "gradient",
    "what is averaged: gradients (Meta), or preconditioned and grafted updates (Google)",
    one_of("gradient", "update"),
  )
  root: str = official(
    "eigh", "row of inverse_root.ROOTS", one_of("eigh", "newton", "denman_beavers", "qr")
  )
  exponent: float | None = official(
    None,
    "a factor is raised to minus this power; None: 1/4 for matrices, 1/2 for vectors",
    above_zero("the positive power that a factor's inverse is taken to"),
  )
  max_residual: float = official(
    0.1, "a root with a larger one is refused, the old one kept", at_least(0, infinite=True)
  )
  precondition_frequency: int = official(1, "steps between a block's roots", at_least(1))
  refresh: str = official(
    "together",
    "together: at multiples of the frequency from start_step (Meta); together_from_first: at steps "
    "1, 1 + frequency, ... (Google); staggered: from start_step, each block at its own step",
    one_of(*BASIS_REFRESHES, "together_from_first"),
  )
  start_step: int | None = official(None, "first with roots; None: the frequency", at_least(1))
  block_size: int = official(1024, "longest axis that has one factor", at_least(1))
  long_axes: str = official(
    "block", "whether longer axes are cut into blocks, or have no factor", one_of("block", "skip")
  )
  merge_dims: bool = official(False, "up to block_size elements are a vector (Meta's default)")
  preconditioner_dtype: str = official("float32", "of stored factors and roots", _STORED)
  packed: bool = official(False, "store factors and roots as triangles")
  eigenvalue_correction: bool = official(
    False,
    "Adam in the factors' eigenbases instead of roots; exponent is then of its second moment, and "
    "1/2 for None",
    younger=True,
  )

  def conflicts(self) -> Iterator[tuple[str, str]]:
    if self.eigenvalue_correction:
      for name, value in WITH_EIGENVALUE_CORRECTION.items():
        if getattr(self, name) != value:
          yield name, f"eigenvalue_correction works with {value!r} only"
      if self.refresh not in BASIS_REFRESHES:
        yield "refresh", f"eigenvalue_correction works with {' or '.join(BASIS_REFRESHES)} only"
    yield from _standing_still("b2", self.b2, self.preconditioner_dtype)

  @property
  def period(self) -> int:
    return self.precondition_frequency


@dataclasses.dataclass(frozen=True)
class Soap(Section):
  """Hyperparameters of `optim.soap`."""

  b1: float = official(0.95, "decay of the first moment", below_one())
  b2: float = official(0.95, "decay of the second moment", below_one())
  shampoo_beta: float | None = official(
    None, "decay of the factors G Gᵀ; None: b2", below_one(", or None for b2")
  )
  eps: float = official(
    1e-8, "added to the second moment's root, before its bias is corrected", at_least(0)
  )
  weight_decay: float = official(
    0.01, "decoupled; shrinks, by the learning rate itself, what the step has made", at_least(0)
  )
  precondition_frequency: int = official(10, "steps between a block's bases", at_least(1))
  refresh: str = official(
    "together",
    "together: at multiples of the frequency; staggered: each block at its own step",
    one_of(*BASIS_REFRESHES),
  )
  max_dim: int = official(10000, "longer axes are not rotated; 0: Adam", at_least(0))
  normalize_gradients: bool = official(False, "an RMS of 1 a slice, before bias correction")
  bias_correction: bool = official(True, "of both moments")
  count_skipped_step: bool = official(False, "the first update counts, as in pytorch_optimizer")
  block_size: int | None = official(
    None, "longer axes are cut", at_least(1, ", or None for whole matrices"), younger=True
  )
  preconditioner_dtype: str = official(
    "float32", "of stored factors and bases", _STORED, younger=True
  )

  def conflicts(self) -> Iterator[tuple[str, str]]:
    name = "b2" if self.shampoo_beta is None else "shampoo_beta"
    yield from _standing_still(name, getattr(self, name), self.preconditioner_dtype)

  @property
  def period(self) -> int:
    return self.precondition_frequency


def _standing_still(name: str, decay: Any, dtype: str) -> Iterator[tuple[str, str]]:
  if dtype == "bfloat16" and is_number(decay) and decay > MAX_BFLOAT16_B2:
    remedy = "choose a smaller one, or preconditioner_dtype=float32"
    yield name, f"averages in bfloat16 stop changing above {MAX_BFLOAT16_B2}; {remedy}"


OPTIMIZERS: dict[str, type[Section]] = {
  "adamw": AdamW,
  "muon": Muon,
  "psgd": Psgd,
  "scion": Scion,
  "shampoo": Shampoo,
  "soap": Soap,
}
