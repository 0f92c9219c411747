"""Floors of optimizers' steps: the least time that this machine's own kernels need for a step.

A floor holds for our implementation on a CPU: with its number of iterations, with symmetric
products computed by halves where it does so, and with each block's decomposition when it is due.
Another algorithm may need fewer operations.

A step's floor is the larger of two times, as if they overlapped completely:
  compute: products at the rate of the library's product alone (`kernels.product_rate`), by dtype;
    decompositions and triangular solves in the time of the library's kernel alone, by shape;
  memory: bytes at the bandwidth of in-place updates (`kernels.update_bandwidth`): parameters and
    the state that a step renews are read and written, gradients are read.

Elementwise arithmetic is not counted, nor is state that a step only reads, such as roots between
refreshes. It is not a strict bound, for two reasons: if a step renews only some matrices of a
stack, as staggered refreshes do, all of the stack's bytes count; and products of other sizes may be
faster than the one whose rate is used. Times are medians, as for steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import optax

from beyond_outliers import hardware
from beyond_outliers.bench import jaxpr_flops, kernels
from beyond_outliers.bench.late_steps import LateStep, late_steps


class Decomposition(NamedTuple):
  """A call of a library's kernel, with the shapes of its operands."""

  primitive: Any
  operands: tuple[jax.ShapeDtypeStruct, ...]
  settings: tuple[tuple[str, Any], ...]
  flops: float


class Needs(NamedTuple):
  """The least work of one step."""

  flops: dict[str | Decomposition, float]  # by the product's dtype, or by decomposition
  moved_bytes: int


def floor_seconds(
  tx: optax.GradientTransformation, params: Any, period: int, repeats: int
) -> float:
  """Floor of a step in seconds, the mean over a period late in a run, from kernels timed in this
  process. repeats: how often each kernel is timed."""
  steps = late_needs(tx, params, period)
  rates = {kind: _rate(kind, repeats) for kind in {kind for step in steps for kind in step.flops}}
  bandwidth = kernels.update_bandwidth(repeats)
  return statistics.mean(
    max(
      math.fsum(flops / rates[kind] for kind, flops in step.flops.items()),
      step.moved_bytes / bandwidth,
    )
    for step in steps
  )


def late_needs(tx: optax.GradientTransformation, params: Any, period: int) -> list[Needs]:
  """Needs of each step of a period late in a run. params: arrays, or their shapes and types."""
  state = jax.eval_shape(tx.init, params)
  update = jax.make_jaxpr(tx.update)(params, state, params)
  # Parameters are read and written, gradients read.
  of_params = 3 * _bytes(jax.tree.leaves(params))

  def needs(step: LateStep) -> Needs:
    renewed = [x for x, new in zip(jax.tree.leaves(state), step.renewed, strict=True) if new]
    flops = {kind: flops for kind, flops in step.flops.items() if flops}
    return Needs(flops, of_params + 2 * _bytes(renewed))

  return [needs(step) for step in late_steps(update, state, period, platform="cpu", cost=_cost)]


def _bytes(leaves: Iterable[Any]) -> int:
  return sum(x.size * x.dtype.itemsize for x in leaves)


def _cost(eqn: Any) -> tuple[Any, float]:
  """(kind, FLOPs) of an equation, where kinds differ in their rates; no FLOPs for elementwise
  arithmetic."""
  kind, flops = jaxpr_flops.equation_flops(eqn)
  if kind == "products":
    return eqn.invars[0].aval.dtype.name, flops
  if kind == "decompositions":
    operands = tuple(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars)
    return Decomposition(eqn.primitive, operands, tuple(eqn.params.items()), flops), flops
  return kind, 0.0


def _rate(kind: str | Decomposition, repeats: int) -> float:
  """FLOP/s of a product or decomposition alone."""
  if isinstance(kind, str):
    return kernels.product_rate(kind, repeats)
  call = jax.jit(lambda *operands: kind.primitive.bind(*operands, **dict(kind.settings)))
  operands = [kernels.symmetric(x.shape, x.dtype) for x in kind.operands]
  return kind.flops / hardware.median_seconds(lambda: call(*operands), repeats)
