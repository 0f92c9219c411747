"""Growth of error along the network, and its sensitivity to one part at a time."""

import numpy as np
import pandas as pd
import pytest
from small_models import BATCHES, quantized_model

from beyond_outliers.analysis import propagation
from beyond_outliers.errors import ConfigError
from beyond_outliers.quant.ptq import quantize
from beyond_outliers.quant.recipes import Recipe


def test_error_grows_by_what_the_blocks_add_times_the_gains_behind_them():
  rows = pd.DataFrame(
    {
      "name": ["layers/0/mlp_add", "layers/0", "layers/1", "final_norm", "head"],
      "kind": ["add", "block", "block", "norm", "linear"],
      "R": [0.1, 0.1, 0.25, 0.5, 0.6],
      "gain": [1.0, np.nan, 2.0, 2.0, 1.0],
      "B": [0.0, 0.12, 0.04, 0.0, 0.1],
      "C": [0.0, -0.02, 0.01, 0.0, 0.0],
    }
  )
  found = propagation.cumulative(rows)
  assert list(found["name"]) == ["layers/0", "layers/1", "final_norm", "head"]
  np.testing.assert_allclose(found["product"], [1, 2, 4, 4])
  np.testing.assert_allclose(found["added"], [0.1, 0.05, 0, 0.1])
  np.testing.assert_allclose(found["share"], np.array([0.4, 0.1, 0, 0.1]) / 0.6)
  with pytest.raises(ConfigError, match="modules=None"):
    propagation.cumulative(rows[:2])
  broken = rows.assign(**{name: np.nan for name in ("R", "gain", "B", "C")})
  assert propagation.cumulative(broken)[["product", "share"]].iloc[1:].isna().all(axis=None)


@pytest.mark.slow
def test_sensitivity_to_parts():
  model, params, q = quantized_model("olmo2", "rtn_w4a4", "smoothquant")
  table = propagation.decompose(model, params, q, BATCHES)
  np.testing.assert_allclose(propagation.cumulative(table)["share"].sum(), 1, rtol=1e-5)

  blocks = propagation.sensitivity(model, params, q, BATCHES, by="block").set_index("name")
  whole = propagation.final_error(model, params, q, BATCHES)
  columns = ["R_alone", "R_alone_se"]
  np.testing.assert_allclose(blocks.loc["all", columns], whole, rtol=1e-4)
  assert blocks.loc["all", "R_without"] == blocks.loc["all", "cost_without"] == 0
  # Of two blocks, either one alone is all but the other.
  np.testing.assert_array_equal(
    blocks.loc["layers/0", ["R_alone", "cost_alone"]],
    blocks.loc["layers/1", ["R_without", "cost_without"]],
  )
  first = table.set_index("name").loc["layers/0", "R"]
  assert 0 < blocks.loc["layers/1", "R_alone"] < first < blocks.loc["all", "R_alone"]

  operands = propagation.sensitivity(model, params, q, BATCHES, by="operand").set_index("name")
  np.testing.assert_array_equal(
    operands.loc["weights", ["R_alone", "cost_alone"]],
    operands.loc["activations", ["R_without", "cost_without"]],
  )
  with pytest.raises(ConfigError, match="'module', 'kind', 'block', 'operand'"):
    propagation.sensitivity(model, params, q, BATCHES, by="layer")


@pytest.mark.slow
def test_a_part_alone_is_the_model_that_is_quantized_so():
  """With weights alone, or one kind of layer alone, against a model quantized by such a recipe."""
  model, params, q = quantized_model("study", "rtn_w4a4")
  _, _, weights = quantized_model("study", "rtn_w4a16")
  operands = propagation.sensitivity(model, params, q, BATCHES, by="operand").set_index("name")
  expected, _ = propagation.final_error(model, params, weights, BATCHES)
  np.testing.assert_allclose(operands.loc["weights", "R_alone"], expected, rtol=1e-5)

  kinds = propagation.sensitivity(model, params, q, BATCHES, by="kind").set_index("name")
  only = Recipe(((r".*/mlp/up", q.recipe.layer("layers/0/mlp/up")), (".*", None)))
  alone = quantize(model, params, only)
  expected, _ = propagation.final_error(model, params, alone, BATCHES)
  np.testing.assert_allclose(kinds.loc["mlp/up", "R_alone"], expected, rtol=1e-5)
