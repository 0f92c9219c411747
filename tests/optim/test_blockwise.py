"""Transformations that work on blocks: what a bucket's step is given, and where its results go."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers import config
from beyond_outliers.config.hyperparameters import Section, official
from beyond_outliers.mesh import make_mesh
from beyond_outliers.optim import blocks, blockwise

TREE = {"w": (3, 4, 6), "up": (6, 4), "b": (5,)}


@dataclasses.dataclass(frozen=True)
class Averaging(Section):
  decay: float = official(0.5, "of the average")
  size: int = official(4, "of blocks")


def average(h, clock, g, s, id_B):
  assert isinstance(h.decay, jax.Array) and h.size == 4
  mean = h.decay * s + (1 - h.decay) * g
  return mean, mean, id_B


def transformation(mesh=None, **changes):
  h = Averaging.given()
  arguments = dict(
    layout_of=lambda tree: blocks.layout(tree, mesh=mesh, block_size=h.size),
    init_bucket=lambda h, bucket, dtype: bucket.zeros(*bucket.shape, dtype=dtype),
    step=average,
    traced=("decay",),
    constants=blocks.Layout.block_ids,
  )
  return blockwise.transformation(h, **{**arguments, **changes})


def gradients(seed):
  draw = np.random.default_rng(seed)
  return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in TREE.items()}


@pytest.mark.parametrize("devices", [1, 8])
def test_every_block_takes_the_step_of_its_bucket(devices):
  mesh = make_mesh(config.Mesh(1, devices, 1), jax.devices()[:devices])
  tx = transformation(mesh)
  state, mean = tx.init(gradients(0)), jax.tree.map(np.zeros_like, gradients(0))
  for t in range(3):
    updates, state = jax.jit(tx.update)(gradients(t), state)
    mean = jax.tree.map(lambda m, g: 0.5 * m + 0.5 * g, mean, gradients(t))
    jax.tree.map(lambda u, m: np.testing.assert_allclose(u, m, atol=1e-6), updates, mean)
    assert state.count == t + 1
  assert set(state.blocks) == {"4x4", "2x4", "4", "1"}


def test_what_needs_all_blocks_is_done_in_the_end():
  """It sees the arrays that hyperparameters have become, and all that steps returned."""

  def finish(h, count, layout, done):
    assert isinstance(h.decay, jax.Array) and set(done) == set(layout.buckets)
    directions, states = blockwise.directions_and_states(done)
    np.testing.assert_array_equal(
      sorted(np.concatenate([out[2] for out in done.values()])), np.arange(10)
    )
    return {name: count * d for name, d in directions.items()}, states

  tx = transformation(finish=finish)
  state = tx.init(gradients(0))
  for t in range(2):
    updates, state = tx.update(gradients(t), state)
    jax.tree.map(
      lambda u, d, t=t: np.testing.assert_allclose(u, (t + 1) * d, rtol=1e-6),
      updates,
      blocks_as_parameters(state),
    )


def blocks_as_parameters(state):
  layout = blocks.layout(gradients(0), block_size=4)
  return layout.unstack(state.blocks, gradients(0))


class Own(NamedTuple):
  clock: jax.Array
  blocks: dict[str, jax.Array]


def test_a_state_of_its_own_is_carried():
  tx = transformation(
    start=lambda blocks: Own(jnp.int32(7), blocks),
    advance=lambda state: (state._replace(clock=state.clock - 1), state.clock),
    step=lambda h, clock, g, s, _: (clock * g, s),
  )
  updates, state = tx.update(gradients(0), tx.init(gradients(0)))
  assert state.clock == 6
  np.testing.assert_allclose(updates["b"], 7 * gradients(0)["b"], rtol=1e-6)
