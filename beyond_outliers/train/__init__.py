"""Training: `run` takes one configuration to a workdir, as README.md here describes."""

from beyond_outliers.train.run import run

__all__ = ["run"]
