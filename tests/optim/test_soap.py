"""SOAP against its authors' and pytorch_optimizer's, thirty steps in float64 on fixed gradients,
and against one in numpy.

tests/golden/soap_*.npz: nikhilvyas/SOAP (a1e5535) with lr 3e-3, betas (0.95, 0.95), eps 1e-8, decay
0.1; po380: pytorch_optimizer 3.8.0. mpd16 and onesided: axes beyond 16 are not rotated. Snapshots
between the first and the last are stored in float32, which is exact to 6e-8. Q1_<parameter>_<axis>:
bases after the first step.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers import config, mesh
from beyond_outliers.optim.soap import scale_by_soap, soap
from beyond_outliers.params import Axes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RECTANGULAR = ("w1", "w2", "b", "emb")
SNAPSHOTS = (1, 2, 5, 10, 11, 20, 30)
ONE_SIDED = dict(max_dim=16)


@functools.cache
def step_of(tx):
  def step(params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step)


def run(tx, params, gradients, state=None):
  """Gradients [T, ...] -> (state, parameters after every step [T, ...])."""
  state, after = jax.jit(tx.init)(params) if state is None else state, []
  for t in range(len(jax.tree.leaves(gradients)[0])):
    params, state = step_of(tx)(params, state, {key: g[t] for key, g in gradients.items()})
    after.append(params)
  return state, {key: np.stack([tree[key] for tree in after]) for key in params}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def problem(keys, dtype):
  data = np.load(GOLDEN / "problem.npz")
  return tuple(
    {key: jnp.asarray(data[f"{name}_{key}"], dtype) for key in keys} for name in ("p0", "g")
  )


def assert_golden(golden, after, keys, tolerance, snapshots=SNAPSHOTS):
  """tolerance: at the last step, which is stored in float64. Before it: 6e-8 more."""
  for number in snapshots:
    for key in keys:
      expected = golden[f"s{number:02d}_{key}"]
      atol = tolerance if expected.dtype == np.float64 else tolerance + 6e-8
      np.testing.assert_allclose(
        after[key][number - 1], expected, rtol=0, atol=atol, err_msg=f"step {number}, {key}"
      )


@pytest.mark.parametrize(
  "name, keys, hyper, tolerance",
  [
    ("soap_sq_mpd10000_freq1", ("sq",), dict(precondition_frequency=1), 1e-12),
    ("soap_sq_mpd10000_freq5", ("sq",), dict(precondition_frequency=5), 1e-12),
    ("soap_rect_mpd16_freq1", RECTANGULAR, dict(precondition_frequency=1, **ONE_SIDED), 1e-12),
    ("soap_rect_mpd16_freq5", RECTANGULAR, dict(precondition_frequency=5, **ONE_SIDED), 1e-12),
    # Its orthogonal iterations are in float32.
    ("soap_po380_onesided_freq10", RECTANGULAR, dict(count_skipped_step=True, **ONE_SIDED), 1e-7),
  ],
)
def test_the_trajectory_is_the_reference_implementations(name, keys, hyper, tolerance):
  with jax.enable_x64(True):
    _, after = run(soap(0.003, weight_decay=0.1, **hyper), *problem(keys, jnp.float64))
  assert_golden(np.load(GOLDEN / f"{name}_f64.npz"), after, keys, tolerance)


def test_long_axes_are_rotated_too():
  """A gradient of fewer rows than columns leaves bases of its columns undetermined, so the
  reference's are put in. The next basis is undetermined again where an axis is longer than two
  gradients have rows."""
  golden = np.load(GOLDEN / "soap_rect_mpd10000_freq1_f64.npz")
  with jax.enable_x64(True):
    params, gradients = problem(RECTANGULAR, jnp.float64)
    tx = soap(0.003, weight_decay=0.1, precondition_frequency=1)
    state, after = run(tx, params, {key: g[:1] for key, g in gradients.items()})
    assert_golden(golden, after, RECTANGULAR, 0, snapshots=(1,))
    blocks = dict(state[0].blocks)
    for key in ("w1", "w2", "emb"):
      bases = sorted((golden[f"Q1_{key}_{axis}"] for axis in (0, 1)), key=len)
      name = "x".join(str(len(basis)) for basis in bases)
      for ours, theirs in zip(blocks[name].bases, bases, strict=True):
        np.testing.assert_allclose(abs(np.sum(ours[0] * theirs, 0))[:16], 1, atol=1e-10)
      blocks[name] = blocks[name]._replace(bases=tuple(jnp.asarray(basis)[None] for basis in bases))
    state = (state[0]._replace(blocks=blocks), *state[1:])
    _, rest = run(tx, params, {key: g[1:] for key, g in gradients.items()}, state)
  after = {key: np.concatenate([after[key], rest[key]]) for key in RECTANGULAR}
  assert_golden(golden, after, ("w1", "b"), 1e-12)
  assert_golden(golden, after, RECTANGULAR, 1e-12, snapshots=(1, 2))


def test_float32_stays_about_as_close_as_the_references_does():
  """The reference's own float32 run is 3.7e-6 away after 30 steps, by the precision of the smallest
  eigenvectors."""
  golden = np.load(GOLDEN / "soap_sq_mpd10000_freq5_f64.npz")
  _, after = run(
    soap(0.003, weight_decay=0.1, precondition_frequency=5), *problem(("sq",), jnp.float32)
  )
  np.testing.assert_allclose(after["sq"][-1], golden["s30_sq"], rtol=0, atol=3 * 3.72e-6)


def numpy_soap(
  w,
  gradients,
  rate,
  b1=0.95,
  b2=0.95,
  shampoo_beta=None,
  eps=1e-8,
  weight_decay=0.01,
  precondition_frequency=10,
  normalize_gradients=False,
  bias_correction=True,
  count_skipped_step=False,
):
  """The parameters after every step, for a square matrix. The first moment is kept out of the
  basis."""
  beta = b2 if shampoo_beta is None else shampoo_beta
  m, v, (left, right), after = np.zeros_like(w), np.zeros_like(w), (0.0, 0.0), []
  for call, g in enumerate(gradients):
    left, right = beta * left + (1 - beta) * g @ g.T, beta * right + (1 - beta) * g.T @ g
    if call == 0:
      q, p = (np.linalg.eigh(factor)[1][:, ::-1] for factor in (left, right))
      after.append(w)
      continue
    t = call + count_skipped_step
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (q.T @ g @ p) ** 2
    u = q @ (q.T @ m @ p / (np.sqrt(v) + eps)) @ p.T
    if normalize_gradients:
      u = u / np.sqrt(np.mean(u**2))
    if bias_correction:
      u = u * np.sqrt(1 - b2**t) / (1 - b1**t)
    w = (w - rate(call) * u) * (1 - rate(call) * weight_decay)
    after.append(w)
    if t % precondition_frequency == 0:
      first, second = (
        np.argsort(-np.diag(basis.T @ factor @ basis)) for basis, factor in ((q, left), (p, right))
      )
      v = v[first][:, second]
      q, p = np.linalg.qr(left @ q[:, first])[0], np.linalg.qr(right @ p[:, second])[0]
  return np.stack(after)


SWITCHES = [
  dict(),
  dict(shampoo_beta=0.7),
  dict(normalize_gradients=True),
  dict(bias_correction=False),
  dict(count_skipped_step=True),
  dict(b1=0.5, b2=0.8, eps=0.1, weight_decay=0.5),
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: ",".join(switch) or "defaults")
def test_every_switch_does_what_numpy_does(switch):
  """Two matrices in one leaf, whose bases change at every third step, under a schedule: it gives
  step and decay their rate."""
  draw = np.random.default_rng(0)
  start, gradients = draw.standard_normal((2, 7, 7)), draw.standard_normal((11, 2, 7, 7))

  def rate(count):
    return 0.1 / (1 + count)

  with jax.enable_x64(True):
    _, after = run(
      soap(rate, precondition_frequency=3, **switch),
      {"w": jnp.asarray(start)},
      {"w": jnp.asarray(gradients)},
    )
  for i in range(2):
    expected = numpy_soap(start[i], gradients[:, i], rate, precondition_frequency=3, **switch)
    np.testing.assert_allclose(after["w"][:, i], expected, rtol=0, atol=1e-9)


def test_axes_stacks_and_cuts_change_nothing():
  """A stacked leaf updates as its slices alone, a transposed one as its transpose, one that is cut
  as its blocks."""
  draw = np.random.default_rng(1)
  square, long = draw.standard_normal((8, 3, 6, 6)), draw.standard_normal((8, 5, 3))
  apart = {
    **{str(i): square[:, i] for i in range(3)},
    "turned": np.moveaxis(square, (1, 2, 3), (2, 3, 1)),
    "row": np.concatenate([square[:, i] for i in range(3)], 2),
    "long": long.swapaxes(1, 2),
  }
  axes = {
    **{str(i): Axes((), (0,), (1,)) for i in range(3)},
    "turned": Axes((1,), (2,), (0,)),
    "row": Axes((), (0,), (1,)),
    "long": Axes((), (1,), (0,)),
  }

  def moved(gradients, axes):
    with jax.enable_x64(True):
      gradients = {key: jnp.asarray(g) for key, g in gradients.items()}
      tx = soap(0.1, axes=axes, precondition_frequency=2, weight_decay=0.1, block_size=6)
      return run(tx, {key: jnp.ones(g.shape[1:]) for key, g in gradients.items()}, gradients)[1]

  expected, actual = moved({"square": square, "long": long}, None), moved(apart, axes)
  same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
  for i in range(3):
    same(actual[str(i)], expected["square"][:, i])
    same(actual["row"][:, :, 6 * i : 6 * i + 6], expected["square"][:, i])
  same(np.moveaxis(actual["turned"], (2, 3, 1), (1, 2, 3)), expected["square"])
  same(actual["long"].swapaxes(1, 2), expected["long"])


def test_a_normalized_step_is_one_of_the_whole_slice():
  """Whatever its blocks: its RMS is what the correction of biases makes of 1."""
  tx = scale_by_soap(normalize_gradients=True, block_size=4)
  gradients = [{"w": normal(seed, 2, 4, 8)} for seed in (0, 1)]
  update = jax.jit(tx.update)
  _, state = update(gradients[0], tx.init(gradients[0]))
  updates, _ = update(gradients[1], state)
  np.testing.assert_allclose(jnp.mean(updates["w"] ** 2, (1, 2)), 0.05 / 0.05**2, rtol=1e-5)


def test_the_first_update_moves_nothing_and_later_ones_decay():
  params = {"w": jnp.full((3, 3), 2.0), "gain": jnp.full(4, 2.0)}
  zero = jax.tree.map(lambda x: jnp.zeros((3, *x.shape)), params)
  _, after = run(soap(0.1, weight_decay=0.5), params, zero)
  for x in after.values():
    np.testing.assert_allclose(x.reshape(3, -1)[:, 0], [2.0, 2.0 * 0.95, 2.0 * 0.95**2], rtol=1e-6)


def test_odd_leaves_keep_their_type_and_stay_finite():
  """Rows, scalars, nothing but vectors, bfloat16, no gradient at first: bases are orthonormal all
  the same."""
  shapes = {"row": (1, 6), "scalar": (), "gain": (5,), "dead": (2, 4, 4), "half": (3, 4)}
  params = {
    key: jnp.ones(shape, jnp.bfloat16 if key == "half" else jnp.float32)
    for key, shape in shapes.items()
  }
  draw = jax.random.key(0)
  gradients = {key: jax.random.normal(draw, (7, *p.shape), p.dtype) for key, p in params.items()}
  gradients["dead"] = gradients["dead"].at[:4].set(0)
  tx = soap(0.1, precondition_frequency=2, refresh="staggered")
  state, after = run(tx, params, gradients)
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, params)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, params)
  )
  for bucket in state[0].blocks.values():
    assert bucket.momentum.dtype == bucket.second_moment.dtype == jnp.float32
    assert not np.any(bucket.kept) and np.less(bucket.age, 2).all()
    for basis in bucket.bases:
      np.testing.assert_allclose(
        basis.swapaxes(1, 2) @ basis,
        np.broadcast_to(np.eye(basis.shape[1]), basis.shape),
        atol=1e-5,
      )
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((state, after)))
  vectors = {key: gradients[key] for key in ("gain", "scalar")}
  _, alone = run(tx, {key: params[key] for key in vectors}, vectors)
  jax.tree.map(np.testing.assert_array_equal, alone, {key: after[key] for key in vectors})


def test_a_basis_that_is_not_finite_is_refused():
  """Factors of the second matrix overflow: it goes on as if no bases were due, the others do not
  notice."""
  every, never = scale_by_soap(precondition_frequency=1), scale_by_soap(precondition_frequency=100)
  params, first, later = (
    {"w": jnp.zeros((3, 4, 4))},
    {"w": normal(5, 3, 3, 4, 4)},
    {"w": normal(6, 2, 3, 4, 4)},
  )
  state, _ = run(every, params, first)
  bucket = state.blocks["4x4"]
  overflowed = tuple(factor.at[1, (0, 1), (1, 0)].set(jnp.inf) for factor in bucket.factors)
  broken = state._replace(blocks={"4x4": bucket._replace(factors=overflowed)})
  (calm, _), (still, _), (after, moved) = (
    run(tx, params, later, before)
    for tx, before in ((every, state), (never, state), (every, broken))
  )
  calm, still, after = (s.blocks["4x4"] for s in (calm, still, after))
  np.testing.assert_array_equal(after.kept, [[0, 0], [2, 2], [0, 0]])
  np.testing.assert_array_equal(after.age, [[0, 0], [2, 2], [0, 0]])
  assert np.isfinite(moved["w"]).all()
  for ours, as_calm, as_still in zip(
    *((s.momentum, s.second_moment, *s.bases) for s in (after, calm, still)), strict=True
  ):
    np.testing.assert_array_equal(ours[::2], as_calm[::2])
    np.testing.assert_allclose(ours[1], as_still[1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_staggered_refreshes_are_dealt_evenly():
  """Seven and two blocks in three steps: three of nine at every step."""
  params = {"many": jnp.zeros((7, 4, 4)), "few": jnp.zeros((2, 3, 3))}
  gradients = {"many": normal(0, 9, 7, 4, 4), "few": normal(1, 9, 2, 3, 3)}
  tx = scale_by_soap(precondition_frequency=3, refresh="staggered")

  state, update, ages = tx.init(params), jax.jit(tx.update), []
  for t in range(9):
    _, state = update({key: g[t] for key, g in gradients.items()}, state)
    ages.append(np.concatenate([bucket.age[:, 0] for bucket in state.blocks.values()]))
  ages = np.stack(ages)
  np.testing.assert_array_equal(ages[0], 0)
  np.testing.assert_array_equal((ages[3:] == 0).sum(1), 3)
  np.testing.assert_array_equal(ages[3:].max(1), 2)


def test_staggered_at_every_step_is_together():
  params, gradients = {"w": jnp.zeros((3, 4, 4))}, {"w": normal(2, 6, 3, 4, 4)}
  (_, together), (_, staggered) = (
    run(scale_by_soap(precondition_frequency=1, refresh=how), params, gradients)
    for how in ("together", "staggered")
  )
  np.testing.assert_allclose(staggered["w"], together["w"], rtol=0, atol=1e-6)


def test_in_bfloat16_the_state_is_half_and_the_steps_are_nearly_the_same():
  """Bytes: 8 for the moments, 8 (m² + n²) / mn for factors and bases."""
  m, n = 24, 40
  gradients = normal(5, 30, m, n) * jnp.linspace(1, 3, n)  # eigenvalues that lie apart
  params, taken = {"w": jnp.zeros((m, n))}, {}
  for dtype, share in (("float32", 1), ("bfloat16", 1 / 2)):
    tx = soap(0.1, precondition_frequency=5, weight_decay=0.0, preconditioner_dtype=dtype)
    state, after = run(tx, params, {"w": gradients})
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert size == pytest.approx(8 * m * n + 8 * share * (m * m + n * n), rel=0.01)
    taken[dtype] = np.diff(after["w"], axis=0)
  with jax.enable_x64(True):
    (bucket,) = tx.init({"w": jnp.zeros((m, n), jnp.float64)})[0].blocks.values()
  assert all(a.dtype == jnp.bfloat16 for a in (*bucket.factors, *bucket.bases)), "as in Shampoo"
  for one, other in zip(taken["float32"], taken["bfloat16"], strict=True):
    assert 1e-5 < np.linalg.norm(other - one) / np.linalg.norm(one) < 0.1


@pytest.mark.slow
def test_eight_devices_do_what_one_does():
  """Staggered: whose turn it is does not depend on how many devices share the blocks."""
  devices = mesh.make_mesh(config.Mesh(2, 2, 2))
  shapes = {"w": (2, 4, 4), "up": (4, 8), "gain": (2, 4), "scalar": ()}
  split = {
    "w": jax.P(None, "fsdp", "model"),
    "up": jax.P("model", "fsdp"),
    "gain": jax.P(),
    "scalar": jax.P(),
  }
  axes = {
    "w": Axes((0,), (1,), (2,)),
    "up": Axes((), (0,), (1,)),
    "gain": Axes((0,), (), (1,)),
    "scalar": Axes(),
  }
  hyper = dict(
    axes=axes, block_size=4, precondition_frequency=3, refresh="staggered", normalize_gradients=True
  )
  params = {key: normal(3, *shape) for key, shape in shapes.items()}
  gradients = {key: normal(4, 5, *shape) for key, shape in shapes.items()}

  def placed(tree, *first):
    return {
      key: jax.device_put(x, jax.NamedSharding(devices, jax.P(*first, *split[key])))
      for key, x in tree.items()
    }

  _, one = run(soap(0.1, **hyper), params, gradients)
  with mesh.use(devices):
    state, eight = run(soap(0.1, mesh=devices, **hyper), placed(params), placed(gradients, None))
  for key in shapes:
    np.testing.assert_allclose(eight[key], one[key], rtol=0, atol=2e-5, err_msg=key)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
  "hyper, message",
  [
    (dict(refresh="stagered"), "refresh = 'stagered': did you mean 'staggered'"),
    (dict(precondition_frequency=0), "precondition_frequency = 0"),
    (dict(max_dim=-1), "max_dim = -1"),
    (dict(block_size=0), "block_size = 0"),
    (
      dict(preconditioner_dtype="bfloat16", b2=0.999),
      "b2 = 0.999: averages in bfloat16 stop changing above 0.99",
    ),
    (
      dict(preconditioner_dtype="bfloat16", shampoo_beta=0.999),
      "shampoo_beta = 0.999: averages in bfloat16 stop changing above 0.99",
    ),
  ],
)
def test_bad_arguments_are_refused(hyper, message):
  with pytest.raises(ValueError, match=message):
    soap(0.1, **hyper)


def test_decay_needs_the_parameters():
  tx, params = soap(0.1), {"w": jnp.zeros((2, 2))}
  with pytest.raises(ValueError, match="params: soap decays"):
    jax.eval_shape(lambda gradients: tx.update(gradients, tx.init(gradients)), params)
