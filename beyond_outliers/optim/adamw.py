"""AdamW (arXiv 1711.05101, algorithm 2; torch.optim.AdamW)."""

from __future__ import annotations

import jax
import optax

from beyond_outliers.config.optimizers import AdamW
from beyond_outliers.optim import factory
from beyond_outliers.optim.axes import AxesTree


@factory.arguments_of(AdamW)
def adamw(
  h: AdamW, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """AdamW: decoupled weight decay on every leaf; moments in the parameters' dtype and sharding.

  Element by element: `axes` and `mesh` do not matter. State: 8 bytes per parameter in float32.

  optax adds the decay to the update before scaling by the rate: the same step as torch's, to 2e-7
  after 30 steps."""
  del axes, mesh
  return optax.adamw(h.learning_rate, b1=h.b1, b2=h.b2, eps=h.eps, weight_decay=h.weight_decay)
