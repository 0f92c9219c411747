"""The short tables of bench: what is measured, and how it is shown; and which flags go together."""

import commands
import pytest

from beyond_outliers.bench import ptq, scoring

# Arguments, and what the one line on stderr holds.
REFUSED = [
  (["--scoring=0.3m", "--only=rtn"], ["--only = ['rtn']: changes nothing of --scoring", "--ptq"]),
  (["--config=configs/adamw.py:0.3m", "--only=adamw"], ["--only = ['adamw']", "--config"]),
  (["--recipes", "--tree=full"], ["--tree = 'full'", "it is for --optimizers"]),
  (
    ["--ptq=0.3m", "--repeats=2"],
    ["--repeats = 2", "--ptq", "--config, --optimizers, --recipes, --scoring"],
  ),
  (["--on_paper=0.3m", "--repeats=2"], ["--repeats = 2", "--on_paper"]),
  (["--collectives=0.3m", "--only=adma"], ["--only = 'adma'", "adamw"]),
  (["--optimizers", "--recipes"], ["expected one of --config, --optimizers"]),
]


@pytest.fixture(scope="module")
def told():
  return commands.answers("bench.__main__", [arguments for arguments, _ in REFUSED])[0]


@pytest.mark.parametrize(
  "number", range(len(REFUSED)), ids=lambda number: " ".join(REFUSED[number][0])
)
def test_flags_that_would_change_nothing_are_refused(told, number):
  code, said = told[number]
  assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
  assert all(part in said for part in REFUSED[number][1]), said


def test_every_method_that_is_asked_for_is_timed():
  result = ptq.measure_ptq("0.3m", ["rtn", "gptq"])
  assert list(result["rows"]) == ["rtn", "gptq"] and all(
    row["seconds"] > 0 for row in result["rows"].values()
  )
  lines = ptq.ptq_table(result).splitlines()
  assert [line.split()[0] for line in lines[2:]] == ["rtn", "gptq", "all"]


def test_scoring_counts_the_tokens_that_are_read():
  result = scoring.measure_scoring("0.3m", repeats=1)
  assert result["pairs"] == 64 * 4 and 64 * 4 * 32 < result["tokens"] < 64 * 4 * 256
  assert result["ratio"] > 0 and f"{result['pairs']} choices" in scoring.scoring_table(result)
