"""Programs with known collectives and decompositions, compiled for eight devices; and text that
only other backends' programs have."""

import collections

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from beyond_outliers import config
from beyond_outliers.bench import hlo
from beyond_outliers.mesh import make_mesh


@pytest.fixture(scope="module")
def program():
  """A program on eight devices: x is [3] on each, matrices are replicated."""

  def local(x, matrices):
    def gather(x, _):
      return lax.all_gather(x, "data", tiled=True)[2:5] / 2, None

    def twice(x, _):
      return lax.scan(gather, x, None, 5)[0] + lax.ppermute(
        x, "data", [(i, (i + 1) % 8) for i in range(8)]
      ), None

    total = lax.psum(x, "data")
    x = lax.scan(twice, x, None, 2)[0]
    x = lax.cond(
      total[0] > 0,
      lambda x: x + lax.psum_scatter(jnp.tile(x, 8), "data", tiled=True),
      lambda x: x,
      x,
    )
    x = lax.while_loop(lambda x: x[0] < 1, lambda x: lax.pmax(2 * x, "data"), x)
    values = lax.map(jnp.linalg.eigvalsh, matrices).sum() + jnp.linalg.eigh(matrices[:4])[0].sum()
    return x + total + values, lax.map(lambda m: jnp.linalg.qr(m[:, :2])[0], matrices[:3])

  mesh = make_mesh(config.Mesh(8, 1, 1))
  mapped = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(jax.P("data"), jax.P()),
    out_specs=(jax.P("data"), jax.P()),
    check_vma=False,
  )
  return hlo.instructions(
    jax.jit(mapped).lower(jnp.ones(24), jnp.ones((6, 5, 5))).compile().as_text()
  )


def test_collectives_their_bytes_and_the_loops_around_them(program):
  found = collections.Counter(
    (hlo.collective(one), one.loops, one.times * one.bytes)
    for one in program
    if hlo.collective(one)
  )
  assert found == {
    ("all-reduce", (), 12): 1,
    ("all-gather", (2, 5), 960): 1,  # ten times 24 numbers
    ("collective-permute", (2,), 24): 1,
    ("reduce-scatter", (), 12): 1,  # in a branch
    ("all-reduce", (None,), 12): 1,
  }  # nobody knows how often: once
  assert hlo.received(program) == 12 + 960 + 24 + 12 + 12


def test_matrices_are_counted_one_by_one_and_in_batches(program):
  assert hlo.decompositions(program) == {"ssyevd 5x5": 6 + 4, "sgeqrf 5x2": 3, "sorgqr 5x2": 3}


def test_what_only_other_backends_write():
  """Asynchronous pairs, whose start holds the operand too; types of all widths; tuples with numbers
  in comments."""
  text = """HloModule jit_f, is_scheduled=true

%branch.1 (p: bf16[2,4]) -> bf16[2,4] {
  %p = bf16[2,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %permute.1 = bf16[2,4]{1,0} collective-permute(%p), channel_id=3, source_target_pairs={{0,1}}
}

%max (a: f32[], b: f32[]) -> f32[] {
  ROOT %m = f32[] maximum(%a, %b)
}

ENTRY %main.2_spmd (p.0: f32[3]) -> f32[24] {
  %start = (f32[3]{0}, f32[24]{0}) all-gather-start(f32[3]{0} %p.0), channel_id=1, dimensions={0}
  %a.2 = (pred[7]{0}, s4[3]{0}, /*index=2*/f8e4m3fn[5]{0}, c64[2]{0}, token[]) all-to-all(%x), channel_id=2
  %c = bf16[2,4]{1,0} conditional(%i, %y, %z), branch_computations={%branch.1, %branch.1}
  %r = f32[]{:T(128)} reduce(%p.0, %zero), dimensions={0}, to_apply=%max
  ROOT %done = f32[24]{0} all-gather-done((f32[3]{0}, f32[24]{0}) %start)
}
"""  # noqa: E501
  found = [
    (hlo.collective(one), one.bytes) for one in hlo.instructions(text) if hlo.collective(one)
  ]
  assert found == [
    ("all-to-all", 7 + 2 + 5 + 16),
    ("collective-permute", 16),
    ("collective-permute", 16),
    ("all-gather", 96),
  ]
  assert hlo.instructions(text)[1].shapes == [(7,), (3,), (5,), (2,), ()]


def test_bytes_that_a_device_sends_along_the_axes_of_a_mesh():
  """Around a ring: for an all-gather all shares but its own, for an all-reduce twice as much."""

  def local(x):
    x = lax.scan(lambda x, _: (lax.all_gather(x, "fsdp", tiled=True)[2:5] / 2, None), x, None, 5)[0]
    x = x + lax.psum(x, ("data", "fsdp")) + lax.psum_scatter(jnp.tile(x, 2), "model", tiled=True)
    swapped = lax.all_to_all(jnp.stack([x, 2 * x]), "data", 0, 0).sum(0)
    return swapped + lax.ppermute(x, "model", [(0, 1), (1, 0)])

  mesh = make_mesh(config.Mesh(2, 2, 2))
  everywhere = jax.P(("data", "fsdp", "model"))
  mapped = jax.shard_map(
    local, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
  )
  program = hlo.instructions(jax.jit(mapped).lower(jnp.ones(24)).compile().as_text())
  assert hlo.sent_by_axes(program, mesh.shape) == {
    "fsdp": 5 * 3 * 4,
    "data·fsdp": 2 * 3 / 4 * 3 * 4,
    "model": 3 * 4 + 3 * 4,
    "data": 3 * 4,
  }


@pytest.mark.parametrize(
  "written, groups",
  [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=1,'b'=4], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2, 1, 3]]),
  ],
)
def test_the_groups_of_a_collective(written, groups):
  """For an asynchronous collective, they are written at its start."""
  text = f"""
ENTRY %main (p: f32[3]) -> f32[6] {{
  %p = f32[3]{{0}} parameter(0)
  %s = (f32[3]{{0}}, f32[6]{{0}}) all-gather-start(%p), channel_id=1, {written}, dimensions={{0}}
  ROOT %d = f32[6]{{0}} all-gather-done(%s)
}}
"""
  *_, done = hlo.instructions(text)
  found = hlo.device_groups(done)
  assert found is not None and found.tolist() == groups


def test_groups_that_are_written_otherwise_are_no_guess():
  text = """
ENTRY %main (p: f32[3]) -> f32[6] {
  ROOT %d = f32[6]{0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4] {'a':(1)2}
}
"""
  with pytest.raises(ValueError, match="not understood"):
    hlo.device_groups(hlo.instructions(text)[0])


def test_a_loop_whose_condition_says_how_often_it_runs():
  """As in TPU programs, whose loops are not annotated."""
  text = """
%until (p.1: (s32[], f32[3])) -> pred[] {
  %n = s32[]{:T(128)} constant(8)
  %p.1 = (s32[]{:T(128)}, f32[3]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="cond/lt"}
}

%round (p.2: (s32[], f32[3])) -> (s32[], f32[3]) {
  %x = f32[3]{0} all-reduce(%p.2), channel_id=1, replica_groups={{0,1}}, to_apply=%sum
}

ENTRY %main (p: f32[3]) -> f32[3] {
  %loop = (s32[], f32[3]) while(%start), condition=%until, body=%round
}
"""
  (found,) = [one for one in hlo.instructions(text) if hlo.collective(one)]
  assert found.loops == (8,) and hlo.sent_by_axes([found], {"data": 2}) == {"data": 8 * 12}
