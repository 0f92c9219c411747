"""What is saved comes back to the bit or not at all: sums, fallback, other structures, other
meshes, the keep policy."""

import errno
import json
import logging
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint._src.serialization import ocdbt_utils

from beyond_outliers import checkpoint, config, mesh, params, workdir
from beyond_outliers.checkpoint import checkpoints as checkpoints_module
from beyond_outliers.checkpoint import digests, reading, recovery
from beyond_outliers.config import sums as file_sums
from beyond_outliers.errors import NotFiniteError, WorkdirError
from beyond_outliers.train import step

OPTIONS = config.Checkpoint(every=1, keep=3, keep_every=0, verify=True)
TEXTS = {"data": {"batches": 3}, "clock": {"seconds": 3.0, "tokens": 30.0}}  # of checkpoint 3


def make_state(scale=1.0, devices=1):
  """A state with one split parameter, and where it should live."""
  grid = mesh.make_mesh(config.Mesh(1, devices, 1), jax.devices()[:devices])
  split = jax.sharding.NamedSharding(grid, jax.sharding.PartitionSpec("fsdp"))
  whole = mesh.replicated(grid)
  zero = jax.device_put(jnp.zeros((), jnp.int32), whole)
  kernel = jax.device_put(scale * jnp.arange(8 * 512, dtype=jnp.float32).reshape(8, 512), split)
  return step.TrainState(zero, {"kernel": kernel}, {"mu": kernel + 1}, zero, zero)


def test_a_field_that_is_none_is_not_stored(tmp_path):
  """So that runs without averages leave what they always left; and one with an average is told."""
  plain, state = make_state(), make_state()
  averaged = plain._replace(average=jax.tree.map(lambda x: 2 * x, plain.params))
  fields = {"step", "params", "opt_state", "skipped", "skipped_in_a_row"}
  assert params.without_empty(plain).keys() == fields
  assert params.without_empty(averaged).keys() == {*fields, "average"}
  checkpoints = checkpoint.Checkpoints(tmp_path, OPTIONS)
  for step_number, state in enumerate((plain, averaged), 1):
    checkpoints.save(step_number, state, {}, {"seconds": 1.0})
  checkpoints.close()
  reader = checkpoint.Checkpoints(tmp_path, read_only=True)
  assert reader.restore(shapes(plain), 1)[1].average is None
  found = reader.restore(shapes(averaged), 2)[1]
  np.testing.assert_array_equal(found.average["kernel"], averaged.average["kernel"])
  part = reader.restore_params(shapes(plain.params), 2, "average")[1]
  np.testing.assert_array_equal(part["kernel"], averaged.average["kernel"])
  for wanted, step_number in ((averaged, 1), (plain, 2)):
    with pytest.raises(checkpoint.CheckpointError, match=r"average/kernel is .* in the checkpoint"):
      reader.restore(shapes(wanted), step_number)


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
    (directory / workdir.SUMS).unlink()
    then(directory)

  return damage


