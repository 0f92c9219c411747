"""Methods of post-training quantization, each a combination of rotation, smoothing, scale and
rounding."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from beyond_outliers.config.checks import nearest, require, require_fraction
from beyond_outliers.errors import ConfigError
from beyond_outliers.quant.ptq.gptq import DAMPING, ROUNDERS, Rounder
from beyond_outliers.quant.ptq.smoothing import ALPHA, SMOOTHINGS, Smoothing
from beyond_outliers.quant.spec import LayerRecipe

# The scales of recipes that ask for no particular one: a method may replace them.
ABSMAX = ("absmax", "absmax_edge")


@dataclasses.dataclass(frozen=True)
class Method:
  """A method, by its parts.

  rounding: row of ROUNDERS.
  smoothing: row of SMOOTHINGS, or "".
  scale: row of SCALES that replaces the recipe's if that is one of ABSMAX, or "".
  rotation: row of ROTATIONS that replaces the recipe's "none", or "".
  fused: fuse rotations into weights where possible (rotation_fusion.py); the rest are online.
  sequential: calibrate a block on the outputs of the quantized blocks before it, else on those in
    full precision; within a block, layers see each other in full precision (the official code
    without `--true-sequential`).
  alpha: of smoothquant, 0 to 1: how much of the inputs' range is moved into the matrix.
  damping: of gptq, relative to the inputs' mean square.
  Errors: ConfigError for alpha or damping out of range."""

  rounding: str = "nearest"
  smoothing: str = ""
  scale: str = ""
  rotation: str = ""
  fused: bool = False
  sequential: bool = False
  alpha: float = ALPHA
  damping: float = DAMPING

  def __post_init__(self):
    require_fraction(self, "", "alpha")
    require(
      0 < self.damping < math.inf,
      "damping",
      self.damping,
      "expected a number above 0, such as 0.01",
    )

  @property
  def options(self) -> tuple[str, ...]:
    """Options that this method's name may set: the fields that its parts read."""
    return tuple(option for part in self._parts for option in part.options)

  @property
  def calibrated(self) -> bool:
    """Whether this method reads the layers' inputs."""
    return bool(self.smoothing) or self.needs_gram

  @property
  def needs_gram(self) -> bool:
    """Whether this method reads the Gram matrices of the layers' inputs."""
    return any(part.needs_gram for part in self._parts)

  @property
  def _parts(self) -> tuple[Smoothing | Rounder, ...]:
    """This method's rows of SMOOTHINGS and ROUNDERS, in the order in which they apply."""
    smoothing = (SMOOTHINGS[self.smoothing],) if self.smoothing else ()
    return *smoothing, ROUNDERS[self.rounding]

  def layer(self, layer: LayerRecipe | None, *, rotated: bool = False) -> LayerRecipe | None:
    """A layer's recipe under this method, without gradients. rotated: its inputs are already."""
    if layer is None or not (layer.weights or layer.activations):
      return None
    w, x = layer.weights, layer.activations
    if self.scale and w and w.scale in ABSMAX:
      w = dataclasses.replace(w, scale=self.scale)
    rotation = "none" if rotated else self.rotation if layer.rotation == "none" else ""
    if rotation:
      w, x = (spec and dataclasses.replace(spec, rotation=rotation) for spec in (w, x))
    learned = any(spec is not None and spec.scale == "learned" for spec in (w, x))
    require(
      not (self.rotation or self.smoothing) or not learned,
      "method",
      self.rotation or self.smoothing,
      "learned scales hold only in the basis that they were learned in; use a method that neither "
      "rotates nor smooths",
    )
    return LayerRecipe(w, x)


METHODS: dict[str, Method] = {
  "rtn": Method(),
  "rtn_mse": Method(scale="mse"),  # the clip of least squared error in the matrix itself
  "gptq": Method("gptq", sequential=True),  # arXiv 2210.17323
  "gptq_in_order": Method("gptq_in_order", sequential=True),
  "gptq_mse": Method("gptq", scale="mse", sequential=True),
  "smoothquant": Method(smoothing="smoothquant"),  # arXiv 2211.10438
  "smoothquant+gptq": Method("gptq", smoothing="smoothquant", sequential=True),
  "awq": Method(smoothing="awq"),  # arXiv 2306.00978
  "awq+gptq": Method("gptq", smoothing="awq", sequential=True),
  "hadamard": Method(rotation="hadamard"),  # of every layer's inputs, online
  "hadamard_mse": Method(scale="mse", rotation="hadamard"),
  "hadamard+gptq": Method("gptq", rotation="hadamard", sequential=True),
  "quarot": Method(rotation="hadamard", fused=True),  # arXiv 2404.00456
  "quarot+gptq": Method("gptq", rotation="hadamard", fused=True, sequential=True),
  "hadamard+gptq_mse": Method("gptq", scale="mse", rotation="hadamard", sequential=True),
}

# Follows a part of a method's name; all its characters are allowed in file names.
OPTION = re.compile(r"\((\w+)=([-+.0-9e]+)\)")


def method_named(name: str, field: str = "method") -> Method:
  """A row of METHODS, with the options that its name sets.

  As in `smoothquant(alpha=0.75)+gptq(damping=0.1)`.

  Errors: ConfigError with the closest name, the row's options, or their range."""
  row, options = OPTION.sub("", name), OPTION.findall(name)
  require(
    "(" not in row,
    field,
    name,
    "numbers are written as in smoothquant(alpha=0.75)+gptq(damping=0.1)",
  )
  if row not in METHODS:
    raise ConfigError(f"{field} = {name!r}: unknown method; {nearest(row, METHODS, cutoff=0.4)}")
  known = METHODS[row].options
  for option, _ in options:
    takes = " and ".join(f"({one}=NUMBER) once" for one in known) or "no numbers"
    require(
      option in known and len(options) == len(dict(options)),
      field,
      name,
      f"{row} takes {takes}, not {option!r} here",
    )
  try:
    numbers: dict[str, Any] = {option: float(number) for option, number in options}
    return dataclasses.replace(METHODS[row], **numbers)
  except ValueError as error:  # not a number, or out of range
    raise ConfigError(f"{field} = {name!r}: {error}") from None
