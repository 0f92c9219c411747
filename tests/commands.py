"""Commands as a person types them: a module is imported once, and gives each command a process of
its own."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

SCRIPT = """
import importlib, json, os, sys, tempfile
from beyond_outliers import cli

name, commands = sys.argv[1], json.loads(sys.argv[2])
module = importlib.import_module("beyond_outliers." + name)
answers, result = [], None
for arguments in commands:
  with tempfile.TemporaryFile("w+") as said:
    child = os.fork()
    if not child:
      os.dup2(said.fileno(), 1)
      os.dup2(said.fileno(), 2)
      sys.argv = [name, *arguments]
      cli.run(module.main)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said.seek(0)
    answers.append([code, said.read()])
{after}
print(json.dumps([answers, result]))
"""


def answers(name, commands, after=""):
  """([exit code, all that it said] of each command, `result`, which the code `after` may set with
  the module at hand)."""
  process = subprocess.run(
    [sys.executable, "-c", SCRIPT.replace("{after}", after), name, json.dumps(commands)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=400,
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout)
