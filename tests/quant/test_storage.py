"""Quantized models as files: whatever is written is read back bit by bit, and takes the bytes that
its grid needs."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import ocdbt_utils
from small_models import STUDY

from beyond_outliers import checkpoint, config, quant
from beyond_outliers.config.sums import SUMS
from beyond_outliers.model import linears, transformer
from beyond_outliers.quant import (
  RECIPES,
  LayerRecipe,
  QuantSpec,
  Recipe,
  dot_general_for,
  packing,
  ptq,
  storage,
)

MODEL = dataclasses.replace(
  STUDY, d_head=32, d_model=128, mlp_hidden=160, tied=False, attention="plain"
)
GROUPS = Recipe(
  (
    ("head", LayerRecipe(QuantSpec(8))),
    (".*", LayerRecipe(QuantSpec(4, granularity="group", group=32))),
  )
)
# Layers of one stack that differ: in bits, in what shares a scale, in the type of their codes; and
# some that stay as they are.
MIXED = Recipe(
  (
    ("layers/0/mlp/.*", LayerRecipe(QuantSpec(8))),
    ("layers/.*/attention/[qk]", RECIPES["fp8"].default),
    ("layers/0/attention/v", LayerRecipe(QuantSpec(4, "e2m1", granularity="nv"))),
    ("layers/1/attention/v", None),
    ("head", None),
    (".*", LayerRecipe(QuantSpec(3, granularity="group", group=32))),
  )
)
EVERY = {
  **{
    name: recipe
    for name, recipe in RECIPES.items()
    if name not in ("none", "nvfp4") and not name.endswith("_g128")
  },
  "groups": GROUPS,
  "nvfp4": RECIPES["nvfp4"],
  "mixed": MIXED,
}
# In the fast tests.
FAMILIES = ("rtn_w4a4", "quest_w1.58a1.58", "lsq_w4a4", "mxfp4", "nvfp4", "mixed")
# Digits in a word of 64 bits.
DIGITS = {1: 64, 1.585: 40, 2: 32, 3: 21, 4: 16, 8: 8}


def fresh(recipe, seed=0):
  """(model, parameters whose sizes differ by orders of magnitude); some inputs of some layers, and
  one whole matrix, are zero."""
  model, draw = transformer.Transformer(MODEL, dot_general_for(recipe)), np.random.default_rng(seed)

  def numbers(leaf):
    spread = 10 ** draw.uniform(-3, 1, (*leaf.shape[:-1], 1)) if leaf.ndim > 2 else 1
    return jnp.asarray(
      spread * draw.normal(0.5 if leaf.ndim < 3 else 0, 0.1, leaf.shape), leaf.dtype
    )

  params = jax.tree.map(numbers, transformer.shapes(model))
  params["layers"]["mlp"]["up"]["kernel"] = (
    params["layers"]["mlp"]["up"]["kernel"].at[0].set(0).at[1, :48].set(0)
  )
  return model, params


def assert_same(actual, expected):
  """The same model and the same numbers, types included."""
  assert (actual.recipe, actual.method, actual.model.config) == (
    expected.recipe,
    expected.method,
    expected.model.config,
  )
  assert jax.tree.structure(actual.params) == jax.tree.structure(expected.params)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(actual.params),
    jax.tree.leaves(expected.params),
    strict=True,
  ):
    assert (a.dtype, a.shape) == (b.dtype, b.shape), path
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def logits(q):
  return jax.jit(lambda params: q.model.apply({"params": params}, np.arange(12).reshape(2, 6)))(
    q.params
  )


@pytest.mark.parametrize(
  "name",
  [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in EVERY],
)
def test_a_model_comes_back_bit_by_bit(name, tmp_path):
  q = ptq.quantize(*fresh(EVERY[name]), EVERY[name])
  q.save(tmp_path / "a")
  assert_same(quant.load(tmp_path / "a"), q)
  tensors, _ = storage.read_model(tmp_path / "a")
  file = tmp_path / "a" / storage.TENSORS
  header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
  assert (
    file.stat().st_size
    == header + sum(array.nbytes for array in tensors.values())
    == header + q.size_bytes
  )
  for path in (
    f"layers/{depth}/{linear}" for depth in range(2) for linear in linears.linear_paths(MODEL)
  ):
    spec = q.recipe.layer(path) and q.recipe.layer(path).weights
    width, outputs = q.params["layers"][path.split("/")[2]][path.split("/")[3]][
      "kernel"
    ].codes.shape[1:]
    if spec is not None:
      assert tensors[f"{path}/kernel/codes"].nbytes == 8 * -(-width * outputs // DIGITS[spec.bits])
    if spec is not None and spec.granularity in ("mx", "nv") and name != "mixed":
      scale = tensors[f"{path}/kernel/scale_" + {"mx": "e8m0", "nv": "e4m3"}[spec.granularity]]
      assert scale.nbytes == width * outputs // {"mx": 32, "nv": 16}[spec.granularity]


@pytest.mark.parametrize("name", ["quest_w4a4", "mixed"])
def test_logits_are_the_same_bits(name, tmp_path):
  q = ptq.quantize(*fresh(EVERY[name]), EVERY[name])
  q.save(tmp_path / "a")
  np.testing.assert_array_equal(logits(quant.load(tmp_path / "a")), logits(q))


@pytest.mark.parametrize("name", ["quest_w1.58a1.58", "nvfp4", "fp8"])
def test_orbax_holds_the_same(name, tmp_path):
  model, params = fresh(EVERY[name])
  params["embedding"] = params["embedding"].astype(jnp.bfloat16)
  q = ptq.quantize(model, params, EVERY[name])
  checkpoint.save_quantized(q, tmp_path / "a")
  assert_same(checkpoint.load_quantized(tmp_path / "a"), q)
  with pytest.raises(checkpoint.CheckpointError, match="not a quantized model"):
    checkpoint.load_quantized(tmp_path / "b")


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "digests alone"])
def test_orbax_s_copy_that_is_damaged_is_refused(tmp_path, sums):
  """A file of a copy; without sums, tensors that lie there as they should, and are another's."""
  for name, seed in (("a", 0), ("b", 1)):
    model = transformer.Transformer(MODEL, dot_general_for(GROUPS))
    params = transformer.init(model, seed)
    checkpoint.save_quantized(ptq.quantize(model, params, GROUPS), tmp_path / name)
  shutil.rmtree(tmp_path / "a" / "tensors")
  shutil.copytree(tmp_path / "b" / "tensors", tmp_path / "a" / "tensors")
  message = "does not match its SHA-256 sum" if sums else "embedding is not what was saved"
  if not sums:
    (tmp_path / "a" / SUMS).unlink()
  with pytest.raises(
    checkpoint.CheckpointError, match=f"/a is damaged: .*{message}.*copy it again"
  ):
    checkpoint.load_quantized(tmp_path / "a")


