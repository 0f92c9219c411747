"""Errors for the person who gave the command, printed as one line: refusals, with exit code 2, and
failures, with 1."""

from __future__ import annotations


class Refusal(Exception):
  """A command that cannot be done as asked. The message names the field, its value, the remedy."""


class ConfigError(Refusal, ValueError):
  """A value of a configuration or a flag that cannot run, or that does not fit the others."""


class DataError(Refusal, ValueError):
  """Documents, a tokenizer or a dataset that cannot be used."""


class WorkdirError(Refusal, RuntimeError):
  """A workdir that holds no run, another run, or one that is under way."""


class CheckpointError(Refusal, RuntimeError):
  """A checkpoint that is missing, damaged, or of another structure."""


class NotFiniteError(Refusal, ArithmeticError):
  """A state that holds a NaN or an infinity, which no checkpoint is made of."""


class TaskError(Refusal, RuntimeError):
  """A task that could not be asked of a model."""


class Failure(OSError):
  """Work that cannot go on though the command was right, on a full disk for instance. The message
  says all that a person can use: it is printed as one line, without a traceback, with exit code 1.
  """


def remedy_for(error: OSError, remedy: str) -> str:
  """The remedy where there is no such file. For one that only cannot be read now (no permission, or
  a disk that does not answer) there is no reason to remove or replace it, and another remedy."""
  if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
    return remedy
  return "nothing is known to be damaged: give the same command once it can be read"
