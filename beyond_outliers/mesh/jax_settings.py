"""JAX's own settings, which environment variables can change: those that affect results are
recorded with a run and compared when it is resumed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

from beyond_outliers import config
from beyond_outliers.config.checks import require
from beyond_outliers.errors import WorkdirError
from beyond_outliers.types import Json

# Settings that affect results by more than the order of float sums, with their defaults.
DEFAULTS: Json = {
  "jax_enable_x64": False,
  "jax_default_prng_impl": "threefry2x32",
  "jax_threefry_partitionable": True,
  "jax_random_seed_offset": 0,
  "jax_default_matmul_precision": None,  # of float32 on GPUs and TPUs
  "jax_numpy_dtype_promotion": "standard",
}
REFUSED: Json = {
  "jax_disable_jit": True,
  "jax_numpy_dtype_promotion": "strict",
  "jax_numpy_rank_promotion": "raise",
}
# Variables that hold compiler flags, most of which do not affect results.
COMPILER = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def deciding() -> Json:
  """{setting: its present value} for the settings in `DEFAULTS`."""
  return {name: _value(name) for name in DEFAULTS}


def check_usable() -> None:
  """Refuses settings under which the programs here cannot be compiled. Errors: ConfigError."""
  for name, refused in REFUSED.items():
    value = _value(name)
    require(
      value != refused, name, value, f"the programs here do not support it; unset {name.upper()}"
    )


def check_dtypes(c: config.Config) -> None:
  """Refuses a configuration with a dtype that JAX would silently replace by a narrower one.

  Errors: ConfigError with the field and the remedy."""
  for field, value in config.flatten(config.to_dict(c)).items():
    if field.endswith("dtype") and value is not None:
      remedy = "JAX has this type only under jax_enable_x64; set JAX_ENABLE_X64=1, or use float32"
      require(jax.dtypes.canonicalize_dtype(value) == value, field, value, remedy)


def changed() -> Json:
  """`deciding`, without the settings that have their defaults."""
  return _not_default(deciding())


def changed_in(manifest: Json) -> Json:
  """`changed` for a run, from what was recorded with it."""
  return _not_default(_recorded(manifest, "jax"))


def compiler_flags() -> Json:
  return {name: os.environ.get(name, "") for name in COMPILER}


def check_recorded(manifest: Json) -> None:
  """Refuses to resume a run under other settings than it was trained under. A run from before they
  were recorded may be resumed under any, which are then recorded.

  Errors: WorkdirError with the setting, both values and the remedy."""
  now = deciding()
  for name, was in _recorded(manifest, "jax").items():
    if name in now and now[name] != was:
      raise WorkdirError(
        f"{name} = {now[name]!r}: the run was trained under {was!r} (manifest.json), and would "
        f"give other numbers now; set or unset {name.upper()} as it was, or give another --workdir "
        "(of a sweep: --root)"
      )


def other_compiler_flags(manifest: Json) -> list[str]:
  """Messages about compiler flags that differ from those that the run was trained under."""
  now = compiler_flags()
  return [
    f"{name} = {now[name]!r}: the run was trained under {was!r}; it goes on, and its numbers may "
    "differ from here on"
    for name, was in _recorded(manifest, "compiler_flags").items()
    if name in now and now[name] != was
  ]


def _not_default(settings: Mapping[str, Any]) -> Json:
  return {name: value for name, value in settings.items() if value != DEFAULTS.get(name)}


def _value(name: str) -> Any:
  settings: Any = jax.config  # type checkers don't see its attributes
  value = getattr(settings, name)
  return getattr(value, "value", value)  # enums have a value


def _recorded(manifest: Json, key: str) -> Mapping[str, Any]:
  """The value of the first start in the manifest that recorded the key, or an empty mapping."""
  starts = [manifest, *manifest.get("resumed", [])]
  return next((start[key] for start in starts if key in start), {})
