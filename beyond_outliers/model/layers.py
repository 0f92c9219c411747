"""The parts of a decoder block. None of them depends on the mesh, the optimizer or the quantizer.

Legend: B batch, L length, D model width, H query heads, K key-value heads, Dh head width, F hidden
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beyond_outliers import config
from beyond_outliers.model import attention
from beyond_outliers.ops import dot

# Makes what a linear layer calls instead of lax.dot_general: a module class, or a function that
# returns a module. None: the plain product.
DotGeneralCls = Callable[[], Any]
DotGenerals = Mapping[str, DotGeneralCls | None]  # of a block, by kind of linear layer
DotGeneralFor = Callable[[str], DotGeneralCls | None]  # takes a path such as `layers/3/mlp/up`


def at_least_float32(dtype: Any) -> jnp.dtype:
  """Dtype of norms, rotary embedding and residual stream: float32, or float64 if `dtype` is."""
  return jnp.promote_types(dtype, jnp.float32)


def as_operand(weights, dtype):
  """Weights as operand of a product in `dtype`. Wider ones are passed as stored: the product casts
  them, and their gradient keeps its float32 sums.

  A quantized matrix is passed as it is: its dot_general handles it."""
  if not hasattr(weights, "astype"):
    return weights
  return weights.astype(jnp.promote_types(weights.dtype, dtype))


def whole(weights, axes):
  """Weights gathered along "embed", the axis along which only their storage is split. Otherwise XLA
  would gather all devices' activations, which are larger, for the weights' gradient.

  A quantized matrix is returned as it is."""
  if not hasattr(weights, "astype"):
    return weights
  return nn.with_logical_constraint(weights, tuple(a if a != "embed" else None for a in axes))


class Linear(nn.Module):
  """x @ kernel, without bias.

  The rows of all sequences form one matrix, [B·L, in], which is faster on CPUs.
  Operands are in `dtype`; the result is float32 if they are narrower (see ops/dot.py)."""

  features: int
  axes: tuple[str, str]  # logical names of the kernel's two axes
  dtype: jnp.dtype
  init_std: float
  dot_general_cls: DotGeneralCls | None = None

  @nn.compact
  def __call__(self, x):
    init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), self.axes)
    kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
    dot_general = self.dot_general_cls() if self.dot_general_cls else dot.dot_general
    rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    y = dot_general(
      rows, as_operand(whole(kernel, self.axes), self.dtype), (((1,), (0,)), ((), ()))
    )
    return y.reshape(*x.shape[:-1], self.features)


class RmsNorm(nn.Module):
  """x / sqrt(mean x² + eps) · gain, over the last axis, in at least float32.

  per_channel: one gain per feature; otherwise a single one, as in arXiv 2506.19697."""

  eps: float
  per_channel: bool = True

  @nn.compact
  def __call__(self, x):
    init = nn.with_logical_partitioning(nn.initializers.ones, ("vector",))
    gain: Any = self.param("gain", init, (x.shape[-1] if self.per_channel else 1,), jnp.float32)
    x = x.astype(at_least_float32(x.dtype))
    inverse_rms = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
    return x * inverse_rms * gain.astype(x.dtype)


def rms_norm(c: config.Model, name: str | None = None) -> RmsNorm:
  """The model's norm."""
  return RmsNorm(c.norm_eps, c.norm_gain == "channel", name=name)


class Add(nn.Module):
  """The residual add, a module so that error analysis can see its two inputs."""

  def __call__(self, stream, branch):
    return stream + branch


class ReluSquared(nn.Module):
  def __call__(self, x):
    return jnp.square(jax.nn.relu(x))


class GatedSilu(nn.Module):
  def __call__(self, gate, up):
    return jax.nn.silu(gate) * up


