#!/usr/bin/env bash
# On CPU, jax.random.uniform inside jit is not fused with the code that uses it: the program keeps
# three arrays of the draw's size, whatever is done with it.
#
# On CPU the rounds of the generator (threefry, the default) are a loop over whole arrays. On GPU and
# TPU they are unrolled, so that a number's bits stay in registers. So dropout and stochastic
# rounding, which look like one element-wise pass, add three times their array to a step's memory,
# and take as long as the loop's passes. The generator "rbg" has no such loop, but other numbers.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, CPU. Seen, of an array of 18 MiB:
#   floor(x + sin(x)):            0 MiB of temporaries
#   floor(x + uniform):          54 MiB of temporaries
#   floor(x + uniform, by rbg):   0 MiB of temporaries
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/bin/python" -I - <<'PY'
import jax
import jax.numpy as jnp

x = jax.ShapeDtypeStruct((2048, 2304), jnp.float32)


def stochastic(impl):
  return lambda x: jnp.floor(x + jax.random.uniform(jax.random.key(0, impl=impl), x.shape))


def temporaries(function):
  return jax.jit(function).lower(x).compile().memory_analysis().temp_size_in_bytes


plain = temporaries(lambda x: jnp.floor(x + jnp.sin(x)))
default, rbg = temporaries(stochastic(None)), temporaries(stochastic("rbg"))
print(f"floor(x + sin(x)):          {plain / 2**20:3.0f} MiB of temporaries")
print(f"floor(x + uniform):         {default / 2**20:3.0f} MiB of temporaries")
print(f"floor(x + uniform, by rbg): {rbg / 2**20:3.0f} MiB of temporaries")

size = 4 * x.size
assert max(plain, rbg) < size / 10, "changed: other element-wise programs have temporaries"
assert 3 * size <= default < 3.1 * size, "changed: random bits are kept otherwise, or not at all"
PY