DAMAGE |= {
  "torn sums": lambda directory: (directory / workdir.SUMS).write_text('{"state/'),
  "no sums in the file": lambda directory: (directory / workdir.SUMS).write_text("{}"),
  "a list for sums": lambda directory: (directory / workdir.SUMS).write_text("[1]"),
  "nested sums": lambda directory: (directory / workdir.SUMS).write_text("[" * 100_000),
  "bytes for sums": lambda directory: (directory / workdir.SUMS).write_bytes(b"\xff\xfe"),
  "no sums and no state": without_sums(lambda directory: shutil.rmtree(directory / "state")),
  "no sums and no data": without_sums(lambda directory: shutil.rmtree(directory / "data")),
  "no sums and no clock": without_sums(lambda directory: shutil.rmtree(directory / "clock")),
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


def another_state(directory):
  """Files that are all well, of arrays that are others: what no reader of files notices."""
  shutil.rmtree(directory / "state")
  shutil.copytree(directory.parent / "2" / "state", directory / "state")


# What may befall a checkpoint 4 between Orbax's commit and the sums, and what names it.
IN_THE_WINDOW = {
  "other arrays": (another_state, r"opt_state/mu is not what was saved"),
  "another position": (
    lambda directory: (directory / "data" / "metadata").write_text('{"batches": 5}'),
    "data is not what was saved",
  ),
  "no record of the run": (lambda directory: shutil.rmtree(directory / "run"), "run is not what"),
  "torn digests": (
    lambda directory: (directory / "digests" / "metadata").write_text('{"arrays'),
    "its digests cannot be read",
  ),
}


@pytest.mark.parametrize("sealed", [True, False], ids=["then summed", "then killed"])
@pytest.mark.parametrize("what", IN_THE_WINDOW)
def test_what_goes_wrong_before_the_sums_are_made_is_found(
  saved, what, sealed, monkeypatch, caplog
):
  """Sums of wrong files hold; a run that is killed then leaves none."""
  damage, message = IN_THE_WINDOW[what]

  def write_sums(directory):
    damage(directory)
    if sealed:
      workdir.write_sums(directory)

  monkeypatch.setattr(checkpoints_module, "write_sums", write_sums)
  checkpoints = checkpoint.Checkpoints(saved, OPTIONS)
  checkpoints.save(4, make_state(4), {"batches": 4}, {"seconds": 4.0}, {"config": {}})
  checkpoints.close()
  assert (saved / "4" / workdir.SUMS).exists() == sealed
  absl_logging.get_absl_logger().propagate = True
  if what == "other arrays":
    reader = checkpoint.Checkpoints(saved, read_only=True)
    with pytest.raises(checkpoint.CheckpointError, match="4 is damaged: params/kernel is not what"):
      reader.restore_params(shapes(make_state()).params, 4)
  with caplog.at_level(logging.WARNING):
    assert checkpoint.Checkpoints(saved, OPTIONS).restore(shapes(make_state()))[0] == 3
  assert re.search(message, caplog.text) and [*saved.glob("damaged-4-*")]


def test_a_text_that_was_written_wrong_is_told_at_once(saved):
  written = params.shapes_by_path(make_state(3))
  reading.check_readable(saved / "3", "state", written, TEXTS)
  (saved / "3" / "data" / "metadata").write_text('{"batches": 5}')
  with pytest.raises(checkpoint.CheckpointError, match=r"read back \(data is not what was saved"):
    reading.check_readable(saved / "3", "state", written, TEXTS)


def test_a_checkpoint_is_of_the_step_that_it_was_saved_as(saved):
  """Renamed by hand it would be gone on from, and evaluated, as of another step."""
  (saved / "3").rename(saved / "7")
  reader = checkpoint.Checkpoints(saved, read_only=True)
  with pytest.raises(checkpoint.CheckpointError, match="7 is damaged: it was saved as 3, and ren"):
    reader.restore_params(shapes(make_state()).params, 7)
  assert checkpoint.Checkpoints(saved, OPTIONS).restore(shapes(make_state()))[0] == 2


def test_folders_of_other_names_beside_them_are_no_checkpoints(saved):
  """Orbax takes those that end in _ and a number for steps: a person has set them aside."""
  for name in ("old_30", "3_1", "_7", "007", "3~"):
    shutil.copytree(saved / "3", saved / name)
  checkpoints = checkpoint.Checkpoints(saved, OPTIONS)
  assert checkpoints.steps() == [1, 2, 3] and checkpoints.restore(shapes(make_state()))[0] == 3
  checkpoints.close()


def test_a_checkpoint_without_digests_opens(saved):
  """As versions before there were any left it, or a run with checkpoint.verify=False."""
  (saved / "3" / workdir.SUMS).unlink()
  shutil.rmtree(saved / "3" / "digests")
  assert checkpoint.Checkpoints(saved, OPTIONS).restore(shapes(make_state()))[0] == 3


def test_a_temporary_checkpoint_is_replaced_by_the_next_and_counts_for_none(tmp_path):
  options = config.Checkpoint(every=10, keep=2, keep_every=0, verify=True, every_minutes=1.0)
  checkpoints = checkpoint.Checkpoints(tmp_path, options)
  there = {}
  for n, is_temporary in ((10, False), (13, True), (17, True), (20, False), (24, True)):
    if n == 20:  # another process goes on from the temporary one
      checkpoints.close()
      checkpoints = checkpoint.Checkpoints(tmp_path, options)
      assert checkpoints.restore(shapes(make_state()))[0] == 17
    checkpoints.save(n, make_state(n), {}, {"seconds": 0.0}, temporary=is_temporary)
    checkpoints.wait()
    there[n] = checkpoints.steps()
  assert there == {10: [10], 13: [10, 13], 17: [10, 17], 20: [10, 20], 24: [10, 20, 24]}
  assert checkpoints.lasting_steps() == [10, 20]
  checkpoints.save(30, make_state(30), {}, {"seconds": 0.0})
  checkpoints.save(31, make_state(31), {}, {"seconds": 0.0}, temporary=True)
  checkpoints.close()
  assert checkpoints.steps() == [20, 30, 31] and (tmp_path / "31" / workdir.SUMS).exists()
  reader = checkpoint.Checkpoints(tmp_path, read_only=True)
  assert reader.steps() == [20, 30], "readers do not see what comes and goes"
  assert reader.restore_params(shapes(make_state()).params)[0] == 30


def test_what_is_not_finite_is_not_saved_and_counts_as_damage_to_a_run(saved, caplog, monkeypatch):
  """Runs of earlier versions left it: the older ones are sound."""
  checkpoints = checkpoint.Checkpoints(saved, OPTIONS)
  broken = (4, make_state(np.nan), {}, {"seconds": 4.0})
  with pytest.raises(NotFiniteError, match="opt_state/mu is not finite, and is not saved"):
    checkpoints.save(*broken)
  examine = digests.examine
  with monkeypatch.context() as earlier:
    earlier.setattr(digests, "examine", lambda tree: examine(tree)._replace(not_finite=""))
    checkpoints.save(*broken)
  checkpoints.wait()
  absl_logging.get_absl_logger().propagate = True
  with caplog.at_level(logging.WARNING):
    assert checkpoints.restore(shapes(make_state()))[0] == 3
  assert "opt_state/mu is not finite" in caplog.text and checkpoints.steps() == [2, 3]
  checkpoints.close()


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
  for _ in range(2):  # a scheduler gives the command again
    with pytest.raises(checkpoint.CheckpointError, match="every checkpoint is damaged"):
      checkpoint.Checkpoints(saved, OPTIONS).restore(shapes(make_state()))
  assert checkpoint.Checkpoints(saved, OPTIONS).steps() == [1, 2, 3]
  assert checkpoint.Checkpoints(tmp_path / "new", OPTIONS).restore(shapes(make_state())) is None


@pytest.mark.parametrize(
  "error, sums",
  [
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), True),
    (ValueError("a file system that does not answer"), True),
    (MemoryError(), False),
    (OSError(errno.EMFILE, "Too many open files"), False),
    (PermissionError(errno.EACCES, "Permission denied"), False),
    (ValueError("PERMISSION_DENIED: Error opening a file"), False),
  ],
)
def test_what_cannot_be_read_now_is_left_alone(saved, monkeypatch, error, sums):
  def fail(*_, **__):
    raise error

  if not sums:
    (saved / "3" / workdir.SUMS).unlink()
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(checkpoint.CheckpointError, match=r"/3 could not be read .* not damaged"):
      checkpoint.Checkpoints(saved, OPTIONS).restore(shapes(make_state()))
  assert checkpoint.Checkpoints(saved, OPTIONS).restore(shapes(make_state()))[0] == 3


