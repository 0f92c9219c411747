"""The short tables of bench: what is measured, and how it is shown."""
from beyond_outliers import bench_ptq, bench_scoring


def test_every_method_that_is_asked_for_is_timed():
  result = bench_ptq.run("0.3m", ["rtn", "gptq"])
  assert list(result["rows"]) == ["rtn", "gptq"] and all(row["seconds"] > 0 for row in result["rows"].values())
  lines = bench_ptq.table(result).splitlines()
  assert [line.split()[0] for line in lines[2:]] == ["rtn", "gptq", "all"]


def test_scoring_counts_the_tokens_that_are_read():
  result = bench_scoring.run("0.3m", repeats=1)
  assert result["pairs"] == 64 * 4 and 64 * 4 * 32 < result["tokens"] < 64 * 4 * 256
  assert result["ratio"] > 0 and f"{result['pairs']} choices" in bench_scoring.table(result)
