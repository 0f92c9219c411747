#!/usr/bin/env bash
# jax.jit(tx.init) on parameters that are split over devices puts the optimizer state on one device;
# tx.init without jit splits it like the parameters.
#
# The state is zeros. Once compiled, it no longer depends on the parameters, and without
# out_shardings the whole of such a result goes to the first device. Outside jit, jnp.zeros_like
# takes its argument's sharding. So a model that fits on many devices runs out of memory on one, or
# the first train step pays for the transfer. Give jit out_shardings.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, optax 0.2.8, on eight simulated CPU devices. Seen:
#   parameters:                                 on 8 devices
#   mu, optax.adam(1e-3).init(params):          on 8 devices
#   mu, jax.jit(optax.adam(1e-3).init)(params): on 1 device
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
JAX_PLATFORMS=cpu "$folder/bin/python" -I - <<'PY'
import jax
import jax.numpy as jnp
import optax

jax.config.update("jax_num_cpu_devices", 8)
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.NamedSharding(mesh, jax.P("fsdp"))
params = {"w": jax.device_put(jnp.ones((64, 64)), split)}
tx = optax.adam(1e-3)


def devices(x):
  count = len(x.sharding.device_set)
  return f"on {count} device{'s' * (count > 1)}"


plain, compiled = tx.init(params)[0].mu["w"], jax.jit(tx.init)(params)[0].mu["w"]
print("parameters:                                ", devices(params["w"]))
print("mu, optax.adam(1e-3).init(params):         ", devices(plain))
print("mu, jax.jit(optax.adam(1e-3).init)(params):", devices(compiled))

assert plain.sharding == split
assert len(compiled.sharding.device_set) == 1, "changed: the compiled init keeps the split"
shardings = jax.tree.map(lambda x: split if x.ndim else jax.NamedSharding(mesh, jax.P()), tx.init(params))
assert jax.jit(tx.init, out_shardings=shardings)(params)[0].mu["w"].sharding == split
PY
