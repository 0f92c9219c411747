"""Checkpoints of a run and of quantized models. The only package that imports Orbax."""

from beyond_outliers.checkpoint.checkpoints import Checkpoints as Checkpoints
from beyond_outliers.checkpoint.quantized import load_quantized as load_quantized
from beyond_outliers.checkpoint.quantized import save_quantized as save_quantized
from beyond_outliers.errors import CheckpointError as CheckpointError
