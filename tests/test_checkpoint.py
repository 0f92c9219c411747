"""What is saved comes back to the bit or not at all: sums, fallback, other structures, other
meshes, the keep policy."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging as absl_logging

from beyond_outliers import checkpoint, config, mesh
from beyond_outliers.train import step

OPTIONS = config.Checkpoint(every=1, keep=3, keep_every=0, verify=True)


def make_state(scale=1.0, devices=1):
  """A state with one split parameter, and where it should live."""
  grid = mesh.make_mesh(config.Mesh(1, devices, 1), jax.devices()[:devices])
  split = jax.sharding.NamedSharding(grid, jax.sharding.PartitionSpec("fsdp"))
  whole = mesh.replicated(grid)
  zero = jax.device_put(jnp.zeros((), jnp.int32), whole)
  kernel = jax.device_put(scale * jnp.arange(8 * 512, dtype=jnp.float32).reshape(8, 512), split)
  return step.TrainState(zero, {"kernel": kernel}, {"mu": kernel + 1}, zero, zero)


def shapes(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def saved(tmp_path):
  """A directory with intact checkpoints 1, 2 and 3."""
  checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", OPTIONS)
  for n in (1, 2, 3):
    checkpoints.save(n, make_state(n), {"batches": n}, {"seconds": float(n), "tokens": 10.0 * n})
  checkpoints.close()
  return tmp_path / "checkpoints"


def largest_file(directory):
  return max(
    (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
  )


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


DAMAGE = {
  "a flipped bit": lambda directory: flip(largest_file(directory / "state")),
  "a truncated file": lambda directory: largest_file(directory / "state").write_bytes(b"short"),
  "a missing file": lambda directory: largest_file(directory / "state").unlink(),
  "another data position": lambda directory: flip(largest_file(directory / "data")),
}


def without_sums(then):
  """As kill -9 leaves it between Orbax's commit and the sums, and then damaged."""

  def damage(directory):
    (directory / checkpoint.SUMS).unlink()
    then(directory)

  return damage


DAMAGE |= {
  "torn sums": lambda directory: (directory / checkpoint.SUMS).write_text('{"state/'),
  "no sums and a truncated file": without_sums(DAMAGE["a truncated file"]),
  "no sums and a missing file": without_sums(DAMAGE["a missing file"]),
  "no sums and torn metadata": without_sums(
    lambda directory: (directory / "state" / "_METADATA").write_text("{")
  ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_older_one_used(saved, damage, caplog):
  DAMAGE[damage](saved / "3")
  checkpoints = checkpoint.Checkpoints(saved, OPTIONS)
  absl_logging.get_absl_logger().propagate = True
  with caplog.at_level(logging.WARNING):
    restored, state, data, clock = checkpoints.restore(shapes(make_state()))
  assert (restored, data, clock) == (2, {"batches": 2}, {"seconds": 2.0, "tokens": 20.0})
  np.testing.assert_array_equal(state.params["kernel"], make_state(2).params["kernel"])
  assert (
    "checkpoint" in caplog.text and "is damaged" in caplog.text and "falling back" in caplog.text
  )
  # Nothing is lost: the damaged one is set aside, and its step can be saved again.
  assert [
    path.name.split("-")[1] for path in saved.iterdir() if path.name.startswith("damaged")
  ] == ["3"]
  checkpoints.save(3, make_state(7), {"batches": 3}, {"seconds": 3.0, "tokens": 30.0})
  checkpoints.close()
  again = checkpoint.Checkpoints(saved, read_only=True).restore(shapes(make_state()))
  np.testing.assert_array_equal(again[1].params["kernel"], make_state(7).params["kernel"])


def test_a_damaged_step_asked_for_by_name_is_refused(saved):
  flip(largest_file(saved / "2" / "state"))
  with pytest.raises(
    checkpoint.CheckpointError, match=r"2 is damaged: .* does not match its SHA-256 sum"
  ):
    checkpoint.Checkpoints(saved, read_only=True).restore(shapes(make_state()), 2)
  assert (saved / "2").exists()


def test_all_damaged_is_an_error_and_none_is_none(saved, tmp_path):
  for n in "123":
    flip(largest_file(saved / n / "state"))
  with pytest.raises(checkpoint.CheckpointError, match="every checkpoint is damaged"):
    checkpoint.Checkpoints(saved, OPTIONS).restore(shapes(make_state()))
  assert checkpoint.Checkpoints(tmp_path / "new", OPTIONS).restore(shapes(make_state())) is None


def test_without_sums_it_is_restored_with_a_warning(saved, caplog):
  """The process may end between Orbax's commit and the sums."""
  (saved / "3" / checkpoint.SUMS).unlink()
  absl_logging.get_absl_logger().propagate = True
  with caplog.at_level(logging.WARNING):
    assert checkpoint.Checkpoints(saved, read_only=True).restore(shapes(make_state()))[0] == 3
  assert "not verified" in caplog.text


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda s: s._replace(
        params={
          "kernel": jax.ShapeDtypeStruct(
            (8, 512), jnp.bfloat16, sharding=s.params["kernel"].sharding
          )
        }
      ),
      r"params/kernel is \(\(8, 512\), 'float32'\) in the checkpoint "
      r"and \(\(8, 512\), 'bfloat16'\)",
    ),
    (
      lambda s: s._replace(
        params={
          "kernel": jax.ShapeDtypeStruct(
            (4, 512), jnp.float32, sharding=s.params["kernel"].sharding
          )
        }
      ),
      r"params/kernel is \(\(8, 512\)",
    ),
    (
      lambda s: s._replace(opt_state={"nu": s.opt_state["mu"]}),
      r"opt_state/mu is .* in the checkpoint and missing in this run",
    ),
  ],
  ids=["dtype", "shape", "name"],
)
def test_another_structure_is_refused_by_name(saved, change, message):
  """Orbax alone would cast to another dtype without a word."""
  with pytest.raises(checkpoint.CheckpointError, match=message):
    checkpoint.Checkpoints(saved, OPTIONS).restore(change(shapes(make_state())))
  assert sorted(path.name for path in saved.iterdir() if path.is_dir()) == ["1", "2", "3"]


