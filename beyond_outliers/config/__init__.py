"""A run's configuration: what a config file says becomes frozen dataclasses here, checked once,
before any long work."""

from beyond_outliers.config.optimizers import OPTIMIZERS
from beyond_outliers.config.overrides import override, parse_argument
from beyond_outliers.config.resolve import (
  MAY_CHANGE,
  check_resumable,
  differences,
  flatten,
  resolve,
  to_dict,
)
from beyond_outliers.config.sections import (
  Checkpoint,
  Config,
  Data,
  Eval,
  Group,
  Log,
  Mesh,
  Model,
  Optimizer,
  Quant,
  QuantRule,
  Schedule,
)
from beyond_outliers.config.sizes import SIZES
from beyond_outliers.errors import ConfigError

__all__ = [
  "MAY_CHANGE",
  "OPTIMIZERS",
  "SIZES",
  "Checkpoint",
  "Config",
  "ConfigError",
  "Data",
  "Eval",
  "Group",
  "Log",
  "Mesh",
  "Model",
  "Optimizer",
  "Quant",
  "QuantRule",
  "Schedule",
  "check_resumable",
  "differences",
  "flatten",
  "override",
  "parse_argument",
  "resolve",
  "to_dict",
]
