"""The loop and its hooks: which steps they act on, what rows they write, and how a run ends
early."""

import concurrent.futures
import dataclasses
import errno
import json
import os
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import ocdbt_utils

from beyond_outliers import checkpoint, cli, config, optim
from beyond_outliers.train import hooks, loop, step
from beyond_outliers.workdir import Workdir

OPTIONS = config.Checkpoint(every=4, keep=100, keep_every=0, verify=False)


class Rows(list):
  """A writer that keeps what it is given."""

  write = list.append

  def close(self):
    pass


class Device:
  """A device that takes 2 s a step while the host goes on at once, and a clock that moves when the
  host waits for it."""

  def __init__(self, monkeypatch):
    self.now = self.done = 100.0
    self.pace = 2.0
    monkeypatch.setattr(loop.time, "perf_counter", lambda: self.now)

  def train_step(self, state, batch):
    state, metrics = train_step(state, batch)
    self.done = max(self.done, self.now) + self.pace
    return state, {name: Pending(value, self, self.done) for name, value in metrics.items()}


class Pending(float):
  """A metric that is there once its step is done; who asks before waits."""

  def __new__(cls, value, device, done):
    self = super().__new__(cls, value)
    self.device, self.done = device, done
    return self

  def block_until_ready(self):
    self.device.now = max(self.device.now, self.done)
    return self

  def __int__(self):
    self.block_until_ready()
    return super().__int__()

  def __float__(self):
    self.block_until_ready()
    return super().__float__()


@pytest.fixture
def device(monkeypatch):
  return Device(monkeypatch)


def start(at: int = 0) -> step.TrainState:
  zero = jnp.zeros((), jnp.int32)
  return step.TrainState(jnp.int32(at), {"w": jnp.zeros(3)}, (), zero, zero)


def metrics_of(number: int, skipped_in_a_row: int = 0, loss: float | None = None):
  values = {
    "train/loss": number / 10 if loss is None else loss,
    "gradient_norm": 1.0,
    "lr/hidden": 0.5,
    "skipped": float(skipped_in_a_row),
    "skipped_in_a_row": float(skipped_in_a_row),
  }
  return {name: jnp.float32(value) for name, value in values.items()}


def train_step(state, batch):
  """Counts, and adds what it is given to the parameters."""
  state = state._replace(
    step=state.step + 1, params=jax.tree.map(lambda x: x + batch, state.params)
  )
  return state, metrics_of(int(state.step))


def make_log(sinks, clock, every=2, num_steps=7, first=0, max_skipped=3):
  return hooks.LogMetrics(
    every,
    sinks,
    clock,
    start(first),
    tokens_per_step=100,
    flops_per_step=1000.0,
    peak_flops=4000.0,
    num_steps=num_steps,
    max_skipped=max_skipped,
  )


def test_fit_calls_every_hook_after_every_step_that_is_left():
  calls = []
  recorders = [
    lambda number, state, metrics, name=name: calls.append(
      (name, number, int(state.step), float(state.params["w"][0]))
    )
    for name in "ab"
  ]
  batches = iter(range(100))
  state = loop.fit(train_step, start(3), batches, recorders, 6)
  assert calls == [
    (name, number, number, total)
    for number, total in ((4, 0.0), (5, 1.0), (6, 3.0))
    for name in "ab"
  ]
  assert int(state.step) == 6 and next(batches) == 3, "a batch was read and not trained on"
  assert loop.fit(train_step, state, batches, recorders, 6) is state and len(calls) == 6


def test_rows_have_the_names_that_users_hold_on_to(device):
  sink, other = Rows(), Rows()
  loop.fit(
    device.train_step, start(), iter([1.0] * 9), [make_log([sink, other], loop.Clock(50.0))], 7
  )
  assert sink == other
  assert [row["step"] for row in sink] == [2, 4, 6, 7], "every second, and the last"
  assert sink[1] == {
    "step": 4,
    "train/loss": pytest.approx(0.4),
    "gradient_norm": 1.0,
    "skipped": 0.0,
    "skipped_in_a_row": 0.0,
    "lr/hidden": 0.5,
    "parameter_norm": pytest.approx(4 * 3**0.5),
    "update_norm": pytest.approx(3**0.5),
    "tokens": 400,
    "tokens_per_second": 50.0,
    "flops_per_second": 500.0,
    "peak_share": 0.125,
    "seconds_per_step": 2.0,
    "seconds": 58.0,
    "seconds_left": 6.0,
    "memory_bytes": sink[1]["memory_bytes"],
  }
  assert sink[1]["memory_bytes"] > 2**20
  assert sink[-1]["update_norm"] == pytest.approx(3**0.5), "the last row's too"
  json.dumps(sink)


