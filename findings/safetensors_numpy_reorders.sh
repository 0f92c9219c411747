#!/usr/bin/env bash
# safetensors 0.8.0 stores a transposed or Fortran-ordered numpy array in memory order. Read back,
# the array has its shape but its numbers are in other places.
#
# There is no error or warning, and the array is contiguous, as the docstring requires. 0.7.0 stored
# it correctly. NumPy results are often in Fortran order: a transpose, a slice of one, factors from
# LAPACK. Pass np.ascontiguousarray(x) to save and save_file.
# Known upstream: github.com/safetensors/safetensors/issues/825.
#
# Versions: safetensors 0.8.0 beside 0.7.0, numpy 2.4.6. Seen:
#   stored                  [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
#   safetensors 0.7.0 reads [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
#   safetensors 0.8.0 reads [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/round_trip.py" <<'PY'
import sys

import numpy as np
import safetensors
import safetensors.numpy

x = np.arange(6, dtype=np.float32).reshape(2, 3).T
assert x.flags.f_contiguous
read = safetensors.numpy.load(safetensors.numpy.save({"x": x}))["x"]
safetensors.numpy.save_file({"x": x}, sys.argv[1])
assert np.array_equal(safetensors.numpy.load_file(sys.argv[1])["x"], read)
if safetensors.__version__ == "0.7.0":
  print("stored                 ", x.tolist())
print(f"safetensors {safetensors.__version__} reads", read.tolist())

assert read.shape == x.shape
stored_as_it_is = np.array_equal(read, x)
assert stored_as_it_is == (safetensors.__version__ == "0.7.0"), "changed: see the output above"
in_c_order = safetensors.numpy.save({"x": np.ascontiguousarray(x)})
assert np.array_equal(safetensors.numpy.load(in_c_order)["x"], x)
PY
for version in 0.7.0 0.8.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "safetensors==$version" numpy==2.4.6
  "$folder/$version/bin/python" -I "$folder/round_trip.py" "$folder/$version.safetensors"
done
