"""Export of quantized OLMo2 and Llama models to Hugging Face directories in compressed-tensors.

  format             for                            a matrix of O outputs and K inputs
  pack-quantized     integer weights                weight_packed int32 [O, K bits / 32],
                                                    weight_shape int64 [2]
  int-quantized      integer weights and inputs     weight int8 [O, K]
  float-quantized    e4m3                           weight float8_e4m3fn [O, K]

each with weight_scale, float32: [O, 1], [O, groups], or [1]. Packed codes take 2, 4 or 8 bits;
3-bit codes take 4. In float32 weights are read back exactly; transformers rounds scales to the type
that it loads a model in. The engine quantizes inputs, by a rule that no field states;
`check_exportable` accepts those rules that an engine also computes:

  transformers, by compressed-       integers: largest magnitude / ((2^bits - 1) / 2),
    tensors 0.20, in float32           all 2^bits levels
  vLLM's kernels, at eight bits      largest magnitude / 127
  both, e4m3                         largest magnitude / 448

With the last two, one number in a million, one that lies halfway between two codes, gets the other
code. The first is grid 'twos_complement' with scale 'absmax_edge': equal inputs become equal codes.
But a token's largest number, if negative, lies halfway between two codes, and its last bit decides.
So single layers agree given the same inputs; whole models agree only on average, because an engine
sums in another order.
Legend: K inputs (contraction), O outputs.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from beyond_outliers.config.checks import require
from beyond_outliers.model import hf, hf_config, hf_files
from beyond_outliers.params import at_depth, is_kernel, leaves_by_path, parent
from beyond_outliers.quant import LayerRecipe, QuantizedModel, QuantSpec, packing, quantizers
from beyond_outliers.quant.qmatrix import QuantizedMatrix
from beyond_outliers.types import Json, PathLike

# Grids whose codes, zero among them, are integers of their number of bits.
INTEGERS = ("symmetric", "twos_complement", "ternary")
# Other widths would straddle words, on which versions of the layout disagree; such codes take the
# next larger width.
PACKED_BITS = (2, 4, 8)
WIDE = ("float32", "float64")  # in these compressed-tensors scales inputs as this program does


def compressed_tensors(
  q: QuantizedModel,
  directory: PathLike,
  *,
  context: int | None = None,
  bos_token_id: int | None = None,
  eos_token_id: int | Sequence[int] | None = None,
  like: PathLike | None = None,
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a quantized model as a compressed-tensors directory.

  The other arguments and the errors are those of `hf.save`; ConfigError also for what
  `check_exportable` refuses."""
  check_exportable(q)
  leaves, dtype = leaves_by_path(q.params), _dtype(q)
  given = hf_config.given(context, bos_token_id, eos_token_id)
  described, beside = hf.description(q.model, dtype.name, given, like)
  entries = hf.entries(hf_config.FAMILIES[described["model_type"]], q.model.config)
  layers = {_module(entry): _layer(q, entry) for entry in entries if is_kernel(entry.path)}
  # A tied head has no tensor, but it is a module.
  described["quantization_config"] = _config({"lm_head": None, **layers})
  tensors = (
    named
    for entry in entries
    for named in _tensors(entry, leaves[entry.path], layers.get(_module(entry)), dtype)
  )
  hf_files.write_directory(pathlib.Path(directory), described, tensors, shard_bytes, beside)


