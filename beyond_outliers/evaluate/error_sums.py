"""Sums over tokens of one unit's error, and the table columns computed from them.

Sums are kept per window, so that standard errors over windows come for free.

Legend: B windows, L length, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers.evaluate.units import Unit

COLUMNS = (
  "R",  # ‖f^q(hq) − f(h)‖² / ‖f(h)‖²
  "R_in",  # the same for the inputs, all together
  "A",  # ‖a‖² / ‖f(h)‖², a: the incoming error as the unit passes it on
  "B",  # ‖b‖² / ‖f(h)‖², b: the error that quantizing the unit adds
  "C",  # 2⟨a, b⟩ / ‖f(h)‖²
  "gain",  # A / R_in
  "spectral_ratio",  # (‖W + E/2‖₂ / ‖W‖₂)², of linear layers
  "alignment_ratio",  # (cos φ / cos ψ)²
  "predicted_gain",  # spectral_ratio · alignment_ratio
  "local",  # ‖f^q(h) − f(h)‖² / ‖f(h)‖²
)

# Numerators over ‖f(h)‖². `predicted` is A as if the error passed through W + E/2.
NUMERATORS = ("R", "A", "B", "C", "local", "predicted")

Sums = dict[str, Any]  # {numerator, "R_in", "out" or "in": [B]} of one kind of mean, and `_centre`


def error_sums(unit: Unit, counts_BxL: jax.Array) -> dict[str, Sums]:
  """{"token": sums of each token's ratios, "batch": sums of squares}, [B] each, at least float32.

  Tokens with a denominator of zero, as after a ReLU, are left out; those with NaN are not.
  counts_BxL: bool, tokens that count."""
  squares = _squares(unit)
  batch = {name: _sum(x_BxL, counts_BxL) for name, x_BxL in squares.items()}
  token = {}
  for of, names in (("out", NUMERATORS), ("in", ("R_in",))):
    has_BxL = counts_BxL & (squares[of] != 0)
    token[of] = jnp.sum(has_BxL, axis=1).astype(batch[of].dtype)
    for name in names:
      token[name] = _sum(squares[name] / jnp.where(has_BxL, squares[of], 1), has_BxL)
  return {"token": token, "batch": batch | _centre(unit, counts_BxL)}


def _centre(unit: Unit, counts_BxL: jax.Array) -> Sums:
  """What `centred` needs: the outputs' sum over tokens, [B, F], and the number of tokens, [B]."""
  h = _wide(unit.output)
  total_BxF = jnp.sum(h, axis=1, where=counts_BxL[..., None])
  return {"total": total_BxF, "tokens": jnp.sum(counts_BxL, axis=1).astype(h.dtype)}


def _squares(unit: Unit) -> dict[str, jax.Array]:
  """Squared norms of each token's features, [B, L]: numerators and denominators."""
  delta = _wide(unit.q_output) - _wide(unit.output)
  zero_BxL = jnp.zeros(delta.shape[:2], delta.dtype)
  found = {"R": _dot(delta, delta), "out": _dot(_wide(unit.output), _wide(unit.output))}
  if unit.replay is None:
    found |= {"A": found["R"], "B": zero_BxL, "C": zero_BxL, "local": zero_BxL}
  else:
    full, quantized = unit.replay
    a, b, local = _parts(
      _wide(unit.output),
      _wide(full(*unit.q_inputs)),
      _wide(quantized(*unit.inputs)),
      _wide(unit.q_output),
    )
    found |= {"A": _dot(a, a), "B": _dot(b, b), "C": 2 * _dot(a, b), "local": _dot(local, local)}
  pairs = [(_wide(h), _wide(hq)) for h, hq in zip(unit.inputs, unit.q_inputs, strict=True)]
  found["in"] = sum((_dot(h, h) for h, _ in pairs), zero_BxL)
  found["R_in"] = sum((_dot(hq - h, hq - h) for h, hq in pairs), zero_BxL)
  found["predicted"] = zero_BxL
  if unit.matrices is not None:
    ((h, hq),) = pairs
    through = jnp.matmul(hq - h, unit.matrices.midpoint, precision=jax.lax.Precision.HIGHEST)
    found["predicted"] = _dot(through, through)
  return found


def _parts(f_h, f_hq, fq_h, fq_hq):
  """(a, b, local) from a unit's four outputs; a + b is fq_hq − f_h."""
  a = ((fq_hq - fq_h) + (f_hq - f_h)) / 2
  b = ((fq_hq - f_hq) + (fq_h - f_h)) / 2
  return a, b, fq_h - f_h


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _dot(x_BxLxF: jax.Array, y_BxLxF: jax.Array) -> jax.Array:
  return jnp.sum(x_BxLxF * y_BxLxF, axis=-1)


def _sum(x_BxL: jax.Array, where_BxL: jax.Array) -> jax.Array:
  return jnp.sum(x_BxL, axis=1, where=where_BxL)


# ---- on the host


def columns(sums: dict[str, Sums], spectral_ratio: float) -> dict[str, float]:
  """{column: value} from a unit's sums per window: COLUMNS, with and without `_se` and `batch_`.

  spectral_ratio: NaN unless the unit is a linear layer. `_se`: jackknife standard errors over
  windows; NaN for one window. Gains are NaN where no error comes in. R_centred: see `centred`."""
  found = {}
  for kind, prefix in (("token", ""), ("batch", "batch_")):
    values, errors = jackknife(sums[kind], lambda total: _ratios(total, spectral_ratio))
    for i, name in enumerate(COLUMNS):
      found[f"{prefix}{name}"], found[f"{prefix}{name}_se"] = float(values[i]), float(errors[i])
  value, error = jackknife(sums["batch"], centred)
  return found | {"R_centred": float(value), "R_centred_se": float(error)}


def centred(total: Sums) -> np.ndarray:
  """‖f^q(hq) − f(h)‖² / ‖f(h) − its mean over tokens‖², of sums over all tokens.

  A large component shared by all tokens carries no information, yet it makes R small."""
  common = np.sum(total["total"] ** 2, axis=-1) / total["tokens"]
  return total["R"] / (total["out"] - common)


def jackknife(
  by_window: Sums, statistic: Callable[[Sums], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """(statistic of the totals, its standard error over windows).

  statistic: maps totals, [B] or [B, F] each, to [..., B]."""
  wide = {name: np.asarray(x_B, np.float64) for name, x_B in by_window.items()}
  totals = {name: x_B.sum(0, keepdims=True) for name, x_B in wide.items()}
  windows = len(next(iter(wide.values())))
  with np.errstate(divide="ignore", invalid="ignore"):  # the resulting NaN is meant
    value = statistic(totals)[..., 0]
    without = statistic({name: totals[name] - x_B for name, x_B in wide.items()})
    spread = without - without.mean(-1, keepdims=True)
    factor = (windows - 1) / windows if windows > 1 else np.nan
    return value, np.sqrt(factor * np.sum(spread**2, -1))


def _ratios(sums: Sums, spectral_ratio: float) -> np.ndarray:
  """COLUMNS from totals, stacked: [len(COLUMNS), B]."""
  over_out = {name: sums[name] / sums["out"] for name in NUMERATORS}
  r_in = sums["R_in"] / sums["in"]
  # Two programs agree to rounding at best: below that no error comes in, and a gain is noise.
  coming_in = np.where(r_in > np.finfo(np.float32).eps ** 2, r_in, np.nan)
  gain, predicted = (over_out[name] / coming_in for name in ("A", "predicted"))
  spectral = np.full_like(gain, spectral_ratio)
  found = {
    **over_out,
    "R_in": r_in,
    "gain": gain,
    "spectral_ratio": spectral,
    "alignment_ratio": predicted / spectral,
    "predicted_gain": np.where(np.isnan(spectral), np.nan, predicted),
  }
  return np.stack([found[name] for name in COLUMNS])
