"""The optimizers whose steps bench/optimizers.py times: all of this package, and beside each family
the peers that PyPI has.

Rows of a family do the same work: the same period between roots, bases or factors, the same blocks,
axes and precision, no weight decay. Where a peer cannot be set so, its function says what differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beyond_outliers import optim

RATE = 1e-3
EMBEDDING = (
  "embedding"  # name of the matrix that Muon leaves to AdamW, and Scion steps along the signs of
)

Arrays = Mapping[str, np.ndarray]


class JaxSteps:
  """An optax transformation as the trainer runs it: one program, which parameters and state are
  donated to."""

  def __init__(
    self,
    make: Callable[[], optax.GradientTransformation],
    params: Arrays,
    gradients: Sequence[Arrays],
  ):
    tx = make()

    def step(params, state, gradient):
      updates, state = tx.update(gradient, state, params)
      return optax.apply_updates(params, updates), state

    self.gradients = jax.device_put(list(gradients))
    self.params = jax.device_put(dict(params))
    self.state = jax.block_until_ready(jax.jit(tx.init)(self.params))
    self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
    start = time.perf_counter()
    self.compiled = (
      jax.jit(step, donate_argnums=(0, 1))
      .lower(self.params, self.state, self.gradients[0])
      .compile()
    )
    self.compile_seconds: float | None = time.perf_counter() - start

  def step(self, number: int) -> float:
    """Seconds of the step with this gradient, in turn."""
    gradient = self.gradients[number % len(self.gradients)]
    start = time.perf_counter()
    self.params, self.state = jax.block_until_ready(
      self.compiled(self.params, self.state, gradient)
    )
    return time.perf_counter() - start

  def finite(self) -> bool:
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(self.params))


class TorchSteps:
  """Optimizers with torch's interface, called eagerly."""

  compile_seconds: float | None = None

  def __init__(
    self,
    make: Callable[[Mapping[str, Any]], list[Any]],
    params: Arrays,
    gradients: Sequence[Arrays],
  ):
    import torch

    torch.set_num_threads(1)
    self.params = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in params.items()}
    self.gradients = [
      {name: torch.tensor(x) for name, x in gradient.items()} for gradient in gradients
    ]
    self.optimizers = make(self.params)

  def step(self, number: int) -> float:
    # Some write to the gradients.
    for name, x in self.gradients[number % len(self.gradients)].items():
      self.params[name].grad = x.clone()
    start = time.perf_counter()
    for optimizer in self.optimizers:
      optimizer.step()
    return time.perf_counter() - start

  @property
  def state_bytes(self) -> int:
    """Of all storages that the state refers to."""
    tensors = _tensors([list(optimizer.state.values()) for optimizer in self.optimizers], set())
    return sum(
      {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()
    )

  def finite(self) -> bool:
    return all(bool(x.isfinite().all()) for x in self.params.values())


def _tensors(thing: Any, seen: set[int]) -> Iterator[Any]:
  """All tensors within dictionaries, sequences and plain objects: some peers keep their state in
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


class Row(NamedTuple):
  """One optimizer with its settings."""

  family: str  # what it is compared with
  make: Callable[
    ..., Any
  ]  # () -> optax.GradientTransformation; torch: {name: parameter} -> its optimizers
  period: int = 1  # steps after which costs repeat: those between roots, bases or factors
  peer: str = ""  # the distribution that somebody else's optimizer is in
  steps: type[JaxSteps] | type[TorchSteps] = JaxSteps


def _beside_embedding(
  hidden: optax.GradientTransformation, embedding: optax.GradientTransformation
) -> optax.GradientTransformation:
  return optax.partition(
    {"hidden": hidden, "embedding": embedding},
    lambda params: {name: "embedding" if name == EMBEDDING else "hidden" for name in params},
  )


def _parted(parameters: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
  """(hidden, embedding)."""
  return [x for name, x in parameters.items() if name != EMBEDDING], [
    x for name, x in parameters.items() if name == EMBEDDING
  ]


def _adamw() -> optax.GradientTransformation:
  return optim.adamw(RATE, weight_decay=0.0)


def _torch_adamw(parameters: Mapping[str, Any], **mode: bool) -> list[Any]:
  import torch

  return [torch.optim.AdamW(list(parameters.values()), lr=RATE, weight_decay=0.0, **mode)]


def _muon(**settings: Any) -> optax.GradientTransformation:
  return _beside_embedding(optim.muon(RATE, **settings), _adamw())


def _optax_muon() -> optax.GradientTransformation:
  """Corrects the bias of its averages, which costs next to nothing."""
  return _beside_embedding(optax.contrib.muon(RATE), optax.adamw(RATE, weight_decay=0.0))


def _torch_muon(parameters: Mapping[str, Any]) -> list[Any]:
  import torch

  hidden, embedding = _parted(parameters)
  aside = (
    [torch.optim.AdamW(embedding, lr=RATE, weight_decay=0.0, foreach=True)] if embedding else []
  )
  return [torch.optim.Muon(hidden, lr=RATE, weight_decay=0.0), *aside]


def _scion(**settings: Any) -> optax.GradientTransformation:
  of = lambda norm, **settings: optim.scion(
    RATE, momentum=0.9, norm=norm, constrained=False, **settings
  )
  return _beside_embedding(of("spectral", **settings), of("sign"))


def _torch_scion(parameters: Mapping[str, Any]) -> list[Any]:
  import pytorch_optimizer
  from pytorch_optimizer.optimizer.scion import LMONorm

  norms = zip(_parted(parameters), (LMONorm.SPECTRAL, LMONorm.SIGN), strict=True)
  groups = [{"params": params, "norm_type": norm} for params, norm in norms if params]
  return [pytorch_optimizer.SCION(groups, lr=RATE, momentum=0.1, constraint=False)]


def _psgd(**settings: Any) -> optax.GradientTransformation:
  return optim.psgd(
    RATE, max_size_triangular=4096, update_probability=0.1, noise="none", **settings
  )


def _torch_kron(parameters: Mapping[str, Any]) -> list[Any]:
  import pytorch_optimizer

  return [
    pytorch_optimizer.Kron(
      list(parameters.values()),
      lr=RATE,
      max_size_triangular=4096,
      pre_conditioner_update_probability=0.1,
    )
  ]


def _shampoo(**settings: Any) -> optax.GradientTransformation:
  """What Meta's Distributed Shampoo is timed with elsewhere: blocks of 1024, eigh, each block with
  the length of Adam's step."""
  return optim.shampoo(
    RATE,
    b2=0.95,
    eps=1e-10,
    grafting="adam",
    grafting_b2=0.95,
    grafting_eps=1e-8,
    precondition_frequency=20,
    start_step=1,
    block_size=1024,
    **settings,
  )


def _torch_dash(parameters: Mapping[str, Any]) -> list[Any]:
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


def _torch_shampoo(parameters: Mapping[str, Any]) -> list[Any]:
  """Google's algorithm: RMSProp's length for a whole parameter, averages of both steps. Roots by
  SVD; its coupled Newton iteration takes longer."""
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


def _soap(**settings: Any) -> optax.GradientTransformation:
  return optim.soap(RATE, weight_decay=0.0, precondition_frequency=10, max_dim=4096, **settings)


def _torch_soap(parameters: Mapping[str, Any]) -> list[Any]:
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


def _torch(
  family: str, make: Callable[..., Any], period: int = 1, peer: str = "pytorch-optimizer"
) -> Row:
  return Row(family, make, period, peer, TorchSteps)


# By family: products in bfloat16 are other work than in float32.
ROWS: dict[str, Row] = {
  "adamw": Row("adamw", _adamw),
  "optax_adamw": Row("adamw", lambda: optax.adamw(RATE, weight_decay=0.0), peer="optax"),
  "torch_adamw": _torch(
    "adamw", lambda parameters: _torch_adamw(parameters, foreach=True), peer="torch"
  ),
  "torch_adamw_fused": _torch(
    "adamw", lambda parameters: _torch_adamw(parameters, fused=True), peer="torch"
  ),
  "muon_float32": Row("muon float32", lambda: _muon(ns_dtype="float32")),
  "muon_float32_gram": Row("muon float32", lambda: _muon(ns_dtype="float32", ns_gram=True)),
  "optax_muon": Row("muon float32", _optax_muon, peer="optax"),
  "muon": Row("muon bfloat16", _muon),
  "torch_muon": _torch("muon bfloat16", _torch_muon, peer="torch"),
  "scion": Row("scion bfloat16", _scion),
  "torch_scion": _torch("scion bfloat16", _torch_scion),
  "psgd": Row("psgd", _psgd, period=10),
  "psgd_without_cache": Row("psgd", lambda: _psgd(cache=False), period=10),
  "torch_kron": _torch("psgd", _torch_kron, period=10),
  "shampoo": Row("shampoo", _shampoo, period=20),
  "shampoo_staggered": Row("shampoo", lambda: _shampoo(refresh="staggered"), period=20),
  "shampoo_packed": Row("shampoo", lambda: _shampoo(refresh="staggered", packed=True), period=20),
  "torch_dash": _torch("shampoo", _torch_dash, period=20),
  "torch_shampoo": _torch("shampoo", _torch_shampoo, period=20),
  "soap": Row("soap", _soap, period=10),
  "soap_staggered": Row("soap", lambda: _soap(refresh="staggered"), period=10),
  "torch_soap": _torch("soap", _torch_soap, period=10),
}
