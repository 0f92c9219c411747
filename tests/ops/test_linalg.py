"""Stacks of decompositions: each matrix its own, and none waits for another for ever."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers.ops import linalg


def symmetric(count, d):
  x = np.random.default_rng(d).standard_normal((count, d, d)).astype(np.float32)
  return jnp.asarray(x @ x.swapaxes(1, 2))


def test_each_is_numpys():
  a = symmetric(3, 5)
  values, vectors = jax.jit(linalg.eigh)(a)
  np.testing.assert_allclose(values, np.linalg.eigvalsh(a), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(vectors * values[:, None] @ vectors.swapaxes(1, 2), a, atol=1e-4)
  q = jax.jit(linalg.qr)(a)
  np.testing.assert_allclose(abs(q), abs(np.linalg.qr(a)[0]), atol=1e-5)
  r = jnp.triu(a) + 5 * jnp.eye(5)
  x = jax.jit(lambda r, b: linalg.solve_triangular(r, b, left_side=True, lower=False))(r, a)
  np.testing.assert_allclose(r @ x, a, atol=1e-4)


def test_on_cpu_no_call_of_a_kernel_takes_more_than_one_matrix():
  """What would wait for ever; seen in the program, since the hanging itself depends on timing."""
  all_of_them = jax.jit(
    lambda a: (linalg.eigh(a), linalg.qr(a), linalg.solve_triangular(a, a, left_side=True))
  )
  program = all_of_them.lower(symmetric(3, 5)).as_text()
  calls = [line for line in program.splitlines() if "custom_call" in line and "lapack" in line]
  assert len(calls) >= 3 and not any("3x5x5" in line for line in calls)


HANGS = """
import jax, numpy as np
from beyond_outliers.ops import linalg
shapes = (6, 48), (4, 48), (3, 24), (8, 16)
xs = [np.eye(d, dtype=np.float32) * np.ones((b, 1, 1), np.float32) for b, d in shapes]
def each(x):
  return linalg.eigh(x), linalg.qr(x), linalg.solve_triangular(x, x, left_side=True)
step = jax.jit(lambda xs: list(map(each, xs)))
for _ in range(100):
  jax.block_until_ready(step(xs))
"""


@pytest.mark.slow
def test_many_at_once_end():
  """With plain batched calls this hangs on machines of few cores, mostly in the first hundred
  rounds."""
  subprocess.run([sys.executable, "-c", HANGS], check=True, timeout=300)
