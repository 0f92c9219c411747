#!/usr/bin/env bash
# What a module sows under flax.linen.scan is silently dropped unless the scan's variable_axes names
# the collection.
#
# Outside a scan the same module's values are kept. apply(mutable=["intermediates"]) is accepted
# either way, but under the scan it returns an empty dictionary; statistics summed over its values
# are then sums over nothing. Name every collection that a layer may sow into in variable_axes.
#
# Versions: flax 0.12.8, jax 0.10.2, jaxlib 0.10.2. Seen:
#   in a loop:                                        {'Block_0': {'h': ((2, 4),)}, 'Block_1': {'h': ((2, 4),)}}
#   scanned, variable_axes={'params': 0}:             {}
#   scanned, variable_axes={..., 'intermediates': 0}: {'ScanBlock_0': {'h': ((2, 2, 4),)}}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/bin/python" -I - <<'PY'
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    x = nn.Dense(4)(x)
    self.sow("intermediates", "h", x)
    return x, None


class Blocks(nn.Module):
  variable_axes: Any = None  # None: a Python loop

  @nn.compact
  def __call__(self, x):
    if self.variable_axes is None:
      for _ in range(2):
        x, _ = Block()(x, None)
      return x
    scanned = nn.scan(
      Block, variable_axes=self.variable_axes, split_rngs={"params": True}, length=2
    )
    return scanned()(x, None)[0]


def sown(blocks):
  x = jnp.ones((2, 4))
  params = blocks.init(jax.random.key(0), x)["params"]
  _, collections = blocks.apply({"params": params}, x, mutable=["intermediates"])
  return jax.tree.map(jnp.shape, collections.get("intermediates", {}))


in_a_loop = sown(Blocks())
dropped = sown(Blocks({"params": 0}))
kept = sown(Blocks({"params": 0, "intermediates": 0}))
print("in a loop:                                       ", in_a_loop)
print("scanned, variable_axes={'params': 0}:            ", dropped)
print("scanned, variable_axes={..., 'intermediates': 0}:", kept)

assert in_a_loop == {f"Block_{i}": {"h": ((2, 4),)} for i in range(2)}
assert dropped == {}, "changed: what is sown under a scan is kept"
assert kept == {"ScanBlock_0": {"h": ((2, 2, 4),)}}
PY
