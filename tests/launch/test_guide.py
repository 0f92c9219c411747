"""What launch/README.md shows of a command's --dry_run is what it prints."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SHOWN = re.findall(
  r"^```\w*\n\$ (python -m launch\.\w+ (?:[^\n]*\\\n)*[^\n]*--dry_run)\n(.*?)^```$",
  (ROOT / "launch" / "README.md").read_text(),
  re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize(("command", "output"), SHOWN)
def test_what_is_shown_is_what_it_prints(command, output):
  """Where the guide has a line of three dots, lines are left out."""
  words = shlex.split(command.replace("\\\n", " "))
  if "launch.xm_launch" in words:
    pytest.importorskip("xmanager", reason="the extra launch is not installed")
  result = subprocess.run(
    [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True
  )
  rest = result.stdout
  for number, part in enumerate(re.split(r"^ *\.\.\.\n", output, flags=re.MULTILINE)):
    before, found, rest = rest.partition(part)
    assert found == part and (number or not before), f"not printed:\n{part}"
  assert output.rstrip().endswith("...") or not rest.strip()


def test_launchers_that_render_are_shown():
  launchers = {command.split()[2] for command, _ in SHOWN}
  assert {"launch.gke", "launch.slurm", "launch.tpu"} <= launchers