def test_smoothing_and_other_types_are_kept(tmp_path):
  model, params = fresh(RECIPES["rtn_w4a4"])
  params["embedding"] = params["embedding"].astype(jnp.bfloat16)
  batches = [{"tokens": np.arange(24).reshape(2, 12) % MODEL.vocab}]
  plain = model.clone(dot_general_for=None)
  q = ptq.quantize(plain, params, RECIPES["rtn_w4a4"], "smoothquant", batches)
  assert q.params["layers"]["mlp"]["up"]["kernel"].smooth is not None
  q.save(tmp_path / "a")
  assert_same(quant.load(tmp_path / "a"), q)


def test_parameters_come_back_however_they_lie_in_memory(tmp_path):
  model, params = fresh(RECIPES["rtn_w4a16"])
  params = jax.tree.map(lambda x: np.asfortranarray(np.asarray(x)), params)
  q = quant.QuantizedModel(model, params, RECIPES["rtn_w4a16"], "rtn")
  assert not params["embedding"].flags.c_contiguous
  q.save(tmp_path / "a")
  assert_same(quant.load(tmp_path / "a"), q)


@pytest.mark.parametrize("bits", DIGITS)
def test_digits_are_those_of_a_number_in_their_base(bits):
  """Against whole numbers of Python, a word at a time; four bits lie two a byte, the first
  below."""
  base, a_word = round(2**bits), DIGITS[bits]
  digits = np.random.default_rng(0).integers(0, base, (7, 23))
  digits[0] = base - 1
  expected = b""
  for start in range(0, digits.size, a_word):
    word = digits.reshape(-1)[start : start + a_word].tolist()
    expected += sum(digit * base**place for place, digit in enumerate(word)).to_bytes(8, "little")
  packed = packing.pack_digits(digits, bits)
  assert packed.dtype == np.uint8 and packed.tobytes() == expected
  np.testing.assert_array_equal(packing.unpack_digits(packed, bits, digits.shape), digits)
  if bits == 4:
    np.testing.assert_array_equal(packed[:80] & 15, digits.reshape(-1)[:160:2])
    np.testing.assert_array_equal(packed[:80] >> 4, digits.reshape(-1)[1:160:2])