def test_speed_is_that_of_the_steps_since_the_last_row(device):
  sink = Rows()

  def slow_down(number, state, metrics):
    device.pace = 8.0 if number >= 3 else 2.0

  loop.fit(
    device.train_step, start(), iter([1.0] * 9), [make_log([sink], loop.Clock()), slow_down], 7
  )
  assert [row["seconds_per_step"] for row in sink] == [2.0, 5.0, 8.0, 8.0]
  assert [row["tokens_per_second"] for row in sink] == [50.0, 20.0, 12.5, 12.5]
  assert [row["seconds_left"] for row in sink] == [10.0, 15.0, 8.0, 0.0]


def test_a_row_is_held_back_while_the_next_step_runs(device):
  sink, seen, waited = Rows(), [], []
  log = make_log([sink], loop.Clock(), every=1)

  def look(number, state, metrics):
    seen.append([row["step"] for row in sink])
    waited.append(device.done - device.now)

  loop.fit(device.train_step, start(), iter([1.0] * 9), [log, look], 7)
  assert seen == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]]
  assert waited == [2.0] * 6 + [0.0], "the device stood idle, waiting for the host"
  assert [row["seconds_per_step"] for row in sink] == [2.0] * 7
  log.flush()
  assert len(sink) == 7


def test_a_loss_that_is_not_a_number_stays_in_its_row(device):
  sink = Rows()
  log = make_log([sink], loop.Clock(), num_steps=2)
  device.now += 1
  log(2, None, metrics_of(2, loss=np.nan))
  assert np.isnan(sink[0]["train/loss"])


def test_a_run_diverges_after_so_many_skipped_updates_in_a_row():
  sink = Rows()
  log = make_log([sink], loop.Clock(), every=100, num_steps=20)
  in_a_row = iter([1, 2, 0, 1, 2, 3, 4, 5])

  def skipping(state, batch):
    number = int(state.step) + 1
    return state._replace(step=jnp.int32(number)), metrics_of(number, next(in_a_row), loss=np.nan)

  with pytest.raises(loop.Stop) as stop:
    loop.fit(skipping, start(), iter(range(99)), [log], 20)
  assert stop.value.status == "diverged"
  assert (
    "3 updates in a row" in stop.value.reason and "optimizer.learning_rate" in stop.value.reason
  )
  assert [row["step"] for row in sink] == [6], (
    "the row that shows it is written, though it is not its turn"
  )


def test_the_clock_stands_still_while_paused_once_the_step_is_done(device):
  clock = loop.Clock(10.0)
  device.now += 5
  assert clock.seconds() == 15
  _, metrics = device.train_step(start(), 1.0)
  with clock.paused(metrics):
    device.now += 100
    assert clock.seconds() == 17
  device.now += 1
  assert clock.seconds() == 18


def test_evaluation_comes_at_its_steps_after_the_row_that_was_held_back(device):
  sink, clock = Rows(), loop.Clock()
  log = make_log([sink], clock, every=2, num_steps=5)

  def validate(params):
    device.now += 30.0
    return {"loss": float(params["w"][0]), "bits_per_byte": None}

  evaluate = hooks.Evaluate(2, validate, [sink], clock, num_steps=5, before=log.flush)
  loop.fit(device.train_step, start(), iter(range(1, 99)), [log, evaluate], 5)
  assert [(row["step"], "eval/loss" in row) for row in sink] == [
    (2, False),
    (2, True),
    (4, False),
    (4, True),
    (5, False),
    (5, True),
  ]
  assert sink[1] == {"step": 2, "eval/loss": 3.0, "eval/bits_per_byte": None, "eval/seconds": 30.0}
  assert [row["seconds_per_step"] for row in sink if "train/loss" in row] == [2.0, 2.0, 2.0], (
    "evaluation was counted as training"
  )
  assert clock.seconds() == 10


@pytest.fixture
def checkpoints(tmp_path):
  made = checkpoint.Checkpoints(tmp_path / "checkpoints", OPTIONS)
  yield made
  made.close()


def make_save(
  checkpoints, num_steps, before=lambda: None, clock=None, options=OPTIONS, rows_every=1
):
  return hooks.Save(
    options,
    checkpoints,
    lambda: {"batches": 7},
    clock or loop.Clock(3.0),
    tokens_per_step=100,
    num_steps=num_steps,
    before=before,
    rows_every=rows_every,
  )


