"""Grids: the values that a quantized element can take, as codes times a scale.

Codes are whole numbers wherever levels are evenly spaced, so that products of codes are exact: a
grid without a zero has odd codes, two apart, and half the step as its scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Rounds to whole numbers: to nearest or stochastically, as the quantizer chooses.
ToInteger = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Codes lowest, lowest + gap, ..., largest. With a gap of two they are odd, half of them below
  0."""

  lowest: int
  largest: int
  gap: int = 1

  @property
  def edge(self) -> float:
    """Upper end of the largest level's rounding interval."""
    return self.largest + self.gap / 2

  @property
  def count(self) -> int:
    return 1 + (self.largest - self.lowest) // self.gap

  @property
  def dtype(self) -> Any:
    """Dtype of the codes: int8, or int16 if the largest is 255."""
    return jnp.int8 if self.largest <= 127 else jnp.int16

  def round(self, v: jax.Array, to_integer: ToInteger) -> jax.Array:
    """The code nearest to `v`, a value in units of the scale. With a gap of two it is, in steps,
    round(v / 2 + ½) - ½, which decides ties as QuEST (arXiv 2502.05003) does."""
    shift = self.gap - 1
    # Clipped last: rounding can exceed the largest level.
    return jnp.clip(
      self.gap * to_integer((v + shift) / self.gap) - shift, self.lowest, self.largest
    )


@dataclasses.dataclass(frozen=True)
class Float:
  """A floating-point format without infinities: values above the largest become the largest."""

  mantissa_bits: int
  lowest_exponent: int  # of normal numbers
  largest: float
  name: str  # of the type in ml_dtypes

  @property
  def lowest(self) -> float:
    return -self.largest

  @property
  def largest_exponent(self) -> int:
    return math.frexp(self.largest)[1] - 1

  @property
  def dtype(self) -> Any:
    """Dtype of the codes in memory: one byte each, since CPUs take ten times as long to convert to
    float4."""
    return jnp.float8_e4m3fn if self.name == "float4_e2m1fn" else self.stored

  @property
  def stored(self) -> Any:
    """Dtype of the codes in files."""
    return jnp.dtype(self.name)

  def round(self, v: jax.Array, to_integer: ToInteger) -> jax.Array:
    """The value of this format nearest to `v`.

    Not by a cast: some devices cast by way of float16, which rounds twice."""
    power = jnp.clip(_power_of_two_below(v), 2.0**self.lowest_exponent, 2.0**self.largest_exponent)
    quantum = power * 2.0**-self.mantissa_bits
    return jnp.clip(to_integer(v / quantum) * quantum, self.lowest, self.largest)


def _power_of_two_below(v: jax.Array) -> jax.Array:
  """2^floor(log2 |v|), which is `v` without sign and mantissa; zero for subnormal values."""
  bits = jnp.dtype(f"uint{8 * v.dtype.itemsize}")
  exponent = lax.bitcast_convert_type(jnp.asarray(jnp.inf, v.dtype), bits)
  return lax.bitcast_convert_type(lax.bitcast_convert_type(v, bits) & exponent, v.dtype)


Grid = Uniform | Float
WHOLE_BITS = range(1, 9)

# name -> bits -> grid
GRIDS: dict[str, dict[float, Grid]] = {
  # 2^b levels at odd halves of a step, none of them zero.
  "midrise": {b: Uniform(1 - 2**b, 2**b - 1, gap=2) for b in WHOLE_BITS},
  # -1, 0, 1: log2(3) bits.
  "ternary": {1.585: Uniform(-1, 1)},
  # As many levels above zero as below: one fewer than b bits could hold.
  "symmetric": {b: Uniform(1 - 2 ** (b - 1), 2 ** (b - 1) - 1) for b in WHOLE_BITS if b > 1},
  # All levels that an integer of b bits can hold: one more below zero than above.
  "twos_complement": {b: Uniform(-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in WHOLE_BITS if b > 1},
  # For unsigned values, such as the outputs of a squared ReLU: 0 .. 2^b - 1. Codes of eight bits
  # are int16, multiplied as floats.
  "unsigned": {b: Uniform(0, 2**b - 1) for b in WHOLE_BITS},
  # arXiv 2209.05433, table 1; e2m1: OCP Microscaling Formats 1.0, section 5.3.3.
  "e4m3": {8: Float(3, -6, 448.0, "float8_e4m3fn")},
  "e5m2": {8: Float(2, -14, 57344.0, "float8_e5m2")},
  "e2m1": {4: Float(1, 0, 6.0, "float4_e2m1fn")},
}
