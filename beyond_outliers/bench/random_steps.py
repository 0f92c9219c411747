"""Train steps on random tokens, for benches that time nothing else."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers.train import program as program_lib
from beyond_outliers.types import Metrics


def random_batch(program: program_lib.Program) -> dict[str, jax.Array]:
  """A batch of a program's shapes, of random tokens that all count."""
  draw, vocab = np.random.default_rng(0), program.config.model.vocab
  return {
    name: jnp.asarray(
      draw.integers(0, vocab, x.shape) if name in ("tokens", "targets") else np.ones(x.shape),
      x.dtype,
    )
    for name, x in program.batch.items()
  }


def steps_of(program: program_lib.Program, compiled: jax.stages.Compiled) -> Callable[[], Metrics]:
  """What takes one train step after the other, from the first, on one batch. compiled: the
  program's, for one device."""
  state, batch = program.init(), random_batch(program)

  def step() -> Metrics:
    nonlocal state
    state, metrics = compiled(state, batch)
    return metrics

  return step