def test_checkpoints_come_at_their_steps_and_after_the_last(checkpoints, device):
  sink, clock = Rows(), loop.Clock(3.0)
  log = make_log([sink], clock, every=1, num_steps=9)
  save = make_save(checkpoints, 9, lambda: (log.flush(), written.append(len(sink))), clock)
  written = []
  try:
    state = loop.fit(device.train_step, start(), iter([1.0] * 9), [log, save], 9)
  finally:
    save.close()
  checkpoints.wait()
  assert checkpoints.steps() == [4, 8, 9]
  assert written == [4, 8, 9], "a run resumed from a checkpoint must not miss the row of its step"
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  number, restored, data, clock = checkpoints.restore(shapes, step=8)
  assert (number, int(restored.step), restored.params["w"].tolist()) == (8, 8, [8.0] * 3)
  assert data == {"batches": 7} and clock == {"seconds": 19.0, "tokens": 800.0}


def test_no_checkpoint_is_made_of_a_state_that_is_not_finite(checkpoints):
  """Not even of a state whose parameters are: the run ends, and goes on from the one before."""

  def break_down(state, batch):
    state, metrics = train_step(state, batch)
    moment = jnp.where(jnp.arange(3) == batch, jnp.nan, 0.0)
    return state._replace(opt_state={"mu": moment}), metrics

  save = make_save(checkpoints, 9)
  begun = start()._replace(opt_state={"mu": jnp.zeros(3)})
  try:
    with pytest.raises(loop.Stop, match="opt_state/mu is not finite, and is not saved") as stop:
      loop.fit(break_down, begun, iter([9.0] * 5 + [1.0] * 4), [save], 9)
  finally:
    save.close()
  checkpoints.wait()
  assert (stop.value.status, stop.value.step, checkpoints.steps()) == ("diverged", 8, [4])


def steps_of_a_save_that_goes_wrong(tmp_path, monkeypatch, merge, refused):
  """The steps until `refused`, and the checkpoints, of a run whose first is written with `merge` in
  the place of Orbax's."""
  monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", merge)
  checkpoints, taken = checkpoint.Checkpoints(tmp_path, OPTIONS), []
  save = make_save(checkpoints, 9)

  def step(state, batch):
    taken.append(int(state.step) + 1)
    concurrent.futures.wait(checkpoints._seals)
    return train_step(state, batch)

  try:
    with refused:
      loop.fit(step, start(), iter([1.0] * 9), [save], 9)
  finally:
    save.close()
  return taken, checkpoints.steps()


def test_a_checkpoint_that_cannot_be_read_back_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
  async def skip(*args, **kwargs):
    pass

  refused = pytest.raises(
    checkpoint.CheckpointError, match="/4: was saved, but cannot be read back"
  )
  taken, saved = steps_of_a_save_that_goes_wrong(tmp_path, monkeypatch, skip, refused)
  assert taken == [1, 2, 3, 4, 5] and saved == [4]


def test_a_full_disk_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
  async def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

  refused = pytest.raises(
    OSError, match=r"could not be written \(.*No space left on device.*earlier ones are intact"
  )
  taken, saved = steps_of_a_save_that_goes_wrong(tmp_path, monkeypatch, fail, refused)
  assert taken == [1, 2, 3, 4, 5] and saved == []


def test_temporary_checkpoints_come_by_time_at_rows_of_the_log(monkeypatch):
  """Those that come by steps are never temporary, and put the next one off."""
  now, saved = [0.0], {}
  monkeypatch.setattr(hooks.time, "monotonic", lambda: now[0])
  keep = types.SimpleNamespace(
    check=lambda: None, save=lambda step, *_, temporary: saved.update({step: temporary})
  )
  options = dataclasses.replace(OPTIONS, every=20, every_minutes=0.5)
  save = make_save(keep, 50, options=options, rows_every=3)
  try:
    for step in range(1, 51):
      now[0] += 4.0  # thirty seconds are eight steps
      save(step, start(step), {})
  finally:
    save.close()
  assert saved == {9: True, 18: True, 20: False, 30: True, 39: True, 40: False, 48: True, 50: False}


