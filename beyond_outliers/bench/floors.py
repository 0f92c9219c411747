"""Floors of optimizers' steps: the time that this machine's own kernels take for what a step cannot
do without.

A floor is of an algorithm as its program has it, here on a CPU: with so many iterations, products
by halves where they are by halves, a decomposition of each block when it is due. Another algorithm
may need fewer.

A step's floor is the longer of two, as if each hid the other whole:
  products at the rate of the library's alone (`kernels.product_rate`), in each dtype its own, and
    decompositions and triangular solves in the seconds that the library's kernel takes alone, at
    each of the shapes that occur;
  bytes at the bandwidth of updates in place (`kernels.update_bandwidth`): parameters and what a
    step renews of the state read and written, gradients read.

Arithmetic on single numbers takes nothing, nor does what a step only reads of the state, such as
roots between refreshes. It is no strict bound in two ways: of a stack of which a step renews some
matrices, as staggered refreshes do, all bytes count; and products of another size may be faster
than the one whose rate is taken. Times are medians, as the step's own are.
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
  """A call of a library's kernel, at the shapes of its operands."""

  primitive: Any
  operands: tuple[jax.ShapeDtypeStruct, ...]
  settings: tuple[tuple[str, Any], ...]
  flops: float


class Needs(NamedTuple):
  """What one step cannot do without."""

  flops: dict[str | Decomposition, float]  # by the product's dtype, or by decomposition
  moved_bytes: int


def floor_seconds(
  tx: optax.GradientTransformation, params: Any, period: int, repeats: int
) -> float:
  """Seconds of a step, the mean over a period late in a run, from kernels timed in this process.

  repeats: how often each is timed."""
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
  """Of each step of a period. params: arrays, or their shapes and types."""
  state = jax.eval_shape(tx.init, params)
  update = jax.make_jaxpr(tx.update)(params, state, params)
  # Read and written, and a gradient for each.
  of_params = 3 * _bytes(jax.tree.leaves(params))

  def needs(step: LateStep) -> Needs:
    renewed = [x for x, new in zip(jax.tree.leaves(state), step.renewed, strict=True) if new]
    flops = {kind: flops for kind, flops in step.flops.items() if flops}
    return Needs(flops, of_params + 2 * _bytes(renewed))

  return [needs(step) for step in late_steps(update, state, period, platform="cpu", cost=_cost)]


def _bytes(leaves: Iterable[Any]) -> int:
  return sum(x.size * x.dtype.itemsize for x in leaves)


def _cost(eqn: Any) -> tuple[Any, float]:
  """(the kind that has a rate of its own, FLOPs) of an equation: of arithmetic on single numbers
  none."""
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
