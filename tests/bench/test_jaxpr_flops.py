"""FLOPs of programs that can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from beyond_outliers import config
from beyond_outliers.bench import jaxpr_flops
from beyond_outliers.mesh import make_mesh


def counted(function, *shapes, known=(), devices=1):
  """(FLOPs by kind, outputs); the last inputs are `known`, the others are not."""
  inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  program = jax.make_jaxpr(function)(*inputs, *known)
  return jaxpr_flops.count_flops(
    program, [jaxpr_flops.UNKNOWN] * len(inputs) + list(known), devices
  )


@pytest.mark.parametrize(
  "function, shapes, kind, expected",
  [
    (jnp.matmul, [(3, 4), (4, 5)], "products", 2 * 3 * 4 * 5),
    (
      lambda x, y: jnp.einsum("bmk,bnk->bmn", x, y),
      [(7, 3, 4), (7, 5, 4)],
      "products",
      7 * 2 * 3 * 4 * 5,
    ),
    (lambda x: x * x + 1, [(6, 2)], "others", 24),
    (lambda x: jnp.sum(x), [(6, 2)], "others", 12),
    (jnp.transpose, [(6, 2)], "others", 0),
    (jnp.linalg.qr, [(2, 8, 8)], "decompositions", 2 * 8 / 3 * 8**3),
    (
      lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True),
      [(8, 8), (8, 3)],
      "decompositions",
      8 * 8 * 3,
    ),
    (
      lambda a: lax.linalg.cholesky(a, symmetrize_input=False),
      [(5, 8, 8)],
      "decompositions",
      5 / 3 * 8**3,
    ),
    (
      lambda a: lax.linalg.eigh(a, symmetrize_input=False),
      [(5, 8, 8)],
      "decompositions",
      5 * 9 * 8**3,
    ),
    (
      lambda x: lax.scan(lambda x, _: (x @ x, None), x, None, 7)[0],
      [(4, 4)],
      "products",
      7 * 2 * 4**3,
    ),
    (
      lambda x: lax.map(lambda x: lax.map(lambda x: x @ x, x), x),
      [(3, 5, 4, 4)],
      "products",
      15 * 2 * 4**3,
    ),
    (
      lambda x: lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x),
      [(4, 4)],
      "products",
      2 * 4**3,
    ),
    (
      lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x),
      [(4, 4)],
      "products",
      4 * 4**3,
    ),
    (
      lambda x: lax.platform_dependent(x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x),
      [(4, 4)],
      "products",
      2 * 4**3,
    ),
  ],
)
def test_what_costs_what(function, shapes, kind, expected):
  total, _ = counted(jax.jit(function), *shapes)
  assert total[kind] == pytest.approx(expected)


@pytest.mark.parametrize("step, products", [(3, 1), (4, 3)])
def test_what_is_known_decides(step, products):
  """Every fourth step takes three products, one of them in a loop of step - 3 iterations."""

  def function(x, step):
    def more(x):
      return lax.fori_loop(0, step - 3, lambda _, x: x @ x, x @ x)

    return lax.cond(step % 4 == 0, more, lambda x: x, x @ x), step + 1

  total, (x, following) = counted(jax.jit(function), (4, 4), known=[np.int32(step)])
  assert total["products"] == products * 2 * 4**3
  assert x is jaxpr_flops.UNKNOWN and following == step + 1


@pytest.mark.parametrize("platform, products", [(None, 1), ("cpu", 2), ("cuda", 1)])
def test_the_branch_of_a_platform_counts(platform, products):
  def function(x):
    return lax.platform_dependent(x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x)

  program = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((4, 4), jnp.float32))
  total, _ = jaxpr_flops.count_flops(program, [jaxpr_flops.UNKNOWN], platform=platform)
  assert total["products"] == products * 2 * 4**3


@pytest.mark.parametrize("step", [3, 4])
def test_what_is_handed_on_is_told_from_what_is_new(step):
  """Every fourth step renews x."""

  def function(x, step):
    return lax.cond(step % 4 == 0, lambda x: x + 1, lambda x: x, x)

  x, known = jaxpr_flops.Unknown(), np.int32(step)
  program = jax.make_jaxpr(jax.jit(function))(jax.ShapeDtypeStruct((4,), jnp.float32), known)
  _, (y,) = jaxpr_flops.count_flops(program, [x, known])
  assert (y is x) == (step == 3) and isinstance(y, jaxpr_flops.Unknown)


def test_what_a_device_does():
  """Outside of shard_map a device does its share, inside all of the contents; there, only values
  that are the same on all devices are known."""
  mesh = make_mesh(config.Mesh(2, 2, 2))

  def local(x, rows, count):
    x = lax.cond(count > 0, lambda x: x @ x, lambda x: x, x)
    return lax.cond(rows[0] > 0, lambda x: x, lambda x: x @ x @ x, x), count + 1

  def function(x, count):
    split = jax.P(("data", "fsdp", "model"))
    mapped = jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(split, split, jax.P()),
      out_specs=(split, jax.P()),
      check_vma=False,
    )
    y, count = mapped(x, jnp.ones(8), count)
    return y @ y.mT, count

  total, (_, count) = counted(function, (16, 4, 4), known=[np.int32(1)], devices=8)
  assert total["products"] == 2 * (1 + 2 + 1) * 2 * 4**3 and count == 2
