"""Floors of optimizers' steps: the least time that this machine's own kernels need for a step.

A floor is that of our implementation on a CPU: with its number of iterations, with products by
halves where it has them, and with each block's decomposition when it is due. Another algorithm may
need fewer operations.

A step's floor is the larger of two times, as if each completely hid the other:
  compute: products at the rate of the library's product alone (`kernels.product_rate`), by dtype;
    decompositions and triangular solves as long as the library's kernel takes alone, by shape;
  memory: bytes at the bandwidth of in-place updates (`kernels.update_bandwidth`): parameters and
    the state that a step renews are read and written, gradients are read.

Elementwise arithmetic counts nothing, and neither does state that a step only reads, such as roots
between refreshes. The bound is not strict in two ways: when a step renews only some matrices of a
stack, as staggered refreshes do, all its bytes count; and products of other sizes may be faster
than the one whose rate is used. Times are medians, as those of steps are.
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
