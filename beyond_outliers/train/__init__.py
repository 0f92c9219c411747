"""Training: `run` takes one configuration to a workdir."""

from beyond_outliers.train.run import run

__all__ = ["run"]
