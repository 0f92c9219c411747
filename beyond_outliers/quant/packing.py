"""Codes and scales packed into as few bytes as they need; quant/storage.py gives the layout."""

from __future__ import annotations

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

WORD_BITS = 64
E8M0, E4M3 = np.dtype(ml_dtypes.float8_e8m0fnu), np.dtype(ml_dtypes.float8_e4m3fn)


def pack_digits(digits: np.ndarray, bits: float) -> np.ndarray:
  """Whole numbers from 0 to below 2^bits, packed into whole words, as bytes."""
  places = _places(bits)
  padded = np.pad(digits.reshape(-1).astype(np.uint64), (0, -digits.size % len(places)))
  words = (padded.reshape(-1, len(places)) * places).sum(axis=1, dtype=np.uint64)
  return words.astype("<u8").view(np.uint8)


def unpack_digits(packed: np.ndarray, bits: float, shape: tuple[int, ...]) -> np.ndarray:
  """uint8 digits of this shape. Errors: ValueError for more or fewer words than the shape takes."""
  size = -(-math.prod(shape) // len(_places(bits))) * WORD_BITS // 8
  if packed.dtype != np.uint8 or packed.shape != (size,):
    raise ValueError(f"codes of shape {shape} are {size} bytes, not {packed.dtype}{packed.shape}")
  words = packed.view("<u8").astype(np.uint64)[:, None]
  digits = words // _places(bits) % np.uint64(round(2**bits))
  return digits.astype(np.uint8).reshape(-1)[: math.prod(shape)].reshape(shape)


def _places(bits: float) -> np.ndarray:
  """Place values: what a digit at each place of a word is multiplied by."""
  return np.uint64(round(2**bits)) ** np.arange(WORD_BITS // bits, dtype=np.uint64)


def pack_scale(scale: np.ndarray, granularity: str) -> dict[str, np.ndarray]:
  """Scales by name of their encoding: one byte each where that is exact, else as they are."""
  if granularity == "mx":
    exponents = scale.astype(E8M0)
    if np.array_equal(exponents.astype(scale.dtype), scale):
      return {"scale_e8m0": exponents.view(np.uint8)}
  if granularity == "nv":
    # The largest scale is e4m3's largest number times the unit, rounded: the unit may also be a
    # floating-point neighbour of the quotient.
    guess = scale.max() / scale.dtype.type(ml_dtypes.finfo(E4M3).max) or scale.dtype.type(1)
    for unit in (guess, np.nextafter(guess, 0 * guess), np.nextafter(guess, 2 * guess)):
      factors = (scale / unit).astype(E4M3)
      if np.array_equal(factors.astype(scale.dtype) * unit, scale):
        return {"scale_e4m3": factors.view(np.uint8), "scale_unit": unit.reshape(1)}
  return {"scale": scale}


def unpack_scale(parts: Mapping[str, np.ndarray]) -> np.ndarray:
  """The inverse of `pack_scale`."""
  if "scale_e8m0" in parts:
    return parts["scale_e8m0"].view(E8M0).astype(np.float32)
  if "scale_e4m3" in parts:
    unit = parts["scale_unit"]
    return parts["scale_e4m3"].view(E4M3).astype(unit.dtype) * unit
  return parts["scale"]
