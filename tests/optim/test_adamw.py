"""AdamW against torch.optim.AdamW, thirty steps in float64 on fixed gradients.

tests/golden/adamw_torch_f64.npz: parameters after some steps, of version 2.13 with lr 0.01, betas
(0.9, 0.95), eps 1e-8, weight decay 0.1; problem.npz: the start and the gradients of every step.
Snapshots between the first and the last are stored in float32, which is exact to 6e-8.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers import optim

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
HYPER = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
KEYS = ("w1", "w2", "b", "emb")
# How far torch's own float32 run is from its float64 one after 30 steps: what float32 may cost.
FLOAT32_DEVIATION = {"b": 1.15e-06, "emb": 1.64e-07, "w1": 2e-07, "w2": 3.58e-07}


def trajectory(dtype, learning_rate=0.01):
  """{step: parameters}, float64 numpy."""
  problem = np.load(GOLDEN / "problem.npz")
  params = {key: jnp.asarray(problem[f"p0_{key}"], dtype) for key in KEYS}
  gradients = {key: jnp.asarray(problem[f"g_{key}"], dtype) for key in KEYS}
  tx = optim.OPTIMIZERS["adamw"](learning_rate, **HYPER)

  def step(carry, gradient):
    params, state = carry
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  _, after = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g))(params, gradients)
  assert all(x.dtype == dtype for x in after.values())
  return {
    number: {key: np.asarray(after[key][number - 1], np.float64) for key in KEYS}
    for number in (1, 2, 5, 10, 11, 20, 30)
  }


def test_the_trajectory_is_torchs():
  golden = np.load(GOLDEN / "adamw_torch_f64.npz")
  with jax.enable_x64(True):
    ours = trajectory(jnp.float64)
  for number, params in ours.items():
    for key, value in params.items():
      expected = golden[f"s{number:02d}_{key}"]
      tolerance = 1e-14 if expected.dtype == np.float64 else 6e-8
      np.testing.assert_allclose(
        value,
        expected,
        rtol=0,
        atol=tolerance * abs(expected).max(),
        err_msg=f"step {number}, {key}",
      )


def test_float32_stays_as_close_as_torchs_does():
  golden, ours = np.load(GOLDEN / "adamw_torch_f64.npz"), trajectory(jnp.float32)[30]
  for key, deviation in FLOAT32_DEVIATION.items():
    np.testing.assert_allclose(ours[key], golden[f"s30_{key}"], rtol=0, atol=2 * deviation)


def test_the_learning_rate_may_be_a_schedule():
  with jax.enable_x64(True):
    steady, scheduled = (
      trajectory(jnp.float64),
      trajectory(jnp.float64, lambda count: jnp.where(count < 10, 0.01, 0.0)),
    )
  np.testing.assert_allclose(scheduled[10]["w1"], steady[10]["w1"], rtol=1e-12)
  np.testing.assert_allclose(scheduled[30]["w1"], steady[10]["w1"], rtol=1e-12)


@pytest.mark.parametrize("hyper", [dict(), dict(weight_decay=0.5)])
def test_decay_is_decoupled(hyper):
  """Without a gradient a parameter shrinks by learning rate · decay; torch's default is 0.01."""
  tx = optim.OPTIMIZERS["adamw"](0.1, **hyper)
  params = {"w": jnp.full((3,), 2.0)}
  updates, _ = tx.update({"w": jnp.zeros(3)}, tx.init(params), params)
  np.testing.assert_allclose(updates["w"], -0.1 * hyper.get("weight_decay", 0.01) * 2.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_of_bfloat16_parameters_the_second_moment_follows_too(name):
  """After gradients become ten times smaller, steps approach the rate again within ten thousand
  steps. Computed in bfloat16, 0.999 v + 0.001 g² would be v."""
  tx = optim.OPTIMIZERS[name](1e-3)

  def last_step(dtype):
    params = {"v": jnp.ones(4, dtype)}

    def step(state, size):
      updates, state = tx.update({"v": jnp.full(4, size, dtype)}, state, params)
      return state, jnp.abs(updates["v"][0]).astype(jnp.float32)

    sizes = jnp.concatenate([jnp.ones(2000), jnp.full(10_000, 0.1)])
    return jax.lax.scan(step, tx.init(params), sizes)[1][-1]

  np.testing.assert_allclose(last_step(jnp.bfloat16), last_step(jnp.float32), rtol=0.01)


def test_decay_reaches_bfloat16_parameters_through_rounding():
  """On average: it is 1/1000 of each step, which rounding to nearest would always drop."""
  tx, draw = optim.OPTIMIZERS["adamw"](1.0, weight_decay=1e-3), np.random.default_rng(0)
  params = {"w": jnp.ones(20_000, jnp.bfloat16)}
  gradients = {"w": jnp.asarray(draw.uniform(0.5, 2, 20_000), jnp.bfloat16)}
  after = {"w": jnp.asarray(draw.uniform(0.5, 2, 20_000), jnp.bfloat16)}

  def second(params):
    _, state = tx.update(gradients, tx.init(params), params)
    return np.asarray(tx.update(after, state, params)[0]["w"], np.float64)

  moved = second(jax.tree.map(jnp.zeros_like, params)) - second(params)
  np.testing.assert_allclose(moved.mean(), 1e-3, rtol=0.2)
