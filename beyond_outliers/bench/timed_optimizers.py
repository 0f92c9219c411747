"""The optimizers whose steps are timed: all of this package, and each family's peers on PyPI.

Rows of one family do the same work; see bench/torch_optimizers.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from beyond_outliers import optim
from beyond_outliers.bench import torch_optimizers
from beyond_outliers.bench.torch_optimizers import EMBEDDING, RATE, Arrays, TorchSteps


class JaxSteps:
  """An optax transformation as the trainer runs it: one program, parameters and state donated."""

  def __init__(
    self,
    make: Callable[[], optax.GradientTransformation],
    params: Arrays,
    gradients: Sequence[Arrays],
  ):
    tx = make()

    def step(params, state, gradient):
      updates, state = tx.update(gradient, state, params)
      return optax.apply_updates(params, updates), state

    self.gradients = jax.device_put(list(gradients))
    self.params = jax.device_put(dict(params))
    self.state = jax.block_until_ready(jax.jit(tx.init)(self.params))
    self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
    start = time.perf_counter()
    self.compiled = (
      jax.jit(step, donate_argnums=(0, 1))
      .lower(self.params, self.state, self.gradients[0])
      .compile()
    )
    self.compile_seconds: float | None = time.perf_counter() - start

  def step(self, number: int) -> float:
    """Seconds of one step; the number selects one of the gradients in turn."""
    gradient = self.gradients[number % len(self.gradients)]
    start = time.perf_counter()
    self.params, self.state = jax.block_until_ready(
      self.compiled(self.params, self.state, gradient)
    )
    return time.perf_counter() - start

  def finite(self) -> bool:
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(self.params))


class TimedOptimizer(NamedTuple):
  """One optimizer with its settings."""

  family: str  # optimizers that it is compared with
  # () -> optax.GradientTransformation; for torch, {name: parameter} -> list of optimizers.
  make: Callable[..., Any]
  period: int = 1  # steps after which costs repeat: those between roots, bases or factors
  peer: str = ""  # PyPI distribution of somebody else's optimizer; empty for ours
  steps: type[JaxSteps] | type[TorchSteps] = JaxSteps


def _with_embedding(
  hidden: optax.GradientTransformation, embedding: optax.GradientTransformation
) -> optax.GradientTransformation:
  return optax.partition(
    {"hidden": hidden, "embedding": embedding},
    lambda params: {name: "embedding" if name == EMBEDDING else "hidden" for name in params},
  )


def _adamw() -> optax.GradientTransformation:
  return optim.adamw(RATE, weight_decay=0.0)


def _muon(**settings: Any) -> optax.GradientTransformation:
  return _with_embedding(optim.muon(RATE, **settings), _adamw())


def _optax_muon() -> optax.GradientTransformation:
  """optax's Muon; it corrects the bias of its averages, which costs next to nothing."""
  return _with_embedding(optax.contrib.muon(RATE), optax.adamw(RATE, weight_decay=0.0))


def _scion(**settings: Any) -> optax.GradientTransformation:
  common = {"momentum": 0.9, "constrained": False}
  return _with_embedding(
    optim.scion(RATE, norm="spectral", **common, **settings),
    optim.scion(RATE, norm="sign", **common),
  )


def _psgd(**settings: Any) -> optax.GradientTransformation:
  return optim.psgd(
    RATE, max_size_triangular=4096, update_probability=0.1, noise="none", **settings
  )


def _shampoo(**settings: Any) -> optax.GradientTransformation:
  """Shampoo with the settings with which Meta's is timed elsewhere: blocks of 1024, eigh, each
  block grafted to the length of Adam's step."""
  return optim.shampoo(
    RATE,
    b2=0.95,
    eps=1e-10,
    grafting="adam",
    grafting_b2=0.95,
    grafting_eps=1e-8,
    precondition_frequency=20,
    start_step=1,
    block_size=1024,
    **settings,
  )


def _soap(**settings: Any) -> optax.GradientTransformation:
  return optim.soap(RATE, weight_decay=0.0, precondition_frequency=10, max_dim=4096, **settings)


def _torch(
  family: str, make: Callable[..., Any], period: int = 1, peer: str = "pytorch-optimizer"
) -> TimedOptimizer:
  return TimedOptimizer(family, make, period, peer, TorchSteps)


# Families of this package's optimizers without a peer on PyPI -> why there is none.
WITHOUT_PEER: dict[str, str] = {}

# Families distinguish dtypes: products in bfloat16 and in float32 are different work.
TIMED_OPTIMIZERS: dict[str, TimedOptimizer] = {
  "adamw": TimedOptimizer("adamw", _adamw),
  "optax_adamw": TimedOptimizer("adamw", lambda: optax.adamw(RATE, weight_decay=0.0), peer="optax"),
  "torch_adamw": _torch(
    "adamw", lambda parameters: torch_optimizers.torch_adamw(parameters, foreach=True), peer="torch"
  ),
  "torch_adamw_fused": _torch(
    "adamw", lambda parameters: torch_optimizers.torch_adamw(parameters, fused=True), peer="torch"
  ),
  "muon_float32": TimedOptimizer("muon float32", lambda: _muon(ns_dtype="float32")),
  "muon_float32_gram": TimedOptimizer(
    "muon float32", lambda: _muon(ns_dtype="float32", ns_gram=True)
  ),
  "optax_muon": TimedOptimizer("muon float32", _optax_muon, peer="optax"),
  "muon": TimedOptimizer("muon bfloat16", _muon),
  "torch_muon": _torch("muon bfloat16", torch_optimizers.torch_muon, peer="torch"),
  "scion": TimedOptimizer("scion bfloat16", _scion),
  "torch_scion": _torch("scion bfloat16", torch_optimizers.torch_scion),
  "psgd": TimedOptimizer("psgd", _psgd, period=10),
  "psgd_without_cache": TimedOptimizer("psgd", lambda: _psgd(cache=False), period=10),
  "torch_kron": _torch("psgd", torch_optimizers.torch_kron, period=10),
  "shampoo": TimedOptimizer("shampoo", _shampoo, period=20),
  "shampoo_staggered": TimedOptimizer("shampoo", lambda: _shampoo(refresh="staggered"), period=20),
  "shampoo_packed": TimedOptimizer(
    "shampoo", lambda: _shampoo(refresh="staggered", packed=True), period=20
  ),
  "shampoo_packed_bfloat16": TimedOptimizer(
    "shampoo",
    lambda: _shampoo(refresh="staggered", packed=True, preconditioner_dtype="bfloat16"),
    period=20,
  ),
  "torch_dash": _torch("shampoo", torch_optimizers.torch_dash, period=20),
  "torch_shampoo": _torch("shampoo", torch_optimizers.torch_shampoo, period=20),
  "soap": TimedOptimizer("soap", _soap, period=10),
  "soap_staggered": TimedOptimizer("soap", lambda: _soap(refresh="staggered"), period=10),
  "soap_bfloat16": TimedOptimizer(
    "soap", lambda: _soap(refresh="staggered", preconditioner_dtype="bfloat16"), period=10
  ),
  "torch_soap": _torch("soap", torch_optimizers.torch_soap, period=10),
}
