#!/usr/bin/env bash
# A compiled jax.jit function reads a numpy array of the other byte order as if it were native.
#
# If the first call has such an array ('>f4' on x86), the function raises a TypeError. But once it
# has been called with a native array of the same shape, it reuses the compiled program and passes
# it the bytes as they are: 1.0 becomes 4.6e-41.
# Such arrays come from FITS, netCDF or IDX files, or from another machine's raw dumps. Convert them
# with x.astype(x.dtype.newbyteorder("=")); dtype.isnative says whether this is needed.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6; Linux, x86-64. Seen:
#   first call: TypeError
#   after a call with native order: [0.0000e+00 4.6006e-41 8.9683e-44], int32: [0 16777216 33554432]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/bin/python" -I - <<'PY'
import jax
import numpy as np

swapped = np.arange(3, dtype=">f4")
try:
  print("first call:", jax.jit(lambda x: x * 1)(swapped))
except TypeError:
  print("first call: TypeError")


def after_native(x):
  same = jax.jit(lambda x: x * 1)
  same(x.astype(x.dtype.newbyteorder("=")))
  return same(x)


floats, integers = after_native(swapped), after_native(swapped.astype(">i4"))
print(f"after a call with native order: {floats}, int32: {integers}")

assert not np.array_equal(floats, swapped), "changed: floats are read as what they are"
assert not np.array_equal(integers, swapped), "changed: integers are read as what they are"
PY