def l2_normalize(x, eps: float = 1e-12):
  """x / max(‖x‖₂, eps) over the last axis, differentiable at zero."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps * eps))


def apply_rotary(x_BxLxHxDh, positions, *, base: float, layout: str):
  """Rotary position embedding over the whole head width (arXiv 2104.09864, eq. 34).

  positions: [L], or [B, L].
  layout: "interleaved" rotates pairs (2i, 2i+1), "half" pairs (i, i + Dh/2)."""
  Dh = x_BxLxHxDh.shape[-1]
  frequencies = base ** (-jnp.arange(0, Dh, 2, dtype=x_BxLxHxDh.dtype) / Dh)
  angles = positions[..., None, None].astype(x_BxLxHxDh.dtype) * frequencies  # [..., L, 1, Dh/2]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if layout == "interleaved":
    first, second = x_BxLxHxDh[..., 0::2], x_BxLxHxDh[..., 1::2]
    pairs = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return pairs.reshape(x_BxLxHxDh.shape)
  first, second = jnp.split(x_BxLxHxDh, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def queries_and_keys(c: config.Model, q, k, scale_H, positions):
  """(q_BxLxHxDh, k_BxLxKxDh), whose products are attention's scores: rotated by position,
  normalised to unit length if so configured, and queries multiplied by the scores' scale.

  q, k: [B, L, heads·Dh], outputs of the linear layers or of the norms after them. scale_H: learned
  scales, or None for 1 / sqrt(Dh)."""
  (B, L, _), dtype = q.shape, jnp.dtype(c.dtype)
  q_BxLxHxDh = q.astype(at_least_float32(dtype)).reshape(B, L, c.heads, c.d_head)
  k_BxLxKxDh = k.astype(at_least_float32(dtype)).reshape(B, L, c.kv_heads, c.d_head)
  q_BxLxHxDh = apply_rotary(q_BxLxHxDh, positions, base=c.rope_base, layout=c.rope_layout)
  k_BxLxKxDh = apply_rotary(k_BxLxKxDh, positions, base=c.rope_base, layout=c.rope_layout)
  if c.qk_norm == "l2":
    q_BxLxHxDh, k_BxLxKxDh = l2_normalize(q_BxLxHxDh), l2_normalize(k_BxLxKxDh)
  if scale_H is None:
    q_BxLxHxDh = q_BxLxHxDh * c.d_head**-0.5
  else:
    q_BxLxHxDh = q_BxLxHxDh * scale_H[:, None].astype(q_BxLxHxDh.dtype)
  return q_BxLxHxDh.astype(dtype), k_BxLxKxDh.astype(dtype)


class Attention(nn.Module):
  """Grouped-query causal self-attention with rotary embedding and optional query-key norms."""

  config: config.Model
  dot_generals: DotGenerals

  @nn.compact
  def __call__(self, x_BxLxD, segment_ids_BxL, positions):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    B, L, D = x_BxLxD.shape

    def linear(name, features, axes):
      return Linear(
        features, axes, dtype, c.init_std, self.dot_generals[f"attention/{name}"], name=name
      )

    q = linear("q", c.heads * c.d_head, ("embed", "heads"))(x_BxLxD)
    k = linear("k", c.kv_heads * c.d_head, ("embed", "kv_heads"))(x_BxLxD)
    v = linear("v", c.kv_heads * c.d_head, ("embed", "kv_heads"))(x_BxLxD)
    if c.qk_norm == "rms":
      q, k = rms_norm(c, "q_norm")(q), rms_norm(c, "k_norm")(k)

    scale_H: Any = None
    if c.attention_scale == "learned":
      init = nn.with_logical_partitioning(nn.initializers.constant(c.d_head**0.5), ("vector",))
      scale_H = self.param("scale", init, (c.heads,), jnp.float32)
    q_BxLxHxDh, k_BxLxKxDh = queries_and_keys(c, q, k, scale_H, positions)
    v_BxLxKxDh = v.reshape(B, L, c.kv_heads, c.d_head)

    y_BxLxHxDh = attention.attention(
      q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh.astype(dtype), segment_ids_BxL, implementation=c.attention
    )
    return linear("o", D, ("heads", "embed"))(y_BxLxHxDh.reshape(B, L, c.heads * c.d_head))


class Mlp(nn.Module):
  """Two matrices with a squared ReLU, or three with a gated SiLU."""

  config: config.Model
  dot_generals: DotGenerals

  @nn.compact
  def __call__(self, x_BxLxD):
    c = self.config

    def linear(name, features, axes):
      return Linear(
        features, axes, jnp.dtype(c.dtype), c.init_std, self.dot_generals[f"mlp/{name}"], name=name
      )

    up_BxLxF = linear("up", c.mlp_hidden, ("embed", "mlp"))(x_BxLxD)
    if c.mlp == "swiglu":
      gate_BxLxF = linear("gate", c.mlp_hidden, ("embed", "mlp"))(x_BxLxD)
      hidden_BxLxF = GatedSilu(name="activation")(gate_BxLxF, up_BxLxF)
    else:
      hidden_BxLxF = ReluSquared(name="activation")(up_BxLxF)
    return linear("down", x_BxLxD.shape[-1], ("mlp", "embed"))(hidden_BxLxF)


class Block(nn.Module):
  """Attention, then MLP, each added to the residual stream, with a norm before or after each."""

  config: config.Model
  dot_generals: DotGenerals

  @nn.compact
  def __call__(self, x_BxLxD, segment_ids_BxL, positions):
    c = self.config
    attention_norm = rms_norm(c, "attention_norm")
    mlp_norm = rms_norm(c, "mlp_norm")
    attend = Attention(c, self.dot_generals, name="attention")
    mlp = Mlp(c, self.dot_generals, name="mlp")
    attention_add, mlp_add = Add(name="attention_add"), Add(name="mlp_add")
    if c.norm_placement == "post":
      x_BxLxD = attention_add(x_BxLxD, attention_norm(attend(x_BxLxD, segment_ids_BxL, positions)))
      x_BxLxD = mlp_add(x_BxLxD, mlp_norm(mlp(x_BxLxD)))
    else:
      x_BxLxD = attention_add(x_BxLxD, attend(attention_norm(x_BxLxD), segment_ids_BxL, positions))
      x_BxLxD = mlp_add(x_BxLxD, mlp(mlp_norm(x_BxLxD)))
    return nn.with_logical_constraint(x_BxLxD, ("batch", "length", None)), None
