"""Hugging Face directories, read and written. test_golden.py compares with what transformers
computes."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from beyond_outliers import config, mesh, quant
from beyond_outliers.config.sums import SUMS
from beyond_outliers.model import hf, hf_config, hf_files, transformer
from beyond_outliers.params import subtree, with_leaves

TOKENS = np.arange(12).reshape(2, 6) * 5 % 32


def model_config(family="olmo2", **changes):
  values = {
    "vocab": 32,
    "blocks": 3,
    "heads": 4,
    "kv_heads": 2,
    "d_head": 6,
    "d_model": 16,
    "mlp_hidden": 24,
    "norm_eps": 1e-6,
    "rope_base": 500000.0,
    "tied": False,
    "init_std": 0.02,
    "dtype": "float32",
    "attention": "blockwise",
    "unroll": 1,
    "remat": "none",
    **hf_config.FAMILIES[family].switches,
    **changes,
  }
  return config.Model(**values)


def model_and_params(c, dtype=jnp.float32):
  """Every number differs from every other, gains included."""
  model = transformer.Transformer(c)
  shapes = nn.unbox(transformer.boxed_shapes(model))
  draw = np.random.default_rng(0)
  return model, jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(0.5, 0.2, leaf.shape), dtype), shapes
  )


def assert_same(actual, expected):
  """Bit by bit, types included."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    assert (a.dtype, a.shape) == (b.dtype, b.shape), path
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def tensor_of(directory, name):
  with safetensors.safe_open(directory / hf.SINGLE, framework="numpy") as file:
    return file.get_tensor(name)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A directory that nobody changes, and what is in it."""
  directory = tmp_path_factory.mktemp("hf") / "model"
  model, params = model_and_params(model_config())
  hf.save(model, params, directory)
  return directory, model, params


@pytest.fixture
def copy(written, tmp_path):
  """A copy to spoil, as of another program, which writes no sums: (directory, rewrite its config
  with changes, rewrite its tensors by a function)."""
  directory = tmp_path / "copy"
  shutil.copytree(written[0], directory, ignore=shutil.ignore_patterns(SUMS))

  def change_config(**changes):
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
      json.dumps({key: value for key, value in {**fields, **changes}.items() if value is not ...})
    )

  def change_tensors(fn):
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    tensors = {
      name: tensor.copy() for name, tensor in tensors.items()
    }  # not the mapped file that is written over
    safetensors.numpy.save_file(fn(tensors), directory / "model.safetensors")

  return directory, change_config, change_tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", hf_config.FAMILIES)
def test_saved_and_loaded_is_identical(family, tied, dtype, tmp_path):
  model, params = model_and_params(model_config(family, tied=tied, dtype=dtype), dtype)
  hf.save(model, params, tmp_path / "a")
  loaded, again = hf.load(tmp_path / "a", dtype=jnp.dtype(dtype))
  assert loaded.config == model.config
  assert_same(again, params)
  hf.save(loaded, again, tmp_path / "b")
  for name in ("config.json", "model.safetensors"):
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_float64_is_kept(tmp_path):
  with jax.enable_x64(True):
    model, params = model_and_params(model_config(dtype="float64"), jnp.float64)
    hf.save(model, params, tmp_path / "a")
    loaded, again = hf.load(tmp_path / "a", dtype=jnp.float64)
    assert loaded.config == model.config
    assert_same(again, params)
  with pytest.raises(ValueError, match=r"dtype = 'float64'.*jax_enable_x64"):
    hf.load(tmp_path / "a", dtype=jnp.float64)


def test_execution_settings_are_no_part_of_a_model(tmp_path):
  model, params = model_and_params(model_config(attention="plain", unroll=0, remat="full"))
  hf.save(model, params, tmp_path / "a")
  loaded, again = hf.load(tmp_path / "a")
  assert loaded.config == dataclasses.replace(
    model.config, attention="blockwise", unroll=1, remat="none"
  )
  np.testing.assert_allclose(
    loaded.apply({"params": again}, TOKENS), model.apply({"params": params}, TOKENS), atol=1e-5
  )


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_any_stored_type_becomes_the_asked_one(stored, written, copy):
  _, _, params = written
  directory, _, change_tensors = copy
  change_tensors(lambda tensors: {name: tensor.astype(stored) for name, tensor in tensors.items()})
  for dtype in (jnp.float32, jnp.bfloat16):
    model, loaded = hf.load(directory, dtype=dtype)
    assert model.config.dtype == jnp.dtype(dtype).name
    assert_same(
      loaded,
      jax.tree.map(lambda x, dtype=dtype: np.asarray(x).astype(stored).astype(dtype), params),
    )
    assert model.apply({"params": loaded}, TOKENS).dtype == jnp.float32


def test_several_files_with_an_index(written, tmp_path):
  _, model, params = written
  hf.save(model, params, tmp_path / "a", shard_bytes=8000)
  index = json.loads((tmp_path / "a" / hf.INDEX).read_text())
  files = sorted(set(index["weight_map"].values()))
  assert files == [
    f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
  ]
  assert len(files) > 2
  named = {path.name for path in (tmp_path / "a").iterdir()}
  assert named == {*files, hf.INDEX, "config.json", SUMS}
  sizes = []
  for file in files:
    tensors = safetensors.numpy.load_file(tmp_path / "a" / file)
    assert set(tensors) == {name for name, where in index["weight_map"].items() if where == file}
    sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
  assert max(sizes) <= 8000
  assert (
    sum(sizes) == index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
  )
  assert_same(hf.load(tmp_path / "a")[1], params)

  (tmp_path / "a" / files[1]).unlink()
  with pytest.raises(ValueError, match=f"{files[1]} is missing"):
    hf.load(tmp_path / "a")
  (tmp_path / "a" / SUMS).unlink()
  with pytest.raises(ValueError, match=f"holds no {files[1]}"):
    hf.load(tmp_path / "a")


def test_files_hold_the_layout_of_the_family(written):
  directory, model, params = written
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  c = model.config
  assert tensors["model.embed_tokens.weight"].shape == (c.vocab, c.d_model)
  assert tensors["lm_head.weight"].shape == (c.vocab, c.d_model)
  for depth in range(c.blocks):
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for ours, theirs in (
      (attention["k"]["kernel"], "self_attn.k_proj"),
      (mlp["down"]["kernel"], "mlp.down_proj"),
    ):
      np.testing.assert_array_equal(tensors[f"model.layers.{depth}.{theirs}.weight"], ours[depth].T)
    np.testing.assert_array_equal(
      tensors[f"model.layers.{depth}.post_feedforward_layernorm.weight"],
      params["layers"]["mlp_norm"]["gain"][depth],
    )
  with safetensors.safe_open(directory / "model.safetensors", framework="numpy") as file:
    assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file


def test_config_json_is_what_transformers_reads(tmp_path):
  model, params = model_and_params(model_config("llama", tied=True), jnp.bfloat16)
  hf.save(model, params, tmp_path / "a", context=128)
  fields = json.loads((tmp_path / "a" / "config.json").read_text())
  assert fields == {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 16,
    "head_dim": 6,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_theta": 500000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "torch_dtype": "bfloat16",
  }


@pytest.mark.parametrize(
  ("changes", "base"),
  [
    ({"rope_theta": 1000, "rope_parameters": ...}, 1000.0),
    ({"rope_theta": 1000, "rope_parameters": ..., "rope_scaling": None}, 1000.0),
    ({"rope_theta": 1000, "rope_parameters": ..., "rope_scaling": {"type": "default"}}, 1000.0),
    (
      {"rope_theta": ..., "rope_parameters": {"rope_theta": 2000.0, "rope_type": "default"}},
      2000.0,
    ),
    (
      {
        "rope_theta": ...,
        "rope_parameters": {"rope_theta": 2000, "partial_rotary_factor": 1.0, "factor": None},
      },
      2000.0,
    ),
    ({"rope_theta": ..., "rope_parameters": ...}, 10000.0),
  ],
)
def test_rotary_base_old_and_new(changes, base, copy):
  directory, change_config, _ = copy
  change_config(**changes)
  assert hf.load(directory)[0].config.rope_base == base


def test_absent_fields_mean_what_they_mean_to_transformers(tmp_path):
  model, params = model_and_params(model_config(kv_heads=4, d_head=4))
  hf.save(model, params, tmp_path / "a")
  fields = json.loads((tmp_path / "a" / "config.json").read_text())
  for name in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "initializer_range"):
    del fields[name]
  (tmp_path / "a" / "config.json").write_text(
    json.dumps({**fields, "head_dim": None, "use_cache": True})
  )
  (tmp_path / "a" / SUMS).unlink()
  loaded, again = hf.load(tmp_path / "a")
  assert loaded.config == model.config
  assert_same(again, params)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "gemma"}, "model_type = 'gemma': expected one of 'olmo2', 'llama'"),
    ({"model_type": ...}, "model_type = None"),
    ({"attention_bias": True}, "attention_bias = True: not supported"),
    ({"mlp_bias": True}, "mlp_bias = True: not supported"),
    ({"sliding_window": 4096}, "sliding_window = 4096: not supported"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu': not supported, only 'silu' is"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: not supported"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1: not supported"),
    ({"pretraining_tp": 2}, "pretraining_tp = 2: not supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: not supported"),
    (
      {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
      "rope_scaling.rope_type = 'llama3': not supported",
    ),
    (
      {"rope_scaling": {"type": "linear", "factor": 2.0}},
      "rope_scaling.type = 'linear': not supported",
    ),
    (
      {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
      "rope_parameters.rope_type = 'yarn': not supported",
    ),
    (
      {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
      "rope_parameters.partial_rotary_factor = 0.5",
    ),
    (
      {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
      "rope_parameters.full_attention = .*not supported",
    ),
    ({"rope_parameters": 10000.0}, "rope_parameters = 10000.0: expected dict"),
    ({"rope_theta": 7.0}, "rope_theta = 7.0, rope_parameters.rope_theta = 500000.0: they disagree"),
    ({"vocab_size": ...}, "vocab_size: missing"),
    ({"rms_norm_eps": ...}, "rms_norm_eps: missing"),
    ({"hidden_size": "16"}, "hidden_size = '16': expected int, got str"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1: expected bool"),
    ({"num_key_value_heads": 3}, "model.kv_heads = 3"),
    ({"model_type": ["llama"]}, r"config.json: model_type = \['llama'\]: expected one of"),
    ({"num_attention_heads": 0, "head_dim": ...}, "num_attention_heads = 0: expected 1 to"),
    ({"num_hidden_layers": -1}, "num_hidden_layers = -1: expected 1 to"),
    ({"num_hidden_layers": 10**9}, r"num_hidden_layers = 1000000000: the files hold 36 tensors"),
    ({"hidden_size": 10**30}, "hidden_size = 10{30}: expected 1 to"),
    ({"num_attention_heads": True}, "num_attention_heads = True: expected int, got bool"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: expected a finite number"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps = 10{400}: expected float, got int"),
    ({"rope_theta": "1e4"}, "rope_theta = '1e4': expected float, got str"),
    ({"max_position_embeddings": "4096"}, "max_position_embeddings = '4096': expected int"),
  ],
)
def test_config_that_the_model_cannot_do_is_refused_by_name(changes, message, copy):
  directory, change_config, _ = copy
  change_config(**changes)
  with pytest.raises(config.ConfigError, match=message):
    hf.load(directory)


def without(name):
  return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      without("model.layers.1.mlp.up_proj.weight"),
      r"tensors missing: model\.layers\.1\.mlp\.up_proj\.weight;",
    ),
    (without("lm_head.weight"), r"tensors missing: lm_head\.weight;"),
    (
      lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)},
      r"tensors not of this model: model\.layers\.0\.self_attn\.q_proj\.bias;",
    ),
    (
      lambda tensors: {**tensors, "model.norm.weight": np.zeros(15, np.float32)},
      r"model\.norm\.weight has shape \(15,\), config\.json makes it \(16,\)",
    ),
    (
      lambda tensors: {**tensors, "model.norm.weight": np.zeros(16, np.int8)},
      r"model\.norm\.weight is of type I8",
    ),
  ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message, copy):
  directory, _, change_tensors = copy
  change_tensors(change)
  with pytest.raises(ValueError, match=message):
    hf.load(directory)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_a_tied_model_may_come_with_its_head(stored, copy):
  """Fine-tuned Llama 3.2 and Granite are published so, and transformers loads them."""
  directory, change_config, change_tensors = copy
  change_config(tie_word_embeddings=True)
  with pytest.raises(
    config.ConfigError, match=r"lm_head.weight = 'not model.embed_tokens.weight'.*set it to false"
  ):
    hf.load(directory)
  change_tensors(
    lambda tensors: {
      **tensors,
      "model.embed_tokens.weight": tensors["lm_head.weight"].astype(stored).astype(np.float32),
      "lm_head.weight": tensors["lm_head.weight"].astype(stored),
    }
  )
  model, params = hf.load(directory)
  assert model.config.tied and "head" not in params
  np.testing.assert_array_equal(
    params["embedding"], tensor_of(directory, "lm_head.weight").astype(np.float32)
  )


@pytest.mark.parametrize("whose", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize(
  ("stored", "named"), [(ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.int8, "I8")]
)
def test_a_tied_head_of_a_type_that_numpy_has_not_is_refused_by_name(stored, named, whose, copy):
  directory, change_config, change_tensors = copy
  change_config(tie_word_embeddings=True)
  change_tensors(lambda tensors: {**tensors, whose: tensors[whose].astype(stored)})
  with pytest.raises(config.ConfigError, match=rf"{whose} is of type {named}, expected one of"):
    hf.load(directory)


def test_one_layer_more_in_the_files_is_refused(copy):
  directory, change_config, _ = copy
  change_config(num_hidden_layers=2)
  with pytest.raises(ValueError, match=r"not of this model: model\.layers\.2\..* and 7 more"):
    hf.load(directory)


def test_old_rotary_buffers_are_passed_over(written, copy):
  directory, _, change_tensors = copy
  change_tensors(
    lambda tensors: {
      **tensors,
      "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
    }
  )
  assert_same(hf.load(directory)[1], written[2])


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "config.json: is not the JSON that was written"),
    (b'{"model_type": "ol', "config.json: is not the JSON that was written"),
    (b"[" * 100_000, "config.json: is not the JSON that was written"),
    (b'{"a": "\xff"}', "config.json: is not the JSON that was written"),
    (b"[]", "config.json: is a JSON list, not an object"),
    (b"null", "config.json: is a JSON NoneType, not an object"),
  ],
)
def test_a_torn_config_is_refused_by_name(content, message, copy):
  directory, _, _ = copy
  (directory / "config.json").write_bytes(content)
  with pytest.raises(config.ConfigError, match=message):
    hf.load(directory)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'{"weight_map": {"model', "index.json: is not the JSON that was written"),
    (b"[]", "index.json: is a JSON list, not an object"),
    (b"{}", "index.json: weight_map = None: expected {tensor: file}"),
    (b'{"weight_map": {"a": 1}}', "weight_map: a = 1: expected the name of a file beside it"),
    (b'{"weight_map": {"a": "../x.safetensors"}}', "a = '../x.safetensors': expected the name"),
    (b'{"weight_map": {"a": "/etc/passwd"}}', "a = '/etc/passwd': expected the name"),
    (b'{"weight_map": {"a": "gone.safetensors"}}', "holds no gone.safetensors"),
    (
      b'{"weight_map": {"a": "one.safetensors"}}',
      "index.json puts a into one.safetensors, which lacks it",
    ),
    (
      b'{"weight_map": {"model.norm.weight": "one.safetensors", "a": "two.safetensors"}}',
      "model.norm.weight is in one.safetensors and in two.safetensors; keep one",
    ),
  ],
)
def test_an_index_that_lies_is_refused(content, message, copy):
  directory, _, _ = copy
  (directory / hf.SINGLE).rename(directory / "one.safetensors")
  norm = {"model.norm.weight": np.ones(16, np.float32), "a": np.ones(1, np.float32)}
  safetensors.numpy.save_file(norm, directory / "two.safetensors")
  (directory / hf.INDEX).write_bytes(content)
  with pytest.raises(config.ConfigError, match=message):
    hf.load(directory)


def header(**tensors):
  """A safetensors file's bytes: its header, and four numbers."""
  described = json.dumps(tensors).encode()
  return len(described).to_bytes(8, "little") + described + bytes(16)


