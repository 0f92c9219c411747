"""Commands: the --config flag, refusals in one line instead of a traceback, and aligned columns."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from beyond_outliers.errors import Refusal


def config_flag(*instead: str) -> flags.FlagHolder:
  """Defines --config, required unless one of the flags `instead`, defined before, is given."""
  holder = config_flags.DEFINE_config_file(
    "config", None, "Config file, with its size and overrides behind a colon."
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


def run_command(main: Callable[[list[str]], None]) -> None:
  """app.run, for `if __name__ == "__main__"`. A refusal exits with code 2."""
  try:
    app.run(main, flags_parser=_parse)
  except Refusal as refusal:
    _refuse(str(refusal))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """One line per row, in aligned columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]


def _parse(argv: list[str]) -> list[str]:
  """absl's flags; refusals by a config file or an override of it become one line."""
  try:
    rest = flags.FLAGS(argv)
  except AttributeError as error:  # --config.key=value with an unknown key
    _refuse(
      "--config: unknown key "
      + " · ".join(str(error).strip("\"'").replace("\\n", "\n").replace("\\'", "'").splitlines())
    )
  except flags.Error as error:
    # An exception inside a config file comes wrapped with its whole traceback, and a refused config
    # with all its values: the last line is what was meant.
    last = [line for line in str(error).splitlines() if line.strip()][-1]
    _refuse(last.partition("Error: ")[-1] or last.lstrip(", "))
  if "config" in flags.FLAGS and flags.FLAGS["config"].present:
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    if not os.path.exists(path):
      _refuse(f"--config={path}: there is no such file")
  if flags.FLAGS["verbosity"].using_default_value:
    # app.run would make it INFO, where Orbax tells of every file.
    flags.FLAGS.verbosity = logging.WARNING
  return rest


def _refuse(message: str) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)
