"""Train steps on random tokens, for benches that time only the steps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers.train import program as program_lib
from beyond_outliers.types import Metrics


def random_batch(program: program_lib.Program) -> dict[str, jax.Array]:
  """A batch with a program's shapes, of random tokens that all count."""
  draw, vocab = np.random.default_rng(0), program.config.model.vocab
  return {
    name: jnp.asarray(
      draw.integers(0, vocab, x.shape) if name in ("tokens", "targets") else np.ones(x.shape),
      x.dtype,
    )
    for name, x in program.batch.items()
  }


def steps_of(program: program_lib.Program, compiled: jax.stages.Compiled) -> Callable[[], Metrics]:
  """A function that takes one train step per call, from the initial state, always on the same
  batch. compiled: the program's train step, for one device."""
  state, batch = program.init(), random_batch(program)

  def step() -> Metrics:
    nonlocal state
    state, metrics = compiled(state, batch)
    return metrics

  return step