def test_no_descriptors_for_the_sums_is_no_damage(saved, monkeypatch):
  def fail(*_, **__):
    raise OSError(errno.EMFILE, "Too many open files")

  monkeypatch.setattr(recovery, "mismatch", fail)
  with pytest.raises(checkpoint.CheckpointError, match=r"/3 could not be read .*Too many"):
    checkpoint.Checkpoints(saved, OPTIONS).restore(shapes(make_state()))


def test_folders_that_cannot_be_listed_now_are_told_in_one_line(saved, monkeypatch):
  """All checkpoints, or one, which is not looked through for what killed writers left."""

  def fail(path):
    raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

  monkeypatch.setattr(os, "listdir", fail)
  with pytest.raises(
    checkpoint.CheckpointError, match=r"/checkpoints: Permission denied; nothing is k"
  ):
    checkpoint.Checkpoints(saved, read_only=True)
  file_sums.remove_stale(epath.Path(saved) / "3")
  assert workdir.stamps(epath.Path(saved) / "3") == set()


def test_a_checkpoint_tells_what_run_it_is_of(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, OPTIONS)
  run = {"config": {"seed": 3}, "data": {"fingerprint": "abc"}}
  checkpoints.save(1, make_state(), {"batches": 1}, {"seconds": 1.0, "tokens": 1.0}, run)
  checkpoints.save(2, make_state(), {"batches": 2}, {"seconds": 2.0, "tokens": 2.0})
  checkpoints.wait()
  assert checkpoints.run_of(1) == run and checkpoints.run_of(2) is None
  checkpoints.close()