@pytest.mark.parametrize("devices", [2, 8])
def test_another_mesh_restores_the_same_bits(saved, devices):
  target = make_state(devices=devices)
  _, state, _, _ = checkpoint.Checkpoints(saved, read_only=True).restore(shapes(target))
  np.testing.assert_array_equal(state.params["kernel"], make_state(3).params["kernel"])
  assert len(state.params["kernel"].sharding.device_set) == devices
  with pytest.raises(
    checkpoint.CheckpointError, match=r"params/kernel is .* in the checkpoint and"
  ):
    checkpoint.Checkpoints(saved, read_only=True).restore_params(
      {"kernel": jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)}, 1
    )
  step_number, params = checkpoint.Checkpoints(saved, read_only=True).restore_params(
    shapes(target).params, 1
  )
  assert step_number == 1
  np.testing.assert_array_equal(params["kernel"], make_state(1).params["kernel"])


def test_plain_orbax_opens_it(saved):
  restored = ocp.CheckpointManager(saved).restore(
    3, args=ocp.args.Composite(state=ocp.args.StandardRestore())
  )
  np.testing.assert_array_equal(restored.state["params"]["kernel"], make_state(3).params["kernel"])


def test_keep_policy(tmp_path):
  checkpoints = checkpoint.Checkpoints(
    tmp_path, config.Checkpoint(every=1, keep=2, keep_every=4, verify=True)
  )
  for n in range(1, 8):
    checkpoints.save(n, make_state(n), {"batches": n}, {"seconds": 0.0, "tokens": 0.0})
  checkpoints.close()
  assert checkpoints.steps() == [4, 6, 7]
  reader = checkpoint.Checkpoints(tmp_path, read_only=True)
  np.testing.assert_array_equal(
    reader.restore(shapes(make_state()))[1].params["kernel"], make_state(7).params["kernel"]
  )
  assert all((tmp_path / str(n) / checkpoint.SUMS).exists() for n in (4, 6, 7))


def test_the_sums_cover_every_file(saved):
  sums = json.loads((saved / "3" / checkpoint.SUMS).read_text())
  files = {
    str(path.relative_to(saved / "3")) for path in (saved / "3").rglob("*") if path.is_file()
  }
  assert sums.keys() == files - {checkpoint.SUMS}


def test_an_unfinished_write_is_not_a_checkpoint(saved):
  (saved / "4.orbax-checkpoint-tmp").mkdir()
  checkpoints = checkpoint.Checkpoints(saved, OPTIONS)
  assert checkpoints.steps() == [1, 2, 3]
  assert checkpoints.restore(shapes(make_state()))[0] == 3
