"""AdamW (arXiv 1711.05101, algorithm 2; torch.optim.AdamW)."""

from __future__ import annotations

import jax
import optax

from beyond_outliers.optim.axes import AxesTree


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
) -> optax.GradientTransformation:
  """Decoupled weight decay on every leaf; moments in the dtype of the parameters, and split like
  them.

  Element by element: `axes` and `mesh` do not matter. State: 8 bytes a parameter in float32.

  optax adds the decay to the update before scaling by the rate: the same step as torch's, to 2e-7
  after 30 steps."""
  del axes, mesh
  return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