def matrix(*offsets, shape=(2, 2)):
  return {"dtype": "F32", "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
  "content",
  [
    b"",
    bytes(8),
    (2**62).to_bytes(8, "little") + b"{}",
    header(a=matrix(0, 16))[:-1],
    header(a=matrix(0, 16)) + b"more",
    header(a=matrix(0, 4096, shape=(32, 32))),
    header(a=matrix(0, 16, shape=(3, 3))),
    header(a=matrix(0, 16), b=matrix(0, 16)),
    header(a=matrix(16, 0)),
    header(a={"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}),
    header(a=matrix(0, 16, shape=(2**62, 2**62))),
  ],
)
def test_a_tensor_file_whose_header_lies_is_refused(content, copy):
  directory, _, _ = copy
  (directory / hf.SINGLE).write_bytes(content)
  with pytest.raises(config.ConfigError, match=r"model.safetensors is not a whole safetensors"):
    hf.load(directory)


def test_a_name_that_stands_twice_in_a_header_is_refused(copy):
  """Which of the two a reader takes is the reader's choice."""
  directory, _, _ = copy
  described = b'{"a": %s, "a": %s, "b": %s}' % tuple(
    json.dumps(matrix(*offsets, shape=(2,))).encode() for offsets in ((0, 8), (8, 16), (0, 8))
  )
  content = len(described).to_bytes(8, "little") + described + bytes(16)
  (directory / hf.SINGLE).write_bytes(content)
  with pytest.raises(config.ConfigError, match=r"a appears twice in model.safetensors; fetch it"):
    hf.load(directory)


def test_names_of_a_model_that_was_saved_without_its_head(written, copy):
  """Of a tied one nothing is missing; transformers puts the prefix before them."""
  directory, change_config, change_tensors = copy
  change_tensors(
    lambda tensors: {
      name.removeprefix("model."): tensor
      for name, tensor in tensors.items()
      if name != "lm_head.weight"
    }
  )
  with pytest.raises(ValueError, match=r"tensors missing: lm_head\.weight;"):
    hf.load(directory)
  change_config(tie_word_embeddings=True)
  _, params = hf.load(directory)
  assert_same(params, {name: leaf for name, leaf in written[2].items() if name != "head"})


def test_missing_and_broken_files_are_refused(copy):
  directory, _, _ = copy
  file = directory / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
    hf.load(directory)
  file.unlink()
  with pytest.raises(ValueError, match=r"holds no model.safetensors"):
    hf.load(directory)
  (directory / "config.json").unlink()
  with pytest.raises(ValueError, match=r"holds no config.json"):
    hf.load(directory)


def test_an_architecture_without_a_family_is_not_written(tmp_path):
  c = model_config(mlp="relu2", qk_norm="l2", attention_scale="learned", rope_layout="interleaved")
  model, params = model_and_params(c)
  with pytest.raises(
    ValueError,
    match=r"olmo2 needs model.mlp = 'swiglu' \(here 'relu2'\), model.attention_scale = 'rsqrt' "
    r"\(here 'learned'\), .*model.qk_norm = 'rms' \(here 'l2'\); llama needs ",
  ):
    hf.save(model, params, tmp_path / "a")
  model, params = model_and_params(model_config(d_model=18))
  with pytest.raises(
    ValueError, match=r"model.d_model = 18: transformers requires a multiple of model.heads"
  ):
    hf.save(model, params, tmp_path / "a")
  assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", [">f4", ml_dtypes.float8_e4m3fn, np.int8])
def test_types_that_no_such_directory_has_are_not_written(dtype, written, tmp_path):
  """It could not be read again."""
  _, model, params = written
  bad = {**params, "embedding": np.asarray(params["embedding"]).astype(dtype)}
  with pytest.raises(config.ConfigError, match=r"^params: embedding = '.*': expected an array of"):
    hf.save(model, bad, tmp_path / "a")
  assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("path", ["embedding", "layers/attention/q/kernel"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_written(bad, path, written, tmp_path):
  _, model, params = written
  leaf = subtree(params, path).at[(1,) * subtree(params, path).ndim].set(bad)
  with pytest.raises(config.ConfigError, match=f"^params: {path} = 'not finite': NaN or infinity"):
    hf.save(model, with_leaves(params, {path: leaf}), tmp_path / "a")
  assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("stored", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e300])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_is_refused_by_name(name, bad, stored, copy):
  """Also what becomes so in the type that it is asked in."""
  directory, _, change_tensors = copy

  def change(tensors):
    with np.errstate(over="ignore"):
      values = tensors[name].astype(np.float64)
      values[-1] = bad
      return {**tensors, name: values.astype(stored)}

  change_tensors(change)
  message = rf"{name} = 'not finite': NaN, or beyond float32; choose another checkpoint"
  with pytest.raises(config.ConfigError, match=message):
    hf.load(directory)


def test_parameters_of_another_model_are_not_written(written, tmp_path):
  _, model, params = written
  with pytest.raises(
    ValueError, match=r"params: head/kernel = 'absent': model.config makes it \(16, 32\)"
  ):
    hf.save(model, {key: value for key, value in params.items() if key != "head"}, tmp_path / "a")
  other = transformer.Transformer(dataclasses.replace(model.config, blocks=2))
  with pytest.raises(
    ValueError, match=r"params: layers/attention/k/kernel = '\(3, 16, 12\)': .* \(2, 16, 12\)"
  ):
    hf.save(other, params, tmp_path / "a")


def test_an_adapter_beside_the_weights_is_refused(copy):
  """Without it the model is another one; also where the weights are elsewhere."""
  directory, _, _ = copy
  (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
  for _ in range(2):
    for read in (hf.load, hf.longest_window):
      with pytest.raises(
        config.ConfigError, match=r"holds adapter_config.json.*merge it into them"
      ):
        read(directory)
    (directory / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("recipe", ["quest_w4a4", "lsq_w4a4"])
def test_a_model_trained_quantized_is_written_only_on_request(recipe, tmp_path):
  """Its float weights compute another loss than it does."""
  plain = transformer.Transformer(model_config())
  model = plain.clone(dot_general_for=quant.dot_general_for(quant.RECIPES[recipe]))
  params = transformer.init(model, 0)
  with pytest.raises(config.ConfigError, match=r"model = 'quantized at .*: .*dot_general_for=None"):
    hf.save(model, params, tmp_path / "a")
  hf.save(model.clone(dot_general_for=None), params, tmp_path / "a")
  unquantized = plain.clone(dot_general_for=quant.dot_general_for(quant.RECIPES["none"]))
  weights = transformer.without_dot_general_params(plain.config, params)
  hf.save(unquantized, weights, tmp_path / "b")
  for directory in ("a", "b"):
    assert_same(hf.load(tmp_path / directory)[1], weights)


# What generating with a model needs, and what a source says that nobody here reads.
SOURCE = {
  "bos_token_id": 1,
  "eos_token_id": [7, 9],
  "pad_token_id": 3,
  "max_position_embeddings": 4096,
  "use_cache": True,
  "transformers_version": "4.46.0",
  "dtype": "bfloat16",
  "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
}
BESIDE = {
  "generation_config.json": json.dumps({"eos_token_id": [7, 9], "temperature": 0.6}),
  "tokenizer.json": '{"model": {}}',
  "tokenizer_config.json": '{"add_bos_token": true}',
  "chat_template.jinja": "{{ messages }}",
}


@pytest.fixture
def source(copy):
  """A directory with SOURCE in its config.json and the files of BESIDE, and files not to copy."""
  directory, change_config, _ = copy
  change_config(**SOURCE)
  for name, content in {**BESIDE, "modeling.py": "import os", "optimizer.pkl": "x"}.items():
    (directory / name).write_text(content)
  return directory


def test_a_copy_generates_as_its_source(source, tmp_path):
  model, params = hf.load(source)
  hf.save(model, params, tmp_path / "b")
  fields = json.loads((tmp_path / "b" / "config.json").read_text())
  kept = {name: value for name, value in SOURCE.items() if name not in ("dtype", "auto_map")}
  assert fields.items() >= kept.items()
  assert fields["torch_dtype"] == "float32" and not fields.keys() & {"dtype", "auto_map"}
  found = {path.name for path in (tmp_path / "b").iterdir()}
  assert found == {"config.json", "model.safetensors", *BESIDE, SUMS}
  for name, content in BESIDE.items():
    assert (tmp_path / "b" / name).read_text() == content
  assert_same(hf.load(tmp_path / "b")[1], params)


def test_tokens_that_a_source_leaves_out_stay_out(source, tmp_path):
  """Then transformers' defaults apply, which null would override."""
  fields = json.loads((source / "config.json").read_text())
  left = {name: value for name, value in fields.items() if name not in hf_config.TOKENS}
  (source / "config.json").write_text(json.dumps(left))
  model, params = hf.load(source)
  hf.save(model, params, tmp_path / "b")
  assert not set(hf_config.TOKENS) & json.loads((tmp_path / "b" / "config.json").read_text()).keys()
  hf.save(model, params, tmp_path / "c", eos_token_id=5)
  fields = json.loads((tmp_path / "c" / "config.json").read_text())
  assert fields["eos_token_id"] == 5 and "bos_token_id" not in fields


def test_what_is_given_goes_before_the_source(source, tmp_path):
  model, params = hf.load(source)
  hf.save(model, params, tmp_path / "b", context=64, eos_token_id=5)
  fields = json.loads((tmp_path / "b" / "config.json").read_text())
  assert (fields["eos_token_id"], fields["bos_token_id"]) == (5, 1)
  assert fields["max_position_embeddings"] == hf.longest_window(tmp_path / "b") == 64
  generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
  assert generation == {"eos_token_id": 5, "temperature": 0.6}


def test_a_model_without_origin_takes_what_a_directory_holds(source, written, tmp_path):
  _, model, params = written
  hf.save(model, params, tmp_path / "b", like=source)
  fields = json.loads((tmp_path / "b" / "config.json").read_text())
  assert fields["eos_token_id"] == [7, 9] and (tmp_path / "b" / "tokenizer.json").exists()
  other, params = model_and_params(model_config("llama"))
  with pytest.raises(config.ConfigError, match=r"like: model_type = 'olmo2': the model is 'llama'"):
    hf.save(other, params, tmp_path / "c", like=source)
  assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"vocab_size": 128256}, "vocab_size = 128256: the model has 32; give the directory of such a"),
    ({"vocab_size": ...}, "vocab_size = None: the model has 32"),
    ({"hidden_size": 32}, "hidden_size = 32: the model has 16"),
    ({"head_dim": ...}, "head_dim = 4: the model has 6"),
    ({"intermediate_size": 8}, "intermediate_size = 8: the model has 24"),
    ({"num_key_value_heads": 4}, "num_key_value_heads = 4: the model has 2"),
    ({"model_type": ...}, "model_type = None: the model is 'olmo2'"),
    ({"mlp_bias": True}, "mlp_bias = True: not supported, only False is"),
    ({"sliding_window": 4096}, "sliding_window = 4096: not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: not supported"),
    ({"pretraining_tp": 2}, "pretraining_tp = 2: not supported"),
    ({"bos_token_id": 32}, "bos_token_id = 32: expected ids of tokens, 0 to 31; correct it there"),
    ({"pad_token_id": -1}, "pad_token_id = -1: expected ids of tokens"),
  ],
)
def test_nothing_is_kept_of_another_model(changes, message, source, copy, written, tmp_path):
  """Its tokens would end this one's texts, and what `load` refuses could not be read again."""
  _, model, params = written
  copy[1](**changes)
  with pytest.raises(config.ConfigError, match=f"^like: {message}"):
    hf.save(model, params, tmp_path / "b", like=source)
  assert not (tmp_path / "b").exists()


def test_tokens_and_positions_of_a_source_are_checked_unless_others_are_given(
  source, copy, written, tmp_path
):
  _, model, params = written
  copy[1](eos_token_id=128001, max_position_embeddings="4096")
  with pytest.raises(config.ConfigError, match="max_position_embeddings = '4096': expected int"):
    hf.save(model, params, tmp_path / "b", like=source)
  with pytest.raises(config.ConfigError, match="like: eos_token_id = 128001: expected ids"):
    hf.save(model, params, tmp_path / "b", like=source, context=64)
  (source / "generation_config.json").write_text('{"eos_token_id": [7, 128009]}')
  copy[1](eos_token_id=7)
  with pytest.raises(
    config.ConfigError, match=r"like: generation_config.json: eos_token_id = \[7, 128009\]: exp"
  ):
    hf.save(model, params, tmp_path / "b", like=source, context=64)
  assert not (tmp_path / "b").exists()
  copy[1](eos_token_id=128001)
  hf.save(model, params, tmp_path / "b", like=source, context=64, eos_token_id=5)
  assert_same(hf.load(tmp_path / "b")[1], params)


def test_a_model_that_lost_blocks_is_still_that_of_its_source(source, tmp_path):
  model, params = hf.load(source)
  params = {**params, "layers": jax.tree.map(lambda x: x[:2], params["layers"])}
  fewer = model.clone(config=dataclasses.replace(model.config, blocks=2))
  hf.save(fewer, params, tmp_path / "b")
  assert_same(hf.load(tmp_path / "b")[1], params)


def test_a_source_that_is_gone_is_named(source, tmp_path):
  model, params = hf.load(source)
  shutil.rmtree(source)
  with pytest.raises(config.ConfigError, match=r"like = '.*copy': holds no config.json; give the"):
    hf.save(model, params, tmp_path / "b")
  hf.save(model.clone(origin=None), params, tmp_path / "b")


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"context": 0}, "max_position_embeddings = 0: expected 1 to"),
    ({"context": 1.5}, "max_position_embeddings = 1.5: expected int"),
    ({"eos_token_id": 32}, "eos_token_id = 32: expected ids of tokens, 0 to 31"),
    ({"eos_token_id": [7, -1]}, "eos_token_id = .*: expected ids of tokens"),
    ({"bos_token_id": True}, "bos_token_id = True: expected ids of tokens"),
  ],
)
def test_what_no_such_model_can_have_is_not_written(given, message, written, tmp_path):
  _, model, params = written
  with pytest.raises(config.ConfigError, match=message):
    hf.save(model, params, tmp_path / "a", **given)
  assert not (tmp_path / "a").exists()


