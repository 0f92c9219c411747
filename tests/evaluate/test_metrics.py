"""Metrics of a fixed set of documents, against the direct formula, a bootstrap, and a count by
hand."""

import math

import numpy as np
import pytest
from scipy import stats

from beyond_outliers import config, mesh
from beyond_outliers.evaluate import metrics
from beyond_outliers.train import program as program_lib
from configs import adamw


def identity(batch):
  return batch["nll"], batch["documents"]


def random_batches(documents: int, seed: int = 0):
  """[(losses, document of each target)] of unequal documents that run over from one batch of 2 × 8
  into the next, padded."""
  rng = np.random.default_rng(seed)
  owner = np.repeat(np.arange(1, documents + 1), rng.integers(3, 40, documents))
  nll = rng.gamma(2.0, 1.0, owner.size) + rng.normal(0, 0.3, documents + 1)[owner] + 1.0
  padding = -owner.size % 16
  owner, nll = np.pad(owner, (0, padding)), np.pad(nll, (0, padding))
  batches = [
    {"nll": n.astype(np.float32), "documents": o}
    for n, o in zip(nll.reshape(-1, 2, 8), owner.reshape(-1, 2, 8), strict=True)
  ]
  return batches, nll[owner > 0], owner[owner > 0]


def test_loss_is_the_mean_over_all_targets_whatever_the_batches():
  batches, nll, owner = random_batches(20)
  result = metrics.evaluate(identity, batches, num_bytes=1000)
  assert result["loss"] == pytest.approx(nll.mean(), rel=1e-6)
  assert result["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-6)
  assert (result["documents"], result["tokens"]) == (20, nll.size)
  sums = np.array([nll[owner == document].sum() for document in range(1, 21)])
  counts = np.array([(owner == document).sum() for document in range(1, 21)])
  residuals = sums - nll.mean() * counts
  assert result["loss_stderr"] == pytest.approx(
    math.sqrt((residuals**2).sum() * 20 / 19) / counts.sum(), rel=1e-5
  )


def test_bits_per_byte_by_hand():
  # One document of 5 bytes in 3 targets: 1 + 2 + 3 nats; and one of 3 bytes in one target of 4
  # nats.
  batch = {"nll": np.array([[1.0, 2.0, 3.0, 4.0, 0.0]]), "documents": np.array([[1, 1, 1, 2, 0]])}
  result = metrics.evaluate(identity, [batch], num_bytes=8)
  assert result["bits_per_byte"] == pytest.approx(10 / math.log(2) / 8)
  assert (result["loss"], result["documents"], result["tokens"]) == (2.5, 2, 4)
  assert metrics.evaluate(identity, [batch], num_bytes=None)["bits_per_byte"] is None


def test_bits_per_byte_are_of_the_bytes_whose_tokens_are_targets():
  class Batches(list):
    unscored_bytes = 3

  batch = {"nll": np.array([[1.0, 2.0]]), "documents": np.array([[1, 1]])}
  assert metrics.evaluate(identity, Batches([batch]), 8)["bits_per_byte"] == pytest.approx(
    3 / math.log(2) / 5
  )
  assert metrics.evaluate(identity, Batches([batch]), None)["bits_per_byte"] is None
  assert metrics.evaluate(identity, Batches([batch]), 3)["bits_per_byte"] is None


def test_padding_counts_nowhere():
  batches, *_ = random_batches(7)
  padding = {"nll": np.zeros((2, 8), np.float32), "documents": np.zeros((2, 8), np.int32)}
  assert metrics.evaluate(identity, [*batches, padding], None) == metrics.evaluate(
    identity, batches, None
  )


def test_a_target_that_is_foreseen_for_certain_still_counts():
  # Float32 rounds the loss of a target with p > 1 - 1e-7 to exactly 0.
  batch = {"nll": np.array([[0.0, 2.0, 0.0]], np.float32), "documents": np.array([[1, 1, 0]])}
  result = metrics.evaluate(identity, [batch], None)
  assert (result["loss"], result["tokens"]) == (1.0, 2)


def test_the_standard_error_is_what_other_documents_would_have_changed():
  rng = np.random.default_rng(1)
  counts = rng.integers(5, 200, 300).astype(float)
  sums = counts * (3 + rng.normal(0, 0.4, 300)) + rng.normal(0, 3, 300)
  _, stderr = metrics.ratio_and_stderr(sums, counts)
  picks = rng.integers(0, 300, (4000, 300))
  bootstrap = (sums[picks].sum(1) / counts[picks].sum(1)).std()
  assert stderr == pytest.approx(bootstrap, rel=0.06)


def test_one_document_has_no_standard_error():
  loss, stderr = metrics.ratio_and_stderr(np.array([6.0]), np.array([3.0]))
  assert loss == 2.0 and math.isnan(stderr)


def test_a_loss_that_is_not_a_number_stays_visible():
  batch = {"nll": np.array([[1.0, np.nan]]), "documents": np.array([[1, 2]])}
  result = metrics.evaluate(identity, [batch], 10)
  assert math.isnan(result["loss"]) and math.isnan(result["perplexity"]) and result["tokens"] == 2


def test_a_target_without_weight_counts_nowhere():
  """Through the compiled step: neither the first target of a masked document, nor padding, nor rows
  beyond the end."""
  tiny = "nano,model.blocks=1,model.d_head=4,data.vocab=32,context=8,batch_size=8"
  program = program_lib.build_program(config.resolve(adamw.get_config(tiny)))
  params = program.init().params
  rng = np.random.default_rng(0)
  batch = {
    "tokens": rng.integers(0, 32, (8, 8)),
    "targets": rng.integers(0, 32, (8, 8)),
    "positions": np.tile(np.arange(8), (8, 1)),
    "segment_ids": np.repeat(np.arange(1, 9)[:, None], 8, 1),
  }
  batch = {name: array.astype(np.int32) for name, array in batch.items()} | {
    "weights": np.ones((8, 8), np.float32)
  }
  batch["weights"][2, 3], batch["weights"][5:] = 0, 0

  def token_losses(batch):
    placed = mesh.put_batch(batch, program.mesh, 8)
    return tuple(map(np.asarray, program.eval_step(params, placed)))

  result = metrics.evaluate(token_losses, [batch], None)
  assert (result["documents"], result["tokens"]) == (5, 39)
  assert result["loss"] == pytest.approx(math.log(32), rel=0.05), "an untrained model knows nothing"


def test_intervals_are_those_of_documents_drawn_again():
  """Against a bootstrap that draws the documents one by one; and pairing: a quantity that is equal
  for all documents has no spread."""
  rng = np.random.default_rng(2)
  counts = rng.integers(5, 200, 40).astype(float)
  sums = counts * np.stack([3 + rng.normal(0, 0.4, 40), np.full(40, 0.25)])
  bounds = metrics.intervals(sums, counts, seed=0)
  picks = rng.integers(0, 40, (10_000, 40))
  direct = sums[0, picks].sum(-1) / counts[picks].sum(-1)
  width = stats.t(39).ppf(0.975) * np.sqrt(40 / 39) * direct.std()
  center = sums[0].sum() / counts.sum()
  np.testing.assert_allclose(bounds[0], [center - width, center + width], atol=0.03 * width)
  np.testing.assert_allclose(bounds[1], [0.25, 0.25], rtol=1e-12)
  np.testing.assert_array_equal(bounds, metrics.intervals(sums, counts, seed=0))
  assert not np.array_equal(bounds, metrics.intervals(sums, counts, seed=1))


@pytest.mark.parametrize("documents", [2, 3, 10, 30])
def test_intervals_hold_the_truth_as_often_as_they_claim(documents):
  """4000 studies with that many documents. Percentiles of the resamples contained it in 49, 75, 90
  and 93 % of them."""
  rng = np.random.default_rng(3)
  counts = rng.integers(100, 200, documents).astype(float)
  sums = counts * (0.03 + rng.normal(0, 0.02, (4000, documents)))
  low, high = metrics.intervals(sums, counts, seed=0, resamples=1000).T
  assert ((low < 0.03) & (high > 0.03)).mean() == pytest.approx(0.95, abs=0.015)


def test_one_document_has_no_interval():
  assert np.isnan(metrics.intervals(np.array([[2.0]]), np.array([2.0]), seed=0)).all()


def test_a_comparison_weighs_targets_not_documents_or_batches():
  batches, nll, owner = random_batches(9, seed=3)

  def shift(document):
    return 0.1 * document

  def numbers(batch):
    after = np.where(batch["documents"] > 0, batch["nll"] + shift(batch["documents"]), 0)
    return {
      "reference_nll": batch["nll"],
      "nll": after,
      "kl": 2 * (after - batch["nll"]),
      "agreement": batch["documents"] == 3,
    }, batch["documents"]

  result = metrics.compare(numbers, batches, num_bytes=1000)
  assert result["loss_difference"] == pytest.approx(shift(owner).mean(), rel=1e-5)
  assert result["kl"] == pytest.approx(2 * shift(owner).mean(), rel=1e-5)
  assert result["agreement"] == pytest.approx((owner == 3).mean())
  assert result["reference_loss"] == pytest.approx(nll.mean(), rel=1e-6)
  assert result["loss"] == pytest.approx(result["reference_loss"] + result["loss_difference"])
  low, high = result["loss_difference_interval"]
  assert low < result["loss_difference"] < high
  alone = metrics.evaluate(
    lambda batch: (numbers(batch)[0]["nll"], batch["documents"]), batches, num_bytes=1000
  )
  assert {name: result[name] for name in alone} == alone
