"""The line of how fast questions are answered."""

from beyond_outliers.bench import scoring


def test_scoring_counts_the_tokens_that_are_read():
  result = scoring.measure_scoring("0.3m", repeats=1)
  assert result["pairs"] == 64 * 4 and 64 * 4 * 32 < result["tokens"] < 64 * 4 * 256
  assert result["ratio"] > 0 and f"{result['pairs']} choices" in scoring.scoring_table(result)
