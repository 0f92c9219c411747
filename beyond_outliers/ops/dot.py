"""Matrix product of all linear layers: bfloat16 operands summed in float32, forward and backward.

Differentiating a float32 product of bfloat16 operands yields products with a float32 cotangent,
which run at float32's speed. The rule here first casts the cotangent to the operands' type.

Legend: T tokens, I in, O out.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from beyond_outliers.ops.int_dot import dot_codes


def dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
  """lax.dot_general for linear layers, whose backward products also run in the operands' type.

  lhs: [T, I]; rhs: [I, O], or [O, I] with dimension_numbers (((1,), (1,)), ((), ())). If one
  operand is bfloat16 the other is cast to it, but each gets its cotangent in its own type: pass a
  float32 kernel uncast, and its gradient keeps its float32 sums. The result is at least float32
  unless preferred_element_type says otherwise: on CPU a bfloat16 result halves the speed, elsewhere
  XLA fuses a cast that follows.
  Errors: ValueError for other shapes."""
  narrow = min(lhs.dtype, rhs.dtype, key=lambda dtype: dtype.itemsize)
  operands = narrow if narrow.itemsize < 4 else jnp.promote_types(lhs.dtype, rhs.dtype)
  out = jnp.dtype(preferred_element_type or jnp.promote_types(operands, jnp.float32))
  # Float32 means float32: by default TPUs multiply it in bfloat16 passes, and recent GPUs in TF32.
  precision = precision or (lax.Precision.HIGHEST if operands.itemsize >= 4 else None)
  (lhs_sum, rhs_sum), batch = dimension_numbers
  if lhs.ndim != 2 or rhs.ndim != 2 or tuple(lhs_sum) != (1,) or any(map(len, batch)):
    raise ValueError(
      f"dimension_numbers = {dimension_numbers} of {lhs.shape} and {rhs.shape}: expected two "
      "matrices, summed over the last axis of the first: reshape the inputs to [tokens, features]"
    )
  return _dot(lhs, rhs, tuple(rhs_sum), precision, operands, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _dot(lhs_TxI, rhs, rhs_sum, precision, operands, out):
  return _forward(lhs_TxI, rhs, rhs_sum, precision, operands, out)[0]


def _forward(lhs_TxI, rhs, rhs_sum, precision, operands, out):
  # Residuals have to be arrays: the empty ones carry the types.
  types = jnp.zeros((0,), lhs_TxI.dtype), jnp.zeros((0,), rhs.dtype)
  lhs_TxI, rhs = lhs_TxI.astype(operands), rhs.astype(operands)
  # Not _dot: rematerialisation policies recognize lax.dot_general, but not inside a custom rule.
  y_TxO = lax.dot_general(lhs_TxI, rhs, (((1,), rhs_sum), ((), ())), precision, out)
  return y_TxO, (lhs_TxI, rhs, *types)


def _backward(rhs_sum, precision, operands, out, residuals, g_TxO):
  del out
  lhs_TxI, rhs, lhs_type, rhs_type = residuals
  g_TxO = g_TxO.astype(operands)
  numbers = (((1,), (1 - rhs_sum[0],)), ((), ()))
  total = jnp.promote_types(operands, jnp.float32)
  lhs_bar = lax.dot_general(g_TxO, rhs, numbers, precision, total)
  first, second = (lhs_TxI, g_TxO) if rhs_sum == (0,) else (g_TxO, lhs_TxI)
  rhs_bar = dot_codes(first, second, 0, 0, operands, precision)
  return lhs_bar.astype(lhs_type.dtype), rhs_bar.astype(rhs_type.dtype)


_dot.defvjp(_forward, _backward)
