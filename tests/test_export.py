"""The compressed-tensors layout: other engines read the right matrix from it, and what it cannot
express is refused.

tests/golden/compressed_tensors.npz is of that package's version 0.20.0: numbers of 2, 4 and 8 bits
with what its pack_to_int32 made of them, and inputs (Student's t, 3 degrees of freedom; a row of
zeros) with what its compute_dynamic_scales_and_zp and fake_quantize made of them.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import small_models

from beyond_outliers import config, export
from beyond_outliers.model import hf, hf_config, transformer
from beyond_outliers.quant import RECIPES, LayerRecipe, QuantSpec, Recipe, ptq, qmatrix, quantizers

# 72 numbers of two or four bits fill no whole number of words.
MODEL = dataclasses.replace(
  small_models.MODELS["llama"], vocab=32, d_head=18, d_model=72, mlp_hidden=72, tied=False
)


def recipe(w, x=None, head=None):
  return Recipe((("head", head and LayerRecipe(head)), (".*", LayerRecipe(w, x))))


def edge(bits, granularity="token"):
  """What the package makes of inputs."""
  return QuantSpec(bits, "twos_complement", "absmax_edge", granularity)


GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "compressed_tensors.npz")
GROUPS = recipe(QuantSpec(4, granularity="group", group=24), head=QuantSpec(4))
FOUR = LayerRecipe(QuantSpec(4))


def rules(*rules):
  return Recipe(tuple(rules))


WRITTEN = {
  "rtn_w4a16": (RECIPES["rtn_w4a16"], "pack-quantized"),
  "groups and a head": (GROUPS, "pack-quantized"),
  "two bits, a tensor": (
    recipe(QuantSpec(2, "twos_complement", granularity="tensor")),
    "pack-quantized",
  ),
  "int4, int3, int2": (
    rules(
      ("head", None),
      ("layers/0/.*", RECIPES["int3_w3a16"].default),
      ("layers/1/mlp/.*", RECIPES["int2_w2a16"].default),
      (".*", RECIPES["int4_w4a16"].default),
    ),
    "pack-quantized",
  ),
  "int4_w4a4": (RECIPES["int4_w4a4"], "int-quantized"),
  "ternary": (recipe(QuantSpec(1.585, "ternary")), "pack-quantized"),
  "eight bits": (recipe(QuantSpec(8)), "pack-quantized"),
  "rtn_w8a8": (RECIPES["rtn_w8a8"], "int-quantized"),
  "W8A8": (recipe(QuantSpec(8), edge(8, "tensor")), "int-quantized"),
  "fp8": (RECIPES["fp8"], "float-quantized"),
  "a block left whole": (
    rules(("head", None), ("layers/0/.*", None), (".*", FOUR)),
    "pack-quantized",
  ),
  "a layer left whole": (
    rules(("head", None), ("layers/1/mlp/down", None), (".*", RECIPES["rtn_w8a8"].default)),
    "int-quantized",
  ),
  "the head alone": (rules(("head", FOUR), (".*", None)), "pack-quantized"),
  "unequal blocks, a layer left whole": (
    rules(
      ("head", LayerRecipe(QuantSpec(8))),
      ("layers/0/mlp/.*", LayerRecipe(QuantSpec(4, granularity="group", group=24))),
      ("layers/1/attention/o", None),
      ("layers/1/mlp/.*", LayerRecipe(QuantSpec(2, "twos_complement"))),
      (".*", FOUR),
    ),
    "pack-quantized",
  ),
}


def fresh(model):
  draw = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(draw.standard_t(4, leaf.shape), leaf.dtype), transformer.shapes(model)
  )


def exported(recipe, directory, c=MODEL):
  """(config.json, {name: its array}, {module: the matrix [O, K] that ours multiplies with, or None
  where it is whole})."""
  model = transformer.Transformer(c)
  q = ptq.quantize(model, fresh(model), recipe)
  export.compressed_tensors(q, directory)
  fields = json.loads((directory / "config.json").read_text())
  found = safetensors.deserialize((directory / hf.SINGLE).read_bytes())
  kinds = {
    "I32": np.int32,
    "I64": np.int64,
    "I8": np.int8,
    "F32": np.float32,
    "F8_E4M3": jnp.float8_e4m3fn,
  }
  tensors = {
    name: np.frombuffer(of["data"], kinds[of["dtype"]]).reshape(of["shape"]) for name, of in found
  }
  matrices = {}
  for entry in hf.entries(hf_config.FAMILIES[fields["model_type"]], model.config):
    if not entry.path.endswith("kernel"):
      continue
    layer = recipe.layer(
      f"layers/{entry.depth}/{entry.path[7:-7]}" if entry.depth is not None else "head"
    )
    matrices[entry.name.removesuffix(".weight")] = None
    if layer:
      node = q.params
      for name in entry.path.split("/"):
        node = node[name]
      matrix = qmatrix.QuantizedMatrix(
        *(field if entry.depth is None or field is None else field[entry.depth] for field in node)
      )
      matrices[entry.name.removesuffix(".weight")] = np.asarray(
        qmatrix.reconstruct(matrix, layer)
      ).T
  return fields, tensors, matrices


@pytest.fixture(scope="module", params=WRITTEN)
def written(request, tmp_path_factory):
  """(directory, recipe, its format, what `exported` returns)."""
  directory = tmp_path_factory.mktemp("hf") / "model"
  return directory, *WRITTEN[request.param], exported(WRITTEN[request.param][0], directory)


def unpacked(packed, bits, width):
  """Integers, bit by bit: what the layout says, and none of our code."""
  rows = [
    [
      (int(word) & 0xFFFFFFFF) >> shift & (2**bits - 1)
      for word in row
      for shift in range(0, 32, bits)
    ]
    for row in packed
  ]
  return np.array(rows)[:, :width] - 2 ** (bits - 1)


def test_every_matrix_can_be_computed_from_the_files(written):
  directory, _, format_, (fields, tensors, matrices) = written
  described = fields["quantization_config"]
  assert (described["quant_method"], described["format"]) == ("compressed-tensors", format_)
  whole = [module for module, matrix in matrices.items() if matrix is None]
  assert sorted(described["ignore"]) == sorted(whole)
  for module, matrix in matrices.items():
    groups = [
      group
      for group in described["config_groups"].values()
      if {"Linear", module} & set(group["targets"])
    ]
    if matrix is None:
      assert groups == [] or groups[0]["targets"] == ["Linear"]
      assert tensors[f"{module}.weight"].dtype == np.float32
      assert f"{module}.weight_scale" not in tensors
      continue
    scale = tensors[f"{module}.weight_scale"]
    if format_ == "pack-quantized":
      (group,) = groups
      shape = tensors[f"{module}.weight_shape"]
      assert shape.tolist() == list(matrix.shape) and f"{module}.weight" not in tensors
      codes = unpacked(tensors[f"{module}.weight_packed"], group["weights"]["num_bits"], shape[1])
    else:
      codes = tensors[f"{module}.weight"].astype(np.float32)
    spread = scale if scale.ndim == 1 else np.repeat(scale, matrix.shape[1] // scale.shape[1], 1)
    np.testing.assert_array_equal(codes.astype(np.float32) * spread, matrix)
  with pytest.raises(config.ConfigError, match="quantization_config"):
    hf.load(directory)


@pytest.mark.parametrize("bits", export.PACKED_BITS)
def test_words_are_those_of_the_package_of_the_layout(bits):
  np.testing.assert_array_equal(
    export._pack(GOLDEN[f"codes_{bits}"], bits), GOLDEN[f"packed_{bits}"]
  )


def engine(x, spec):
  """(codes, scale) that compressed-tensors 0.20 makes of inputs, in their type: calculate_qparams
  and round_to_quantized_type_args, for dynamic symmetric arguments."""
  largest = np.abs(x).max(axis=1 if spec.granularity == "token" else None, keepdims=True)
  if spec.grid == "e4m3":
    scale = largest / x.dtype.type(448)
  else:
    scale = largest / x.dtype.type((2**spec.bits - 1) / 2)
  scale = np.where(scale == 0, np.finfo(x.dtype).eps, scale)
  if spec.grid == "e4m3":
    return np.clip(x / scale, -448, 448).astype(jnp.float8_e4m3fn).astype(x.dtype), scale
  return np.rint(np.clip(x / scale, -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1)), scale


INPUTS = {
  "int4_token": edge(4),
  "int8_token": edge(8),
  "int4_tensor": edge(4, "tensor"),
  "int8_tensor": edge(8, "tensor"),
  "float8_token": QuantSpec(8, "e4m3", granularity="token"),
  "float8_tensor": QuantSpec(8, "e4m3", granularity="tensor"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_the_rule_of_the_package_of_the_layout_is_this_one(name):
  """Its own numbers, to the bit."""
  codes, scale = engine(GOLDEN["x"], INPUTS[name])
  np.testing.assert_array_equal(codes * scale, GOLDEN[name])


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_get_the_codes_of_the_package_of_the_layout(name):
  """All codes of all tokens; of a token whose largest number is negative that one is a tie."""
  spec = INPUTS[name]
  integers = spec.grid != "e4m3"
  weights = QuantSpec(8, "symmetric" if integers else "e4m3")
  export._check_layer("up", LayerRecipe(weights, spec), "float32")
  normal = np.random.default_rng(0).standard_normal((4096, 256)).astype(np.float32)
  assert (normal.min(1) < -normal.max(1)).mean() > 0.4
  jitted = jax.jit(quantizers.quantize_array, static_argnums=1)
  for x in (GOLDEN["x"], normal):
    codes, scale = engine(x, spec)
    for quantize in (quantizers.quantize_array, jitted):
      ours = quantize(jnp.asarray(x), spec)
      ours_codes = np.asarray(ours.codes, np.float32)
      if integers:
        np.testing.assert_array_equal(ours_codes, codes)
        np.testing.assert_array_equal(np.where(x == 0, 0, ours.scale), np.where(x == 0, 0, scale))
        continue
      # Scaled by a reciprocal: what lies halfway but for a rounding error may go to either side.
      other = ours_codes != codes
      assert other.sum() <= 2
      halfway = np.broadcast_to((ours_codes + codes) / 2 * scale, x.shape)
      np.testing.assert_allclose(x[other], halfway[other], rtol=3e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_get_the_numbers_of_the_package_of_the_layout(bits):
  """One scale per output: as its inputs have one per token."""
  spec = RECIPES[f"int{bits}_w{bits}a{bits}"].weights
  q = quantizers.quantize_array(jnp.asarray(GOLDEN["x"].T), spec, 0)
  np.testing.assert_array_equal(quantizers.dequantize(q).T, GOLDEN[f"int{bits}_token"])


def test_inputs_that_an_engine_rounds_to_bfloat16_are_refused():
  """There the largest magnitude over 7.5 is rounded to eight bits, and so are its multiples."""
  with pytest.raises(config.ConfigError, match="in bfloat16 the engine rounds scales and inputs"):
    export._check_layer("up", LayerRecipe(QuantSpec(4), edge(4)), "bfloat16")
  export._check_layer("up", RECIPES["fp8"].default, "bfloat16")


def test_a_layer_left_whole_keeps_the_type_of_the_parameters(tmp_path):
  model = transformer.Transformer(MODEL)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), fresh(model))
  q = ptq.quantize(model, params, rules(("head|layers/0/.*", None), (".*", FOUR)))
  export.compressed_tensors(q, tmp_path / "a")
  with safetensors.safe_open(tmp_path / "a" / hf.SINGLE, framework="numpy") as file:
    whole = file.get_tensor("model.layers.0.mlp.up_proj.weight")
  np.testing.assert_array_equal(whole, params["layers"]["mlp"]["up"]["kernel"][0].T)
  assert whole.dtype == export._dtype(q) == jnp.bfloat16


def test_what_generation_needs_goes_with_the_model(tmp_path):
  """From the directory that it was loaded from, also over a quantized model that was saved."""
  model = transformer.Transformer(MODEL)
  hf.save(model, fresh(model), tmp_path / "a", context=4096, eos_token_id=7, bos_token_id=1)
  (tmp_path / "a" / "tokenizer.json").write_text("{}")
  loaded, params = hf.load(tmp_path / "a")
  q = ptq.quantize(loaded, params, RECIPES["rtn_w4a16"])
  q.save(tmp_path / "q")
  for name, of in (("b", q), ("c", ptq.load(tmp_path / "q"))):
    export.compressed_tensors(of, tmp_path / name)
    fields = json.loads((tmp_path / name / "config.json").read_text())
    assert (fields["eos_token_id"], fields["bos_token_id"]) == (7, 1)
    assert fields["max_position_embeddings"] == 4096
    assert (tmp_path / name / "tokenizer.json").read_text() == "{}"
  export.compressed_tensors(q, tmp_path / "d", context=128, eos_token_id=[2, 3])
  fields = json.loads((tmp_path / "d" / "config.json").read_text())
  assert (fields["eos_token_id"], fields["max_position_embeddings"]) == ([2, 3], 128)


def test_nothing_is_kept_of_what_took_the_place_of_a_models_origin(tmp_path):
  model = transformer.Transformer(MODEL)
  hf.save(model, fresh(model), tmp_path / "a", eos_token_id=7)
  q = ptq.quantize(*hf.load(tmp_path / "a"), RECIPES["rtn_w4a16"])
  (tmp_path / "a").rename(tmp_path / "moved")
  other = transformer.Transformer(dataclasses.replace(MODEL, vocab=64))
  hf.save(other, fresh(other), tmp_path / "a", eos_token_id=60)
  with pytest.raises(config.ConfigError, match=r"like: vocab_size = 64: the model has 32; give"):
    export.compressed_tensors(q, tmp_path / "b")
  assert not (tmp_path / "b").exists()
  export.compressed_tensors(q, tmp_path / "b", like=tmp_path / "moved")


def test_the_package_of_the_layout_reads_the_same(written):
  """Its own configuration classes and its own unpacking, where it is installed."""
  pytest.importorskip("compressed_tensors", reason="pip install -c constraints.txt -e '.[peers]'")
  import torch
  from compressed_tensors.compressors import BaseCompressor
  from compressed_tensors.compressors.format import infer_module_format
  from compressed_tensors.quantization import QuantizationConfig
  from safetensors.torch import load_file

  directory, _, format_, (fields, _, matrices) = written
  described = QuantizationConfig(**fields["quantization_config"])
  state = load_file(directory / hf.SINGLE)
  for module, matrix in matrices.items():
    if matrix is None:
      continue
    (scheme,) = [
      scheme
      for scheme in described.config_groups.values()
      if {"Linear", module} & set(scheme.targets)
    ]
    assert infer_module_format(torch.nn.Linear, scheme).value == described.format == format_
    compressor = BaseCompressor.get_value_from_registry(format_)
    local = {
      key.rpartition(".")[2]: value
      for key, value in state.items()
      if key.rpartition(".")[0] == module
    }
    assert (
      set(local)
      == {key for key in compressor.compression_param_names(scheme) if key in local}
      >= {"weight_scale"}
    )
    read = compressor.decompress(local, scheme)["weight"]
    np.testing.assert_array_equal(read.numpy(), matrix)


@pytest.mark.parametrize(
  "recipe,message",
  [
    (
      RECIPES["quest_w4a4"],
      "layers/0/attention/q: rotation = 'hadamard': the engine would have to rotate inputs",
    ),
    (
      recipe(QuantSpec(4, "midrise")),
      "weights.grid = 'midrise': its codes are odd numbers.*use 'symmetric'",
    ),
    (
      recipe(QuantSpec(4, "e2m1")),
      "weights.grid = 'e2m1': not supported .* keep the model with its save",
    ),
    (
      recipe(QuantSpec(4), QuantSpec(4, "unsigned", granularity="token")),
      "activations.grid = 'unsigned': not supported",
    ),
    (
      recipe(None, QuantSpec(8, granularity="token")),
      "weights = None: the layout quantizes inputs only together",
    ),
    (
      recipe(QuantSpec(8), QuantSpec(8, scale="mse", granularity="token")),
      "activations = 'symmetric, mse': the engine divides",
    ),
    (
      RECIPES["rtn_w4a4"],
      "activations = 'symmetric, absmax': the engine .* use the grid 'twos_complement' with",
    ),
    (
      recipe(QuantSpec(4), dataclasses.replace(edge(4), grid="symmetric")),
      "activations = 'symmetric, absmax_edge': the engine",
    ),
    (RECIPES["none"], "recipe = 'none': quantizes nothing; hf.save"),
    (
      Recipe((("head", None), (".*/q", LayerRecipe(QuantSpec(4))), *RECIPES["fp8"].rules[1:])),
      "pack-quantized, float-quantized",
    ),
  ],
)
def test_what_the_layout_cannot_say_is_refused(recipe, message, tmp_path):
  with pytest.raises(config.ConfigError, match=message):
    exported(recipe, tmp_path / "a")
  assert not (tmp_path / "a").exists()


def test_smoothed_inputs_are_refused():
  model, tokens = transformer.Transformer(MODEL), [{"tokens": np.arange(16).reshape(2, 8)}]
  q = ptq.quantize(model, fresh(model), RECIPES["rtn_w4a16"], "smoothquant", tokens)
  with pytest.raises(
    config.ConfigError, match=r"layers/attention/k/kernel = 'smoothed'.*a method without smoothing"
  ):
    export.check_exportable(q)
