"""Contender of bench/peers.py: the trainer's own AdamW step, with a recipe or without."""

from __future__ import annotations

import functools
import json
import sys

import jax

from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench.contenders import serve
from beyond_outliers.bench.random_steps import steps_of
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.train import program as program_lib

AS_THE_OTHERS = "optimizer.learning_rate=1e-3,schedule.name=constant,schedule.warmup=0"


def main(size: str, dtype: str, recipe: str, batch_size: int) -> None:
  """Serves steps of a model size on random tokens. The result is the loss."""
  config_of = "adamw" if recipe == "none" else "adamw_qat"
  given = f"{size},batch_size={batch_size},micro_batches=1,model.dtype={dtype},{AS_THE_OTHERS}"
  c = study_config(config_of, given if recipe == "none" else f"{given},quant.recipe={recipe}")
  program = program_lib.build_program(c, jax.devices()[:1])
  # Compiled in the first step, as in the other contenders.
  step = functools.cache(lambda: steps_of(program, program.compile_train_step()))
  with mesh_lib.use(program.mesh):
    serve(lambda: float(jax.block_until_ready(step()())["train/loss"]))


if __name__ == "__main__":
  asked = json.loads(sys.argv[1])
  main(asked["size"], asked["dtype"], asked["recipe"], asked["batch_size"])