def check_exportable(q: QuantizedModel) -> None:
  """Refuses models that the layout cannot represent.

  Errors: ConfigError naming the layer, the setting that cannot be represented, and the remedy."""
  formats_used = {}
  for path in q.model.contractions():
    layer = q.recipe.layer(path)
    if layer is not None:
      _check_layer(path, layer, _dtype(q).name)
      formats_used[_format(layer)] = path
  require(
    bool(formats_used),
    "recipe",
    "none",
    "quantizes nothing; hf.save writes models in full precision",
  )
  require(
    len(formats_used) == 1,
    "recipe",
    ", ".join(formats_used),
    "the layers' formats differ; use recipes of one format",
  )
  require(
    not (q.model.config.tied and q.recipe.layer("head")),
    "head",
    "quantized",
    "it shares the embedding's matrix, which is not quantized; leave the head in full precision, "
    "or untie it",
  )
  for path, leaf in leaves_by_path(q.params).items():
    require(
      not isinstance(leaf, QuantizedMatrix) or leaf.smooth is None,
      path,
      "smoothed",
      "the layout has no place for factors of a layer's inputs, and a norm's gain cannot take "
      "them, since the layers after one norm have different ones; use a method without smoothing",
    )


def _dtype(q: QuantizedModel) -> np.dtype:
  """The type of everything that is not quantized, in which the engine computes."""
  leaves = leaves_by_path(q.params).values()
  return jnp.result_type(*(leaf for leaf in leaves if not isinstance(leaf, QuantizedMatrix)))


def _check_layer(path: str, layer: LayerRecipe, dtype: str) -> None:
  w, x = layer.weights, layer.activations
  require(
    w is not None,
    f"{path}: weights",
    None,
    "the layout quantizes inputs only together with weights; quantize both",
  )
  assert w is not None  # for type checkers
  require(
    layer.rotation == "none",
    f"{path}: rotation",
    layer.rotation,
    "the engine would have to rotate inputs at run time; use a recipe and a method that do not "
    "rotate",
  )
  for name, spec in (("weights", w), ("activations", x)):
    if spec is not None:
      require(
        spec.grid in (*INTEGERS, "e4m3"),
        f"{path}: {name}.grid",
        spec.grid,
        "its codes are odd numbers, without zero, and the layout has whole numbers around zero; "
        "use 'symmetric'"
        if spec.grid == "midrise"
        else (
          "not supported by the layout; use 'symmetric' or 'e4m3', or keep the model with its "
          "save()"
        ),
      )
  require(
    w.granularity in ("channel", "tensor", "group"),
    f"{path}: weights.granularity",
    w.granularity,
    "not supported by the layout; use 'channel', 'group' or 'tensor', or keep the model with its "
    "save()",
  )
  if x is not None:
    _check_activations(path, w, x, dtype)


def _check_activations(path: str, w: QuantSpec, x: QuantSpec, dtype: str) -> None:
  require(
    (x.grid == "e4m3") == (w.grid == "e4m3"),
    f"{path}: activations.grid",
    x.grid,
    f"the weights are in {w.grid!r}; use integers for both, or 'e4m3' for both",
  )
  require(
    x.granularity in ("token", "tensor"),
    f"{path}: activations.granularity",
    x.granularity,
    "not supported by the layout; use 'token' or 'tensor'",
  )
  by_largest = x.scale == "absmax" and x.bits == 8
  require(
    by_largest or (x.grid, x.scale) == ("twos_complement", "absmax_edge"),
    f"{path}: activations",
    f"{x.grid}, {x.scale}",
    "the engine divides inputs by their largest magnitude over half of 2^bits - 1, and has 2^bits "
    "levels; use the grid 'twos_complement' with the scale 'absmax_edge', eight bits with "
    "'absmax', or leave them in full precision",
  )
  require(
    by_largest or dtype in WIDE,
    f"{path}: activations",
    f"{x.grid}, {x.scale}",
    f"in {dtype} the engine rounds scales and inputs to that type, which gives other codes; give "
    "parameters in float32, or leave activations in full precision",
  )


def _format(layer: LayerRecipe) -> str:
  if layer.weights is not None and layer.weights.grid == "e4m3":
    return "float-quantized"
  return "pack-quantized" if layer.activations is None else "int-quantized"


def _bits(layer: LayerRecipe) -> int:
  """Bits of the integers that hold the codes of a layer's weights."""
  assert layer.weights is not None  # `_check_layer` saw to it
  bits = math.ceil(layer.weights.bits)  # ternary: two
  packed = _format(layer) == "pack-quantized"
  return next(width for width in PACKED_BITS if width >= bits) if packed else bits


