"""Commands as a person types them: a module is imported once, and each command runs in a process
forked from there."""

import json
import os
import pathlib
import socket
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
      cli.run_command(module.main)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said.seek(0)
    answers.append([code, said.read()])
{after}
print(json.dumps([answers, result]))
"""


def answers(name, commands, after=""):
  """([exit code, output] of each command, `result`, which the code `after` may set, with access to
  the module)."""
  process = subprocess.run(
    [sys.executable, "-c", SCRIPT.replace("{after}", after), name, json.dumps(commands)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=400,
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout)


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def start(module, *flags, **environment):
  """A command in a process of its own, with these variables on top of this one's."""
  return subprocess.Popen(
    [sys.executable, "-m", module, *flags],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env={**os.environ, **environment},
  )


def finish(process, expected=0, timeout=240):
  """Output of a started command, after it has ended with this exit code."""
  output, _ = process.communicate(timeout=timeout)
  assert process.returncode == expected, output[-3000:]
  return output


def run(module, *flags, **environment):
  """A command that has ended, with what it said on stdout and on stderr."""
  return subprocess.run(
    [sys.executable, "-m", module, *flags],
    cwd=ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
  )


def instead(flags, given):
  """The flags, with those of the same name replaced by `given`: commands take each flag once."""
  names = {flag.partition("=")[0] for flag in given}
  return [*(flag for flag in flags if flag.partition("=")[0] not in names), *given]


FLAGS_SCRIPT = """
import contextlib, importlib, io, json, os, re, runpy, sys
import flax, jax, optax
import beyond_outliers.data, beyond_outliers.quant, beyond_outliers.train

found = {}
for name in sys.argv[1:]:
  reader, writer = os.pipe()
  child = os.fork()
  if not child:
    from absl import flags
    importlib.import_module(name)
    names = set(flags.FLAGS)
    if not flags.FLAGS.flags_by_module_dict().get(name):
      # It defines its flags when it runs.
      sys.argv, help = [name, "--help"], io.StringIO()
      with contextlib.redirect_stdout(help), contextlib.suppress(SystemExit):
        runpy.run_module(name, run_name="__main__")
      names = set(re.findall(r"--(?:\\[no\\])?(\\w+)", help.getvalue()))
    os.write(writer, json.dumps(sorted(names)).encode())
    os._exit(0)
  os.close(writer)
  with os.fdopen(reader) as pipe:
    text = pipe.read()
  os.waitpid(child, 0)
  found[name] = json.loads(text)
print(json.dumps(found))
"""


def flags_of(modules):
  """{module of a command: names of its flags}; each is imported in a process of its own."""
  process = subprocess.run(
    [sys.executable, "-c", FLAGS_SCRIPT, *modules],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=400,
  )
  assert process.returncode == 0, process.stderr
  return {name: set(flags) for name, flags in json.loads(process.stdout).items()}