@pytest.mark.parametrize("number", cli.STOP_SIGNALS)
def test_asked_to_stop_a_run_saves_and_gives_the_signals_back(checkpoints, number, monkeypatch):
  monkeypatch.setattr(hooks, "_is_ignored_hang_up", lambda number: False)  # tests under nohup
  before = {each: signal.getsignal(each) for each in cli.STOP_SIGNALS}
  save = make_save(checkpoints, 9)

  def asked(state, batch):
    if int(state.step) == 2:
      os.kill(os.getpid(), number)
    return train_step(state, batch)

  try:
    with pytest.raises(loop.Stop) as stop:
      loop.fit(asked, start(), iter([1.0] * 9), [save], 9)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, (
      "a second Ctrl-C must end the run at once"
    )
  finally:
    save.close()
  assert stop.value.status == "preempted"
  assert checkpoints.steps() == [3], "saved after the step that was running, and waited for"
  assert {each: signal.getsignal(each) for each in before} == before


def test_a_hang_up_that_nohup_has_made_to_be_ignored_stays_so(checkpoints):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  save = make_save(checkpoints, 9)
  try:
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    save.close()
    signal.signal(signal.SIGHUP, before)


def test_of_a_hang_the_watchdog_tells_once(tmp_path):
  workdir = Workdir(tmp_path)
  watchdog = hooks.Watchdog(0.4, workdir, 0)

  def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
      assert time.monotonic() < deadline
      time.sleep(0.02)

  stacks = tmp_path / "stacks-0.txt"
  watchdog(7, None, {})
  try:
    until(lambda: (workdir.read("status.json") or {}).get("reason"))
    assert workdir.read("status.json")["reason"] == (
      "no step for 0.4 s; where it stands: stacks-0.txt"
    )
    said = stacks.read_text()
    assert said.startswith("no step after 7 for 0.4 s") and "in until" in said, (
      "where the main thread stands"
    )
    time.sleep(0.6)
    assert stacks.read_text() == said
    workdir.check_past()  # a run killed now, before its first checkpoint, may begin anew
    watchdog(8, None, {})
    until(lambda: "no step after 8" in stacks.read_text())
  finally:
    watchdog.close()


def test_asked_to_stop_during_the_last_step_a_run_is_done(checkpoints):
  save = make_save(checkpoints, 3)

  def asked(state, batch):
    if int(state.step) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return train_step(state, batch)

  try:
    assert int(loop.fit(asked, start(), iter([1.0] * 3), [save], 3).step) == 3
  finally:
    save.close()
  checkpoints.wait()
  assert checkpoints.steps() == [3]


@pytest.mark.parametrize("first, traces", [(0, 1), (2, 1), (3, 0), (4, 0)])
def test_a_profile_is_taken_of_its_steps_by_a_run_that_is_there_in_time(tmp_path, first, traces):
  profile = hooks.Profile(tmp_path, 4, 2)
  loop.fit(train_step, start(first), iter([1.0] * 9), [profile], 6)
  assert len(list(tmp_path.rglob("*.xplane.pb"))) == traces
  with pytest.raises(RuntimeError):
    jax.profiler.stop_trace()


def test_schedules_that_are_logged_are_those_that_train():
  """lr/<group> is the rate of the update that led to the row's step, also after skipped updates."""
  schedule = optim.SCHEDULES["trapezoidal"](
    config.Schedule("trapezoidal", 0.5, 0.0, 0.0, 0.0), 1.0, 10
  )
  sink = Rows()
  tx = optim.OPTIMIZERS["adamw"](schedule, b1=0.0, b2=0.0, weight_decay=0.0)

  # With both betas at 0 an update is minus the learning rate.
  def loss_fn(p, batch, rng):
    return jnp.sum(p["w"]) * batch, {"weight": jnp.ones(())}

  run = jax.jit(step.make_train_step(loss_fn, tx, {"hidden": schedule}, seed=0))
  state = step.init_state({"w": jnp.zeros(())}, tx)
  log = hooks.LogMetrics(
    1,
    [sink],
    loop.Clock(),
    state,
    tokens_per_step=1,
    flops_per_step=1.0,
    peak_flops=1.0,
    num_steps=4,
    max_skipped=9,
  )
  moved = [0.0]
  for number, batch in enumerate([1.0, np.nan, 1.0, 1.0], 1):
    state, metrics = run(state, jnp.float32(batch))
    moved.append(float(state.params["w"]))
    log(number, state, metrics)
  steps = -np.diff(moved)
  logged = [row["lr/hidden"] for row in sink]
  np.testing.assert_allclose(
    [logged[i] for i in (0, 2, 3)], [steps[i] for i in (0, 2, 3)], atol=1e-6
  )
  assert steps[1] == 0
