"""Errors for the person who gave the command, printed as one line: refusals with exit code 2,
failures with 1."""

from __future__ import annotations


class Refusal(Exception):
  """A command that cannot be done as asked. The message names field, value and remedy."""


class ConfigError(Refusal, ValueError):
  """A value of a configuration or flag that is impossible, or that does not fit the others."""


class DataError(Refusal, ValueError):
  """Documents, a tokenizer or a dataset that cannot be used."""


class WorkdirError(Refusal, RuntimeError):
  """A workdir that holds no run, another run, or one that is in use."""


class CheckpointError(Refusal, RuntimeError):
  """A checkpoint that is missing, damaged, or of another structure."""


class NotFiniteError(Refusal, ArithmeticError):
  """A state that holds a NaN or an infinity, and is therefore not saved."""


class TaskError(Refusal, RuntimeError):
  """A task on which a model could not be evaluated."""


class Failure(OSError):
  """Work that cannot continue although the command was right, for instance on a full disk. The
  message says all that helps a person: it is printed as one line, without a traceback; exit code 1.
  """


def remedy_for(error: OSError, remedy: str) -> str:
  """The remedy if there is no such file. If it just cannot be read now, for lack of permission or
  because a disk does not answer, nothing suggests that it should be removed or replaced."""
  if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
    return remedy
  return "nothing is known to be damaged: give the same command once it can be read"
