"""The configurations that benches measure: the files of configs/."""

from __future__ import annotations

import importlib

from beyond_outliers import config


def study_config(optimizer: str, argument: str) -> config.Config:
  """configs/<optimizer>.py with an argument, size and overrides, such as "50m,batch_size=2"."""
  return config.resolve(importlib.import_module(f"configs.{optimizer}").get_config(argument))
