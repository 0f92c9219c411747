"""The command: which flags go together."""

import pathlib
import subprocess
import sys

import commands
import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Arguments, and what the one line on stderr holds.
USELESS = [
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
  return commands.answers("bench.__main__", [arguments for arguments, _ in USELESS])[0]


@pytest.mark.parametrize(
  "number", range(len(USELESS)), ids=lambda number: " ".join(USELESS[number][0])
)
def test_flags_that_would_change_nothing_are_refused(told, number):
  code, said = told[number]
  assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
  assert all(part in said for part in USELESS[number][1]), said


# what is wrong -> (arguments, what the refusal says)
REFUSED = {
  "a row": (["--optimizers", "--only=adamw,nobody"], ["--only = 'nobody'", "shampoo_staggered"]),
  "nothing to measure": ([], ["expected one of --config, --optimizers"]),
  "two things to measure": (
    ["--optimizers", "--config=configs/adamw.py:nano"],
    ["expected one of --config, --optimizers"],
  ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_command_refuses(what):
  arguments, parts = REFUSED[what]
  process = subprocess.run(
    [sys.executable, "-m", "beyond_outliers.bench", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert (process.returncode, process.stdout) == (2, "")
  (line,) = process.stderr.splitlines()
  assert line.startswith("error: ") and all(part in line for part in parts)


def test_the_rooms_readme_has_a_command_of_every_bench():
  # The module defines flags, so it is read in a process of its own.
  _, names = commands.answers("bench.__main__", [], "result = list(module.BENCHES)")
  text = (ROOT / "beyond_outliers" / "bench" / "README.md").read_text()
  assert len(names) >= 7
  assert not [name for name in names if f"python -m beyond_outliers.bench --{name}" not in text]
