"""Quantization as data, without computation: specs of operands and recipes of linear layers."""

from __future__ import annotations

import dataclasses

from beyond_outliers.config.checks import require, require_one_of
from beyond_outliers.quant.estimators import ESTIMATORS
from beyond_outliers.quant.grids import GRIDS, Float, Grid
from beyond_outliers.quant.rotations import ROTATIONS
from beyond_outliers.quant.scales import GRANULARITIES, SCALES

ROUNDINGS = ("nearest", "stochastic")
BACKWARDS = ("quantized", "unquantized")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """Quantization of one operand: everything that determines its values.

  bits: 1 to 8, or 1.585 (ternary).
  grid: row of GRIDS.
  scale: row of SCALES.
  granularity: row of GRANULARITIES.
  group: values along the contraction axis that share a scale, with granularity "group".
  rotation: row of ROTATIONS, applied before quantizing.
  estimator: row of ESTIMATORS.
  rounding: nearest (ties to even) or stochastic (which needs a key; without one, nearest).
  Errors: ConfigError for values that do not go together."""

  bits: float
  grid: str = "symmetric"
  scale: str = "absmax"
  granularity: str = "channel"
  group: int = 0
  rotation: str = "none"
  estimator: str = "ste"
  rounding: str = "nearest"

  def __post_init__(self):
    require_one_of(
      self,
      "",
      grid=GRIDS,
      scale=SCALES,
      granularity=GRANULARITIES,
      rotation=ROTATIONS,
      estimator=ESTIMATORS,
      rounding=ROUNDINGS,
    )
    bits = GRIDS[self.grid]
    require(
      self.bits in bits,
      "bits",
      self.bits,
      f"grid {self.grid!r} has {', '.join(map(str, bits))} bits",
    )
    self._check_granularity()
    self._check_grid()
    self._check_learned()

  def _check_granularity(self) -> None:
    granularity = GRANULARITIES[self.granularity]
    if granularity.block == 0:
      require(
        self.group >= 1, "group", self.group, "granularity 'group' needs the width of its groups"
      )
    else:
      require(
        self.group == 0,
        "group",
        self.group,
        f"only granularity 'group' has one, not {self.granularity!r}",
      )
    if granularity.rule is not None:
      require(
        isinstance(self.levels, Float),
        "grid",
        self.grid,
        f"granularity {self.granularity!r} takes a grid of floating-point numbers: e2m1, ...",
      )
      require(
        self.scale == "absmax",
        "scale",
        self.scale,
        f"granularity {self.granularity!r} has its own rule for scales; leave it at 'absmax'",
      )

  def _check_grid(self) -> None:
    if self.scale == "gaussian":
      require(
        self.grid in ("midrise", "ternary"),
        "scale",
        self.scale,
        f"its constants belong to the grids 'midrise' and 'ternary', not {self.grid!r}",
      )
    if self.scale == "absmax_edge" or self.estimator == "trust":
      name = "scale" if self.scale == "absmax_edge" else "estimator"
      require(
        not isinstance(self.levels, Float),
        name,
        getattr(self, name),
        f"needs a grid with even steps, not {self.grid!r}",
      )
    require(
      self.grid != "unsigned" or self.rotation == "none",
      "rotation",
      self.rotation,
      "rotated numbers are signed, and the grid 'unsigned' is not; use 'none', or another grid",
    )

  def _check_learned(self) -> None:
    require(
      (self.scale == "learned") == ESTIMATORS[self.estimator].learns_scale,
      "scale",
      self.scale,
      f"'learned' and estimator 'lsq' come together, not with estimator {self.estimator!r}",
    )
    if self.scale == "learned":
      require(
        self.granularity == "tensor",
        "granularity",
        self.granularity,
        "a learned scale is of the whole tensor; use 'tensor'",
      )

  @property
  def levels(self) -> Grid:
    return GRIDS[self.grid][self.bits]


@dataclasses.dataclass(frozen=True)
class LayerRecipe:
  """Quantization of the product of a linear layer, y = x w. None leaves an operand as it is.

  gradients: of g, the gradient of y, separately for each of the two backward products:

    dx = g wᵀ  sums over outputs: one scale per token ("token"), or for all ("tensor")
    dw = xᵀ g  sums over tokens: one scale per output, or for all

  In these products, w's scales per output and x's per token lie along the axis that is summed over,
  so they are multiplied into g before g is quantized. The other operand is the one that `backward`
  names: "quantized", as in the forward pass, or "unquantized". dx and dw themselves are not
  quantized, nor are attention's own products. Both backends do the same. A rotation is applied to
  both operands, even to one that is not quantized: otherwise it would not cancel.
  Errors: ConfigError for operands that do not go together."""

  weights: QuantSpec | None = None
  activations: QuantSpec | None = None
  gradients: QuantSpec | None = None
  backward: str = "quantized"

  def __post_init__(self):
    require_one_of(self, "", backward=BACKWARDS)
    w, x, g = self.weights, self.activations, self.gradients
    require(any((w, x, g)), "weights", w, "a layer that quantizes nothing has the recipe None")
    for name, spec in (("weights", w), ("gradients", g)):
      require(
        spec is None or spec.grid != "unsigned",
        f"{name}.grid",
        "unsigned",
        "they are signed; only activations may be unsigned",
      )
    if w is not None and x is not None:
      require(
        w.rotation == x.rotation,
        "activations.rotation",
        x.rotation,
        f"must equal that of the weights ({w.rotation!r}), so that the two cancel in the product",
      )
    if w is not None:
      require(
        w.granularity not in ("token", "nv_token"),
        "weights.granularity",
        w.granularity,
        "weights have channels; use 'channel', or 'nv'",
      )
    if x is not None:
      require(
        x.granularity != "channel",
        "activations.granularity",
        x.granularity,
        "activations have tokens; use 'token'",
      )
    if g is not None:
      _check_gradients(g)

  @property
  def rotation(self) -> str:
    return next(
      (spec.rotation for spec in (self.weights, self.activations) if spec is not None), "none"
    )


def _check_gradients(g: QuantSpec) -> None:
  require(
    g.granularity in ("tensor", "token"),
    "gradients.granularity",
    g.granularity,
    "expected 'tensor' or 'token'",
  )
  require(g.rotation == "none", "gradients.rotation", g.rotation, "gradients are not rotated")
  require(
    g.scale != "learned", "gradients.scale", g.scale, "nothing would learn it; use another scale"
  )
