"""Small untrained models of three architectures, quantized, and tokens for them."""

import dataclasses

import numpy as np

from beyond_outliers import config, quant
from beyond_outliers.model import transformer
from beyond_outliers.quant import ptq

STUDY = config.Model(
  vocab=64,
  blocks=2,
  heads=4,
  kv_heads=2,
  d_head=8,
  d_model=32,
  mlp_hidden=64,
  mlp="relu2",
  norm_placement="post",
  norm_eps=1e-6,
  qk_norm="l2",
  attention_scale="learned",
  rope_layout="interleaved",
  rope_base=1024.0,
  tied=True,
  init_std=0.2,
  dtype="float32",
  attention="blockwise",
  unroll=1,
  remat="none",
)
OTHERS = {"mlp": "swiglu", "attention_scale": "rsqrt", "rope_layout": "half"}
MODELS = {
  "study": STUDY,
  "olmo2": dataclasses.replace(STUDY, qk_norm="rms", tied=False, **OTHERS),
  "llama": dataclasses.replace(STUDY, qk_norm="none", norm_placement="pre", **OTHERS),
}


def tokens(seed, rows=3, length=16):
  return {"tokens": np.random.default_rng(seed).integers(0, 64, (rows, length)).astype(np.int32)}


BATCHES = [tokens(1), tokens(2)]


def quantized_model(name, recipe, method="rtn", seed=0):
  model = transformer.Transformer(MODELS[name])
  params = transformer.init(model, seed)
  return model, params, ptq.quantize(model, params, quant.RECIPES[recipe], method, BATCHES)
