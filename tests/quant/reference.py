"""QuEST and round-to-nearest in plain numpy, float64, from the formulas; float formats from
ml_dtypes, bit pattern by pattern."""

import ml_dtypes
import numpy as np

# arXiv 2502.05003: the MSE-optimal clip of a standard normal distribution, in standard deviations.
OPTIMAL = {
  1: 0.7978845587140913,
  1.585: 1.2240089519030855,
  2: 1.4935346200015913,
  3: 2.051068354131873,
  4: 2.513930578568423,
  5: 2.9160938834961225,
  6: 3.276597282593217,
  7: 3.6010497188221655,
  8: 3.884938678807525,
}
BITS = list(OPTIMAL)


def hadamard_blocks(width, block):
  """Block-diagonal [width, width], entry by entry: (-1)^(number of ones that i and j share) /
  sqrt(block)."""
  h = np.zeros((width, width))
  for i in range(width):
    for j in range(i // block * block, (i // block + 1) * block):
      h[i, j] = (-1) ** (i % block & j % block).bit_count() / block**0.5
  return h


def quest(rows, bits):
  """(x̂, mask) of rows that each have a scale."""
  std = np.sqrt(np.mean(rows**2, axis=-1, keepdims=True))
  s = OPTIMAL[bits] * std + 1e-8
  if bits == 1.585:
    quantized = s * np.where(rows > s / 2, 1, np.where(rows < -s / 2, -1, 0))
    return quantized, np.abs(rows) <= 1.5 * s
  step = 2 * s / (2**bits - 1)
  quantized = np.round(np.clip(rows, -s, s) / step + 0.5) * step - step / 2
  return quantized, np.abs(quantized - rows) <= s / (2**bits - 1)


def round_to_nearest(rows, bits):
  """absmax to the largest level of the symmetric grid; no mask."""
  scale = np.abs(rows).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
  return np.round(rows / scale) * scale, np.ones(rows.shape, bool)


def layer(x, w, g, quantize, block=None):
  """(y, dx, dw) of sum(g * y) where y = x̂ ŵ of x [T, K] and w [K, O], rotated in blocks."""
  h = np.eye(x.shape[1]) if block is None else hadamard_blocks(x.shape[1], block)
  (xq, x_mask), (wq, w_mask) = quantize(x @ h), quantize(w.T @ h)
  return xq @ wq.T, (g @ wq * x_mask) @ h.T, ((g.T @ xq * w_mask) @ h.T).T


def float_levels(name):
  """All finite numbers of a format, by reading every bit pattern."""
  bits = 4 if name == "float4_e2m1fn" else 8
  every = (
    np.arange(2**bits, dtype=np.uint8).view(np.dtype(getattr(ml_dtypes, name))).astype(np.float64)
  )
  return np.unique(every[np.isfinite(every)])


def nearest_level(x, name):
  """The nearest finite number of a format; of two, the one whose last bit is zero."""
  levels = float_levels(name)
  above = np.clip(np.searchsorted(levels, x), 1, len(levels) - 1)
  low, high = levels[above - 1], levels[above]
  last_bit = low.astype(getattr(ml_dtypes, name)).view(np.uint8) & 1
  middle = (low + high) / 2
  return np.where((x > middle) | ((x == middle) & (last_bit == 1)), high, low)


def assert_near(ours, expected, tolerance=1e-6):
  """To `tolerance` of the largest number."""
  np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())