def test_without_sums_it_is_restored_with_a_warning(saved, caplog):
  """The process may end between Orbax's commit and the sums."""
  (saved / "3" / workdir.SUMS).unlink()
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
  assert all((tmp_path / str(n) / workdir.SUMS).exists() for n in (4, 6, 7))


def test_the_sums_cover_every_file(saved):
  sums = json.loads((saved / "3" / workdir.SUMS).read_text())
  files = {
    str(path.relative_to(saved / "3")) for path in (saved / "3").rglob("*") if path.is_file()
  }
  assert sums.keys() == files - {workdir.SUMS}


def test_an_unfinished_write_is_not_a_checkpoint(saved):
  (saved / "4.orbax-checkpoint-tmp").mkdir()
  checkpoints = checkpoint.Checkpoints(saved, OPTIONS)
  assert checkpoints.steps() == [1, 2, 3]
  assert checkpoints.restore(shapes(make_state()))[0] == 3


@pytest.mark.parametrize("name", ["lr=[1e-3]", "[ab]", "*", "100% #1, ü {x} ~"])
def test_a_folder_of_any_name_gives_back_what_was_saved_in_it(tmp_path, name):
  """Also beside a folder that matches it as a pattern: Orbax globs its path."""
  for folder, scale in (("a", 5), (name, 2)):
    checkpoints = checkpoint.Checkpoints(tmp_path / folder / "checkpoints", OPTIONS)
    checkpoints.save(1, make_state(scale), {"batches": 1}, {"seconds": 1.0})
    checkpoints.close()
  directory = tmp_path / name / "checkpoints"
  found = checkpoint.Checkpoints(directory, read_only=True).restore(shapes(make_state()))
  np.testing.assert_array_equal(found[1].params["kernel"], make_state(2).params["kernel"])
  by_orbax = ocp.CheckpointManager(directory).restore(
    1, args=ocp.args.Composite(state=ocp.args.StandardRestore())
  )
  np.testing.assert_array_equal(by_orbax.state["params"]["kernel"], make_state(2).params["kernel"])


def skip_merge(monkeypatch):
  """Makes Orbax leave the parts that each process wrote unmerged, silently."""

  async def skip(*args, **kwargs):
    pass

  monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", skip)


def test_what_cannot_be_read_back_is_told_at_once_and_not_sealed(saved, monkeypatch):
  skip_merge(monkeypatch)
  checkpoints = checkpoint.Checkpoints(saved, OPTIONS)
  checkpoints.save(4, make_state(4), {"batches": 4}, {"seconds": 4.0})
  with pytest.raises(checkpoint.CheckpointError, match="/4: was saved, but cannot be read back"):
    while True:  # as training steps ask
      checkpoints.check()
  with pytest.raises(checkpoint.CheckpointError, match="/4: was saved, but cannot be read back"):
    checkpoints.save(5, make_state(5), {"batches": 5}, {"seconds": 5.0})
  assert not (saved / "4" / workdir.SUMS).exists() and not (saved / "5").exists()
  assert checkpoint.Checkpoints(saved, OPTIONS).restore(shapes(make_state()))[0] == 3


