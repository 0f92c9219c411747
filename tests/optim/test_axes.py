"""What the axes of a leaf mean: a batch of matrices or vectors, in whatever order the axes lie, and
back to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers.optim import axes as axes_lib
from beyond_outliers.params import Axes

# shape, axes -> slices, size of a slice, fan_in, fan_out
LEAVES = {
  "stacked kernel": ((3, 5, 7), Axes((0,), (1,), (2,)), 3, (5, 7), 5, 7),
  "fan_out first": ((3, 5, 7), Axes((0,), (2,), (1,)), 3, (5, 7), 7, 5),
  "embedding": ((24, 8), Axes((), (1,), (0,)), 1, (24, 8), 8, 24),
  "batch in the middle": ((5, 3, 7), Axes((1,), (0,), (2,)), 3, (5, 7), 5, 7),
  "batch last": ((5, 7, 3), Axes((2,), (0,), (1,)), 3, (5, 7), 5, 7),
  "batch out of order": ((2, 5, 3, 7), Axes((2, 0), (1,), (3,)), 6, (5, 7), 5, 7),
  "several fan_in": ((2, 3, 5, 7), Axes((), (0, 1, 2), (3,)), 1, (30, 7), 30, 7),
  "several fan_out, reversed": ((2, 3, 5, 7), Axes((0,), (3,), (2, 1)), 2, (15, 7), 7, 15),
  "interleaved": ((2, 3, 5, 7), Axes((), (0, 2), (1, 3)), 1, (10, 21), 10, 21),
  "negative": ((3, 5, 7), Axes((0,), (-2,), (-1,)), 3, (5, 7), 5, 7),
  "vectors": ((3, 5), Axes((0,), (), (1,)), 3, (5,), 1, 5),
  "a vector of two axes": ((3, 5), Axes((), (), (1, 0)), 1, (15,), 1, 15),
  "scalars": ((3, 5), Axes((0, 1)), 15, (), 1, 1),
  "scalar": ((), Axes(), 1, (), 1, 1),
  "one row": ((1, 5), Axes((), (0,), (1,)), 1, (1, 5), 1, 5),
  "one column": ((5, 1), Axes((), (0,), (1,)), 1, (5, 1), 5, 1),
}


def leaf(shape, axes=None):
  tree = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
  return axes_lib.leaves(tree, None if axes is None else {"w": axes})[0]


@pytest.mark.parametrize("shape, axes, slices, size, fan_in, fan_out", LEAVES.values(), ids=LEAVES)
def test_a_leaf_is_split_into_its_slices_and_joined_again(
  shape, axes, slices, size, fan_in, fan_out
):
  record, x = (
    leaf(shape, axes),
    jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape),
  )
  assert (record.slices, record.size, record.fan_in, record.fan_out) == (
    slices,
    size,
    fan_in,
    fan_out,
  )
  assert record.is_matrix == bool(axes.fan_in)
  y = record.split(x)
  assert y.shape == (slices, *size)
  np.testing.assert_array_equal(record.join(y), x)
  np.testing.assert_array_equal(jax.jit(record.join)(jax.jit(record.split)(x)), x)


def test_slices_keep_the_order_of_memory():
  """Batch axes in the order given; the axis that comes first in the leaf comes first in a slice,
  whatever it is called."""
  x = np.arange(2 * 3 * 5).reshape(2, 3, 5)
  np.testing.assert_array_equal(leaf(x.shape, Axes((1,), (2,), (0,))).split(x), x.swapaxes(0, 1))
  np.testing.assert_array_equal(leaf(x.shape, Axes((1,), (0,), (2,))).split(x), x.swapaxes(0, 1))
  np.testing.assert_array_equal(
    leaf(x.shape, Axes((2, 0), (), (1,))).split(x), x.transpose(2, 0, 1).reshape(10, 3)
  )
  # Of several axes that are one side of a matrix, the first named varies slowest.
  np.testing.assert_array_equal(
    leaf(x.shape, Axes((), (2,), (1, 0))).split(x)[0], x.transpose(1, 0, 2).reshape(6, 5)
  )


def test_what_is_a_fan_in_is_told_by_axes_alone():
  square, turned = leaf((4, 4), Axes((), (0,), (1,))), leaf((4, 4), Axes((), (1,), (0,)))
  assert (
    square.fan_in_axis,
    turned.fan_in_axis,
    leaf((4, 4), Axes((), (), (0, 1))).fan_in_axis,
  ) == (0, 1, None)


@pytest.mark.parametrize(
  "shape, same_as",
  [
    ((), Axes()),
    ((5,), Axes((), (), (0,))),
    ((5, 7), Axes((), (0,), (1,))),
    ((2, 3, 5, 7), Axes((0, 1), (2,), (3,))),
  ],
)
def test_without_axes_the_last_two_are_a_matrix(shape, same_as):
  if shape == ():
    assert leaf(shape).slices == 1 and not leaf(shape).is_matrix
  else:
    assert leaf(shape) == leaf(shape, same_as)


def test_paths_axes_as_a_function_and_masked_leaves():
  tree = {"a": {"b": jnp.ones((2, 3))}, "c": [jnp.ones(4), optax.MaskedNode()], "d": jnp.ones(())}
  given = {
    "a": {"b": Axes((), (1,), (0,))},
    "c": [Axes((), (), (0,)), Axes((), (0,), (1,))],
    "d": Axes(),
    "unused": Axes(),
  }
  records = axes_lib.leaves(tree, given)
  assert [record.path for record in records] == ["a/b", "c/0", "d"]
  assert axes_lib.leaves(tree, lambda _: given) == records
  shapes = jax.eval_shape(lambda: jax.tree.map(lambda x: x, tree))
  assert axes_lib.leaves(shapes, given) == records, "shapes do as well as arrays"


@pytest.mark.parametrize(
  "shape, axes, message",
  [
    ((2, 3), {"other": Axes()}, r"parameter 'w' has none; they are given for \['other'\]"),
    (
      (2, 3),
      {"w": Axes((0,), (1,), ())},
      "'w'.*expected each axis of shape .2, 3. once, and fan_in only together with fan_out",
    ),
    ((2, 3), {"w": Axes((), (0,), (0, 1))}, "expected each axis"),
    ((2, 3), {"w": Axes((), (0,), (1, -1))}, "expected each axis"),
    ((2, 3), {"w": Axes((), (), (1,))}, "expected each axis"),
    ((2, 3), {"w": Axes((), (1,), (2,))}, "expected each axis"),
    ((2, 3), {"w": Axes((), (-2,), (-3,))}, "expected each axis"),
    ((), {"w": Axes((), (), (0,))}, "expected each axis"),
  ],
  ids=[
    "missing",
    "fan_in alone",
    "twice",
    "twice, once negative",
    "unnamed",
    "too large",
    "too negative",
    "of a scalar",
  ],
)
def test_axes_that_do_not_fit_are_refused(shape, axes, message):
  with pytest.raises(ValueError, match=message):
    axes_lib.leaves({"w": jnp.ones(shape)}, axes)


def test_matrices_and_others_can_have_transformations_of_their_own():
  params = {
    "gain": jnp.ones((2, 4)),
    "kernel": jnp.ones((2, 4, 4)),
    "scale": jnp.ones((2, 2)),
    "masked": optax.MaskedNode(),
  }
  axes = {
    "gain": Axes((0,), (), (1,)),
    "kernel": Axes((0,), (1,), (2,)),
    "scale": Axes((0, 1)),
    "masked": Axes((), (0,), (1,)),
  }
  of_kind = functools.partial(axes_lib.by_kind, matrix=optax.scale(2.0), other=optax.scale(3.0))
  for given in (axes, lambda _: axes):
    assert axes_lib.matrix_mask(given)(params) == {
      **params,
      "gain": False,
      "kernel": True,
      "scale": False,
    }
    tx = of_kind(given)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["masked"] == optax.MaskedNode()
    for name, factor in (("gain", 3), ("kernel", 2), ("scale", 3)):
      np.testing.assert_array_equal(updates[name], factor)
  updates, _ = of_kind(None).update(
    {"gain": jnp.ones((2, 4))}, of_kind(None).init({"gain": jnp.ones((2, 4))})
  )
  np.testing.assert_array_equal(updates["gain"], 2)
