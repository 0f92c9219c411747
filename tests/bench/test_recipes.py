"""The table of what recipes cost: what is compared with what, which products are integer, and how
it is shown."""

import jax
import pytest

from beyond_outliers import hardware, quant
from beyond_outliers.bench import linear_layer, recipes

INTEGER, FLOAT, NARROW = "i8·i8→i32", "f32·f32→f32", "bf16·bf16→f32"


@pytest.mark.parametrize("backend", quant.BACKENDS)
@pytest.mark.parametrize(
  ("name", "dtype", "expected"),
  [
    ("rtn_w8a8", "float32", [INTEGER, FLOAT, FLOAT]),
    ("quest_w4a4", "bfloat16", [INTEGER, NARROW, NARROW]),
    ("quest_w8a8", "float32", [FLOAT] * 3),  # 256 odd codes are more than int8 holds
    ("int8_gradients", "bfloat16", [INTEGER] * 3),
  ],
)
def test_types_of_products_for_other_devices(name, dtype, expected, backend):
  layer = linear_layer.quantized_layer(recipes.LAYER_RECIPES[name], backend)
  types = linear_layer.product_types(layer, dtype)
  assert types == dict(zip(("forward", "dx", "dw"), expected, strict=True))


@pytest.mark.parametrize("backend", quant.BACKENDS)
def test_four_bits_take_at_most_half_as_much_memory_again(backend):
  """Forward and backward, on CPU, as it is scheduled and fused outside of tests."""
  scheduled = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_DEFAULT",
    "xla_cpu_use_fusion_emitters": True,
  }
  ours, base = (
    jax.jit(linear_layer.with_gradients(layer).apply, compiler_options=scheduled)
    .lower(layer.params, *linear_layer.operands("float32"))
    .compile()
    for layer in (
      linear_layer.quantized_layer(recipes.LAYER_RECIPES["quest_w4a4"], backend),
      linear_layer.plain_layer(),
    )
  )
  figures = recipes.memory(ours, base)
  assert figures["peak_bytes"] <= 1.5 * figures["plain_peak_bytes"]


def test_learned_scales_are_learned():
  """Their gradient is part of what is timed."""
  layer = linear_layer.quantized_layer(recipes.LAYER_RECIPES["lsq_w4a4"], "jax")
  shapes = jax.eval_shape(
    linear_layer.with_gradients(layer).apply, layer.params, *linear_layer.operands("float32")
  )
  assert [leaf.shape for leaf in jax.tree.leaves(shapes[1])] == [(2,)]


def test_what_slows_both_calls_changes_no_ratio(monkeypatch):
  """Everything took ten times as long in one of three pairs, and one call of another was disturbed
  alone."""
  seconds = iter([1, 2, 10, 20, 1, 50])
  monkeypatch.setattr(
    hardware, "seconds_of", lambda call, count: [call() or next(seconds) for _ in range(count)]
  )
  assert recipes.by_turns(lambda: 0, lambda: 0, 3) == {
    "plain_seconds": 1,
    "seconds": 20,
    "ratio": 2,
  }


MIB = 2**20
BOTH = {
  "plain_seconds": 0.2,
  "seconds": 0.25,
  "ratio": 1.24,
  "temporary_bytes": 30 * MIB,
  "plain_temporary_bytes": 20 * MIB,
  "peak_bytes": 90 * MIB,
  "plain_peak_bytes": 60 * MIB,
}


def test_the_table_shows_times_ratios_memory_and_products():
  layer = {
    "recipe": "rtn_w8a8",
    "backend": "aqt",
    "dtype": "float32",
    "forward": BOTH | {"seconds": 0.1, "ratio": 0.5},
    "both": BOTH,
    "products": {"forward": INTEGER, "dx": FLOAT, "dw": FLOAT},
  }
  model = {"model": "nano", "recipe": "quest_w4a4", "dtype": "float32", "tokens": 2048} | BOTH
  text = recipes.recipes_table(
    {"device": "cpu", "repeats": 1, "layers": [layer], "models": [model]}
  )
  lines = [" ".join(line.split()) for line in text.splitlines()]
  assert (
    f"rtn_w8a8 aqt float32 100.0 200.0 0.50 250.0 200.0 1.24 30.0 20.0 1.50 {INTEGER} {FLOAT} "
    f"{FLOAT}" in lines
  )
  assert "nano quest_w4a4 float32 2,048 250.0 200.0 1.24 30.0 20.0 1.50 1.50" in lines


def test_recipes_are_rows_of_the_table():
  models = [name for model in recipes.MODELS.values() for name in model.recipes]
  assert (
    set(models)
    <= set(recipes.DEFAULT)
    <= set(recipes.LAYER_RECIPES)
    == set(quant.RECIPES) - {"none"}
  )
