"""Recipes: rules that give each linear layer, by its path, its recipe; and the named recipes."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

from beyond_outliers import config
from beyond_outliers.config.checks import nearest, require
from beyond_outliers.errors import ConfigError
from beyond_outliers.params import at_any_depth
from beyond_outliers.quant import quantizers, rotations
from beyond_outliers.quant.spec import LayerRecipe, QuantSpec


class LinearShape(NamedTuple):
  """The contraction axis of a linear layer."""

  width: int
  shards: int = 1  # number of devices over which it is split


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Ordered rules: a linear layer follows the first whose regular expression matches its whole
  path; None: it is not quantized.

  Paths are those of layers (params.py): `layers/3/mlp/up`, `head`.
  Errors: ConfigError for an invalid regular expression."""

  rules: tuple[tuple[str, LayerRecipe | None], ...]

  def __post_init__(self):
    for paths, _ in self.rules:
      try:
        re.compile(paths)
      except re.error as error:
        raise ConfigError(f"quant.rules: {paths!r} is not a regular expression ({error})") from None

  @property
  def default(self) -> LayerRecipe | None:
    """The recipe of the last rule, which covers all layers that the others leave."""
    return self.rules[-1][1]

  @property
  def weights(self) -> QuantSpec | None:
    return self.default.weights if self.default else None

  @property
  def activations(self) -> QuantSpec | None:
    return self.default.activations if self.default else None

  @property
  def quantizes(self) -> bool:
    return any(layer is not None for _, layer in self.rules)

  @property
  def sees_batches(self) -> bool:
    """Whether results depend on which tokens share a batch: gradients have scales over the tokens,
    and stochastic rounding draws per batch."""
    layers = [layer for _, layer in self.rules if layer is not None]
    forward = [spec for layer in layers for spec in (layer.weights, layer.activations) if spec]
    return any(layer.gradients for layer in layers) or any(
      spec.rounding == "stochastic" for spec in forward
    )

  def layer(self, path: str) -> LayerRecipe | None:
    """The recipe of the layer at `path`. Errors: ConfigError when no rule matches."""
    return self.rules[self.rule(path)][1]

  def rule(self, path: str) -> int:
    """Index of the rule that the layer at `path` follows. Errors: those of `layer`."""
    for i, (paths, _) in enumerate(self.rules):
      if re.fullmatch(paths, path):
        return i
    raise ConfigError(
      f"quant.rules = {[paths for paths, _ in self.rules]}: none matches the linear layer "
      f"{path!r}; end with a rule for '.*'"
    )

  def check(self, shapes: Mapping[str, LinearShape]) -> None:
    """Checks that the rules fit a model, given all its linear layers by path.

    Errors: ConfigError for a layer without a rule, a rule without a layer, and blocks that do not
      divide a width or a shard's width."""
    used = set()
    for path, shape in shapes.items():
      used.add(self.rule(path))
      layer = self.layer(path)
      if layer is not None:
        _check_blocks(path, layer, shape)
    for i, (paths, _) in enumerate(self.rules):
      require(
        i in used,
        "quant.rules",
        paths,
        "no linear layer is left for this rule; the model has "
        + ", ".join(sorted({at_any_depth(path) for path in shapes})),
      )


def _check_blocks(path: str, layer: LayerRecipe, shape: LinearShape) -> None:
  """Refuses blocks that do not divide the width, or a shard's width. Errors: ConfigError."""
  width, shards = shape
  blocks = {}
  for operand, spec in (("weights", layer.weights), ("activations", layer.activations)):
    if spec is not None:
      try:
        blocks[f"the scales of {operand}"] = quantizers.block_of(spec, width) or 1
      except ConfigError as error:
        raise ConfigError(f"quant: {path}: {error}") from None
  if rotations.ROTATIONS[layer.rotation] is not None:
    blocks["the rotation"] = rotations.block_size(width)
  for name, block in blocks.items():
    require(
      width // shards % block == 0,
      "mesh.model",
      shards,
      f"{path} sums over {width} numbers, {width // shards} on each device, which is not a "
      f"multiple of the blocks of {block} of {name}; use a smaller mesh.model",
    )


def _but_the_head(layer: LayerRecipe) -> Recipe:
  """A recipe for all layers but the head, which stays in full precision, as in QuEST."""
  return Recipe((("head", None), (".*", layer)))


def _integers(
  grid: str, scale: str, weights: int, activations: int | None, group: int = 0
) -> LayerRecipe:
  """Integers with one scale per output channel, or per group of weights, and one per token."""
  of_weights = "group" if group else "channel"
  return LayerRecipe(
    QuantSpec(weights, grid, scale, of_weights, group),
    QuantSpec(activations, grid, scale, "token") if activations else None,
  )


# The study's integers: at four bits -7 to 7, absmax/7.
_round_to_nearest = functools.partial(_integers, "symmetric", "absmax")
# What inference engines call symmetric integers, scaled as in compressed-tensors, llm-compressor
# and torchao: at four bits -8 to 7, absmax/7.5.
_served = functools.partial(_integers, "twos_complement", "absmax_edge")


