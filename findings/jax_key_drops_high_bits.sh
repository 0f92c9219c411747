#!/usr/bin/env bash
# jax.random.key(seed) takes 32 bits of an integer, though its keys have 64: by default the higher bits
# of a larger seed are dropped without a word, so that 2**32 + 7 is the seed 7 again.
#
# A Python integer of up to 64 bits is accepted, and would fill both words of a threefry key. It is
# first made a number of the default type, which has 32 bits unless JAX_ENABLE_X64 is set; under that,
# the two seeds are two. Seeds made of a time or a hash can so be the same: refuse larger ones, or
# give both words to jax.random.wrap_key_data.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6; Linux, x86-64, CPU. Seen:
#   by default   key(2**32 + 7) [0, 7]   equals key(7) [0, 7]
#   under x64    key(2**32 + 7) [1, 7]   is another than key(7) [0, 7]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
for x64 in 0 1; do
  JAX_PLATFORMS=cpu JAX_ENABLE_X64=$x64 "$folder/bin/python" -I - <<'PY'
import warnings

import jax

warnings.simplefilter("error")
words = {seed: jax.random.key_data(jax.random.key(seed)).tolist() for seed in (7, 2**32 + 7)}
small, large = words.values()
print(f"x64 {jax.config.jax_enable_x64}: key(7) {small}, key(2**32 + 7) {large}")
if [small, large] != [[0, 7], [1, 7] if jax.config.jax_enable_x64 else [0, 7]]:
  raise SystemExit("changed: these are not the words that were seen")
PY
done
