"""A compiled step computes the same on every mesh, whatever an optimizer does with its gradient,
and lowers for accelerators."""

import importlib

import jax
import numpy as np
import pytest

from beyond_outliers import config, optim
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.train.program import build_program
from configs import shampoo


def trained(c, mesh, steps=2):
  """[(loss, norm of the gradient)] of steps on a mesh."""
  axes = dict(zip(("data", "fsdp", "model"), mesh, strict=True))
  c.mesh.update(axes)
  program = build_program(config.resolve(c), jax.devices()[: np.prod(mesh)])
  draw = np.random.default_rng(0)
  found = []
  with mesh_lib.use(program.mesh):
    state = program.init()
    step = program.train_step.lower(program.state, program.batch).compile()
    for _ in range(steps):
      shape = (c.batch_size, c.context)
      tokens = draw.integers(0, 64, shape, np.int32)
      batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(c.context, dtype=np.int32), (c.batch_size, 1)),
        "weights": np.ones(shape, np.float32),
      }
      state, metrics = step(state, mesh_lib.put_batch(batch, program.mesh, c.batch_size))
      found.append([float(metrics["train/loss"]), float(metrics["gradient_norm"])])
  return found


@pytest.mark.slow
def test_a_step_is_the_same_on_a_mesh_of_three_axes(tiny):
  """With Shampoo, which deals blocks of the gradient to the devices; of this width, since of narrow
  models XLA leaves the forward pass alone."""
  size = {"model.blocks": 1, "model.heads": 4, "model.kv_heads": 2, "model.d_head": 64}
  argument = tiny(**size, **{"optimizer.learning_rate": 1e-4})
  one, other = (trained(shampoo.get_config(argument), mesh) for mesh in ((1, 1, 1), (2, 2, 2)))
  np.testing.assert_allclose(other, one, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_steps_lower_for_accelerators(tiny, name):
  """No primitive without a lowering there, no call into LAPACK: what a CPU can tell of a GPU."""
  c = importlib.import_module(f"configs.{name}_qat").get_config(tiny())
  c.mesh.update({"data": 2, "fsdp": 4})
  program = build_program(config.resolve(c))
  with mesh_lib.use(program.mesh):
    traced = program.train_step.trace(program.state, program.batch)
    for platform in ("cuda", "tpu"):
      assert "lapack" not in traced.lower(lowering_platforms=(platform,)).as_text()
