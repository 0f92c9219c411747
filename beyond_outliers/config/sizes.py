"""Sizes of models, by the name after the colon of --config. The study's are 50m to 1.5b."""

from __future__ import annotations

from typing import Any

# Keys of the section `model` that make it larger; the others are switches of the architecture.
SHAPE = ("blocks", "heads", "kv_heads", "d_head", "d_model", "mlp_hidden")

SIZES = {
  # Smaller than the study's. nano is for trying things out, in minutes on a laptop; the others are
  # for scaling laws on one machine.
  "nano": dict(blocks=2, heads=3, d_head=128, vocab=2048, context=256, batch_size=8, steps=260),
  "0.1m": dict(blocks=1, heads=3, d_head=16, vocab=2048, context=256, batch_size=16),
  "0.3m": dict(blocks=1, heads=3, d_head=32, vocab=2048, context=256, batch_size=16),
  "0.6m": dict(blocks=4, heads=3, d_head=32, vocab=2048, context=256, batch_size=16),
  "1m": dict(blocks=2, heads=6, d_head=32, vocab=2048, context=256, batch_size=16),
  "2m": dict(blocks=4, heads=6, d_head=32, vocab=2048, context=256, batch_size=32),
  # The study's. The paper gives blocks and heads of 50m only; the others were chosen to match its
  # totals.
  "50m": dict(blocks=4, heads=6, d_head=128, vocab=32000, context=1024, batch_size=512),
  "125m": dict(blocks=6, heads=9, d_head=128, vocab=32000, context=1024, batch_size=512),
  "350m": dict(blocks=12, heads=12, d_head=128, vocab=32000, context=1024, batch_size=512),
  "500m": dict(blocks=18, heads=12, d_head=128, vocab=32000, context=1024, batch_size=512),
  "760m": dict(blocks=18, heads=15, d_head=128, vocab=32000, context=1024, batch_size=512),
  "1.5b": dict(blocks=25, heads=18, d_head=128, vocab=32000, context=1024, batch_size=512),
}


def shape_of(model: Any) -> dict[str, Any]:
  """The keys of a section `model` that decide the number of parameters and their shapes: if they
  agree, what was tuned on one model is used for another."""
  return {name: getattr(model, name) for name in ("vocab", *SHAPE, "mlp", "tied")}
