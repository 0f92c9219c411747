"""Collectives of a compiled program, and its decompositions on CPU, per device.

XLA's cost analysis counts neither. They are read from the text of the per-device HLO. An
instruction counts once per iteration of the loops around it if XLA or the loop's condition tells
how many there are, otherwise once; all branches of conditionals count.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)

_BITS = {"pred": 8, "token": 0}  # per element; other types have it in their names, as bf16
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)\)")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_MESH = re.compile(
  r"replica_groups=mesh\[([^\]]+)\]"
  r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]+)\}"
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"\b(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_BELOW = re.compile(r" compare\(.*%([\w.\-]+)\), direction=LT")
_WHOLE = re.compile(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")

# Instructions whose called computations work on scalars.
_OF_NUMBERS = (
  "all-reduce",
  "map",
  "reduce",
  "reduce-scatter",
  "reduce-window",
  "scatter",
  "select-and-scatter",
  "sort",
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation: a line of HLO text, parsed."""

  opcode: str
  result: str  # its type as written: f32[8,768]{1,0}, or a tuple of these
  line: str
  # Iterations of the loops around it, outermost first; None: unknown.
  loops: tuple[int | None, ...] = ()
  start: str = ""  # for the end of an asynchronous pair, the line of its start

  @property
  def times(self) -> int:
    return math.prod(trips or 1 for trips in self.loops)

  @property
  def shapes(self) -> list[tuple[int, ...]]:
    """Shapes of all arrays of the result."""
    return [shape for _, shape in self._arrays()]

  @property
  def bytes(self) -> int:
    """Bytes of the result, whatever the number of iterations."""
    return sum(-(-math.prod(shape) * bits // 8) for bits, shape in self._arrays())

  def _arrays(self) -> list[tuple[int, tuple[int, ...]]]:
    found = re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", self.result)
    return [
      (
        _BITS[name] if name in _BITS else int(bits),
        tuple(int(length) for length in shape.split(",") if length),
      )
      for name, bits, shape in found
    ]


def instructions(text: str) -> list[Instruction]:
  """All instructions that the program runs; those of a called computation once per caller."""
  computations, name, entry = {}, "", ""
  lines: dict[str, str] = {}  # instruction's name -> line, in the current computation
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      name = header[2]
      computations[name], lines = [], {}
      entry = name if header[1] else entry
    elif found := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)):
      lines[found[1]] = line
      ended = _OPERAND.search(line) if found[3].endswith("-done") else None
      start = lines.get(ended[1], "") if ended else ""
      computations[name].append(Instruction(found[3], found[2], line, start=start))
  return list(_inside(computations, entry, ()))


def _inside(
  computations: dict[str, list[Instruction]], name: str, loops: tuple[int | None, ...]
) -> Iterator[Instruction]:
  for one in computations[name]:
    yield dataclasses.replace(one, loops=loops)
    if one.opcode in _OF_NUMBERS:
      continue
    deeper = loops
    if one.opcode == "while":
      deeper = (*loops, _trips(computations, one))
    branches = [
      name.strip().lstrip("%") for names in _BRANCHES.findall(one.line) for name in names.split(",")
    ]
    for called in [*_CALLED.findall(one.line), *branches]:
      yield from _inside(computations, called, deeper)


def _trips(computations: dict[str, list[Instruction]], loop: Instruction) -> int | None:
  """Iterations of a loop, if known: from XLA, or as it counts from 0 to a constant, as scans do."""
  if known := _TRIPS.search(loop.line):
    return int(known[1])
  condition = _CONDITION.search(loop.line)
  inside = computations.get(condition[1], []) if condition else []
  below = _BELOW.search(inside[-1].line) if inside else None
  constants = {found[1]: found[2] for one in inside if (found := _WHOLE.search(one.line))}
  return int(constants[below[1]]) if below and below[1] in constants else None