def _module(entry: hf.Entry) -> str:
  return entry.name.removesuffix(".weight")


def _layer(q: QuantizedModel, entry: hf.Entry) -> LayerRecipe | None:
  path = parent(entry.path)
  return q.recipe.layer(path if entry.depth is None else at_depth(path, entry.depth))


def _config(layers: dict[str, LayerRecipe | None]) -> Json:
  """The `quantization_config` of config.json. layers: recipes by name, for all linear modules."""
  kinds: dict[LayerRecipe, list[str]] = {}
  for name, layer in layers.items():
    if layer is not None:
      kinds.setdefault(layer, []).append(name)
  groups = {
    f"group_{i}": _group(layer, ["Linear"] if len(kinds) == 1 else names)
    for i, (layer, names) in enumerate(kinds.items())
  }
  return {
    "quant_method": "compressed-tensors",
    "format": _format(next(iter(kinds))),
    "quantization_status": "compressed",
    "config_groups": groups,
    "ignore": [name for name, layer in layers.items() if layer is None],
    "kv_cache_scheme": None,
  }


def _group(layer: LayerRecipe, targets: list[str]) -> Json:
  w, x = layer.weights, layer.activations
  assert w is not None  # `_check_layer` saw to it
  return {
    "targets": targets,
    "weights": _arguments(w, _bits(layer), dynamic=False),
    "input_activations": x and _arguments(x, math.ceil(x.bits), dynamic=True),
    "output_activations": None,
  }


def _arguments(spec: QuantSpec, bits: int, dynamic: bool) -> Json:
  group = {"group_size": spec.group} if spec.granularity == "group" else {}
  return {
    "num_bits": bits,
    "type": "float" if spec.grid == "e4m3" else "int",
    "symmetric": True,
    "strategy": spec.granularity,
    "dynamic": dynamic,
    **group,
  }


def _tensors(
  entry: hf.Entry, leaf: Any, layer: LayerRecipe | None, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array) of every tensor that represents a parameter in the files. dtype: of unquantized
  matrices, which are float32 in stacks with quantized ones."""
  if not isinstance(leaf, QuantizedMatrix):
    yield entry.name, hf.tensor(leaf, entry)
    return
  if layer is None:
    yield entry.name, hf.tensor(leaf.codes, entry).astype(dtype)
    return
  spec: Any = layer.weights
  codes_OxK = hf.tensor(leaf.codes, entry).astype(spec.levels.dtype)
  K = codes_OxK.shape[1]
  groups = K // (quantizers.block_of(spec, K) or K)
  # In a stack of layers with different recipes, a scale may be repeated over its block.
  scale = hf.tensor(leaf.scale, entry)
  scale = scale[:, :: scale.shape[1] // groups]
  if _format(layer) == "pack-quantized":
    yield f"{_module(entry)}.weight_packed", _pack(codes_OxK, _bits(layer))
    yield f"{_module(entry)}.weight_shape", np.array(codes_OxK.shape, np.int64)
  else:
    yield entry.name, codes_OxK
  one = spec.granularity == "tensor"
  yield f"{_module(entry)}.weight_scale", scale[0] if one else np.ascontiguousarray(scale)


def _pack(codes_OxK: np.ndarray, bits: int) -> np.ndarray:
  """Packed codes, int32 [O, K bits / 32 rounded up].

  Codes plus 2^(bits - 1), the first of a row in the lowest bits."""
  K = codes_OxK.shape[1]
  digits = codes_OxK.astype(np.int32) + 2 ** (bits - 1)
  in_words = np.pad(digits, ((0, 0), (0, -K % (packing.WORD_BITS // bits))))
  packed = packing.pack_digits(in_words, bits).view("<i4").reshape(len(codes_OxK), -1)
  return np.ascontiguousarray(packed[:, : -(-K * bits // 32)])
