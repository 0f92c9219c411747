#!/usr/bin/env bash
# If s is a constant or is broadcast over x, x / s is not the correctly rounded quotient: XLA
# computes 1 / s and multiplies. Both operations round, and a quarter to two thirds of the results
# differ from NumPy's and PyTorch's in the last bit.
#
# This also happens without jit. The last bit matters when a quotient is rounded to an integer.
# absmax / 7.5 is the scale of four-bit inputs in compressed-tensors. If the value of largest
# magnitude is negative, it becomes -7.5, halfway between two codes; a third of all tokens then got
# a code other than PyTorch's. x / jnp.where(x == 0, 1, s) divides: the divisor has a value of its
# own for every x.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6; Linux, x86-64. Seen:
#   largest / 7.5:                  69.4 % other than NumPy's
#   x / scale[:, None]:             28.5 %
#   x / jnp.where(x == 0, 1, s):    0.0 %, 0.0 %
#   tokens with another four-bit code: 34.6 %
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/bin/python" -I - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

x = np.random.default_rng(0).standard_normal((4096, 256)).astype(np.float32)
largest = np.abs(x).max(axis=1)
scale = largest / np.float32(7.5)
quotients = x / scale[:, None]


def share(found, expected):
  return 100 * float((np.asarray(found) != expected).mean())


@jax.jit
def by_constant(largest):
  return largest / 7.5


@jax.jit
def by_row(x, scale):
  return x / scale[:, None]


@jax.jit
def divided(x, s):
  return x / jnp.where(x == 0, 1, s)


constant = share(by_constant(largest), scale)
rows = share(by_row(x, scale), quotients)
whole = share(divided(largest, 7.5), scale), share(divided(x, scale[:, None]), quotients)
codes = np.clip(np.rint(by_row(x, by_constant(largest))), -8, 7)
tokens = 100 * float((codes != np.clip(np.rint(quotients), -8, 7)).any(axis=1).mean())
print(f"largest / 7.5:                  {constant:.1f} % other than NumPy's")
print(f"x / scale[:, None]:             {rows:.1f} %")
print(f"x / jnp.where(x == 0, 1, s):    {whole[0]:.1f} %, {whole[1]:.1f} %")
print(f"tokens with another four-bit code: {tokens:.1f} %")

assert share(jnp.asarray(largest) / 7.5, scale) == constant, "changed: jit divides otherwise"
assert constant > 50 and rows > 10, "changed: divisions are rounded once"
assert whole == (0, 0), "changed: no division any more"
PY