def collective(one: Instruction) -> str | None:
  """The kind in COLLECTIVES of an instruction, if it is one.

  Of an asynchronous pair the end counts, since its result is what was received."""
  kind = one.opcode.removesuffix("-done")
  return kind if kind in COLLECTIVES else None


def received(program: Iterable[Instruction]) -> int:
  """Bytes of the results of all collectives: what a device receives, its own part included."""
  return sum(one.times * one.bytes for one in program if collective(one))


def device_groups(one: Instruction) -> np.ndarray | None:
  """[groups, devices]: numbers of the devices that take part in a collective, or pairs of sender
  and receiver; None: all devices. Errors: ValueError if they are written in an unknown way."""
  line = one.start or one.line
  if iota := _IOTA.search(line):
    return _transposed(iota[2], iota[3]).reshape(_integers(iota[1]))
  if listed := _LISTED.search(line):
    return np.array(json.loads("[" + listed[1].translate(str.maketrans("{}", "[]")) + "]"))
  if mesh := _MESH.search(line):  # mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
    sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", mesh[1])}
    among = mesh[4].replace(" ", "").split(",")
    if set(among) <= set(sizes) and len(sizes) == mesh[1].count("="):
      order = [list(sizes).index(name) for name in sorted(sizes, key=lambda name: name in among)]
      shape = tuple(sizes.values())
      numbers = _transposed(mesh[2] or str(math.prod(shape)), mesh[3]).reshape(shape)
      return numbers.transpose(order).reshape(-1, math.prod(sizes[name] for name in among))
  if "replica_groups=" in line and "replica_groups={}" not in line:
    raise ValueError(f"groups of devices that are not understood: {line.strip()[:300]}")
  return None


def _integers(written: str) -> tuple[int, ...]:
  return tuple(map(int, written.split(",")))


def _transposed(shape: str, order: str | None) -> np.ndarray:
  """Device numbers in an array of `shape`, with its axes transposed to `order`."""
  numbers = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
  return numbers.transpose(_integers(order)) if order else numbers


def sent(one: Instruction, group: int) -> float:
  """Bytes that a device sends for a ring collective in a group of that size; it receives as many.
  For a permutation, what each sender sends."""
  whole = one.times * one.bytes
  return {
    "all-gather": whole * (group - 1) / group,
    "all-reduce": whole * 2 * (group - 1) / group,
    "reduce-scatter": whole * (group - 1),  # the result is one share
    "all-to-all": whole * (group - 1) / group,
    "ragged-all-to-all": whole * (group - 1) / group,
  }.get(str(collective(one)), whole)


def sent_by_axes(program: Iterable[Instruction], shape: Mapping[str, int]) -> dict[str, float]:
  """{"data": ..., "data·fsdp": ...}: bytes that a device sends along an axis of a mesh, or several
  axes together. shape: sizes by axis; devices are numbered in the order of the mesh."""
  found: dict[str, float] = collections.defaultdict(float)
  for one in program:
    if not collective(one):
      continue
    groups = device_groups(one)
    groups = np.arange(math.prod(shape.values()))[None] if groups is None else groups
    places = np.stack(np.unravel_index(groups, tuple(shape.values())))  # [axes, groups, devices]
    crossed = (places != places[..., :1]).any((1, 2))
    if crossed.any():
      axes = "·".join(axis for axis, crosses in zip(shape, crossed, strict=True) if crosses)
      found[axes] += sent(one, groups.shape[1])
  return dict(found)


def decompositions(program: Iterable[Instruction]) -> dict[str, int]:
  """Matrices passed to LAPACK: {"ssyevd 768x768": 6}."""
  found: collections.Counter[str] = collections.Counter()
  for one in program:
    if one.opcode == "custom-call" and (
      kernel := re.search(r'custom_call_target="lapack_(\w+?)(?:_ffi)?"', one.line)
    ):
      *batch, rows, columns = one.shapes[0]
      found[f"{kernel[1]} {rows}x{columns}"] += one.times * math.prod(batch)
  return dict(found)
