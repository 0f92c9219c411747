"""Outlier metrics of arXiv 2509.23500: of one array, and of many through mergeable statistics.

A tensor's statistics are a few values per channel. Those of several batches are merged on the host,
in float64, by centred moments: sums of powers about zero would suffer from cancellation.

Legend: T tokens, F features (channels).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers.model import layers
from beyond_outliers.ops.extremes import max_magnitude
from beyond_outliers.quant import QuantSpec, fake_quantize
from beyond_outliers.types import Array

# A channel is an outlier if its RMS is over this many times the median channel's. LLM.int8() (arXiv
# 2208.07339, section 4.1) calls magnitudes of at least 6 outliers, which is only meaningful where
# all models' activations have the same scale.
OUTLIER = 6.0

METRICS = ("max_to_median", "max_to_mean", "kurtosis", "rms_kurtosis", "outlier_channels", "sqnr")


def max_to_median(x_TxF: jax.Array) -> jax.Array:
  """max|x| / median|x| over features, mean over tokens.

  For an even number of features, the median is the mean of the middle two. Tokens whose median is
  zero, as after a ReLU, don't count; NaN if there are no others."""
  ratio_T, counts_T = _ratio(x_TxF, _median)
  return jnp.mean(ratio_T, where=counts_T)


def max_to_mean(x_TxF: jax.Array) -> jax.Array:
  """max|x| / mean|x| over features, mean over tokens. Tokens that are all zero don't count."""
  ratio_T, counts_T = _ratio(x_TxF, _mean)
  return jnp.mean(ratio_T, where=counts_T)


def kurtosis(x: jax.Array) -> jax.Array:
  """Excess kurtosis of all entries: the fourth central moment over the squared second, less 3
  (Fisher's, of the population, as scipy's default)."""
  centred = x - jnp.mean(x)
  return jnp.mean(centred**4) / jnp.mean(centred**2) ** 2 - 3


def rms_kurtosis(x_TxF: jax.Array) -> jax.Array:
  """Kurtosis over features of their RMS over tokens: large where few channels dominate."""
  return kurtosis(_rms(x_TxF))


def outlier_channels(x_TxF: jax.Array) -> jax.Array:
  """Share of channels whose RMS is more than OUTLIER times the median channel's."""
  return _share_of_outliers(jnp, _rms(x_TxF))


def sqnr(x_TxF: jax.Array, spec: QuantSpec) -> jax.Array:
  """Signal to quantization noise in decibels: Σ x² over Σ (x − x̂)², x̂ quantized along features."""
  return 10 * jnp.log10(jnp.sum(x_TxF**2) / jnp.sum((x_TxF - fake_quantize(x_TxF, spec)) ** 2))


def _ratio(x_TxF, center):
  """(max|x| / center|x|, whether the center is not zero), one per token."""
  magnitude_TxF = jnp.abs(x_TxF)
  center_T = center(magnitude_TxF)
  counts_T = center_T != 0  # NaN counts
  return max_magnitude(magnitude_TxF, 1) / jnp.where(counts_T, center_T, 1), counts_T


def _share_of_outliers(xp: Any, rms_F: Any) -> Any:
  """`outlier_channels` from the channels' RMS. xp: jnp or np."""
  median = xp.median(rms_F)
  return xp.where(xp.isnan(median), xp.nan, xp.mean(rms_F > OUTLIER * median))


def _mean(magnitude_TxF):
  return jnp.mean(magnitude_TxF, axis=1)


def _median(magnitude_TxF):
  """Median over features, as numpy's, of non-negative values.

  As integers their bits have the same order, so it is found bit by bit, by counting. On a CPU,
  XLA's sort takes ten times as long as all else here, the model included."""
  bits_TxF = jax.lax.bitcast_convert_type(
    magnitude_TxF, jnp.dtype(f"int{8 * magnitude_TxF.dtype.itemsize}")
  )
  # Ranks of the middle two, or of the middle one twice.
  lower, upper = (bits_TxF.shape[1] - 1) // 2, bits_TxF.shape[1] // 2
  highest = 8 * bits_TxF.dtype.itemsize - 2

  def set_bit(i, found_T):
    candidate_T = found_T | (jnp.ones((), bits_TxF.dtype) << (highest - i).astype(bits_TxF.dtype))
    return jnp.where(
      jnp.sum(bits_TxF < candidate_T[:, None], axis=1) <= lower, candidate_T, found_T
    )

  low_T = jax.lax.fori_loop(0, highest + 1, set_bit, jnp.zeros_like(bits_TxF[:, 0]))
  above_TxF = bits_TxF > low_T[:, None]
  next_T = jnp.min(bits_TxF, axis=1, where=above_TxF, initial=jnp.iinfo(bits_TxF.dtype).max)
  high_T = jnp.where(jnp.sum(~above_TxF, axis=1) > upper, low_T, next_T)
  low_T, high_T = (
    jax.lax.bitcast_convert_type(bits_T, magnitude_TxF.dtype) for bits_T in (low_T, high_T)
  )
  return low_T + (high_T - low_T) / 2


