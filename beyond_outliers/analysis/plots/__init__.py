"""Figures (extra: report). Each function takes what to show and a path, and returns the figure.

The path's suffix chooses PNG or SVG; without a path, the figure is drawn but not written.
"""

from beyond_outliers.analysis.plots.propagation import (
  plot_error_along_depth,
  plot_error_parts,
  plot_gains,
)
from beyond_outliers.analysis.plots.quantization import (
  plot_by_learning_rate,
  plot_degradation,
  plot_landings,
  plot_predictors,
)
from beyond_outliers.analysis.plots.style import COLORS
from beyond_outliers.analysis.plots.training import (
  plot_along_training,
  plot_loss_curves,
  plot_qat_gaps,
  plot_scaling_law,
)

__all__ = [
  "COLORS",
  "plot_along_training",
  "plot_by_learning_rate",
  "plot_degradation",
  "plot_error_along_depth",
  "plot_error_parts",
  "plot_gains",
  "plot_landings",
  "plot_loss_curves",
  "plot_predictors",
  "plot_qat_gaps",
  "plot_scaling_law",
]
