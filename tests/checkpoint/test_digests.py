"""Digests of arrays: they depend on every bit and its place, and not on where arrays live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers import config, mesh, optim
from beyond_outliers import params as params_lib
from beyond_outliers.checkpoint import digests
from beyond_outliers.optim import blockwise

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int32", "int8", "int4", "uint8", "bool")
VALUES = np.random.default_rng(0).normal(scale=3.0, size=(8, 16))


def of_arrays(tree):
  return digests.examine(tree).digests


def of(x):
  (found,) = of_arrays({"x": x}).values()
  return found


def flipped(x):
  """The same with one bit of one element flipped."""
  if x.dtype == bool:
    return x.at[3, 5].set(~x[3, 5])
  whole = jax.lax.bitcast_convert_type(x, f"uint{jax.dtypes.itemsize_bits(x.dtype)}")
  return jax.lax.bitcast_convert_type(whole.at[3, 5].set(whole[3, 5] ^ 1), x.dtype)


CHANGES = {
  "a bit flipped": flipped,
  "two elements swapped": lambda x: x.at[1, 2].set(x[6, 3]).at[6, 3].set(x[1, 2]),
  "two rows swapped": lambda x: x[jnp.array([0, 5, 2, 3, 4, 1, 6, 7])],
  "a block of zeros": lambda x: x.at[2:4, 4:8].set(0),
  "another dtype": lambda x: x.astype("float16"),
  "another shape": lambda x: x.reshape(16, 8),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
def test_every_change_changes_it(change, dtype):
  x = jnp.asarray(VALUES).astype(dtype).at[1, 2].set(2).at[6, 3].set(-2)  # a sign bit apart
  assert of(CHANGES[change](x)) != of(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_changes_it_in_every_dtype(dtype):
  x = jnp.asarray(VALUES).astype(dtype)
  assert of(flipped(x)) != of(x) == of(jnp.array(x))


def test_scalars_keys_and_what_has_no_elements():
  assert of(jnp.float32(0.0)) != of(jnp.float32(-0.0)) and of(jnp.zeros((0, 3)))
  assert of(jax.random.key(1)) != of(jax.random.key(2))
  assert of(np.arange(6, dtype=np.uint8)) == of(jnp.arange(6, dtype=jnp.uint8)), "on the host, too"


def test_one_element_never_goes_unnoticed():
  """Every value of one byte at one place has a digest of its own."""
  rows = np.zeros((256, 9), np.uint8)
  rows[:, 4] = np.arange(256)
  # The difference of a row's digest from that of zeros is of this element alone.
  (found,) = of_arrays(blockwise.first_state({"9": rows})._replace(count=None)).values()
  (zeros,) = of_arrays(blockwise.first_state({"9": 0 * rows})._replace(count=None)).values()
  moved = {(int(a, 16) - int(b, 16)) % 2**32 for a, b in zip(found, zeros, strict=True)}
  assert len(moved) == 256


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
@pytest.mark.parametrize("name", ["shampoo", "soap", "psgd"])
def test_what_is_not_finite_is_found_but_in_what_is_told_of_roots(name, value):
  params = {"w": jnp.ones((4, 6), jnp.bfloat16)}
  state = {"params": params, "opt_state": optim.OPTIMIZERS[name](1e-2).init(params)}
  assert digests.examine(state).not_finite == ""
  broken = []
  leaves, tree = jax.tree.flatten(state)
  for i, x in enumerate(leaves):
    if x.ndim and jnp.issubdtype(x.dtype, jnp.inexact):
      changed = [*leaves[:i], x.at[(-1,) * x.ndim].set(value), *leaves[i + 1 :]]
      broken.append(digests.examine(tree.unflatten(changed)).not_finite)
  found = sorted(path for path in broken if path)
  everything = {
    params_lib.path_of(path)
    for path, x in jax.tree_util.tree_leaves_with_path(state)
    if x.ndim and jnp.issubdtype(x.dtype, jnp.inexact)
  }
  told = {path for path in everything if path.endswith(("/residual", "/condition"))}
  assert found == sorted(everything - told) and "params/w" in found


@pytest.mark.parametrize("devices", [2, 8])
def test_it_is_the_same_on_every_mesh(devices):
  tree = {"w": jnp.asarray(VALUES, jnp.float32), "count": jnp.int32(7)}
  grid = mesh.make_mesh(config.Mesh(1, devices // 2, 2), jax.devices()[:devices])
  split = jax.sharding.NamedSharding(grid, jax.sharding.PartitionSpec("fsdp", "model"))
  where = {"w": split, "count": mesh.replicated(grid)}
  assert digests.examine(jax.device_put(tree, where)) == digests.examine(tree)
  broken = {**tree, "w": tree["w"].at[6, 3].set(jnp.inf)}
  assert digests.examine(jax.device_put(broken, where)) == digests.examine(broken)
  assert digests.examine(broken).not_finite == "w"


def test_of_blocks_the_padding_may_differ_and_nothing_else():
  def state(blocks):
    return {"opt_state": blockwise.first_state({"16": jnp.asarray(blocks)})}

  recorded = digests.record(of_arrays(state(VALUES)), {})
  padded = np.concatenate([VALUES, np.ones((3, 16))])
  assert not digests.difference(recorded, of_arrays(state(padded)))
  assert not digests.difference(recorded, of_arrays(state(VALUES[:6]))), "were the last two padding"
  padded[5, 3] += 1
  assert digests.difference(recorded, of_arrays(state(padded))) == "opt_state/blocks/16"


def test_it_is_what_it_was_when_older_checkpoints_were_written():
  tree = {
    "opt_state": blockwise.first_state({"16": jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)}),
    "w": jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4),
  }
  assert of_arrays(tree) == {
    "opt_state/blocks/16": ["289b9c31", "e6e25631"],
    "opt_state/count": "4418f2e9",
    "w": "ad419ed6",
  }


def test_texts_are_compared_as_json_and_none_may_be_missing():
  texts = {"data": {"b": 1, "a": [0.1]}, "clock": {"seconds": 1.5}}
  recorded = digests.record({}, texts)
  assert not digests.difference(recorded, {}, {**texts, "data": {"a": [0.1], "b": 1}})
  assert not digests.difference(recorded, {}), "no text is compared"
  assert digests.difference(recorded, {}, {"data": texts["data"]}) == "clock"
  assert digests.difference(recorded, {}, {**texts, "run": {}}) == "run"
  assert digests.difference(recorded, {}, {**texts, "clock": {"seconds": 1.25}}) == "clock"
