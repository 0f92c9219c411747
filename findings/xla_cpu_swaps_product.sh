#!/usr/bin/env bash
# On CPU, the product a.T @ b of a wide a and a narrow b, such as the gradient of an output layer's
# weights, takes more than three times as long as its transpose b.T @ a. Writing it as (b.T @ a).T
# does not help: it is compiled to a.T @ b.
#
# XLA folds the transpose of a result into the product by swapping the operands, whatever that
# costs. A jitted training step of a small language model spends more on this product than on the
# two others of its head. An optimization barrier between product and transpose keeps them apart.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6; Linux, x86-64 with AVX-512, one core. Seen:
#   a.T @ b               a product to f32[2048,96]   3.5 of the CPU time of b.T @ a
#   (b.T @ a).T           a product to f32[2048,96]   3.5
#   barrier(b.T @ a).T    a product to f32[96,2048]   1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
one=$(taskset -pc $$ | sed 's/.*: *//; s/[-,].*//')
JAX_PLATFORMS=cpu taskset -c "$one" "$folder/bin/python" -I - <<'PY'
import re
import statistics
import time

import jax
from jax import lax

written = {
  "b.T @ a": lambda a, b: b.T @ a,
  "a.T @ b": lambda a, b: a.T @ b,
  "(b.T @ a).T": lambda a, b: (b.T @ a).T,
  "barrier(b.T @ a).T": lambda a, b: lax.optimization_barrier(b.T @ a).T,
}
a = jax.random.normal(jax.random.key(0), (4096, 2048))
b = jax.random.normal(jax.random.key(1), (4096, 96))
compiled = {name: jax.jit(f).lower(a, b).compile() for name, f in written.items()}
seconds = {name: [] for name in compiled}
for _ in range(30):
  for name, f in compiled.items():
    began = time.process_time()
    f(a, b).block_until_ready()
    seconds[name].append(time.process_time() - began)
least = statistics.median(seconds.pop("b.T @ a"))
products, took = {}, {}
for name, times in seconds.items():
  products[name] = re.findall(r"(f32\[\d+,\d+\])\S* dot\(", compiled[name].as_text())
  took[name] = statistics.median(times) / least
  note = " of the CPU time of b.T @ a" * (name == "a.T @ b")
  print(f"{name:21} a product to {', '.join(products[name])}   {took[name]:.1f}{note}")

assert products["(b.T @ a).T"] == products["a.T @ b"] == ["f32[2048,96]"], "changed: not exchanged"
assert products["barrier(b.T @ a).T"] == ["f32[96,2048]"], "changed: exchanged behind a barrier"
assert took["a.T @ b"] > 1.4, "changed: both take as long"
PY
