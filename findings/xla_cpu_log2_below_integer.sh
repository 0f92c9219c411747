#!/usr/bin/env bash
# On CPU, jnp.log2 of an exact power of two can be slightly below its exponent, so that
# jnp.floor(jnp.log2(x)) is one too small.
#
# XLA computes log2 as log(x) / log(2), and neither is exact. If the exponent sets a block's scale
# (block floating point, E8M0 scales, MX formats), a block whose largest value is such a power gets
# half its scale. numpy is right for all exponents. jnp.frexp(x)[1] - 1 is the exact exponent.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6; Linux, x86-64. Seen:
#   jnp.log2(8192.0) = 12.999999046325684
#   floor(log2(2**k)) is k - 1 for 23 of 254 k: 13 15 26 27 30 31 49 52 54 57 ...
#   numpy: for 0 of 254; jnp.frexp(x)[1] - 1: for 0 of 254
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/bin/python" -I - <<'PY'
import jax.numpy as jnp
import numpy as np

k = np.arange(-126, 128)
x = np.ldexp(np.float32(1), k)
by_jax = np.asarray(jnp.floor(jnp.log2(jnp.asarray(x)))).astype(int)
by_numpy = np.floor(np.log2(x)).astype(int)
by_frexp = np.asarray(jnp.frexp(jnp.asarray(x))[1]) - 1
wrong = k[by_jax != k]
print(f"jnp.log2(8192.0) = {jnp.log2(8192.0)}")
print(f"floor(log2(2**k)) is k - 1 for {len(wrong)} of {len(k)} k:", *wrong[:10], "...")
print(
  f"numpy: for {(by_numpy != k).sum()} of {len(k)}; "
  f"jnp.frexp(x)[1] - 1: for {(by_frexp != k).sum()} of {len(k)}"
)

assert len(wrong) and (by_jax[by_jax != k] == wrong - 1).all(), "changed: log2 is exact, or above"
assert (by_numpy == k).all() and (by_frexp == k).all()
PY
