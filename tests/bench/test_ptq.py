"""The table of what methods after training cost."""

import pytest

from beyond_outliers.bench import ptq


@pytest.mark.slow
def test_every_method_that_is_asked_for_is_timed():
  result = ptq.measure_ptq("0.3m", ["rtn", "gptq"])
  assert list(result["rows"]) == ["rtn", "gptq"] and all(
    row["seconds"] > 0 for row in result["rows"].values()
  )
  lines = ptq.ptq_table(result).splitlines()
  assert [line.split()[0] for line in lines[2:]] == ["rtn", "gptq", "all"]
