"""Memory that the C library holds."""

import os
import platform

import pytest

from beyond_outliers import hardware


def resident_bytes():
  with open("/proc/self/statm") as pages:
    return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other library is asked")
def test_freed_memory_is_given_back():
  """What lies below something that lives is kept by itself."""
  held = [bytes([i % 256]) * 100_000 for i in range(2000)]
  lives = held.pop()
  del held
  before = resident_bytes()
  hardware.return_freed_memory()
  assert before - resident_bytes() > 100e6
  assert len(lives) == 100_000
