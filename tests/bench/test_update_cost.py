"""Costs of the configurations at a size where a person can add them up: two square matrices, two
narrow and two wide ones."""

import pytest

from beyond_outliers.bench import jaxpr_flops, update_cost

SIZE, D, KV, F, VOCAB = "0.3m", 96, 32, 384, 2048


def program(name, devices, size=SIZE):
  ((_, found),) = update_cost.programs(name, size, [(1, devices, 1)])
  return found


@pytest.mark.parametrize(
  "devices, size, of_each_shape", [(1, SIZE, 2), (8, SIZE, 1), (8, "0.6m", 1)]
)
def test_muon_multiplies_at_every_step(devices, size, of_each_shape):
  """Five times X Xᵀ, its square, and their sum by X. On eight devices one matrix of each shape, or
  padding, is on each; of four blocks a whole one."""
  mean, costliest = update_cost.flops_of_update(program("muon", devices, size))
  one = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in ((D, D), (KV, D), (D, F)))
  assert mean["products"] == costliest["products"] == of_each_shape * one
  assert mean["decompositions"] == 0


def test_shampoo_decomposes_every_twentieth_step():
  mean, costliest = update_cost.flops_of_update(program("shampoo", 1))
  squares, narrow, wide, embedding, vectors = (
    4 * [D],
    2 * [D, KV],
    2 * [D, F],
    2 * [D, VOCAB // 2],
    [D, D, D, 3],
  )
  together = jaxpr_flops.EIGH * sum(d**3 for d in squares + narrow + wide + embedding + vectors)
  assert costliest["decompositions"] == pytest.approx(together)
  assert mean["decompositions"] == pytest.approx(together / 20)


def test_meshes_that_do_not_divide_the_model_are_left_out():
  """The model has one key-value head."""
  found = update_cost.programs("adamw", SIZE, [(1, 1, 2), (2, 2, 2), (2, 4, 1), (1, 8, 1)])
  assert [mesh for mesh, _ in found] == [(2, 4, 1), (1, 8, 1)]


def test_tables_have_a_row_each():
  paper = update_cost.on_paper(["adamw"], SIZE)
  assert [row["devices"] for row in paper] == [1, 8] and [row["over_adamw"] for row in paper] == [
    1,
    1,
  ]
  assert len(update_cost.on_paper_table(paper).splitlines()) == 3
  # The padding of a scalar or so apart, AdamW's state is two values per parameter, split over all.
  assert paper[1]["state_bytes"] == pytest.approx(paper[0]["state_bytes"] / 8, rel=0.01)
  collectives = update_cost.collectives(["adamw"], SIZE)
  assert [row["mesh"] for row in collectives] == [(1, 1, 1), (8, 1, 1), (1, 8, 1)]
  assert [row["bytes"] for row in collectives] == [0, 0, 0]
  assert len(update_cost.collectives_table(collectives).splitlines()) == 4
