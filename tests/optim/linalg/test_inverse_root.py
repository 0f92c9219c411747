"""Inverse roots against eigendecompositions in float64, and each method on matrices that are hard
in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers.ops import linalg
from beyond_outliers.optim.linalg import coupled_iterations, inverse_root
from beyond_outliers.optim.linalg.inverse_root import ROOTS

D, STACK = 8, 6  # of nearly all tests, so that they share compiled programs
ORDERS = {"eigh": (1, 1.5, 4), "newton": (1, 2, 3, 4), "denman_beavers": (2, 4, 8), "qr": (1.5, 4)}
# The iterations stop where no entry is off by more than 1e-6.
PRECISION = {"eigh": 1e-12, "newton": 2e-6, "denman_beavers": 2e-6, "qr": 1e-12}


def spectrum(eigenvalues, seed=0):
  """A float64 matrix of these eigenvalues."""
  q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))[0]
  return (q * np.asarray(eigenvalues, float)) @ q.T


def graded(condition, seed=0, d=D):
  return spectrum(np.logspace(0, -np.log10(condition), d), seed)


def low_rank(rank, seed=0):
  g = np.random.default_rng(seed).standard_normal((D, rank))
  return g @ g.T


def exact_root(a, p, ridge=0.0):
  values, vectors = np.linalg.eigh(a)
  return (vectors * (np.maximum(values, 0) + ridge) ** (-1 / p)) @ vectors.T


def largest(a):
  return np.linalg.eigvalsh(a)[-1]


def close(actual, expected, tolerance):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@functools.partial(jax.jit, static_argnames=("name", "p", "relative"))
def compute(name, a, p, eps, basis, relative):
  return ROOTS[name].compute(a, p, eps, relative=relative, basis=basis)


def root(name, matrices, p, eps=0.0, basis=None, relative=False, dtype=np.float32):
  """The method on a list of matrices, in a stack filled up with identities, with no basis unless
  one is given. eps is traced."""

  def stack(x):
    return jnp.asarray(np.stack([*x, *[np.eye(len(x[0]))] * (STACK - len(x))]), dtype)

  basis = [np.zeros_like(x) for x in matrices] if basis is None else basis
  found = compute(name, stack(matrices), p, eps, stack(basis) if ROOTS[name].warm else (), relative)
  return jax.tree.map(lambda x: np.asarray(x[: len(matrices)]), found)


@pytest.mark.parametrize("name", ROOTS)
def test_roots_of_well_conditioned_matrices(name):
  with jax.enable_x64(True):
    for p in ORDERS[name]:
      for a in ([graded(30, 0), graded(30, 1)], [np.array([[0.7]])]) if p == 4 else ([graded(30)],):
        found = root(name, a, p, 1e-3, dtype=np.float64)
        assert found.root.dtype == found.residual.dtype == np.float64
        close(found.root, np.stack([exact_root(x, p, 1e-3) for x in a]), PRECISION[name])
        assert np.all((found.residual >= 0) & (found.residual < PRECISION[name]))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", ROOTS)
def test_float32_stays_float32(name, x64):
  with jax.enable_x64(x64):
    found = root(name, [graded(100)], 4, 1e-3)
  assert found.root.dtype == found.residual.dtype == np.float32
  close(found.root[0], exact_root(graded(100), 4, 1e-3), 1e-5)
  assert found.residual[0] < 1e-5


@pytest.mark.parametrize("name", ROOTS)
def test_matrices_of_a_stack_do_not_touch_each_other(name):
  """Each has its own number of steps and of attempts, and may fail alone."""
  matrices = [
    graded(100),
    low_rank(2),
    np.full((D, D), np.nan),
    np.zeros((D, D)),
    -np.eye(D),
    graded(1e5),
  ]
  together = root(name, matrices, 4, 1e-9)
  for i, a in enumerate(matrices):
    others = [np.eye(D)] * STACK
    others[i] = a
    alone = root(name, others, 4, 1e-9)
    np.testing.assert_array_equal(together.residual[i], alone.residual[i])
    np.testing.assert_array_equal(together.root[i], alone.root[i])
  np.testing.assert_array_equal(
    np.isfinite(together.residual[[0, 1, 2, 3, 5]]), [True, True, False, True, True]
  )
  assert np.all(together.residual[[0, 1, 3, 5]] < 1e-2)


@pytest.mark.parametrize("eps", [1e-10, 1e-6])
@pytest.mark.parametrize("name", ["eigh", "qr"])
def test_eigenvectors_make_finite_roots_of_deficient_matrices(name, eps):
  """Also where float32 does not see eps beside the largest eigenvalue; the backward error is small
  all the same."""
  matrices = [np.zeros((D, D)), low_rank(1), low_rank(4), 1e4 * low_rank(4), graded(1e12)]
  for relative in (False, True):
    found = root(name, matrices, 4, eps, relative=relative)
    assert np.all(found.residual < 1e-5)
    for a, r in zip(matrices, found.root.astype(float), strict=True):
      values, ridge = np.linalg.eigvalsh(r), eps * max(largest(a), 1e-25) if relative else eps
      np.testing.assert_allclose(values[0], (largest(a) + ridge) ** -0.25, rtol=1e-2)
      assert values[-1] < 1.01 * ridge**-0.25


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("name", ["newton", "denman_beavers"])
def test_iterations_raise_eps_until_float32_sees_it_or_say_that_they_failed(name, p):
  matrices = [np.zeros((D, D)), low_rank(1), low_rank(3), 1e4 * low_rank(3)]
  found = root(name, matrices, p, 1e-9)
  assert np.all(np.isfinite(found.root))
  assert np.all(found.residual[:3] < 0.01)
  assert (
    0.05 < found.residual[3] < 10
  )  # all six are nothing beside an eigenvalue of 1e5; it stops before it diverges
  for a, r in zip(matrices[:3], found.root[:3].astype(float), strict=True):
    values = np.linalg.eigvalsh(r)
    np.testing.assert_array_equal(r, r.T)
    np.testing.assert_allclose(values[0], (largest(a) + 1e-9) ** (-1 / p), rtol=1e-2)
    assert 0.9e-9 < values[-1] ** -p < 1.1e-4


@pytest.mark.parametrize("name", ["newton", "denman_beavers"])
def test_what_iterations_call_a_root_is_positive_definite(name):
  """With some of these seeds, if the product is not kept symmetric, rounding leads it to I while
  the root is indefinite."""
  draws = (np.random.default_rng(seed).standard_normal((32, 3)) for seed in range(64))
  found = compute(
    name, jnp.asarray(np.stack([g @ g.T for g in draws]), np.float32), 2, 1e-9, (), False
  )
  assert np.all(found.residual < 0.01)
  assert np.linalg.eigvalsh(np.asarray(found.root, float)).min() > 0


def test_an_iteration_stops_where_float32_can_do_no_better(monkeypatch):
  products, matmul = [], coupled_iterations.matmul
  monkeypatch.setattr(coupled_iterations, "matmul", lambda x, y: products.append(1) or matmul(x, y))
  with jax.disable_jit():
    found = ROOTS["denman_beavers"].compute(
      jnp.asarray(graded(1e6, d=64)[None], np.float32), 2, 0.0, relative=False, basis=()
    )
  assert 1e-6 < found.residual[0] < 1e-3
  assert len(products) < 3 * 30


def test_the_residual_of_roots_of_roots_is_the_worst():
  with jax.enable_x64(True):
    first, *others = (
      root("denman_beavers", [graded(30)], p, 1e-3, dtype=np.float64).residual[0] for p in (2, 4, 8)
    )
  assert first > 1e-8
  assert all(other >= first for other in others)


@pytest.mark.parametrize("name", ROOTS)
def test_a_relative_eps_is_a_multiple_of_the_largest_eigenvalue(name):
  a = 5 * graded(1e3)
  found = root(name, [a], 4, 1e-2, relative=True)
  close(found.root[0], exact_root(a, 4, 1e-2 * largest(a)), 1e-5)


@pytest.mark.parametrize("name", ROOTS)
def test_a_relative_root_scales_with_the_matrix(name):
  """Factors of tiny gradients are tiny: in float32 the squares of their entries are zero."""
  scales = np.array([1.0, 1e-24, 1e24])
  found = root(
    name, [*(scale * graded(100) for scale in scales), np.zeros((D, D))], 4, 1e-4, relative=True
  )
  assert np.all(found.residual < 1e-5)
  assert np.all(np.isfinite(found.root))
  for scale, r in zip(scales, found.root[:3], strict=True):
    close(r * scale**0.25, found.root[0], 1e-5)


@pytest.mark.parametrize("name", ["eigh", "qr"])
def test_eigenvalues_below_zero_shift_all_or_become_zero(name):
  values = np.array([-0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 1.0])
  shifted, clamped = (
    root(name, [spectrum(values)], 4, 1e-3, relative=relative).root[0] for relative in (False, True)
  )
  close(np.linalg.eigvalsh(shifted)[::-1], (values + 0.02 + 1e-3) ** -0.25, 1e-4)
  close(np.linalg.eigvalsh(clamped)[::-1], (np.maximum(values, 0) + 1e-3) ** -0.25, 1e-4)


@pytest.mark.parametrize("name", ROOTS)
def test_no_root_is_no_success(name):
  assert not np.isfinite(root(name, [np.zeros((D, D))], 4).residual[0])
  if name in ("newton", "denman_beavers"):
    assert root(name, [-np.eye(D)], 4).residual[0] > 0.05


def test_the_residual_of_eigh_sees_a_wrong_decomposition(monkeypatch):
  a = jnp.asarray(graded(1e3)[None], np.float32)
  values, vectors = linalg.eigh(a)
  wrong = {
    "values": (values * 1.1, vectors),
    "order": (values, vectors[:, :, ::-1]),
    "length": (values / 1.21, vectors * 1.1),
  }
  for what, pair in wrong.items():
    monkeypatch.setattr(linalg, "eigh", lambda _, pair=pair: pair)
    assert ROOTS["eigh"].compute(a, 4, 1e-6, relative=False, basis=()).residual[0] > 0.05, what


@pytest.mark.parametrize("p", [2, 3, 4])
def test_newton_is_the_published_iteration(p):
  """Up to the same step: the error left at the tolerance is equal, too."""
  a = low_rank(5)
  x, m, steps = published_newton(a + 1e-4 * np.eye(D), p)
  with jax.enable_x64(True):
    found = root("newton", [a], p, 1e-4, dtype=np.float64)
  assert steps > 5
  close(found.root[0], x, 1e-9)
  np.testing.assert_allclose(found.residual[0], abs(m - np.eye(D)).max(), rtol=1e-3, atol=1e-12)


def published_newton(a, p):
  """Higham's 7.18 as both Distributed Shampoos scale and stop it."""
  scale, eye = (1 + p) / (2 * np.linalg.norm(a)), np.eye(D)
  x, m, steps = scale ** (1 / p) * eye, scale * a, 0
  while abs(m - eye).max() > 1e-6:
    factor = (1 + 1 / p) * eye - m / p
    x, m, steps = x @ factor, np.linalg.matrix_power(factor, p) @ m, steps + 1
  return x, m, steps


