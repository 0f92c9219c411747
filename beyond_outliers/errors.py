"""Refusals: errors whose message is meant for whoever gave the command, told in one line, exit code
2."""

from __future__ import annotations


class Refusal(Exception):
  """Something that cannot be done as asked; the message names the field, its value and the
  remedy."""


class ConfigError(Refusal, ValueError):
  """A configuration that cannot run."""


class DataError(Refusal, ValueError):
  """Documents or a dataset that cannot be used."""


class WorkdirError(Refusal, RuntimeError):
  """A workdir that cannot be used for this run."""


class CheckpointError(Refusal, RuntimeError):
  """A checkpoint that cannot be used."""


class TaskError(Refusal, RuntimeError):
  """Tasks that could not be asked of a model."""
