"""Contender of bench/peers.py: the study's model and AdamW in minimal plain JAX, as a researcher
would first write it. No checks, meshes or causal blocks.

Legend: B batch, L length, D model width, H query heads, K key-value heads, Dh head width, F hidden
width, V vocabulary, T = B·L tokens.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from beyond_outliers.bench.contenders import serve


def bare_params(m: Any, key: jax.Array) -> Any:
  keys = iter(jax.random.split(key, 1 + 6 * m["blocks"]))
  D, F, Dh = m["d_model"], m["mlp_hidden"], m["d_head"]

  def matrix(*shape: int) -> jax.Array:
    return 0.02 * jax.random.normal(next(keys), shape)

  def block() -> Any:
    return {
      "q": matrix(D, m["heads"] * Dh),
      "k": matrix(D, m["kv_heads"] * Dh),
      "v": matrix(D, m["kv_heads"] * Dh),
      "o": matrix(m["heads"] * Dh, D),
      "up": matrix(D, F),
      "down": matrix(F, D),
      "attention_norm": jnp.ones(D),
      "mlp_norm": jnp.ones(D),
      "scale": jnp.full((m["heads"], 1, 1), Dh**0.5),
    }

  return {
    "embedding": matrix(m["vocab"], D),
    "norm": jnp.ones(D),
    "blocks": [block() for _ in range(m["blocks"])],
  }


def bare_loss(m: Any, dtype: Any, params: Any, tokens: jax.Array) -> jax.Array:
  L, H, K, Dh = tokens.shape[1] - 1, m["heads"], m["kv_heads"], m["d_head"]
  angles = jnp.arange(L)[:, None] * m["rope_base"] ** (-jnp.arange(0, Dh, 2) / Dh)
  cos, sin = jnp.cos(angles), jnp.sin(angles)

  # So that the backward pass's products are in `dtype`, too.
  @jax.custom_vjp
  def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)

  linear.defvjp(
    lambda x, w: (linear(x, w), (x, w)),
    lambda operands, g: (linear(g, operands[1].T), linear(operands[0].T, g)),
  )

  def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + m["norm_eps"]) * gain

  def heads(x: jax.Array) -> jax.Array:
    return x.reshape(-1, L, x.shape[-1] // Dh, Dh).swapaxes(1, 2)

  def rotated(x: jax.Array) -> jax.Array:
    a, b = x[..., 0::2], x[..., 1::2]
    x = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-24)

  x_TxD = params["embedding"][tokens[:, :-1].reshape(-1)]
  for p in params["blocks"]:
    q, k, v = (heads(linear(x_TxD, p[name])) for name in ("q", "k", "v"))
    q, k = rotated(q) * p["scale"], rotated(k)
    k, v = jnp.repeat(k, H // K, 1), jnp.repeat(v, H // K, 1)
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(jnp.tri(L, dtype=bool), scores, -jnp.inf), -1)
    y = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(dtype), v, preferred_element_type=jnp.float32)
    y = y.swapaxes(1, 2).reshape(-1, H * Dh)
    x_TxD = x_TxD + norm(linear(y, p["o"]), p["attention_norm"])
    hidden = jnp.square(jax.nn.relu(linear(x_TxD, p["up"])))
    x_TxD = x_TxD + norm(linear(hidden, p["down"]), p["mlp_norm"])
  logits_TxV = linear(norm(x_TxD, params["norm"]), params["embedding"].T)
  return optax.softmax_cross_entropy_with_integer_labels(
    logits_TxV, tokens[:, 1:].reshape(-1)
  ).mean()


def main(m: Any, dtype: str, batch_size: int, context: int) -> None:
  tx = optax.adamw(1e-3, b2=0.95, weight_decay=0.0)
  loss_fn = functools.partial(bare_loss, m, jnp.dtype(dtype))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params: Any, state: Any, tokens: jax.Array) -> Any:
    loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  params = bare_params(m, jax.random.key(0))
  state = tx.init(params)
  tokens = jax.random.randint(jax.random.key(1), (batch_size, context + 1), 0, m["vocab"])

  def step() -> float:
    nonlocal params, state
    params, state, loss = jax.block_until_ready(train_step(params, state, tokens))
    return float(loss)

  serve(step)


if __name__ == "__main__":
  asked = json.loads(sys.argv[1])
  main(asked["model"], asked["dtype"], asked["batch_size"], asked["context"])