def test_odd_codes_of_four_bits_lie_in_four_bits(tmp_path):
  """2k + 1 as k + 8: what QuEST trains is stored whole."""
  q = ptq.quantize(*fresh(RECIPES["quest_w4a4"]), RECIPES["quest_w4a4"])
  q.save(tmp_path / "a")
  stored = storage.read_model(tmp_path / "a")[0]["layers/1/mlp/down/kernel/codes"]
  codes = np.asarray(q.params["layers"]["mlp"]["down"]["kernel"].codes[1], np.int32)
  assert set(np.unique(codes)) == set(range(-15, 16, 2)) and stored.nbytes == codes.size // 2
  nibbles = np.stack([stored & 15, stored >> 4], -1).reshape(codes.shape).astype(np.int32)
  np.testing.assert_array_equal(2 * (nibbles - 8) + 1, codes)


def test_what_is_refused(tmp_path):
  q = ptq.quantize(*fresh(RECIPES["rtn_w4a16"]), RECIPES["rtn_w4a16"])
  q.save(tmp_path / "a")
  with pytest.raises(config.ConfigError, match="already holds a model"):
    q.save(tmp_path / "a")
  with pytest.raises(config.ConfigError, match=r"holds no model\.safetensors"):
    quant.load(tmp_path)
  tensors, description = storage.read_model(tmp_path / "a")
  path = "layers/0/mlp/up/kernel"
  for change, message in (
    ({"version": 2}, "version = 2: this program reads version 1"),
    (
      {"model": {"class": "os.path.join", "config": {}}},
      "model.class = 'os.path.join': not a model that can be stored; expected one of",
    ),
    (  # a module of this package that does something when it is imported
      {"model": {"class": "beyond_outliers.analysis.__main__.main", "config": {}}},
      "model.class = 'beyond_outliers.analysis.__main__.main': not a model",
    ),
    (
      {"model": {**description["model"], "config": {"vocab": 3}}},
      "description does not fit its tensors .TypeError",
    ),
    ({"recipe": [["head"]]}, "description does not fit its tensors .ValueError"),
    ({"recipe": [["head", {"w": 1}]]}, "description does not fit its tensors .TypeError"),
    ({"matrices": {path: [16, 10**9]}}, "codes of shape .* are .* bytes, not uint8"),
    ({"matrices": {path: [16, 16]}}, "codes of shape .* are .* bytes, not uint8"),
    ({"matrices": {path: "x"}}, "description does not fit its tensors"),
    ({"matrices": {path: None}}, "description does not fit its tensors"),
  ):
    with pytest.raises(config.ConfigError, match=message):
      storage.unpack_model(tensors, {**description, **change})
  del tensors["layers/1/mlp/up/kernel/codes"]
  with pytest.raises(config.ConfigError, match="layers/1/mlp/up/kernel/codes = None: missing"):
    storage.unpack_model(tensors, description)
  text = (tmp_path / "a" / storage.DESCRIPTION).read_text()
  assert json.loads(text) == json.loads(json.dumps(description))
  tensors_file = tmp_path / "a" / storage.TENSORS
  description_file = tmp_path / "a" / storage.DESCRIPTION
  tensors_file.write_bytes(tensors_file.read_bytes()[:-1])
  with pytest.raises(config.ConfigError, match=r"model.safetensors does not match its SHA-256 sum"):
    quant.load(tmp_path / "a")
  (tmp_path / "a" / SUMS).unlink()
  with pytest.raises(config.ConfigError, match=r"model.safetensors: .*; fetch the whole model"):
    quant.load(tmp_path / "a")
  description_file.write_text(text[:100])
  with pytest.raises(config.ConfigError, match=r"quantized.json: is not the JSON .*; fetch the"):
    quant.load(tmp_path / "a")
  with pytest.raises(config.ConfigError, match=r"quantized.json': File exists; choose another"):
    q.save(description_file)


