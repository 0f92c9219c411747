"""Configuration: a config file's values as frozen dataclasses, checked once, before any long work.

Pure Python: importing it imports neither JAX nor NumPy.
"""

from beyond_outliers.config.optimizers import OPTIMIZERS
from beyond_outliers.config.overrides import flatten, override, parse_argument
from beyond_outliers.config.resolve import (
  MAY_CHANGE,
  check_resumable,
  differences,
  resolve,
  to_dict,
)
from beyond_outliers.config.run import Config
from beyond_outliers.config.sections import (
  Average,
  Checkpoint,
  Data,
  Distributed,
  Eval,
  Group,
  Log,
  Mesh,
  Model,
  OptimizerGroups,
  Quant,
  QuantRule,
  Schedule,
  Spikes,
)
from beyond_outliers.config.sizes import SIZES
from beyond_outliers.errors import ConfigError

__all__ = [
  "MAY_CHANGE",
  "OPTIMIZERS",
  "SIZES",
  "Average",
  "Checkpoint",
  "Config",
  "ConfigError",
  "Data",
  "Distributed",
  "Eval",
  "Group",
  "Log",
  "Mesh",
  "Model",
  "OptimizerGroups",
  "Quant",
  "QuantRule",
  "Schedule",
  "Spikes",
  "check_resumable",
  "differences",
  "flatten",
  "override",
  "parse_argument",
  "resolve",
  "to_dict",
]
