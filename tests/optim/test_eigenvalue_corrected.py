"""Eigenvalue-corrected Shampoo against Meta's, thirty steps in float64 on fixed gradients, and
against one in numpy.

tests/golden/shampoo_meta-head_*_evcorrected_f64.npz: facebookresearch/optimizers (f606606) with lr
0.01, betas (0.9, 0.95), eps 1e-8, decay 0.1, a refresh every 5 steps, no grafting. Its numbers of a
step are float32: good to 2e-8.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers.optim.eigenvalue_corrected import scale_by_eigenvalue_corrected_shampoo
from beyond_outliers.optim.shampoo import shampoo
from beyond_outliers.params import Axes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@functools.cache
def update_of(tx):
  return jax.jit(tx.update)


def run(tx, gradients, params=None):
  """Gradients [T, ...] -> (state, updates of every step [T, ...]); with params, parameters after
  every step."""
  state, after = jax.jit(tx.init)({key: g[0] for key, g in gradients.items()}), []
  for t in range(len(jax.tree.leaves(gradients)[0])):
    updates, state = update_of(tx)({key: g[t] for key, g in gradients.items()}, state, params)
    params = params and optax.apply_updates(params, updates)
    after.append(params or updates)
  return state, {key: np.stack([tree[key] for tree in after]) for key in gradients}


def test_the_trajectory_is_metas():
  """The factor of b never has full rank: after the first refresh, at step 5, its basis is
  anybody's."""
  problem = np.load(GOLDEN / "problem.npz")
  golden = np.load(GOLDEN / "shampoo_meta-head_none-graft_freq5_dim64_eps1e-08_evcorrected_f64.npz")
  tx = shampoo(
    0.01,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    precondition_frequency=5,
    block_size=64,
    eigenvalue_correction=True,
  )
  with jax.enable_x64(True):
    params, gradients = (
      {key: jnp.asarray(problem[f"{name}_{key}"], jnp.float64) for key in ("w1", "w2", "emb", "b")}
      for name in ("p0", "g")
    )
    _, after = run(tx, gradients, params)
  for key in after:
    for number in (1, 2, 5) if key == "b" else (1, 2, 5, 10, 11, 20, 30):
      expected = golden[f"s{number:02d}_{key}"]
      np.testing.assert_allclose(
        after[key][number - 1], expected, rtol=0, atol=1e-7, err_msg=f"step {number}, {key}"
      )


def numpy_directions(
  gradients,
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  exponent=0.5,
  bias_correction=True,
  precondition_frequency=3,
  start_step=3,
):
  """Of every step, for matrices. The first moment is kept out of the basis."""
  m, v, (left, right), (q, p), directions = (
    0.0,
    0.0,
    (0.0, 0.0),
    map(np.eye, gradients[0].shape),
    [],
  )
  weight = 1 - b2 if b2 < 1 else 1
  for t, g in enumerate(gradients, 1):
    left, right = b2 * left + weight * g @ g.T, b2 * right + weight * g.T @ g
    if t == start_step or (t > start_step and t % precondition_frequency == 0):
      q, p = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
    m, v = b1 * m + (1 - b1) * g, b2 * v + weight * (q.T @ g @ p) ** 2
    of_m, of_v = (1 - b1**t, 1 - b2**t if b2 < 1 else 1) if bias_correction else (1, 1)
    directions.append(q @ (q.T @ (m / of_m) @ p / ((v / of_v) ** exponent + eps)) @ p.T)
  return np.stack(directions)


SWITCHES = [
  dict(),
  dict(b2=1.0),
  dict(exponent=0.25, eps=0.1),
  dict(bias_correction=False),
  dict(start_step=5),
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: ",".join(switch) or "defaults")
def test_every_switch_does_what_numpy_does(switch):
  """A leaf of two matrices, and one that is the transpose of both."""
  gradients = np.random.default_rng(0).standard_normal((8, 2, 5, 5))
  hyper = dict(b2=0.95, eps=1e-8, precondition_frequency=3) | switch
  tx = scale_by_eigenvalue_corrected_shampoo(
    **hyper, axes={"w": Axes((0,), (1,), (2,)), "turned": Axes((2,), (1,), (0,))}
  )
  with jax.enable_x64(True):
    state, updates = run(
      tx, {"w": jnp.asarray(gradients), "turned": jnp.asarray(gradients.transpose(0, 3, 2, 1))}
    )
  for i in range(2):
    expected = numpy_directions(gradients[:, i], **switch)
    np.testing.assert_allclose(updates["w"][:, i], expected, rtol=0, atol=1e-8)
    np.testing.assert_allclose(
      updates["turned"][..., i], expected.swapaxes(1, 2), rtol=0, atol=1e-8
    )
  # At steps 3 and 6, or at 5 and 6.
  np.testing.assert_array_equal(state.blocks["5x5"].age, 2)


def test_before_the_start_it_is_adam():
  gradients = {"w": jax.random.normal(jax.random.key(0), (6, 3, 4, 5))}
  state, ours = run(
    scale_by_eigenvalue_corrected_shampoo(b2=0.99, eps=1e-8, start_step=7, refresh="staggered"),
    gradients,
  )
  _, adam = run(optax.scale_by_adam(b2=0.99), gradients)
  np.testing.assert_allclose(ours["w"], adam["w"], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(state.blocks["4x5"].age, -1)


def test_staggered_it_renews_every_block_in_its_turn():
  """Five blocks in three steps; axes beyond the block size do without, a matrix without gradients
  stays finite."""
  gradients = jax.random.normal(jax.random.key(1), (8, 5, 4, 6)).at[:, 2].set(0)
  hyper = dict(
    b2=0.95, precondition_frequency=3, refresh="staggered", block_size=4, long_axes="skip"
  )
  state, updates = run(scale_by_eigenvalue_corrected_shampoo(**hyper), {"w": gradients})
  bucket = state.blocks["4x6"]
  assert [factor.shape for factor in bucket.factors] == [(5, 4, 4)]
  assert sorted(bucket.age[:, 0].tolist()) == [0, 1, 1, 2, 2] and not bucket.kept.any()
  assert np.isfinite(updates["w"]).all() and not updates["w"][:, 2].any()


@pytest.mark.parametrize(
  "hyper, message",
  [
    (dict(refresh="togehter"), "refresh = 'togehter': did you mean 'together'"),
    (dict(long_axes="cut"), "long_axes = 'cut'"),
    (dict(precondition_frequency=0), "precondition_frequency = 0"),
    (dict(block_size=0), "block_size = 0"),
  ],
)
def test_bad_arguments_are_refused(hyper, message):
  with pytest.raises(ValueError, match=message):
    scale_by_eigenvalue_corrected_shampoo(**hyper)