def _rms(x_TxF):
  return jnp.sqrt(jnp.mean(x_TxF * x_TxF, axis=0))


class Moments(NamedTuple):
  """Central moments of one or many groups of values: count, mean, and sums of powers of the
  deviations from the mean."""

  count: Any
  mean: Any
  second: Any
  third: Any
  fourth: Any


def pooled(groups: Moments, axis: int) -> Moments:
  """Moments of the union of the groups along `axis` (Pébay, SAND2008-6212, eq. 2.1 and its
  analogues for orders 3 and 4)."""
  count = groups.count.sum(axis, keepdims=True)
  mean = (groups.count * groups.mean).sum(axis, keepdims=True) / np.maximum(count, 1)
  n, d = groups.count, groups.mean - mean
  second = groups.second + n * d**2
  third = groups.third + 3 * d * groups.second + n * d**3
  fourth = groups.fourth + 4 * d * groups.third + 6 * d**2 * groups.second + n * d**4
  return Moments(
    *(np.squeeze(x, axis) for x in (count, mean)), *(x.sum(axis) for x in (second, third, fourth))
  )


class Statistics(NamedTuple):
  """Sufficient statistics of a tensor [T, F] for all METRICS, from one batch or several."""

  channels: Moments  # [F]; float32 or wider
  to_median: Any  # [2]: sum over tokens of max_to_median, number of tokens
  to_mean: Any  # [2]
  power: Any  # [2]: of the signal, of the error


def statistics(x_TxF: jax.Array, counts_T: Array, spec: QuantSpec) -> Statistics:
  """Statistics of the tokens where counts_T (bool). spec: quantization whose error is measured."""
  x_TxF = x_TxF.astype(layers.at_least_float32(x_TxF.dtype))
  weight_Tx1 = counts_T[:, None].astype(x_TxF.dtype)
  x_TxF = jnp.where(counts_T[:, None], x_TxF, 0)
  n = jnp.sum(weight_Tx1)
  mean_F = jnp.sum(x_TxF, axis=0) / jnp.maximum(n, 1)
  centred_TxF = (x_TxF - mean_F) * weight_Tx1
  powers = [jnp.sum(centred_TxF**k, axis=0) for k in (2, 3, 4)]
  # Tokens that don't count have become zeros, which have no ratio.
  to_median, to_mean = (
    jnp.stack([jnp.sum(ratio_T, where=has_T), jnp.sum(has_T)])
    for ratio_T, has_T in (_ratio(x_TxF, _median), _ratio(x_TxF, _mean))
  )
  error_TxF = x_TxF - fake_quantize(x_TxF, spec)
  power = jnp.stack([jnp.sum(jnp.sum(y**2, axis=0)) for y in (x_TxF, error_TxF)])
  return Statistics(
    Moments(jnp.broadcast_to(n, mean_F.shape), mean_F, *powers), to_median, to_mean, power
  )


def merged(a: Statistics, b: Statistics) -> Statistics:
  """Statistics of both batches' tokens, numpy."""
  channels = pooled(
    Moments(*(np.stack(pair) for pair in zip(a.channels, b.channels, strict=True))), 0
  )
  return Statistics(channels, a.to_median + b.to_median, a.to_mean + b.to_mean, a.power + b.power)


def metrics_of(found: Statistics) -> dict[str, Any]:
  """{name: value} of METRICS, with the number of tokens and zero_medians.

  zero_medians: the share of tokens that max_to_median leaves out."""
  channels, whole = found.channels, pooled(found.channels, 0)
  tokens = channels.count.max()
  rms_F = np.sqrt(channels.second / np.maximum(channels.count, 1) + channels.mean**2)
  distance_F = rms_F - rms_F.mean()
  with np.errstate(divide="ignore", invalid="ignore"):  # the resulting NaN and infinity are meant
    return {
      "tokens": int(tokens),
      "max_to_median": found.to_median[0] / found.to_median[1],
      "max_to_mean": found.to_mean[0] / found.to_mean[1],
      "kurtosis": whole.count * whole.fourth / whole.second**2 - 3,
      "rms_kurtosis": np.mean(distance_F**4) / np.mean(distance_F**2) ** 2 - 3,
      "outlier_channels": _share_of_outliers(np, rms_F),
      "sqnr": 10 * np.log10(found.power[0] / found.power[1]),
      "zero_medians": 1 - found.to_median[1] / tokens,
    }
