"""Functions of one matrix, some of a stack at a time."""

import jax
import numpy as np
import pytest

from beyond_outliers.optim.linalg import chunks


@pytest.mark.parametrize("chunk, at_once", [(1, 1), (2 * 12, 2), (4 * 12, 3), (100 * 12, 6)])
def test_as_many_at_a_time_as_divide_the_stack_and_fit(monkeypatch, chunk, at_once):
  monkeypatch.setattr(chunks, "CHUNK", chunk)
  x = jax.random.normal(jax.random.key(0), (6, 3, 4))
  program = jax.make_jaxpr(lambda x: chunks.in_chunks(lambda m: (m.T, m.sum()), x))(x)
  (loop,) = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
  assert loop.params["length"] == 6 // at_once
  transposes, sums = chunks.in_chunks(lambda m: (m.T, m.sum()), x)
  np.testing.assert_array_equal(transposes, x.mT)
  np.testing.assert_allclose(sums, x.sum((1, 2)), rtol=1e-6)
