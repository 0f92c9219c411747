"""Orbax's handlers, which say at once that this process could not write its part of a checkpoint.

Orbax tells who waits for it, and among several processes only once all of them have met: one whose
disk is full waits for the others, which wait for its part, until Orbax gives up after 20 minutes.
"""

from __future__ import annotations

from typing import Any


class _Watched:
  """A write under way, whose error goes into `errors`, too."""

  def __init__(self, future: Any, errors: list[Exception]):
    self._future, self._errors = future, errors

  def result(self, timeout: float | None = None) -> Any:
    try:
      return self._future.result(timeout)
    except TimeoutError:
      raise  # it is not at its end
    except Exception as error:
      self._errors.append(error)
      raise

  def cancel(self) -> bool | None:
    return self._future.cancel()


def telling(handler: Any, errors: list[Exception]) -> Any:
  """The handler; `errors` gets those of its writes in the background."""
  save = handler.async_save

  async def async_save(*args: Any, **kwargs: Any) -> list[_Watched]:
    return [_Watched(future, errors) for future in await save(*args, **kwargs) or ()]

  handler.async_save = async_save  # of this one: Orbax knows handlers by their class
  return handler
