"""Orbax's handlers, which say at once that this process could not write its part of a checkpoint.

Orbax itself raises an error only in whoever waits for it, and among several processes only once all
of them have met: one whose disk is full would wait for the others, and these for its part, until
Orbax gives up after 20 minutes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def _noted(errors: list[Exception]) -> Iterator[None]:
  try:
    yield
  except TimeoutError:
    raise  # of who waits: it is not at its end
  except Exception as error:
    errors.append(error)
    raise


class _Watched:
  """A write under way, whose error goes into `errors`, too."""

  def __init__(self, future: Any, errors: list[Exception]):
    self._future, self._errors = future, errors

  def result(self, timeout: float | None = None) -> Any:
    with _noted(self._errors):
      return self._future.result(timeout)

  def cancel(self) -> bool | None:
    return self._future.cancel()


def telling(handler: Any, errors: list[Exception]) -> Any:
  """The handler; `errors` gets those of its writes in the background, and of what process 0 does
  once all have written."""
  save, finalize = handler.async_save, handler.finalize

  async def async_save(*args: Any, **kwargs: Any) -> list[_Watched]:
    return [_Watched(future, errors) for future in await save(*args, **kwargs) or ()]

  def finalized(*args: Any, **kwargs: Any) -> None:
    with _noted(errors):
      finalize(*args, **kwargs)

  # Of this one: Orbax knows handlers by their class.
  handler.async_save, handler.finalize = async_save, finalized
  return handler
