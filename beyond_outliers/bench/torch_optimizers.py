"""Peers of our optimizers, from torch and pytorch-optimizer, and their timed steps.

Each does the same work as our row of its family: the same period between roots, bases or factors,
the same blocks, axes and precision, and no weight decay. If a peer cannot be configured that way,
its function says what differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

RATE = 1e-3
# Name of the matrix that Muon leaves to AdamW, and for which Scion uses signs.
EMBEDDING = "embedding"

Arrays = Mapping[str, np.ndarray]
Tensors = Mapping[str, Any]  # torch's
Optimizers = list[Any]  # torch's; parameters may be divided among several


class TorchSteps:
  """Optimizers with torch's interface, called eagerly."""

  compile_seconds: float | None = None

  def __init__(
    self, make: Callable[[Tensors], Optimizers], params: Arrays, gradients: Sequence[Arrays]
  ):
    import torch

    torch.set_num_threads(1)
    self.params = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in params.items()}
    self.gradients = [
      {name: torch.tensor(x) for name, x in gradient.items()} for gradient in gradients
    ]
    self.optimizers = make(self.params)

  def step(self, number: int) -> float:
    # Cloned, since some optimizers write to the gradients.
    for name, x in self.gradients[number % len(self.gradients)].items():
      self.params[name].grad = x.clone()
    start = time.perf_counter()
    for optimizer in self.optimizers:
      optimizer.step()
    return time.perf_counter() - start

  @property
  def state_bytes(self) -> int:
    """Bytes of all storages that the state refers to."""
    tensors = _tensors([list(optimizer.state.values()) for optimizer in self.optimizers], set())
    return sum(
      {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()
    )

  def finite(self) -> bool:
    return all(bool(x.isfinite().all()) for x in self.params.values())


def _tensors(thing: Any, seen: set[int]) -> Iterator[Any]:
  """All tensors within dictionaries, sequences and plain objects, as some peers keep their state in
  objects of their own."""
  if id(thing) in seen or isinstance(thing, type):
    return
  seen.add(id(thing))
  if hasattr(thing, "untyped_storage"):
    yield thing
    return
  parts: Iterable[Any] = ()
  if isinstance(thing, Mapping):
    parts = thing.values()
  elif isinstance(thing, (list, tuple)):
    parts = thing
  elif hasattr(thing, "__dict__"):
    parts = vars(thing).values()
  for part in parts:
    yield from _tensors(part, seen)


def _split(parameters: Tensors) -> tuple[list[Any], list[Any]]:
  """(hidden parameters, embedding, each as a list)."""
  return [x for name, x in parameters.items() if name != EMBEDDING], [
    x for name, x in parameters.items() if name == EMBEDDING
  ]


def torch_adamw(parameters: Tensors, **mode: bool) -> Optimizers:
  """torch's AdamW in one of its modes, foreach or fused."""
  import torch

  return [torch.optim.AdamW(list(parameters.values()), lr=RATE, weight_decay=0.0, **mode)]


def torch_muon(parameters: Tensors) -> Optimizers:
  """torch's Muon, and AdamW for the embedding."""
  import torch

  hidden, embedding = _split(parameters)
  aside = (
    [torch.optim.AdamW(embedding, lr=RATE, weight_decay=0.0, foreach=True)] if embedding else []
  )
  return [torch.optim.Muon(hidden, lr=RATE, weight_decay=0.0), *aside]


def torch_scion(parameters: Tensors) -> Optimizers:
  """Scion: spectral norms, and signs for the embedding."""
  import pytorch_optimizer
  from pytorch_optimizer.optimizer.scion import LMONorm

  norms = zip(_split(parameters), (LMONorm.SPECTRAL, LMONorm.SIGN), strict=True)
  groups = [{"params": params, "norm_type": norm} for params, norm in norms if params]
  return [pytorch_optimizer.SCION(groups, lr=RATE, momentum=0.1, constraint=False)]


def torch_kron(parameters: Tensors) -> Optimizers:
  """PSGD Kron."""
  import pytorch_optimizer

  return [
    pytorch_optimizer.Kron(
      list(parameters.values()),
      lr=RATE,
      max_size_triangular=4096,
      pre_conditioner_update_probability=0.1,
    )
  ]


def torch_dash(parameters: Tensors) -> Optimizers:
  """DASH, a block-wise Shampoo."""
  import pytorch_optimizer

  return [
    pytorch_optimizer.DASH(
      list(parameters.values()),
      lr=RATE,
      betas=(0.9, 0.95),
      block_size=1024,
      precondition_frequency=20,
      start_preconditioning_step=1,
      inverse_root_method="eigh",
      eps=1e-8,
      matrix_eps=1e-10,
    )
  ]


def torch_shampoo(parameters: Tensors) -> Optimizers:
  """Google's Shampoo, grafted to RMSProp per parameter, with averages of both steps.

  Roots are by SVD, which is faster than its coupled Newton iteration."""
  import pytorch_optimizer
  from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

  return [
    pytorch_optimizer.ScalableShampoo(
      list(parameters.values()),
      lr=RATE,
      betas=(0.9, 0.95),
      moving_average_for_momentum=True,
      start_preconditioning_step=1,
      preconditioning_compute_steps=20,
      block_size=1024,
      shape_interpretation=False,
      graft_type=LayerWiseGrafting.RMSPROP,
      nesterov=False,
      use_svd=True,
    )
  ]


def torch_soap(parameters: Tensors) -> Optimizers:
  """SOAP."""
  import pytorch_optimizer

  return [
    pytorch_optimizer.SOAP(
      list(parameters.values()),
      lr=RATE,
      weight_decay=0.0,
      precondition_frequency=10,
      max_precondition_dim=4096,
    )
  ]