@pytest.mark.parametrize("temporary", [(), (3,), (2, 3), (1, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("every", [0, 3])
def test_none_is_deleted_before_the_next_is_proven(tmp_path, monkeypatch, temporary, every):
  """If only the newest were kept, nothing might be left but one that cannot be read back."""
  options = config.Checkpoint(every=1, keep=1, keep_every=every, verify=True, every_minutes=1.0)
  checkpoints, sealed_before = checkpoint.Checkpoints(tmp_path, options), []

  def save(n):
    checkpoints.save(n, make_state(n), {}, {"seconds": 0.0}, temporary=n in temporary)
    checkpoints.wait()

  def write_sums(directory):
    sealed_before.append(sorted(int(path.parent.name) for path in tmp_path.glob("*/sha256.json")))
    workdir.write_sums(directory)

  monkeypatch.setattr(checkpoints_module, "write_sums", write_sums)
  save(1)
  save(2)
  left = [1, 2] if 2 in temporary and 1 not in temporary else [2]
  assert sealed_before == [[], [1]] and checkpoints.steps() == left
  with monkeypatch.context() as fault:
    skip_merge(fault)
    with pytest.raises(checkpoint.CheckpointError, match="/3: was saved, but cannot be read back"):
      save(3)
  assert checkpoints.steps() == [*left, 3]
  checkpoints = checkpoint.Checkpoints(tmp_path, options)  # the same command again
  restored, state, *_ = checkpoints.restore(shapes(make_state()))
  assert restored == 2
  np.testing.assert_array_equal(state.params["kernel"], make_state(2).params["kernel"])
  save(3)
  lasting = [n for n in (1, 2) if n in left and n not in temporary]
  assert checkpoints.steps() == ([*lasting[-1:], 3] if 3 in temporary else [3])


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda state: state._replace(params={}), "params/kernel is .* not None"),
    (
      lambda state: state._replace(params={"kernel": state.params["kernel"][:, 1:]}),
      r"params/kernel is \(\(8, 512\), 'float32'\), not \(\(8, 511\), 'float32'\)",
    ),
    (
      lambda state: state._replace(skipped=np.float32(0)),
      r"skipped is \(\(\), 'int32'\), not \(\(\), 'float32'\)",
    ),
  ],
  ids=["name", "shape", "dtype"],
)
def test_what_is_read_back_is_compared_with_what_was_saved(saved, change, message):
  expected = params.shapes_by_path(change(make_state(3)))
  with pytest.raises(checkpoint.CheckpointError, match=message):
    reading.check_readable(saved / "3", "state", expected, TEXTS)
  (saved / "3" / "clock" / "metadata").write_text("{")
  with pytest.raises(checkpoint.CheckpointError, match="cannot be read back"):
    reading.check_readable(saved / "3", "state", params.shapes_by_path(make_state(3)), TEXTS)


def test_arrays_without_elements_and_without_axes_come_back(tmp_path):
  one = mesh.replicated(mesh.make_mesh(config.Mesh(1, 1, 1), jax.devices()[:1]))
  state = jax.device_put(
    {"params": {"none": jnp.zeros((0, 4), jnp.bfloat16), "w": jnp.ones(3)}, "count": jnp.int32(7)},
    one,
  )
  checkpoints = checkpoint.Checkpoints(tmp_path, OPTIONS)
  checkpoints.save(1, state, {}, {})
  checkpoints.close()
  reader = checkpoint.Checkpoints(tmp_path, read_only=True)
  _, found, _, _ = reader.restore(shapes(state))
  _, found_params = reader.restore_params(shapes(state)["params"])
  for tree in (found, {**state, "params": found_params}):
    assert params.shapes_by_path(tree) == params.shapes_by_path(state)
    jax.tree.map(np.testing.assert_array_equal, tree, state)
  assert found["params"]["none"].sharding == state["params"]["none"].sharding


def test_a_file_where_the_checkpoints_should_be_is_refused(tmp_path):
  (tmp_path / "checkpoints").write_text("x")
  with pytest.raises(WorkdirError, match=r"/checkpoints: File exists; give another --workdir"):
    checkpoint.Checkpoints(tmp_path / "checkpoints", OPTIONS)
  assert checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == []
