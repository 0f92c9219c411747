"""Commands: the --config flag, refusals in one line instead of a traceback, and aligned columns."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from beyond_outliers.config.files import expand_home
from beyond_outliers.config.overrides import check_overrides
from beyond_outliers.errors import Failure, Refusal

# Ask a run to save and stop: Ctrl-C, what schedulers send before a time limit, or the closing of a
# terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STOPPED = 42  # exit code after such a stop
TELL_SECONDS = 3.0
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")

_tell: Callable[[int, str], None] | None = None  # set in one of several processes

flags.disclaim_key_flags()  # flags belong to the commands that define them with these functions


def config_flag(*instead: str) -> flags.FlagHolder:
  """Defines --config, required unless one of the flags `instead`, defined before, is given."""
  holder = config_flags.DEFINE_config_file(
    "config", None, "Config file; a size and overrides may follow after a colon."
  )
  if instead:
    names = ["config", *instead]
    flags.register_multi_flags_validator(
      names,
      lambda values: sum(map(bool, values.values())) == 1,
      "expected one of " + ", ".join(f"--{name}" for name in names),
    )
  else:
    flags.mark_flag_as_required("config")
  return holder


def distributed_flag() -> flags.FlagHolder:
  """Defines --distributed, which `config.cluster.membership` reads."""
  return flags.DEFINE_string(
    "distributed",
    "",
    "For a run of several processes: 'auto' (found from the variables of JAX, Slurm, Open MPI or a "
    "JobSet, or from Cloud TPU's metadata), HOST:PORT of process 0 (the rest is found), or "
    "HOST:PORT,COUNT,INDEX.",
  )


class _PathParser(flags.ArgumentParser):
  syntactic_help = "a path"

  def parse(self, argument: str) -> str:
    return expand_home(argument)


class _PathsParser(flags.ListParser):
  syntactic_help = "a list of paths"

  def parse(self, argument: str | list[str]) -> list[str]:
    if isinstance(argument, str) and os.path.exists(found := expand_home(argument)):
      return [found]  # a single path, whose name may contain a comma
    return [expand_home(path) for path in super().parse(argument)]


def path_flag(name: str, default: str | None, help: str, **options: Any) -> flags.FlagHolder:
  """Defines a flag that is a path, with a leading ~ for the home folder, which shells leave as
  is."""
  return flags.DEFINE(_PathParser(), name, default, help, **options)


def paths_flag(name: str, default: list[str] | None, help: str, **options: Any) -> flags.FlagHolder:
  """Defines a flag that is a list of paths, separated by commas."""
  serializer = flags.CsvListSerializer(",")
  return flags.DEFINE(_PathsParser(), name, default, help, serializer=serializer, **options)


def take_huge_pages() -> None:
  """Starts this command again, in the same process, with huge pages for its memory, if Linux lets
  programs choose them (through glibc). XLA allocates large arrays anew in every step; with small
  pages that is a seventh of a step on a CPU. A setting in GLIBC_TUNABLES is respected."""
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  if "glibc.malloc.hugetlb" in tunables or sys.orig_argv[1:2] != ["-m"]:
    return
  with contextlib.suppress(OSError):  # then continues with small pages
    if "[madvise]" in HUGE_PAGES.read_text():
      os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
      os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run_command(main: Callable[[list[str]], None]) -> None:
  """app.run, for `if __name__ == "__main__"`. A Refusal exits with code 2, a Failure with 1, Ctrl-C
  with 130."""
  try:
    app.run(main, flags_parser=_parse)
  except Refusal as refusal:
    _refuse(str(refusal))
  except Failure as failure:
    print(f"error: {failure}", file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:  # in a command that does not call `end_when_asked`
    print("stopped", file=sys.stderr)
    sys.exit(killed_by(signal.SIGINT))


def end_when_asked(
  saying: str = "asked to stop with no step under way; the same command resumes",
  code: Callable[[int], int] = lambda number: STOPPED,
) -> None:
  """Makes STOP_SIGNALS end this process at once, until a run handles them: before that there is
  nothing to save. A thread does so, since Python runs no signal handlers while XLA compiles.

  code: signal number -> exit code."""
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  for number in STOP_SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup
      signal.signal(number, _asked)
  arguments = (reader, saying, code)
  threading.Thread(target=_end_when_asked, args=arguments, name="signals", daemon=True).start()


def tell_when_asked(tell: Callable[[int, str], None]) -> None:
  """Addition to `end_when_asked` for one of several processes, which end together: before this one
  ends, `tell` is called with the exit code and the text, for at most TELL_SECONDS."""
  global _tell
  _tell = tell


def ask_all_when_asked() -> None:
  """Replaces `end_when_asked` for one of several processes, which stop together after a step: turns
  the other signals into SIGTERM, which JAX listens for once they have joined."""
  for number in STOP_SIGNALS:
    if signal.getsignal(number) is _asked and number != signal.SIGTERM:
      signal.signal(number, _ask_all)


def _asked(number: int, frame: Any) -> None:
  """Does nothing: the thread of `end_when_asked` also gets the number, and acts."""


def _ask_all(number: int, frame: Any) -> None:
  signal.raise_signal(signal.SIGTERM)


def killed_by(number: int) -> int:
  """Exit code of a process that a signal ended, by the convention of shells."""
  return 128 + number


def _end_when_asked(reader: int, saying: str, code: Callable[[int], int]) -> None:
  while True:
    (number,) = os.read(reader, 1)
    if signal.getsignal(number) is _asked:
      try:
        redraw = "\r\x1b[K" if sys.stderr.isatty() else ""  # clears a progress line
        print(redraw + saying, file=sys.stderr, flush=True)
        if _tell is not None:
          telling = threading.Thread(target=_tell, args=(code(number), saying), daemon=True)
          telling.start()
          telling.join(TELL_SECONDS)  # the process that it talks to may hang
      finally:
        os._exit(code(number))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """One line per row, in aligned columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]


