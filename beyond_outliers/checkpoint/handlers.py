"""Orbax handlers that report at once if this process could not write its part of a checkpoint.

Orbax reports a failed write only to a caller that waits for the save, and with several processes
only after all of them have synchronized. A process with a full disk would wait for the others, and
they for its part, until Orbax gives up after 20 minutes.
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
    raise  # the waiter's timeout: the write has not ended
  except Exception as error:
    errors.append(error)
    raise


class _Watched:
  """A write in progress, whose error is also appended to `errors`."""

  def __init__(self, future: Any, errors: list[Exception]):
    self._future, self._errors = future, errors

  def result(self, timeout: float | None = None) -> Any:
    with _noted(self._errors):
      return self._future.result(timeout)

  def cancel(self) -> bool | None:
    return self._future.cancel()


def telling(handler: Any, errors: list[Exception]) -> Any:
  """The handler, changed so that `errors` collects the errors of its writes in the background, and
  of process 0's work once all have written."""
  save, finalize = handler.async_save, handler.finalize

  async def async_save(*args: Any, **kwargs: Any) -> list[_Watched]:
    return [_Watched(future, errors) for future in await save(*args, **kwargs) or ()]

  def finalized(*args: Any, **kwargs: Any) -> None:
    with _noted(errors):
      finalize(*args, **kwargs)

  # Patched on the instance: Orbax looks handlers up by class.
  handler.async_save, handler.finalize = async_save, finalized
  return handler
