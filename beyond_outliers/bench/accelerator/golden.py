"""Other implementations' results in float64, tests/golden/model_*.npz: logits, loss, gradients.

model_study_f64.npz is from the PyTorch model of arXiv 2509.23500, the other two are from
transformers' OLMo2 and Llama.
"""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers import config
from beyond_outliers.errors import DataError
from beyond_outliers.model import hf, loss, transformer
from beyond_outliers.ops import tensor_files
from beyond_outliers.types import Params

FOLDER = pathlib.Path(__file__).parents[3] / "tests" / "golden"
FLOAT32_TOLERANCE = 2e-5  # relative to an array's largest magnitude

# Our paths -> the study's names in PyTorch, where matrices are (out, in).
STUDY_NAMES = {
  ("attention", "q", "kernel"): "mhsa.lq.weight",
  ("attention", "k", "kernel"): "mhsa.lk.weight",
  ("attention", "v", "kernel"): "mhsa.lv.weight",
  ("attention", "o", "kernel"): "mhsa.lo.weight",
  ("attention", "scale"): "mhsa.scale",
  ("attention_norm", "gain"): "out_att_norm.weight",
  ("mlp", "up", "kernel"): "mlp.l1.weight",
  ("mlp", "down", "kernel"): "mlp.l2.weight",
  ("mlp_norm", "gain"): "out_mlp_norm.weight",
}


class Golden(NamedTuple):
  """One model with its recorded results."""

  numbers: Mapping[str, np.ndarray]  # "ids" [B, L], "logits", "loss", ...
  config: config.Model
  params: Params
  gradients: Params  # like the parameters


def read_arrays(name: str) -> dict[str, np.ndarray]:
  """The arrays of one file. Errors: DataError outside of a clone, which has the files."""
  path = FOLDER / f"model_{name}_f64.npz"
  if not path.exists():
    raise DataError(f"{path}: is missing; run the check in a clone, which has tests/golden")
  arrays = {}
  with zipfile.ZipFile(path) as archive:
    for member in archive.namelist():
      with archive.open(member) as file:
        arrays[member.removesuffix(".npy")] = np.lib.format.read_array(file)
  return arrays


def study(dtype: str) -> Golden:
  numbers = read_arrays("study")
  given = json.loads(str(numbers["config"]))
  c = config.Model(
    vocab=given["vocab"],
    blocks=given["blocks"],
    heads=given["heads"],
    kv_heads=given["heads"] // given["gqa_ratio"],
    d_head=given["d_head"],
    d_model=given["heads"] * given["d_head"],
    mlp_hidden=given["mlp_hidden"],
    mlp="relu2",
    norm_placement="post",
    norm_eps=float(np.finfo(np.float64).eps),
    qk_norm="l2",
    attention_scale="learned",
    rope_layout="interleaved",
    rope_base=float(given["rope_base"]),
    tied=True,
    init_std=0.02,
    dtype=dtype,
    attention="plain",
    unroll=1,
    remat="none",
  )
  params = jax.tree.map(lambda x: x.astype(dtype), study_tree(numbers, "p", c.blocks))
  return Golden(numbers, c, params, study_tree(numbers, "g", c.blocks))


def study_tree(numbers: Mapping[str, np.ndarray], kind: str, blocks: int) -> Params:
  """The study's parameters (kind p) or gradients (kind g) in our layout."""

  def layer(path: tuple[str, ...], name: str) -> np.ndarray:
    each = [numbers[f"{kind}/blocks.{i}.{name}"].astype(np.float64) for i in range(blocks)]
    return np.stack([x.T if path[-1] == "kernel" else x.reshape(-1) for x in each])

  layers: dict[str, Any] = {}
  for path, name in STUDY_NAMES.items():
    node = layers
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = layer(path, name)
  return {
    "embedding": numbers[f"{kind}/emb.weight"].astype(np.float64),
    "layers": layers,
    "final_norm": {"gain": numbers[f"{kind}/out_norm.weight"].astype(np.float64)},
  }


def hugging_face(family: str, dtype: str) -> Golden:
  """A Hugging Face model; gradients, named and laid out like parameters, go through its loader."""
  numbers, trees, model = read_arrays(f"hf_{family}"), {}, None
  for kind in ("p", "g"):
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      (folder / "config.json").write_text(str(numbers["config"]))
      tensors = {key[2:]: x for key, x in numbers.items() if key.startswith(kind + "/")}
      tensor_files.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
      model, trees[kind] = hf.load(folder, dtype=jnp.dtype(dtype))
  assert model
  return Golden(numbers, model.config, trees["p"], trees["g"])


GOLDEN_MODELS: dict[str, Callable[[str], Golden]] = {
  "study": study,
  "olmo2": functools.partial(hugging_face, "olmo2"),
  "llama": functools.partial(hugging_face, "llama"),
}


def compared(golden: Golden, c: config.Model) -> dict[str, tuple[Any, Any]]:
  """{name: (ours, theirs)}: logits, loss, and the gradient of every parameter, layer by layer. c:
  the golden model's configuration, except for settings that change no results."""
  model, numbers = transformer.Transformer(c), golden.numbers
  ids = numbers["ids"]

  def loss_fn(params: Params) -> tuple[jax.Array, jax.Array]:
    logits: Any = model.apply({"params": params}, ids)
    nll_T = loss.cross_entropy(logits[:, :-1].reshape(-1, c.vocab), ids[:, 1:].reshape(-1))
    return nll_T.mean(), logits

  (value, logits), ours = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(golden.params)
  assert jax.tree.structure(ours) == jax.tree.structure(golden.gradients)
  pairs = {"logits": (logits, numbers["logits"]), "loss": (value, numbers["loss"])}
  leaves = jax.tree.leaves(golden.gradients)
  for (path, actual), expected in zip(
    jax.tree_util.tree_leaves_with_path(ours), leaves, strict=True
  ):
    stacked = jax.tree_util.keystr(path[:1]) == "['layers']"
    for depth in range(c.blocks) if stacked else [...]:
      name = f"gradient of {jax.tree_util.keystr(path)}[{depth}]"
      pairs[name] = actual[depth], expected[depth]
  return pairs


def relative_error(actual: Any, expected: Any) -> float:
  """The largest difference over the largest expected magnitude; NaN if there is a NaN."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  return float(np.abs(actual - expected).max() / np.abs(expected).max())
