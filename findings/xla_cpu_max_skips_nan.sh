#!/usr/bin/env bash
# On CPU, jnp.max and jnp.min of 4096 or more float32 numbers ignore a NaN.
#
# For fewer numbers, and for bfloat16, the result is NaN, as in numpy and as StableHLO specifies for
# its maximum. So a check such as "is the largest magnitude finite?" works in a small test but not
# on a real tensor. XLA_FLAGS=--xla_cpu_enable_fast_min_max=false changes nothing.
# jnp.isfinite(x).all() sees the NaN. So does a maximum of the bits as integers, which are ordered
# like magnitudes, with NaN above all.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6; Linux, x86-64. Seen:
#   64 numbers, one of them NaN: nan
#   4096 numbers, one of them NaN: 0.0
#   100000 numbers, one of them NaN: 0.0
#   jnp.linalg.norm(x, inf) of 100000: 0.0, jnp.isfinite(x).all(): False, numpy.max: nan
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/bin/python" -I - <<'PY'
import jax.numpy as jnp
import numpy as np


def with_nan(count):
  x = np.zeros(count, np.float32)
  x[count // 2] = np.nan
  return jnp.asarray(x)


for count in (64, 4096, 100_000):
  print(f"{count} numbers, one of them NaN: {jnp.max(with_nan(count))}")
x = with_nan(100_000)
norm, finite, by_numpy = jnp.linalg.norm(x, jnp.inf), jnp.isfinite(x).all(), np.max(np.asarray(x))
print(f"jnp.linalg.norm(x, inf) of 100000: {norm}, jnp.isfinite(x).all(): {finite}, numpy.max: {by_numpy}")

assert np.isnan(jnp.max(with_nan(64))), "changed: small maxima pass over NaN as well"
for reduce in (jnp.max, jnp.min, lambda x: jnp.linalg.norm(x, jnp.inf)):
  assert reduce(x) == 0, "changed: a NaN comes out of a large maximum"
assert np.isnan(jnp.max(x.astype(jnp.bfloat16))), "changed: bfloat16 passes over NaN as well"
assert not finite and np.isnan(by_numpy)
PY
