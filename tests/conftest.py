"""Eight simulated devices, and a compilation cache kept from one run of the tests to the next."""
import os
import pathlib

CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"

# Commands that tests start inherit the cache, but not the eight devices.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  (the environment comes first)

jax.config.update("jax_num_cpu_devices", 8)