def test_orthogonal_iteration_is_numpys():
  a = np.stack([graded(100, seed) for seed in (0, 1)])
  basis = np.stack([np.linalg.qr(low_rank(D, seed))[0] for seed in (5, 6)])
  with jax.enable_x64(True):
    new, eigenvalues, order = jax.jit(inverse_root.orthogonal_iteration)(a, basis)
  for i in range(2):
    quotients = np.diag(basis[i].T @ a[i] @ basis[i])
    expected = np.argsort(-quotients)
    assert np.any(np.diff(expected) < 0)
    np.testing.assert_array_equal(order[i], expected)
    np.testing.assert_allclose(eigenvalues[i], quotients[expected], rtol=1e-12)
    # QR leaves the signs of columns open.
    q = np.linalg.qr((a[i] @ basis[i])[:, expected])[0]
    np.testing.assert_allclose(abs(q.T @ np.asarray(new[i])), np.eye(D), atol=1e-12)


def test_orthogonal_iteration_stays_orthonormal_on_deficient_matrices():
  a = np.stack([np.zeros((D, D)), low_rank(1), graded(1e12)]).astype(np.float32)
  basis = jnp.broadcast_to(np.linalg.qr(low_rank(D))[0], a.shape).astype(np.float32)
  iterate = jax.jit(inverse_root.orthogonal_iteration)
  for _ in range(5):
    basis, _, _ = iterate(a, basis)
  np.testing.assert_allclose(
    np.swapaxes(basis, 1, 2) @ basis, np.broadcast_to(np.eye(D), a.shape), atol=1e-5
  )


