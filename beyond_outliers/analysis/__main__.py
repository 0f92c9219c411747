"""Reports on a sweep: python -m beyond_outliers.analysis --root=runs/tuning [--plot=curves.png]."""
from __future__ import annotations

from absl import app, flags

from beyond_outliers import runs
from beyond_outliers.analysis import plots, protocol, tables

ROOT = flags.DEFINE_string("root", None, "Folder with the workdirs of the sweep, at any depth.", required=True)
PLOT = flags.DEFINE_string("plot", "", "Also write the loss curves to this PNG file.")


def main(argv: list[str]) -> None:
  del argv
  tunings = protocol.tuning(runs.find(ROOT.value))
  print(tables.tuning(tunings))
  for t in tunings:
    if t.at_the_edge:
      print(f"{t.optimizer}: {t.learning_rate:g} lies on the edge of its grid {sorted(t.losses)}; widen it")
  if PLOT.value:
    plots.loss_curves(tunings, PLOT.value)


if __name__ == "__main__":
  app.run(main)
