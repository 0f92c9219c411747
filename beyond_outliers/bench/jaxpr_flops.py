"""FLOPs of one run of a traced program of any size: products, decompositions, elementwise.

XLA's cost analysis counts each loop once, all branches, and no decompositions. Here the program is
walked with the few values that are known, such as the step number: these decide which branches are
taken, and loops count as often as they would run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

KINDS = ("products", "decompositions", "others")

# FLOPs over d³ for one d x d matrix: Golub and Van Loan, Matrix Computations, 4th edition.
EIGH = 9  # all eigenvectors, section 8.3.5
QR = 4 / 3  # R by Householder reflections, section 5.2.2; forming Q takes as much again
CHOLESKY = 1 / 3  # section 4.2.5

_OVER_CUBE = {
  "eigh": EIGH,
  "geqrf": QR,
  "householder_product": QR,
  "qr": 2 * QR,
  "cholesky": CHOLESKY,
}
_ONE_A_NUMBER = frozenset(
  (
    *("add", "sub", "mul", "div", "max", "min", "neg", "abs", "sign"),
    *("sqrt", "rsqrt", "exp", "log", "pow", "integer_pow", "square"),
    *("reduce_sum", "reduce_max", "reduce_min"),
  )
)


class Flops(dict[Any, float]):
  """FLOPs by kind."""

  def __missing__(self, kind: Any) -> float:
    return 0.0

  def total(self) -> float:
    return sum(self.values())


class Unknown:
  """Placeholder for an array whose values are unknown. An instance of its own for each input shows
  where the program returns an input unchanged."""


UNKNOWN = Unknown()
_LARGEST_KNOWN = 1024  # elements; larger arrays are unknown


def equation_flops(eqn: Any) -> tuple[str, float]:
  """(kind, FLOPs) of an equation that contains no program."""
  name, shapes = eqn.primitive.name, [atom.aval.shape for atom in (*eqn.invars, *eqn.outvars)]
  if name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return "products", 2 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
  if name == "triangular_solve":
    return "decompositions", math.prod(shapes[-1]) * shapes[0][-1]
  if name in _OVER_CUBE:
    return "decompositions", _OVER_CUBE[name] * math.prod(shapes[0]) * shapes[0][-1]
  if name in _ONE_A_NUMBER and jax.dtypes.issubdtype(eqn.invars[0].aval.dtype, np.inexact):
    return "others", max(map(math.prod, shapes))
  return "others", 0


@dataclasses.dataclass(frozen=True)
class _Count:
  """What a walk has counted, and how it counts."""

  flops: Flops  # so far
  weight: float  # of the following equations: how often they run, over the devices that share them
  platform: str | None
  cost: Callable[[Any], tuple[Any, float]]

  def add(self, eqn: Any) -> None:
    kind, amount = self.cost(eqn)
    self.flops[kind] += self.weight * amount


def count_flops(
  program: core.ClosedJaxpr,
  inputs: Sequence[Any],
  devices: int = 1,
  *,
  platform: str | None = None,
  cost: Callable[[Any], tuple[Any, float]] = equation_flops,
) -> tuple[Flops, list[Any]]:
  """(FLOPs on one device, the outputs). Inputs and outputs are flat, with UNKNOWN for arrays that
  are unknown or not small.

  The contents of a shard_map run on one device; all else is assumed to be shared by all `devices`.
  Of an unknown choice of branches the costliest counts, and a loop with an unknown condition runs
  once. Of branches by platform, that of `platform` counts, by default the one for any platform.
  cost: maps an equation that contains no program to (kind, FLOPs)."""
  flops = Flops()
  return flops, _walk(program, inputs, _Count(flops, 1 / devices, platform, cost))


def _walk(
  program: core.ClosedJaxpr | core.Jaxpr, inputs: Sequence[Any], count: _Count
) -> list[Any]:
  jaxpr, constants = (
    (program.jaxpr, program.consts) if isinstance(program, core.ClosedJaxpr) else (program, ())
  )
  known: dict[Any, Any] = {}

  def read(atom: Any) -> Any:
    if isinstance(atom, core.Literal):
      # As numpy's: JAX's own array remembers the mesh of a shard_map, and is refused outside of it.
      return np.asarray(atom.val, atom.aval.dtype)  # pyrefly: ignore[missing-attribute]
    return known.get(atom, UNKNOWN)

  def write(variables: Sequence[Any], values: Sequence[Any]) -> None:
    known.update(
      (variable, value)
      for variable, value in zip(variables, values, strict=True)
      if value is not UNKNOWN and np.size(value) <= _LARGEST_KNOWN
    )

  write(jaxpr.constvars, constants)
  write(jaxpr.invars, inputs)
  for eqn in jaxpr.eqns:
    write(eqn.outvars, _evaluate(eqn, [read(atom) for atom in eqn.invars], count))
  return [read(atom) for atom in jaxpr.outvars]


def _evaluate(eqn: Any, inputs: list[Any], count: _Count) -> list[Any]:
  name = eqn.primitive.name
  if name in _NESTED:
    return _NESTED[name](eqn, inputs, count)
  count.add(eqn)
  if any(isinstance(x, Unknown) for x in inputs) or any(
    math.prod(v.aval.shape) > _LARGEST_KNOWN for v in eqn.outvars
  ):
    return [UNKNOWN] * len(eqn.outvars)
  values = eqn.primitive.bind(*inputs, **eqn.params)
  return list(values) if eqn.primitive.multiple_results else [values]


def _call(eqn: Any, inputs: list[Any], count: _Count) -> list[Any]:
  program = next(
    value for value in eqn.params.values() if isinstance(value, (core.Jaxpr, core.ClosedJaxpr))
  )
  return _walk(program, inputs, count)


def _shard_map(eqn: Any, inputs: list[Any], count: _Count) -> list[Any]:
  """Walks a shard_map, in which an array is known only if it is the same on all devices."""
  alike = [
    x if not any(spec) else UNKNOWN for x, spec in zip(inputs, eqn.params["in_specs"], strict=True)
  ]
  outputs = _walk(eqn.params["jaxpr"], alike, dataclasses.replace(count, weight=1.0))
  return [
    x if not any(spec) else UNKNOWN
    for x, spec in zip(outputs, eqn.params["out_specs"], strict=True)
  ]


def _cond(eqn: Any, inputs: list[Any], count: _Count) -> list[Any]:
  index, *rest = inputs
  if not isinstance(index, Unknown):
    return _walk(eqn.params["branches"][int(index)], rest, count)
  each = [Flops() for _ in eqn.params["branches"]]
  for branch, of_branch in zip(eqn.params["branches"], each, strict=True):
    _walk(branch, rest, dataclasses.replace(count, flops=of_branch))
  for kind, amount in max(each, key=Flops.total).items():
    count.flops[kind] += amount
  return [UNKNOWN] * len(eqn.outvars)


def _scan(eqn: Any, inputs: list[Any], count: _Count) -> list[Any]:
  fixed = eqn.params["num_consts"]
  _walk(
    eqn.params["jaxpr"],
    inputs[:fixed] + [UNKNOWN] * (len(inputs) - fixed),
    dataclasses.replace(count, weight=count.weight * eqn.params["length"]),
  )
  return [UNKNOWN] * len(eqn.outvars)


def _while(eqn: Any, inputs: list[Any], count: _Count) -> list[Any]:
  end = eqn.params["cond_nconsts"]
  start = end + eqn.params["body_nconsts"]
  of_condition, of_body, carry = inputs[:end], inputs[end:start], inputs[start:]
  while True:
    (goes_on,) = _walk(eqn.params["cond_jaxpr"], of_condition + carry, count)
    if not isinstance(goes_on, Unknown) and not goes_on:
      return carry
    carry = _walk(eqn.params["body_jaxpr"], of_body + carry, count)
    if isinstance(goes_on, Unknown):
      return [UNKNOWN] * len(carry)


def _platform_index(eqn: Any, inputs: list[Any], count: _Count) -> list[Any]:
  del inputs
  platforms = eqn.params["platforms"]
  named = (i for i, names in enumerate(platforms) if names and count.platform in names)
  return [np.int32(next(named, platforms.index(None)))]


_NESTED: dict[str, Callable[..., list[Any]]] = {
  "cond": _cond,
  "scan": _scan,
  "while": _while,
  "shard_map": _shard_map,
  "platform_index": _platform_index,
  **dict.fromkeys(
    ("jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint"), _call
  ),
}
