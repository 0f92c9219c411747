#!/usr/bin/env bash
# The order of a jitted function's arguments and results decides whether donated arrays are updated
# in place. If the state comes before the parameters in the arguments but after them in the results,
# a step of AdamW takes several times as long on CPU, with no warning.
#
# JAX gives each result the first unused donated array of its shape and type, whatever that array
# holds. AdamW's parameters and moments have the same shape. Given (gradients, state, parameters),
# the new parameters get the first moment's buffer, the new first moment the second's, and the new
# second moment the parameters'. XLA then has to copy values that are still needed. Every donated
# buffer is used, so JAX gives no warning. Arguments in the order of the results, (parameters,
# state, gradients), or one pytree of both, need no copy.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, optax 0.2.8, numpy 2.4.6; Linux, x86-64, one core. Seen:
#   parameters, state, gradients   0 copies
#   gradients, state, parameters   4 copies   6.5 times the CPU time
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 numpy==2.4.6
one=$(taskset -pc $$ | sed 's/.*: *//; s/[-,].*//')
JAX_PLATFORMS=cpu taskset -c "$one" "$folder/bin/python" -I - <<'PY'
import re
import statistics
import time
import warnings

import jax
import jax.numpy as jnp
import optax

warnings.simplefilter("error")
adamw = optax.adamw(1e-3)


def step(params, state, grads):
  updates, state = adamw.update(grads, state, params)
  return optax.apply_updates(params, updates), state


orders = {
  "parameters, state, gradients": (step, (0, 1), lambda p, s, g: (p, s, g)),
  "gradients, state, parameters": (lambda g, s, p: step(p, s, g), (1, 2), lambda p, s, g: (g, s, p)),
}
copies, seconds = {}, {}
for name, (function, donated, arranged) in orders.items():
  params, grads = jnp.zeros((4096, 4096)), jnp.ones((4096, 4096))
  state = adamw.init(params)
  compiled = jax.jit(function, donate_argnums=donated).lower(*arranged(params, state, grads)).compile()
  text = compiled.as_text()
  entry = text[text.index("ENTRY") :]
  copies[name] = len(re.findall(r"= f32\[4096,4096\]\S* copy\(", entry))
  taken = []
  for _ in range(12):
    began = time.process_time()
    params, state = jax.block_until_ready(compiled(*arranged(params, state, grads)))
    taken.append(time.process_time() - began)
  seconds[name] = statistics.median(taken)
fast, slow = seconds.values()
for name, count in copies.items():
  note = f"   {slow / fast:.1f} times the CPU time" if count else ""
  print(f"{name}   {count} copies{note}")

assert list(copies.values()) == [0, 4], "changed: other copies"
assert slow > 1.5 * fast, "changed: both take as long"
PY
