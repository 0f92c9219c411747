"""Sizes of models by the name behind the colon of --config. The study's run from 50m to 1.5b."""

from __future__ import annotations

from typing import Any

# Of the section `model`: what makes it larger. All else are switches of the architecture.
SHAPE = ("blocks", "heads", "kv_heads", "d_head", "d_model", "mlp_hidden")

SIZES = {
  # Below the study. nano is for trying things out: minutes on a laptop. The ladder is for scaling
  # laws on one machine.
  "nano": dict(blocks=2, heads=3, d_head=128, vocab=2048, context=256, batch_size=8, steps=260),
  "0.1m": dict(blocks=1, heads=3, d_head=16, vocab=2048, context=256, batch_size=16),
  "0.3m": dict(blocks=1, heads=3, d_head=32, vocab=2048, context=256, batch_size=16),
  "0.6m": dict(blocks=4, heads=3, d_head=32, vocab=2048, context=256, batch_size=16),
  "1m": dict(blocks=2, heads=6, d_head=32, vocab=2048, context=256, batch_size=16),
  "2m": dict(blocks=4, heads=6, d_head=32, vocab=2048, context=256, batch_size=32),
  # The study's. Blocks and heads of 50m are known; the paper does not give the others, these come
  # to the right totals.
  "50m": dict(blocks=4, heads=6, d_head=128, vocab=32000, context=1024, batch_size=512),
  "125m": dict(blocks=6, heads=9, d_head=128, vocab=32000, context=1024, batch_size=512),
  "350m": dict(blocks=12, heads=12, d_head=128, vocab=32000, context=1024, batch_size=512),
  "500m": dict(blocks=18, heads=12, d_head=128, vocab=32000, context=1024, batch_size=512),
  "760m": dict(blocks=18, heads=15, d_head=128, vocab=32000, context=1024, batch_size=512),
  "1.5b": dict(blocks=25, heads=18, d_head=128, vocab=32000, context=1024, batch_size=512),
}


def shape_of(model: Any) -> dict[str, Any]:
  """What decides how many parameters a section `model` has, and their shapes: with it what was
  tuned on a model is taken for another."""
  return {name: getattr(model, name) for name in ("vocab", *SHAPE, "mlp", "tied")}
