"""Steps of nano on tokens that every machine draws alike, and the losses that a CPU gave.

  JAX_PLATFORMS=cpu python -m beyond_outliers.bench.accelerator.nano

prints what nano_losses.json holds: losses of STEPS steps of configs/adamw.py in float32 at RATE,
and how far they are from those in float64, which is what rounding alone does to them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from beyond_outliers import cli
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench.accelerator.utilization import TINY
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.train import program as program_lib
from beyond_outliers.train.step import TrainState
from beyond_outliers.types import Json

RECORDED = pathlib.Path(__file__).with_name("nano_losses.json")
TRAINED = {"full": "nano", "tiny": TINY}
STEPS = 20
# At the study's rate the first losses rise, and rounding is amplified to tenths.
RATE = 3e-4
ROUNDINGS = 50  # so many times what rounding did on the CPU may another machine be off


def nano_program(scale: str, change: str = "") -> program_lib.Program:
  """configs/adamw.py at nano, or what stands for it, on one device. change: "key=value,..."."""
  rate = f"optimizer.learning_rate={RATE}"
  c = study_config("adamw", ",".join(filter(None, (TRAINED[scale], rate, change))))
  return program_lib.build_program(c, jax.devices()[:1])


def batches(program: program_lib.Program, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
  """Batches from the one with this number on, of a chain that can be learned: in four of five
  places a token's successor is 5 times it and 1. Numpy keeps RandomState's numbers for ever."""
  shape, vocab = program.batch["tokens"].shape, program.config.model.vocab
  while True:
    draw = np.random.RandomState(first)
    tokens = draw.randint(0, vocab, (shape[0], shape[1] + 1))
    leads = draw.randint(0, 5, tokens.shape) > 0
    for i in range(1, tokens.shape[1]):
      tokens[:, i] = np.where(leads[:, i], (5 * tokens[:, i - 1] + 1) % vocab, tokens[:, i])
    yield {
      "tokens": tokens[:, :-1].astype(np.int32),
      "targets": tokens[:, 1:].astype(np.int32),
      "segment_ids": np.ones(shape, np.int32),
      "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
      "weights": np.ones(shape, np.float32),
    }
    first += 1


def train(
  program: program_lib.Program, steps: int, state: TrainState | None = None
) -> tuple[TrainState, list[float]]:
  """(the state after so many steps from `state`, or from the first, which is donated; the losses
  before each)."""
  losses: list[Any] = []
  with mesh_lib.use(program.mesh):
    state = program.init() if state is None else state
    given = batches(program, int(state.step))
    for _ in range(steps):
      batch: Any = mesh_lib.put_batch(next(given), program.mesh, program.config.batch_size)
      state, metrics = program.train_step(state, batch)
      losses.append(metrics["train/loss"])
  return state, [float(loss) for loss in losses]


def recorded_losses(scale: str) -> tuple[list[float], float]:
  """(the CPU's losses, how far another machine's may be from them)."""
  found = json.loads(RECORDED.read_text())[scale]
  return found["losses"], ROUNDINGS * found["rounding"]


def _record(scale: str) -> Json:
  _, losses = train(nano_program(scale), STEPS)
  with jax.enable_x64(True):
    _, exact = train(nano_program(scale, "model.dtype=float64"), STEPS)
  rounding = float(np.abs(np.subtract(losses, exact)).max())
  return {"jax": jax.__version__, "losses": losses, "rounding": rounding}


def main(argv: list[str]) -> None:
  del argv
  print(json.dumps({scale: _record(scale) for scale in TRAINED}, indent=1))


if __name__ == "__main__":
  cli.run_command(main)