def off_diagonal(basis, a):
  """The part of a that the basis leaves off the diagonal."""
  turned = basis.T @ a @ basis
  return np.linalg.norm(turned - np.diag(np.diag(turned))) / np.linalg.norm(a)


def test_a_carried_basis_follows_a_slowly_changing_matrix():
  """Never stale enough to be given up, and closer with every call while the matrix rests."""
  a, x = graded(100), 0.01 * np.random.default_rng(1).standard_normal((D, D))
  turn = np.linalg.solve(np.eye(D) - (x - x.T), np.eye(D) + (x - x.T))
  with jax.enable_x64(True):
    step = functools.partial(root, "qr", p=4, dtype=np.float64)
    basis = first = step([a]).basis
    for _ in range(20):
      a = turn @ a @ turn.T
      found = step([a], basis=basis)
      basis = found.basis
      assert 1e-6 < found.residual[0] < 0.03  # a decomposition leaves less than 1e-12
      np.testing.assert_allclose(found.residual[0], off_diagonal(basis[0], a), rtol=1e-6)
      close(found.root[0], exact_root(a, 4), 0.01)
    assert off_diagonal(first[0], a) > 0.5
    residuals = [found.residual[0]]
    for _ in range(15):
      found = step([a], basis=found.basis)
      residuals.append(found.residual[0])
    assert np.all(np.diff(residuals) < 0)
    assert residuals[-1] < 1e-5
    close(found.root[0], exact_root(a, 4), 1e-5)


