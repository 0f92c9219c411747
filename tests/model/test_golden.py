"""The model against numbers of other implementations, in float64: logits, loss and the gradient of every parameter.

tests/golden/model_study_f64.npz comes from the PyTorch model of arXiv 2509.23500, the other two from transformers' OLMo2 and
Llama, all run in float64. Nothing can agree better than the files are exact: parameters (p/) and gradients (g/) are stored in
float32, which is 6e-8, and transformers computes norms and rotary angles in float32. The worst is off by this much of the
largest number of its array, one layer at a time: study 1.6e-7, Llama 2.9e-7, OLMo2 7.4e-7.
"""
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from beyond_outliers import config
from beyond_outliers.model import attention
from beyond_outliers.model import hf
from beyond_outliers.model import loss
from beyond_outliers.model import transformer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-6

# The study's names in PyTorch, where matrices are (out, in).
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


def golden(name):
  return dict(np.load(GOLDEN / f"model_{name}_f64.npz"))


def study_tree(numbers, kind, blocks):
  """The study's parameters (kind p) or gradients (kind g) in our layout."""
  def layer(path, name):
    each = [numbers[f"{kind}/blocks.{i}.{name}"].astype(np.float64) for i in range(blocks)]
    return np.stack([x.T if path[-1] == "kernel" else x.reshape(-1) for x in each])

  layers = {}
  for path, name in STUDY_NAMES.items():
    node = layers
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = layer(path, name)
  return {"embedding": numbers[f"{kind}/emb.weight"].astype(np.float64), "layers": layers,
          "final_norm": {"gain": numbers[f"{kind}/out_norm.weight"].astype(np.float64)}}


def study(tmp_path):
  del tmp_path
  numbers = golden("study")
  given = json.loads(str(numbers["config"]))
  c = config.Model(
    vocab=given["vocab"], blocks=given["blocks"], heads=given["heads"], kv_heads=given["heads"] // given["gqa_ratio"],
    d_head=given["d_head"], d_model=given["heads"] * given["d_head"], mlp_hidden=given["mlp_hidden"], mlp="relu2",
    norm_placement="post", norm_eps=float(np.finfo(np.float64).eps), qk_norm="l2", attention_scale="learned",
    rope_layout="interleaved", rope_base=float(given["rope_base"]), tied=True, init_std=0.02, dtype="float64",
    attention="plain", unroll=1, remat="none")
  return numbers, c, study_tree(numbers, "p", c.blocks), study_tree(numbers, "g", c.blocks)


def hugging_face(family):
  def case(tmp_path):
    """Gradients go through the loader too: they have the names and layouts of the parameters."""
    numbers = golden(f"hf_{family}")
    trees = {}
    for kind in ("p", "g"):
      directory = tmp_path / kind
      directory.mkdir()
      (directory / "config.json").write_text(str(numbers["config"]))
      tensors = {name[2:]: tensor for name, tensor in numbers.items() if name.startswith(kind + "/")}
      safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
      model, trees[kind] = hf.load(directory, dtype=jnp.float64)
    return numbers, model.config, trees["p"], trees["g"]

  return case


CASES = {"study": study, "olmo2": hugging_face("olmo2"), "llama": hugging_face("llama")}


def assert_near(actual, expected, name):
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.dtype == np.float64, name
  assert actual.shape == expected.shape, name
  error = np.abs(actual - expected).max() / np.abs(expected).max()
  assert error <= TOLERANCE, f"{name}: off by {error:.1e} of the largest number"


@pytest.mark.parametrize("unroll", [1, 0])
@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case, implementation, unroll, tmp_path):
  with jax.enable_x64(True):
    numbers, c, params, grads = CASES[case](tmp_path)
    model = transformer.Transformer(dataclasses.replace(c, attention=implementation, unroll=unroll))
    ids = numbers["ids"]

    def loss_fn(params):
      logits = model.apply({"params": params}, ids)
      return loss.cross_entropy(logits[:, :-1].reshape(-1, c.vocab), ids[:, 1:].reshape(-1)).mean(), logits

    (value, logits), ours = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)

    assert_near(logits, numbers["logits"], "logits")
    assert_near(value, numbers["loss"], "loss")
    assert jax.tree.structure(ours) == jax.tree.structure(grads)
    for (path, actual), expected in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(grads), strict=True):
      for depth in range(c.blocks) if path[0].key == "layers" else [...]:
        assert_near(actual[depth], expected[depth], f"gradient of {jax.tree_util.keystr(path)}[{depth}]")
