"""Steps of nano on tokens that are the same on every machine, and the losses recorded on a CPU.

  JAX_PLATFORMS=cpu python -m beyond_outliers.bench.accelerator.nano

prints the contents of nano_losses.json: losses of STEPS steps of configs/adamw.py in float32 at
RATE, and their distance from those in float64, which is the effect of rounding alone."""

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
ROUNDINGS = 50  # tolerance for another machine, in multiples of the CPU's rounding error


def nano_program(scale: str, change: str = "") -> program_lib.Program:
  """configs/adamw.py at nano, or TINY in its place, on one device. change: "key=value,..."."""
  rate = f"optimizer.learning_rate={RATE}"
  c = study_config("adamw", ",".join(filter(None, (TRAINED[scale], rate, change))))
  return program_lib.build_program(c, jax.devices()[:1])


def batches(program: program_lib.Program, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
  """Batches, from number `first` on, of a learnable chain: four times out of five, token t is
  followed by 5t + 1. numpy guarantees that RandomState's numbers never change."""
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
  """(the state after that many steps from `state`, which is donated, or from the initial one; the
  loss before each step)."""
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
  """(the CPU's losses, tolerance for another machine's)."""
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
