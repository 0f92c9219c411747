"""Times of libraries' kernels alone: lower bounds for optimizers that call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers import hardware
from beyond_outliers.ops import linalg

WIDTH = 1024  # of products: both operands and the result fit in the cache
MATMULS = {"float32": f"matmul {WIDTH}", "bfloat16": f"matmul {WIDTH} bfloat16"}

# name -> function that returns a call to time
KERNELS: dict[str, Callable[[], Callable[[], Any]]] = {
  MATMULS["float32"]: lambda: _kernel(lambda x: jnp.matmul(x, x, precision="highest"), WIDTH),
  MATMULS["bfloat16"]: lambda: _kernel(
    lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32), WIDTH, jnp.bfloat16
  ),
  "eigh 768": lambda: _kernel(linalg.eigh, 768),
  "eigh 1024": lambda: _kernel(linalg.eigh, 1024),
  "qr 768": lambda: _kernel(linalg.qr, 768),
  "qr 2304": lambda: _kernel(linalg.qr, 2304),
}


def _kernel(
  function: Callable[[jax.Array], Any], width: int, dtype: Any = jnp.float32
) -> Callable[[], Any]:
  """A call of a kernel on a stack of one symmetric matrix."""
  stack, compiled = symmetric((1, width, width), dtype), jax.jit(function)
  return lambda: compiled(stack)


def symmetric(shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """Random positive definite matrices [..., D, D], cut to `shape` if that is not square."""
  *stacks, rows, columns = shape
  width = max(rows, columns)
  x = np.random.default_rng(0).standard_normal((*stacks, width, 2 * width), np.float32)
  return jnp.asarray((x @ x.mT / width)[..., :rows, :columns], dtype)


def measure_kernels(repeats: int) -> dict[str, float]:
  """Median seconds of every kernel, timed in this process."""
  return {name: hardware.median_seconds(make(), repeats) for name, make in KERNELS.items()}


def product_rate(dtype: str, repeats: int) -> float:
  """FLOP/s of a product of `dtype`, from its median seconds."""
  return 2 * WIDTH**3 / hardware.median_seconds(KERNELS[MATMULS[dtype]](), repeats)


def update_bandwidth(repeats: int, count: int = 2**28) -> float:
  """Bytes per second, read and written together, from the median seconds of updating an array of
  `count` bytes, far more than caches hold, in place.

  In place, as optimizers update donated arrays: a copy to a new array waits for its pages."""
  x = jnp.ones(count // 4, jnp.float32)
  scale = jax.jit(lambda x: 0.999 * x, donate_argnums=0)

  def update() -> jax.Array:
    nonlocal x
    x = scale(x)
    return x

  return 2 * count / hardware.median_seconds(update, repeats)
