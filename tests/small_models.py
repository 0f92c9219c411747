"""Small models of three architectures, untrained and trained, quantized, and tokens for them."""

import dataclasses
import functools

import jax
import numpy as np
import optax

from beyond_outliers import config, optim, quant
from beyond_outliers.model import loss, transformer
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


def text(seed, rows=3, length=16):
  """Tokens that can be learned: of a chain in which one successor has 80 %, and few tokens most of
  the rest."""
  draw = np.random.default_rng(seed)
  found = np.minimum(draw.zipf(1.5, (rows, length)) - 1, 63)
  for i in range(1, length):
    found[:, i] = np.where(draw.random(rows) < 0.8, (5 * found[:, i - 1] + 1) % 64, found[:, i])
  return {"tokens": found.astype(np.int32)}


TEXT = [text(1), text(2)]


@functools.cache
def trained(name, steps=30):
  """(model, its parameters after some steps of AdamW, the losses), in nats."""
  model = transformer.Transformer(MODELS[name])
  tx = optim.OPTIMIZERS["adamw"](0.02)
  tokens_SxBxL = np.stack([text(100 + step, 8, 32)["tokens"] for step in range(steps)])

  def step(carry, tokens_BxL):
    params, state = carry

    def mean_loss(params):
      logits = model.apply({"params": params}, tokens_BxL[:, :-1])
      return loss.cross_entropy(logits.reshape(-1, 64), tokens_BxL[:, 1:].reshape(-1)).mean()

    value, gradients = jax.value_and_grad(mean_loss)(params)
    updates, state = tx.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), value

  params = transformer.init(model, 0)
  start = params, tx.init(params)
  (params, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, tokens_SxBxL))(start)
  return model, params, np.asarray(losses)


def quantized_trained_model(name, recipe, method="rtn"):
  model, params, _ = trained(name)
  return model, params, ptq.quantize(model, params, quant.RECIPES[recipe], method, TEXT)
