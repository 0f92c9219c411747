"""Contender of bench/peers.py: the trainer's own step, AdamW, under a recipe or none."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench.contenders import serve
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.train import program as program_lib


def main(size: str, dtype: str, recipe: str, batch_size: int) -> None:
  """Serves steps of a size at this batch size on random tokens."""
  config_of = "adamw" if recipe == "none" else "adamw_qat"
  given = f"{size},batch_size={batch_size},micro_batches=1,model.dtype={dtype}"
  c = study_config(config_of, given if recipe == "none" else f"{given},quant.recipe={recipe}")
  program = program_lib.build_program(c)
  draw = np.random.default_rng(0)
  tokens = draw.integers(0, c.model.vocab, (c.batch_size, c.context + 1)).astype(np.int32)
  batch = {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segment_ids": np.ones_like(tokens[:, 1:]),
    "positions": np.tile(np.arange(c.context, dtype=np.int32), (c.batch_size, 1)),
    "weights": np.ones((c.batch_size, c.context), np.float32),
  }
  with mesh_lib.use(program.mesh):
    compiled = program.train_step.lower(program.state, program.batch).compile()
    placed, state = mesh_lib.put_batch(batch, program.mesh, c.batch_size), program.init()

    def step() -> float:
      nonlocal state
      state, metrics = jax.block_until_ready(compiled(state, placed))
      return float(metrics["train/loss"])

    serve(step)


if __name__ == "__main__":
  asked = json.loads(sys.argv[1])
  main(asked["size"], asked["dtype"], asked["recipe"], asked["batch_size"])
