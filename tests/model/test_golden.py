"""The model against numbers of other implementations, in float64: logits, loss and the gradient of
every parameter.

tests/golden/model_study_f64.npz comes from the PyTorch model of arXiv 2509.23500, the other two
from transformers' OLMo2 and Llama, all run in float64. Agreement is limited by the files'
precision: parameters (p/) and gradients (g/) are stored in float32, which is 6e-8, and transformers
computes norms and rotary angles in float32. The worst errors, relative to the largest number of an
array, one layer at a time: study 3.4e-7, Llama 2.9e-7, OLMo2 7.4e-7.
"""

import dataclasses

import jax
import pytest

from beyond_outliers.bench.accelerator import golden
from beyond_outliers.model import attention

# (model.attention, dtype, tolerance). jax.nn's attention has no float64.
PRECISIONS = [
  ("plain", "float64", 1e-6),
  ("blockwise", "float64", 1e-6),
  ("fused", "float32", 2e-5),
]


def assert_near(actual, expected, dtype, tolerance, name):
  assert (actual.dtype, actual.shape) == (dtype, expected.shape), name
  error = golden.relative_error(actual, expected)
  assert error <= tolerance, f"{name}: off by {error:.1e} of the largest number"


def test_every_attention_is_tried():
  assert {name for name, _, _ in PRECISIONS} == attention.IMPLEMENTATIONS.keys()


@pytest.mark.parametrize("unroll", [1, 0])
@pytest.mark.parametrize(("implementation", "dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", golden.GOLDEN_MODELS)
def test_logits_loss_and_gradients(case, implementation, dtype, tolerance, unroll, monkeypatch):
  monkeypatch.setattr(attention, "MIN_BLOCK", 8)  # several blocks, the last one shorter
  with jax.enable_x64(dtype == "float64"):
    model = golden.GOLDEN_MODELS[case](dtype)
    c = dataclasses.replace(model.config, attention=implementation, unroll=unroll)
    for name, (actual, expected) in golden.compared(model, c).items():
      assert_near(actual, expected, dtype, tolerance, name)