def test_a_save_that_breaks_off_leaves_no_model(written, tmp_path, monkeypatch):
  _, model, params = written
  monkeypatch.setattr(hf, "tensor", lambda leaf, entry: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    hf.save(model, params, tmp_path / "a")
  assert not (tmp_path / "a" / "config.json").exists()
  with pytest.raises(ValueError, match=r"holds no config\.json"):
    hf.load(tmp_path / "a")
  (tmp_path / "file").write_text("")
  with pytest.raises(config.ConfigError, match=r"directory = '.*file': File exists; choose"):
    hf.save(model, params, tmp_path / "file")


def test_nothing_is_overwritten(written):
  directory, model, params = written
  with pytest.raises(ValueError, match=r"already holds config.json, model.safetensors"):
    hf.save(model, params, directory)


@pytest.mark.parametrize("name", hf_files.COMPANIONS)
def test_nothing_is_written_beside_what_another_model_left(name, written, tmp_path):
  """It would count as this one's: the tokens of generation_config.json go before config.json's."""
  _, model, params = written
  (tmp_path / name).write_text("{}")
  (tmp_path / "README.md").write_text("what is no part of a model stays")
  with pytest.raises(config.ConfigError, match=f"already holds {name}; remove them or choose"):
    hf.save(model, params, tmp_path, eos_token_id=3)
  assert {path.name for path in tmp_path.iterdir()} == {name, "README.md"}
  (tmp_path / name).unlink()
  hf.save(model, params, tmp_path, eos_token_id=3)


@pytest.mark.parametrize("tied", [False, True])
def test_placed_on_a_mesh(tied, tmp_path):
  model, params = model_and_params(model_config(tied=tied))
  hf.save(model, params, tmp_path / "a", shard_bytes=8000)
  devices = mesh.make_mesh(config.Mesh(data=2, fsdp=2, model=2))
  loaded, placed = hf.load(tmp_path / "a", mesh=devices)
  assert_same(placed, params)
  expected = mesh.shardings(transformer.boxed_shapes(model), devices)
  for (path, x), sharding in zip(
    jax.tree_util.tree_leaves_with_path(placed), jax.tree.leaves(expected), strict=True
  ):
    assert x.sharding == sharding, path
  kernel = placed["layers"]["attention"]["q"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 8, 12)
  with mesh.use(devices):
    logits = jax.jit(loaded.apply)({"params": placed}, TOKENS)
  np.testing.assert_allclose(logits, model.apply({"params": params}, TOKENS), atol=1e-5)
  hf.save(loaded, placed, tmp_path / "b")
  assert_same(hf.load(tmp_path / "b")[1], params)


def test_widths_that_the_mesh_does_not_divide_are_refused(written):
  with pytest.raises(config.ConfigError, match="cannot be split"):
    hf.load(
      written[0], mesh=mesh.make_mesh(config.Mesh(data=1, fsdp=1, model=-1), jax.devices()[:5])
    )