def _quest(weights: float, activations: float | None) -> LayerRecipe:
  """QuEST, arXiv 2502.05003."""

  def spec(bits, granularity):
    grid = "ternary" if bits == 1.585 else "midrise"
    return QuantSpec(bits, grid, "gaussian", granularity, rotation="hadamard", estimator="trust")

  return LayerRecipe(spec(weights, "channel"), spec(activations, "token") if activations else None)


def _lsq(activations: str) -> LayerRecipe:
  """LSQ, arXiv 1902.08153; section 2 defines a grid for signed and one for unsigned values."""

  def spec(grid):
    return QuantSpec(4, grid, "learned", "tensor", estimator="lsq")

  return LayerRecipe(spec("twos_complement"), spec(activations))


def _both(spec: QuantSpec, gradients: QuantSpec | None = None) -> LayerRecipe:
  return LayerRecipe(spec, spec, gradients)


RECIPES: dict[str, Recipe] = {
  "none": Recipe(((".*", None),)),
  "rtn_w8a8": _but_the_head(_round_to_nearest(8, 8)),
  "rtn_w4a4": _but_the_head(_round_to_nearest(4, 4)),
  "rtn_w4a16": _but_the_head(_round_to_nearest(4, None)),
  "rtn_w3a16": _but_the_head(_round_to_nearest(3, None)),
  "rtn_w2a16": _but_the_head(_round_to_nearest(2, None)),
  "rtn_w4a16_g128": _but_the_head(_round_to_nearest(4, None, group=128)),
  "int8_w8a8": _but_the_head(_served(8, 8)),
  "int4_w4a4": _but_the_head(_served(4, 4)),
  "int4_w4a16": _but_the_head(_served(4, None)),
  "int3_w3a16": _but_the_head(_served(3, None)),
  "int2_w2a16": _but_the_head(_served(2, None)),
  "int4_w4a16_g128": _but_the_head(_served(4, None, group=128)),
  **{f"quest_w{b}a{b}": _but_the_head(_quest(b, b)) for b in (1, 2, 3, 4, 8)},
  "quest_w1.58a1.58": _but_the_head(_quest(1.585, 1.585)),
  "quest_w4a16": _but_the_head(_quest(4, None)),
  "lsq_w4a4": _but_the_head(_lsq("twos_complement")),
  # Meant for a rule about layers that follow a squared ReLU: `.*/mlp/down`.
  "lsq_w4a4_unsigned": _but_the_head(_lsq("unsigned")),
  # The types of arXiv 2209.05433: e4m3 forward, e5m2 for gradients; but not its scale per tensor,
  # through which a token would depend on later ones.
  "fp8": _but_the_head(
    LayerRecipe(
      QuantSpec(8, "e4m3"),
      QuantSpec(8, "e4m3", granularity="token"),
      QuantSpec(8, "e5m2", granularity="token"),
    )
  ),
  # mxfp4 and nvfp4 are only the number formats, with scales for blocks along the contraction:
  # gradients are not quantized, and the backward pass multiplies them by the forward pass's
  # dequantized operands. The training methods of their papers (rotations, stochastic rounding,
  # blocks over two axes, layers left out) are not part of these rows.
  "mxfp4": _but_the_head(_both(QuantSpec(4, "e2m1", granularity="mx"))),
  # Weights as published. The float32 scale of activations is per token instead of per tensor, for
  # the same reason as fp8's.
  "nvfp4": _but_the_head(
    LayerRecipe(
      QuantSpec(4, "e2m1", granularity="nv"), QuantSpec(4, "e2m1", granularity="nv_token")
    )
  ),
  # All operands of all products in int8. Gradients are rounded stochastically: sums stay unbiased.
  "int8_gradients": _but_the_head(
    dataclasses.replace(
      _round_to_nearest(8, 8), gradients=QuantSpec(8, granularity="token", rounding="stochastic")
    )
  ),
}


def check_recipe(recipe: object) -> None:
  """Refuses anything but a Recipe, such as the name of one. Errors: ConfigError."""
  remedy = "expected a quant.Recipe; for a name, give quant.RECIPES[name]"
  require(isinstance(recipe, Recipe), "recipe", recipe, remedy)


def recipe_named(name: str, field: str = "quant.recipe") -> Recipe:
  """A row of RECIPES. Errors: ConfigError with the nearest name."""
  if name not in RECIPES:
    raise ConfigError(f"{field} = {name!r}: unknown recipe; {nearest(name, RECIPES, cutoff=0.4)}")
  return RECIPES[name]


def name_of(c: config.Quant) -> str:
  """A run's recipe as text: the row of most layers, and the rules except that of a plain head."""
  own = [
    f"{rule.paths}: {rule.recipe}"
    for rule in c.rules.values()
    if (rule.paths, rule.recipe) != ("head", "none")
  ]
  return ", ".join([c.recipe, *own])


def from_config(c: config.Quant) -> Recipe:
  """A run's Recipe: its rules in order, each with the default of its row, then `recipe` for all
  other layers."""
  rules = [
    (rule.paths, recipe_named(rule.recipe, f"quant.rules.{label}.recipe").default)
    for label, rule in c.rules.items()
  ]
  return Recipe((*rules, (".*", recipe_named(c.recipe).default)))
