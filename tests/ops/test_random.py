"""Random numbers that are JAX's to the bit, without its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers.ops import random


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 7, 2), (300, 257)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_numbers_are_those_of_jax(distribution, shape, dtype, kind):
  """Also of kinds of keys and of numbers that are left to it."""
  key = jax.random.fold_in(jax.random.key(2**40 + 7, impl=kind), 3)
  ours = getattr(random, distribution)(key, shape, dtype)
  assert ours.dtype == dtype
  theirs = getattr(jax.random, distribution)(key, shape, jnp.dtype(dtype))
  np.testing.assert_array_equal(ours, theirs)


def test_numbers_of_many_keys_are_those_of_jax():
  keys = jax.random.split(jax.random.key(1), 3)
  ours, theirs = (
    jax.vmap(functools.partial(draw, shape=(4, 6)))(keys)
    for draw in (random.uniform, jax.random.uniform)
  )
  np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("draw", [random.uniform, random.normal])
def test_numbers_take_no_memory_beside_themselves(draw):
  draw = jax.jit(draw, static_argnums=1)
  compiled = draw.lower(jax.random.key(0), (512, 512)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 512 * 512
