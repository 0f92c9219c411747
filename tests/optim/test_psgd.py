"""PSGD against kron_torch and pytorch_optimizer on fixed gradients and probes, against an
implementation in numpy, and by how well it whitens.

tests/golden/kron_torch_probed_f32.npz, kron_po380_probed_f32.npz: kron_torch (884427c) and Kron of
pytorch_optimizer 3.8.0, thirty steps in float32, lr 0.01, decay 0.1, factors updated at every step,
no balancing; Q<step>_<parameter>_<axis> are these. psgd_probes.npz: their V.
psgd_fixture_torch.npz: matrices A (12, 12) and B (8, 8) of condition 1000 and 100, and a start X0.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers import config, optim
from beyond_outliers.mesh import make_mesh
from beyond_outliers.optim.axes import matrix_mask
from beyond_outliers.optim.linalg import chunks, triangular
from beyond_outliers.optim.psgd import drawn, psgd, scale_by_psgd

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
KEYS = ("w1", "w2", "b", "emb")
ALWAYS = dict(update_probability=1.0)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def given(probes):
  """Probes of every step, [T, *block] for each shape of blocks, as scale_by_psgd takes them."""
  return lambda key, count, shape: jnp.asarray(probes[shape])[count]


@functools.partial(jax.jit, static_argnames="arguments")
def updated(gradient, state, numbers, arguments):
  return scale_by_psgd(**numbers, **dict(arguments)).update(gradient, state)


def run(gradients, state=None, **arguments):
  """Gradients of each step -> (direction, state) after each. All numbers are traced: many tests
  share a program."""
  arguments = {**ALWAYS, "balance_probability": 0.0, **arguments}
  numbers = {name: value for name, value in arguments.items() if isinstance(value, float)}
  others = tuple((name, value) for name, value in arguments.items() if name not in numbers)
  state, after = scale_by_psgd(**arguments).init(gradients[0]) if state is None else state, []
  for gradient in gradients:
    direction, state = updated(gradient, state, numbers, others)
    after.append((direction, state))
  return after


@pytest.mark.parametrize(
  "name, hyper", [("kron_torch", dict()), ("kron_po380", dict(noise="none", clip_eps=1e-6))]
)
def test_the_trajectory_is_the_libraries(name, hyper):
  golden, problem, stored = (
    np.load(GOLDEN / f"{file}.npz") for file in (f"{name}_probed_f32", "problem", "psgd_probes")
  )
  probes = {}
  for key in KEYS:
    v = stored[f"v_{key}"]
    v = v.swapaxes(1, 2) if v.ndim == 3 and v.shape[1] > v.shape[2] else v
    probes[v.shape[1:]] = v
  tx = optax.chain(
    scale_by_psgd(probes=given(probes), balance_probability=0.0, **ALWAYS, **hyper),
    optax.add_decayed_weights(0.1, matrix_mask(None)),
    optax.scale_by_learning_rate(0.01),
  )

  def step(carry, gradient):
    params, state = carry
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (params, {bucket: s.factors for bucket, s in state[0].blocks.items()})

  params = {key: jnp.asarray(problem[f"p0_{key}"]) for key in KEYS}
  gradients = {key: jnp.asarray(problem[f"g_{key}"]) for key in KEYS}
  _, (after, factors) = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), gradients))(params)

  for number in (1, 2, 5, 10, 11, 20, 30):
    for key in KEYS:
      expected = golden[f"s{number:02d}_{key}"]
      np.testing.assert_allclose(
        after[key][number - 1], expected, rtol=0, atol=1e-6, err_msg=f"step {number}, {key}"
      )
  for number in (1, 30):
    for key in KEYS:
      shape = params[key].shape
      for axis, of_bucket in zip(
        np.argsort(shape), factors["x".join(map(str, sorted(shape)))], strict=True
      ):
        expected = golden[f"Q{number:02d}_{key}_{axis}"]
        np.testing.assert_allclose(
          of_bucket[number - 1, 0], expected, rtol=0, atol=1e-6 * abs(expected).max()
        )


def reference(
  gradients,
  probes,
  *,
  longest=99,
  rate=0.1,
  decay=0.9,
  start=1.0,
  noise=(True, True),
  clip=1.1,
  eps=1e-12,
):
  """kron_torch of one matrix or vector in numpy, by the formulas -> direction at every step,
  factors."""
  shape = gradients[0].shape
  qs = [np.eye(d) if len(shape) == 2 and 1 < d <= longest else np.ones(d) for d in shape]
  qs = [start ** (1 / len(shape)) * q for q in qs]

  def full(q):
    return q if q.ndim == 2 else np.diag(q)

  def as_matrix(x):
    return x if x.ndim == 2 else x[:, None]

  mean, directions = np.zeros(shape), []
  for t, (g, v) in enumerate(zip(gradients, probes, strict=True), 1):
    mean = decay * mean + (1 - decay) * g
    h = as_matrix(mean / (1 - decay**t))
    v = as_matrix(v)
    noisy = h + np.sqrt(np.finfo(np.float32).eps) * np.abs(h).mean() * v
    left, right = full(qs[0]), full(qs[1]) if len(qs) == 2 else np.eye(1)
    a = left @ (noisy if noise[0] else h) @ right.T
    b = np.linalg.inv(left).T @ v @ np.linalg.inv(right)
    new = []
    for q, x, y in zip(qs, (a, a.T), (b, b.T), strict=False):
      t1, t2 = x @ x.T, y @ y.T
      if q.ndim == 1:
        new.append(q - rate * np.diag(t1 - t2) * q / np.diag(t1 + t2).max())
      else:
        s = t1 + t2
        z = s @ s[:, (s * s).sum(0).argmax()]
        new.append(q - rate * np.triu(t1 - t2) @ q / np.linalg.norm(s @ z) * np.linalg.norm(z))
    qs = new
    left, right = full(qs[0]), full(qs[1]) if len(qs) == 2 else np.eye(1)
    u = left.T @ left @ (noisy if noise[1] else h) @ right.T @ right
    directions.append((u * min(1, clip / (np.sqrt((u * u).mean()) + eps))).reshape(shape))
  return directions, qs


@pytest.mark.parametrize(
  "shapes, arguments, same",
  [
    ([(4, 6)], dict(), dict()),
    ([(4, 6)], dict(noise="preconditioner"), dict(noise=(True, False))),
    ([(4, 6)], dict(noise="none", momentum=0), dict(noise=(False, False), decay=0.0)),
    ([(4, 6)], dict(max_size_triangular=5, preconditioner_lr=0.2), dict(longest=5, rate=0.2)),
    ([(4, 6)], dict(max_size_triangular=0, cache=False), dict(longest=0)),
    (
      [(1, 6), (6,), (1,)],
      dict(preconditioner_init=9.0, clip_rms=0.3, clip_eps=0.1),
      dict(start=9.0, clip=0.3, eps=0.1),
    ),
  ],
)
def test_every_step_is_the_formulas(shapes, arguments, same):
  gradients = {str(shape): normal(0, 5, *shape).astype(np.float64) / 8 for shape in shapes}
  probes = {shape: normal(1, 5, *shape).astype(np.float64) for shape in shapes}
  with jax.enable_x64(True):
    after = run(
      [{key: jnp.asarray(g[t]) for key, g in gradients.items()} for t in range(5)],
      probes=given(probes),
      **arguments,
    )
  for shape in shapes:
    expected, factors = reference(gradients[str(shape)], probes[shape], **same)
    for (directions, _), direction in zip(after, expected, strict=True):
      np.testing.assert_allclose(directions[str(shape)], direction, rtol=1e-9, atol=1e-11)
    state = after[-1][1].blocks["x".join(map(str, shape))]
    for ours, q in zip(state.factors, factors, strict=True):
      np.testing.assert_allclose(ours[0], q, rtol=1e-9, atol=1e-11)
    assert state.kept == 0


def test_panels_make_whole_products():
  assert [p.start for p in triangular.rows(600)] == [0, 256, 512] and len(
    triangular.rows(5000)
  ) == 4

  @jax.jit
  def by_panels(q, x):
    gram = triangular.gram(x)
    return (
      triangular.times(q, x),
      triangular.transposed_times(q, x),
      triangular.transposed_solve(q, x),
      triangular.square(q),
      triangular.column_squares(gram),
      triangular.triangle_product(gram, q),
      triangular.transposed_solve(0 * q, x),
    )

  with jax.enable_x64(True):
    q, x = np.triu(normal(0, 600, 600)) / 30 + np.eye(600), normal(1, 600, 3).astype(np.float64)
    s = x @ x.T
    whole = q @ x, q.T @ x, np.linalg.solve(q.T, x), q.T @ q, (s * s).sum(0), np.triu(s) @ q, x
    for ours, expected in zip(by_panels(q, x), whole, strict=True):
      np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


def steps_with_update(start, steps, since_update, **arguments):
  """Counted from 0."""
  gradients = [{"w": jnp.asarray(normal(t, 3))} for t in range(steps)]
  state = (
    scale_by_psgd()
    .init(gradients[0])
    ._replace(count=jnp.int32(start), since_update=jnp.int32(since_update))
  )
  states = [state, *(state for _, state in run(gradients, state, **arguments))]
  factors = [state.blocks["3"].factors[0] for state in states]
  return [start + t for t in range(steps) if (factors[t] != factors[t + 1]).any()]


@pytest.mark.parametrize(
  "start, since_update, steps",
  [
    (0, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    (496, 0, [496, 497, 498, 499, 500, 502, 504]),  # exp((500 - n) / 1000) falls below 1
    (1190, 0, [1191, 1193, 1196, 1199]),  # and below 1/2 after 1193
    (9000, 30, [9003]),  # the least is 0.03: 34 steps
  ],
)
def test_the_schedule_counts_steps(start, since_update, steps):
  assert steps_with_update(start, 10, since_update, update_probability=None) == steps


@pytest.mark.parametrize(
  "probability, steps", [(1.0, [0, 1, 2, 3, 4, 5, 6]), (0.5, [1, 3, 5]), (0.4, [2, 5])]
)
def test_a_constant_probability_is_a_period(probability, steps):
  assert steps_with_update(0, 7, 0, update_probability=probability) == steps


def test_balancing_changes_nothing_but_the_range_of_factors():
  gradients = [{"w": jnp.asarray(normal(t, 3, 4, 6))} for t in range(30)]
  start = scale_by_psgd().init(gradients[0])
  short, long = start.blocks["4x6"].factors
  start.blocks["4x6"] = start.blocks["4x6"]._replace(factors=(8 * short, long / 8))
  never, always, sometimes = (run(gradients, start, balance_probability=p) for p in (0.0, 1.0, 0.2))
  for directions in zip(
    *([direction["w"] for direction, _ in of] for of in (never, always, sometimes)), strict=True
  ):
    np.testing.assert_allclose(directions[1], directions[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(directions[2], directions[0], rtol=1e-3, atol=1e-4)

  def ratios(of):
    factors = [state.blocks["4x6"].factors for _, state in of]
    return np.array(
      [[abs(short[i]).max() / abs(long[i]).max() for i in range(3)] for short, long in factors]
    )

  assert ratios(never).min() > 16
  np.testing.assert_allclose(ratios(always), 1, rtol=1e-5)
  chance = (ratios(sometimes) < 2).all(1)
  assert not chance[0] and chance[-1] and (ratios(sometimes)[~chance] > 16).all(), (
    "all blocks by one draw"
  )


def test_the_clip_is_of_every_slice():
  gradient = {"w": jnp.asarray(normal(0, 3, 4, 6)) * jnp.array([10.0, 1.0, 0.1])[:, None, None]}

  def rms(x):
    return np.sqrt(np.mean(np.square(x), axis=(1, 2)))

  for limit in (1.1, 0.5, float("inf")):
    ((direction, _),) = run([gradient], clip_rms=limit, update_probability=1e-6)
    np.testing.assert_allclose(
      rms(direction["w"]), np.minimum(rms(gradient["w"]), limit), rtol=1e-5
    )


def test_slices_are_matrices_of_their_own():
  gradients = [{"w": jnp.asarray(normal(t, 3, 4, 6))} for t in range(3)]
  apart = [{str(i): x for i, x in enumerate(g["w"])} for g in gradients]
  for (directions, _), (expected, _) in zip(run(gradients), run(apart), strict=True):
    np.testing.assert_array_equal(directions["w"], np.stack(list(expected.values())))


def test_a_matrix_may_lie_either_way():
  gradients = [{"w": jnp.asarray(normal(t, 3, 4, 6))} for t in range(3)]
  turned = [{"w": g["w"].swapaxes(1, 2)} for g in gradients]
  turned = run(turned, axes=lambda _: {"w": optim.Axes((0,), (2,), (1,))})
  for (directions, _), (expected, _) in zip(turned, run(gradients), strict=True):
    np.testing.assert_array_equal(directions["w"], expected["w"].swapaxes(1, 2))


def test_which_axes_have_triangles():
  params = {
    "wide": jnp.zeros((4, 9)),
    "row": jnp.zeros((1, 4)),
    "vector": jnp.zeros(4),
    "scalar": jnp.zeros(()),
  }

  def shapes(tree):
    return {name: [x.shape for x in s] for name, s in tree.items()}

  state = scale_by_psgd(max_size_triangular=8).init(params)
  assert shapes({name: s.factors for name, s in state.blocks.items()}) == {
    "4x9": [(1, 4, 4), (1, 9)],
    "1x4": [(1, 1), (1, 4, 4)],
    "4": [(1, 4)],
    "1": [(1, 1)],
  }
  assert shapes({name: jax.tree.leaves(s.applied) for name, s in state.blocks.items()}) == {
    "4x9": [(1, 4, 4)],
    "1x4": [(1, 4, 4)],
    "4": [],
    "1": [],
  }
  lean = scale_by_psgd(max_size_triangular=8, momentum=0.0, cache=False).init(params).blocks["4x9"]
  assert lean.momentum is None and lean.applied == ()


def test_blocks_are_worked_on_a_few_at_a_time(monkeypatch):
  gradients = [{"w": jnp.asarray(normal(t, 3, 4, 6))} for t in range(2)]
  together = run(gradients)[-1]
  monkeypatch.setattr(chunks, "CHUNK", 2 * 24)
  map_matrices = run(gradients, probes=lambda *args: drawn(*args))[-1]  # another program
  for x, y in zip(jax.tree.leaves(map_matrices), jax.tree.leaves(together), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_cache_changes_nothing():
  gradients = [{"w": jnp.asarray(normal(t, 3, 4, 6))} for t in range(6)]
  pairs = (run(gradients, update_probability=0.4, cache=cache) for cache in (True, False))
  for (directions, _), (expected, _) in zip(*pairs, strict=True):
    np.testing.assert_allclose(directions["w"], expected["w"], rtol=0, atol=1e-6)


def test_an_update_that_is_not_finite_is_refused():
  """Of the blocks that it would spoil, and of no other."""
  good, nan = normal(0, 4, 6), np.full((4, 6), np.nan, np.float32)
  gradients = [
    {"w": jnp.stack(w)}
    for w in ((good, 0 * good, good), (good, 0 * good, nan), (good, 0 * good, good))
  ]
  (_, first), (direction, second), (_, third) = run(gradients, preconditioner_init=4.2e9)
  kept = [state.blocks["4x6"].kept for state in (first, second, third)]
  np.testing.assert_array_equal(kept, [[0, 1, 0], [0, 2, 1], [0, 3, 2]])
  assert (
    np.isfinite(direction["w"][:2]).all()
    and not direction["w"][1].any()
    and direction["w"][0].any()
  )
  for x, y in zip(second.blocks["4x6"].factors, third.blocks["4x6"].factors, strict=True):
    np.testing.assert_array_equal(x[1:], y[1:])
    assert (x[0] != y[0]).any()


@pytest.mark.parametrize("shape", [(4095,), (4096,), (70, 70), (2, 5000)])
def test_one_nan_is_refused_in_blocks_of_any_size(shape):
  good = {"w": jnp.asarray(normal(0, *shape))}
  bad = {"w": good["w"].at[(0,) * len(shape)].set(jnp.nan)}
  runs = run([good, bad, good], momentum=0.0, noise="none", max_size_triangular=100)
  assert [int(state.blocks["x".join(map(str, shape))].kept[0]) for _, state in runs] == [0, 1, 1]
  assert np.isfinite(runs[-1][0]["w"]).all()


def test_eight_devices_do_what_one_does():
  """On three blocks: five are padding, whose factors stay zero."""
  gradients = [{"w": jnp.asarray(normal(t, 3, 4, 6))} for t in range(3)]
  one, eight = run(gradients), run(gradients, mesh=make_mesh(config.Mesh(2, 2, 2)))
  for (directions, _), (expected, _) in zip(eight, one, strict=True):
    np.testing.assert_allclose(directions["w"], expected["w"], rtol=1e-5, atol=1e-6)
  for x, y in zip(*(jax.tree.leaves(of[-1][1].blocks) for of in (eight, one)), strict=True):
    np.testing.assert_allclose(x[:3], y, rtol=1e-5, atol=1e-6)
    assert len(x) == 8 and not x[3:].any()


def test_random_numbers_follow_from_seed_and_step():
  gradients = [{"w": jnp.asarray(normal(0, 3, 4, 6))}] * 2
  first, same, other = (
    run(gradients, scale_by_psgd(seed=seed).init(gradients[0])) for seed in (0, 0, 1)
  )
  jax.tree.map(np.testing.assert_array_equal, same, first)
  assert (other[0][0]["w"] != first[0][0]["w"]).any()
  seen = []

  def probe(key, count, shape):
    jax.debug.callback(lambda x: seen.append(tuple(x.tolist())), jax.random.key_data(key))
    return drawn(key, count, shape)

  run([{"u": jnp.ones(3), "v": jnp.ones(2), "w": jnp.ones(3)}] * 2, probes=probe)
  jax.effects_barrier()
  assert len(set(seen)) == len(seen) == 4, "one for every step and shape"


def test_products_are_of_full_precision_unless_told_otherwise():
  """Those of a step, and those that make the first QᵀQ."""
  params = {"w": jnp.ones((4, 6))}

  def products(tx):
    programs = [jax.jit(tx.init).lower(params), jax.jit(tx.update).lower(params, tx.init(params))]
    found = [re.findall(".*dot_general.*", program.as_text()) for program in programs]
    assert all(found)
    return [*found[0], *found[1]]

  assert all("[HIGHEST, HIGHEST]" in line for line in products(scale_by_psgd()))
  assert not any("HIGHEST" in line for line in products(scale_by_psgd(precision="default")))


def test_weights_decay_where_they_are_matrices():
  gradient = {"w": jnp.asarray(normal(0, 3, 4, 6)), "b": jnp.zeros(6)}
  params, tx = jax.tree.map(jnp.ones_like, gradient), psgd(0.1, weight_decay=0.5)
  updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
  ((direction, _),) = run([{"w": gradient["w"]}])
  np.testing.assert_allclose(updates["w"], -0.1 * (direction["w"] + 0.5), rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(updates["b"], 0)


@pytest.mark.parametrize(
  "hyper, message",
  [
    (dict(noise="precondition"), "noise = 'precondition': did you mean 'preconditioner'"),
    (dict(update_probability=0.0), "update_probability = 0.0: expected"),
    (dict(update_probability=1.5), "update_probability = 1.5: expected"),
    (dict(max_size_triangular=-1), "max_size_triangular = -1: expected"),
    (dict(momentum=1.0), "momentum = 1.0: expected"),
  ],
)
def test_bad_arguments_are_refused(hyper, message):
  with pytest.raises(ValueError, match=message):
    psgd(0.1, **hyper)


def test_it_whitens_and_descends_as_the_libraries_do():
  """Five seeds. Gradients A^½ N B^½, 2000 updates: the condition number of what is left, which was
  316; the libraries' median is 1.94. Then ½ tr(Xᵀ A X B) under such noise, 400 steps: final losses
  of 1.7e-4 to 2.4e-4 there, of AdamW 1e-3."""
  fixture = np.load(GOLDEN / "psgd_fixture_torch.npz")
  a, b = (jnp.asarray(fixture[name], jnp.float32) for name in "AB")

  def root(x):
    values, vectors = np.linalg.eigh(x)
    return jnp.asarray(vectors * np.sqrt(values) @ vectors.T, jnp.float32)

  a_root, b_root = root(fixture["A"]), root(fixture["B"])

  def colored(key):
    return a_root @ jax.random.normal(key, (12, 8)) @ b_root

  def with_seed(tx, x, seed):
    return tx.init(x)._replace(key=jax.random.key_data(jax.random.key(seed)))

  def whiten(seed):
    tx = scale_by_psgd(momentum=0.0, **ALWAYS)

    def step(state, key):
      return tx.update(colored(key), state)[1], None

    state, _ = jax.lax.scan(
      step,
      with_seed(tx, jnp.zeros((12, 8)), seed),
      jax.random.split(jax.random.key(100 + seed), 2000),
    )
    return [q[0] for q in state.blocks["8x12"].factors]

  def descend(seed):
    tx = scale_by_psgd(**ALWAYS)

    def step(carry, now):
      (x, state), (key, rate) = carry, now
      direction, state = tx.update(a @ x @ b + 0.01 * colored(key), state)
      return (x - rate * direction, state), None

    x = jnp.asarray(fixture["X0"], jnp.float32)
    (x, _), _ = jax.lax.scan(
      step,
      (x, with_seed(tx, x, seed)),
      (jax.random.split(jax.random.key(200 + seed), 400), 0.05 * (1 - jnp.arange(400) / 400)),
    )
    return 0.5 * jnp.sum(x * (a @ x @ b))

  (of_b, of_a), losses = jax.jit(jax.vmap(lambda seed: (whiten(seed), descend(seed))))(
    jnp.arange(5)
  )

  def cond(q, x):
    return np.linalg.cond(q @ x @ q.swapaxes(1, 2))

  assert 1.7 < np.median(cond(np.asarray(of_a), a_root) * cond(np.asarray(of_b), b_root)) < 2.3
  assert min(losses) > 1.4e-4 and max(losses) < 3e-4