def test_a_stale_basis_is_given_up_and_a_good_one_is_kept():
  """The identity, zeros and another matrix's basis are stale; a matrix that isn't finite doesn't
  spoil the basis it came with."""
  a, other, broken = graded(100), graded(100, seed=3), np.full((D, D), np.nan)
  with jax.enable_x64(True):
    good, foreign = root("qr", [a, other], 4, dtype=np.float64).basis
    nearly = np.linalg.qr(good + 0.01 * low_rank(D))[0]
    found = root(
      "qr",
      [a, a, a, a, a, broken],
      4,
      dtype=np.float64,
      basis=[np.eye(D), np.zeros((D, D)), foreign, np.full((D, D), np.nan), nearly, good],
    )
  assert np.all(found.residual[:4] < 1e-12)
  close(found.root[:4], np.stack([exact_root(a, 4)] * 4), 1e-12)
  assert 1e-6 < found.residual[4] < 0.1
  assert not np.isfinite(found.residual[5])
  np.testing.assert_array_equal(found.basis[5], good)


def test_only_the_warm_carry_a_basis():
  for name, row in ROOTS.items():
    basis = root(name, [graded(100)], 4).basis
    assert basis.shape == (1, D, D) if row.warm else basis == ()


@pytest.mark.parametrize(
  ("name", "p", "words"),
  [
    ("newton", 2.5, ["root = 'newton'", "p = 2.5", "p = 1, 2, 3", "eigh or qr"]),
    ("newton", 0, ["p = 0", "another exponent"]),
    ("denman_beavers", 3, ["root = 'denman_beavers'", "p = 3", "2, 4, 8", "eigh or newton or qr"]),
    ("eigh", -2, ["root = 'eigh'", "p = -2", "p > 0", "another exponent"]),
    ("qr", float("inf"), ["root = 'qr'", "p = inf"]),
    ("svd", 2, ["root = 'svd'", "eigh, newton, denman_beavers, qr"]),
  ],
)
def test_what_cannot_be_computed_is_refused(name, p, words):
  with pytest.raises(ValueError) as error:
    inverse_root.check(name, p)
  assert all(word in str(error.value) for word in words), error.value


def test_what_can_be_computed_is_not_refused():
  assert set(ORDERS) == set(ROOTS)
  for name, orders in ORDERS.items():
    for p in orders:
      inverse_root.check(name, p)
