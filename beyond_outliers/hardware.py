"""Peak FLOP/s and memory of this machine, to relate a run's speed to; and timing of calls."""

from __future__ import annotations

import ctypes
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Dense peak of one device in FLOP/s, bfloat16 with float32 accumulation, from data sheets.
BFLOAT16_PEAKS = {
  "TPU v2": 45e12 / 2,
  "TPU v3": 123e12 / 2,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12 / 2,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H200": 989e12,
  "NVIDIA GH200 480GB": 989e12,
  "NVIDIA B200": 2250e12,
}


class Chip(NamedTuple):
  """Peaks of a device and its networks, for predictions on paper. Networks: bytes per second that
  a device sends while it receives as many."""

  flops: float  # FLOP/s, dense, bfloat16
  memory: float  # bytes
  memory_bandwidth: float  # bytes per second
  together: int  # consecutive devices that the faster network joins: a slice, or a host
  fast: float  # within these, of one device along one axis of the mesh
  slow: float  # between these, of one device


# Google's pages on v5e and v5p (docs.cloud.google.com/tpu/docs/v5e, /v5p): ICI of 1,600 and 4,800
# Gbit/s per chip one way, over two and three axes of a torus; DCN of 6.4 Tbit/s per 256 chips and
# of 50 Gbit/s per chip. NVIDIA's data sheets of H100 SXM and DGX H100: NVLink of 900 GB/s in both
# directions together, eight GPUs per host, each with a 400 Gbit/s adapter.
CHIPS = {
  "v5e": Chip(BFLOAT16_PEAKS["TPU v5e"], 16e9, 819e9, 256, 100e9, 3.125e9),
  "v5p": Chip(BFLOAT16_PEAKS["TPU v5p"], 95 * 2**30, 2765e9, 8960, 200e9, 6.25e9),
  "H100": Chip(BFLOAT16_PEAKS["NVIDIA H100 80GB HBM3"], 80e9, 3350e9, 8, 450e9, 50e9),
}


def peak_flops(dtype: str) -> tuple[float, str]:
  """(FLOP/s of one device in a matmul of `dtype`, "data sheet" or "measured")."""
  kind = jax.devices()[0].device_kind
  if kind in BFLOAT16_PEAKS and dtype == "bfloat16":
    return BFLOAT16_PEAKS[kind], "data sheet"
  # Several CPU devices share the same cores.
  sharing = jax.local_device_count() if jax.default_backend() == "cpu" else 1
  return measure_matmul(dtype) / sharing, "measured"


def measure_matmul(dtype: str, repeats: int = 5) -> float:
  """FLOP/s of square matmuls in `dtype`, float32 accumulation, one device: best of `repeats`.

  On an accelerator the matrices are large and several products run in one program; otherwise the
  dispatch would be measured."""
  width, products = (2048, 1) if jax.default_backend() == "cpu" else (8192, 8)
  # Random: on ones or zeros a GPU is faster than on data. Scaled so that products don't grow.
  x = (jax.random.normal(jax.random.key(0), (width, width)) / width**0.5).astype(dtype)
  precision = jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else None

  @jax.jit
  def multiply(a, b):
    def once(_, c):
      return jnp.matmul(
        c.astype(a.dtype),
        b,
        precision=precision,
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
      )

    return jax.lax.fori_loop(0, products - 1, once, once(0, a))

  multiply(x, x).block_until_ready()
  return products * 2 * width**3 / min(seconds_of(lambda: multiply(x, x), repeats))


def measure_copy(count: int, repeats: int = 5) -> float:
  """Bytes per second, reads plus writes, of copies of `count` bytes on one device: best of
  `repeats`, each of several copies."""
  x, copies = jax.random.normal(jax.random.key(0), (count // 4,)), 4
  copy = jax.jit(jnp.copy)

  def several():
    for _ in range(copies - 1):
      copy(x)
    return copy(x)

  several()
  return copies * 2 * x.nbytes / min(seconds_of(several, repeats))


def seconds_of(call: Callable[[], Any], count: int) -> list[float]:
  """Wall time of each of `count` calls, until its result is ready."""
  times = []
  for _ in range(count):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return times


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
  """Median wall time of `call`, after one call that is not counted."""
  jax.block_until_ready(call())
  return statistics.median(seconds_of(call, repeats))


def memory_bytes() -> int:
  """Peak memory so far: the first device's if the backend reports it, else this process's."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"]
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
  """Returns freed memory that the C library keeps to the system: after compiling a step, some
  hundreds of MiB. Does nothing if the library is not glibc."""
  if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
    trim(0)