def replaced(name, value):
  return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda tensors: {name: x for name, x in tensors.items() if name != "final_norm/gain"},
      'tensors do not fit the model .Could not find parameter named "gain" in scope "/final_norm"',
    ),
    (replaced("final_norm/gain", np.ones(15, np.float32)), "do not fit the model .*shape .15,"),
    (
      replaced("final_norm/gain", np.ones(128, np.int8)),
      "params: final_norm/gain = 'int8': expected an array of float64",
    ),
    (
      replaced("embedding", np.full((64, 128), np.inf, np.float32)),
      "params: embedding = 'not finite'",
    ),
    (
      replaced("layers/1/mlp/up/kernel/scale", np.full((1, 160), np.nan, np.float32)),
      "params: layers/1/mlp/up/kernel/scale = 'not finite'",
    ),
  ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(change, message):
  q = ptq.quantize(*fresh(RECIPES["rtn_w4a16"]), RECIPES["rtn_w4a16"])
  tensors, description = storage.pack_model(q)
  assert tensors["layers/1/mlp/up/kernel/scale"].shape == (1, 160)
  with pytest.raises(config.ConfigError, match=message):
    ptq.restored(change(tensors), description)


def test_a_folder_of_any_name_gives_back_the_model(tmp_path, monkeypatch):
  """Beside one that matches it as a pattern; or what was lost is told at once."""
  q = ptq.quantize(*fresh(RECIPES["rtn_w4a16"]), RECIPES["rtn_w4a16"])
  checkpoint.save_quantized(q, tmp_path / "1" / "q")
  checkpoint.save_quantized(q, tmp_path / "[1]" / "q")
  assert_same(checkpoint.load_quantized(tmp_path / "[1]" / "q"), q)
  q.save(tmp_path / "[1]" / "r")
  assert_same(quant.load(tmp_path / "[1]" / "r"), q)
  with pytest.raises(checkpoint.CheckpointError, match="already exists; remove it or choose"):
    checkpoint.save_quantized(q, tmp_path / "1")

  async def skip(*args, **kwargs):
    pass

  monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", skip)
  with pytest.raises(checkpoint.CheckpointError, match="/2: was saved, but cannot be read back"):
    checkpoint.save_quantized(q, tmp_path / "2")
  with pytest.raises(checkpoint.CheckpointError, match=r"/2 is damaged: .*; copy it again"):
    checkpoint.load_quantized(tmp_path / "2")


def header(text, data=bytes(16)):
  """A safetensors file's bytes."""
  return len(text).to_bytes(8, "little") + text.encode() + data


def matrix(start, stop, *shape, dtype="F32"):
  return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, stop]})


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "header too small"),
    ((2**62).to_bytes(8, "little") + b"{}", "header too large"),
    (header(f'{{"a": {matrix(0, 16, 4)}}}')[:-1], "file not fully covered"),
    (header(f'{{"a": {matrix(0, 4096, 32, 32)}}}'), "file not fully covered"),
    (header(f'{{"a": {matrix(0, 16, 3, 3)}}}'), "invalid shape, data type, or offset"),
    (header(f'{{"a": {matrix(0, 8, 2)}, "b": {matrix(4, 16, 3)}}}'), "invalid offset for"),
    (header(f'{{"a": {matrix(0, 4, 1)}, "b": {matrix(8, 16, 2)}}}'), "invalid offset for"),
    (header(f'{{"a": {matrix(-16, 0, 4)}}}'), "expected usize"),
    (header(f'{{"a": {matrix(0, 16, 2**62, 2**62)}}}'), "overflow computing buffer size"),
    (header(f'{{"a": {matrix(0, 16, 16, dtype="F8_E4M3")}}}'), "has no attribute 'float8"),
    (header(f'{{"a": {matrix(0, 16, 4)}, "a": {matrix(0, 16, 4)}}}'), "= 'a': appears twice in it"),
  ],
)
def test_a_tensor_file_whose_header_lies_is_refused(content, message, tmp_path):
  """By safetensors, but for the last; and a type that numpy lacks."""
  model = {"class": "", "config": {}}
  described = {"version": 1, "model": model, "method": "", "recipe": [], "matrices": {}}
  storage.write_model(tmp_path, {}, described)
  (tmp_path / SUMS).unlink()
  (tmp_path / storage.TENSORS).write_bytes(content)
  with pytest.raises(
    config.ConfigError, match=rf"model.safetensors[: ][^\n]*{message}.*; fetch the"
  ):
    storage.read_model(tmp_path)


def test_a_save_that_breaks_off_leaves_no_model(tmp_path, monkeypatch):
  model = {"class": "", "config": {}}
  described = {"version": 1, "model": model, "method": "", "recipe": [], "matrices": {}}
  monkeypatch.setattr(storage, "write_folder_sums", lambda *given: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    storage.write_model(tmp_path, {"a": np.ones(3)}, described)
  assert [path.name for path in tmp_path.iterdir()] == [storage.TENSORS]
  with pytest.raises(config.ConfigError, match=r"holds no quantized.json"):
    storage.read_model(tmp_path)
