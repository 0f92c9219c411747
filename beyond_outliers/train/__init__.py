"""Training: `run` takes one configuration to a workdir. README.md tells what it does and leaves."""

from beyond_outliers.train.run import run

__all__ = ["run"]
