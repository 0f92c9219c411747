#!/usr/bin/env bash
# jax.random.key(seed) uses 32 bits of an integer, though its keys have 64. By default it silently
# drops the higher bits of a larger seed, so that 2**32 + 7 gives the same key as 7.
#
# A Python integer of up to 64 bits is accepted, and would fill both words of a threefry key. But it
# is first converted to the default integer type, which has 32 bits unless JAX_ENABLE_X64 is set;
# with that set, the two keys differ. So seeds made from a time or a hash can collide: refuse larger
# seeds, or give both words to jax.random.wrap_key_data.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6; Linux, x86-64, CPU. Seen:
#   by default   key(2**32 + 7) [0, 7]   equals key(7) [0, 7]
#   under x64    key(2**32 + 7) [1, 7]   differs from key(7) [0, 7]
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