def _parse(argv: list[str]) -> list[str]:
  """Parses flags with absl; errors in a config file or an override become one line."""
  try:
    rest = flags.FLAGS([_with_home(argument) for argument in argv])
  except AttributeError as error:  # --config.key=value with an unknown key
    _refuse(
      "--config: unknown key "
      + " · ".join(str(error).strip("\"'").replace("\\n", "\n").replace("\\'", "'").splitlines())
    )
  except flags.DuplicateFlagError:  # flags of overrides are defined whenever --config is read
    _refuse("--config is given more than once: give it once")
  except flags.Error as error:
    # An exception in a config file arrives with its whole traceback, and a refused config with all
    # its values: the last line is the message.
    last = [line for line in str(error).splitlines() if line.strip()][-1]
    _refuse(last.partition("Error: ")[-1] or last.lstrip(", "))
  if problem := given_again(flags.FLAGS):
    _refuse(problem)
  if "config" in flags.FLAGS and flags.FLAGS["config"].present:
    path = config_path()
    if not os.path.exists(path):
      _refuse(f"--config={path}: there is no such file")
    flag = flags.FLAGS["config"]
    if not isinstance(flag.value, str):
      check_overrides(flag.value, config_flags.get_override_values(flag))
  if flags.FLAGS["verbosity"].using_default_value:
    # app.run would make it INFO, at which Orbax reports every file.
    flags.FLAGS.verbosity = logging.WARNING
  return rest


def given_again(values: flags.FlagValues) -> str:
  """A message about the first flag that is given more than once, of which only the last would
  count, or ""; flags made for repetition are fine."""
  for name in values:
    flag = values[name]
    if flag.present > 1 and not isinstance(flag, flags.MultiFlag):
      form = f", as --{name}=A,B" if isinstance(flag.value, list) else ""
      return f"--{name} is given {flag.present} times: give it once{form}"
  return ""


def config_path() -> str:
  """The file that --config names, without what follows the colon."""
  flag = flags.FLAGS["config"]  # defined by `config_flag` or `path_flag`
  text = flag.value if isinstance(flag.value, str) else config_flags.get_config_filename(flag)
  return text.partition(":")[0]


def _with_home(argument: str) -> str:
  """The argument --config=~/FILE.py with ~ expanded, since that flag is not one of ours."""
  flag, tilde, path = argument.partition("~")
  if flag not in ("--config=", "-config="):
    return argument
  try:
    return flag + expand_home(tilde + path)
  except ValueError as error:
    _refuse(f"{argument}: {error}")


def _refuse(message: str) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)
