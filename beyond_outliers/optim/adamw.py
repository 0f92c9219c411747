"""AdamW (arXiv 1711.05101, algorithm 2; torch.optim.AdamW)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from beyond_outliers.config.optimizers import AdamW
from beyond_outliers.optim import factory
from beyond_outliers.optim.axes import AxesTree, check_floating


@factory.arguments_of(AdamW)
def adamw(
  h: AdamW, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """AdamW: decoupled weight decay on every leaf; moments sharded like the parameters, in float32 or
  wider.

  The moments of bfloat16 parameters are float32 too, like the state of every optimizer here: in
  bfloat16 0.999 rounds to 1 and 0.999 v + 0.001 g² to v, so v would not shrink when gradients do.
  Updates have the promoted type of gradient and parameter.

  Works element by element: `axes` and `mesh` do not matter. State: 8 bytes per parameter.

  optax adds the decay to the update before scaling by the rate: the same step as torch's, to 2e-7
  after 30 steps."""
  del axes, mesh
  tx = optax.adamw(h.learning_rate, b1=h.b1, b2=h.b2, eps=h.eps, weight_decay=h.weight_decay)

  def init(params):
    check_floating(params)
    return tx.init(_at_least_float32(params))

  def update(updates, state, params=None):
    wide, state = tx.update(_at_least_float32(updates), state, _at_least_float32(params))
    like = (updates,) if params is None else (updates, params)
    return jax.tree.map(_in_type_of, wide, *like), state

  return optax.GradientTransformation(init, update)


def _at_least_float32(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _in_type_of(x: jax.Array, *like: jax.Array) -> jax.Array:
  return x.astype(jnp.result_type(*(y.dtype for y in like)))
