"""Reports on sweeps.

  python -m beyond_outliers.analysis --root=runs/tuning,runs/qat [--plot=curves.png]

Prints each recipe's best learning rates and, with several recipes, what each costs each optimizer.
Instead, --common_loss prints how the optimizers reach one loss, and --degradation what quantization
after training costs them, from the cells of evaluation jobs. --overrides=FILE also writes the
rates, or rates and lengths, for launch.local. --out=FOLDER writes all of this and more as one page
of HTML, with its figures and tables. --pack=FILE writes everything that these reports read into one
small file, which --root accepts in place of a folder.
"""

from __future__ import annotations

import os

from absl import app, flags

from beyond_outliers import cli, runs, stores
from beyond_outliers.analysis import packed_runs, report
from beyond_outliers.analysis.plots import style
from beyond_outliers.config.checks import require, require_once
from beyond_outliers.config.files import make_folder
from beyond_outliers.errors import ConfigError

OUT = cli.path_flag(
  "out", "", "Write an HTML report on all of it to this folder, with figures and tables, instead."
)
ROOT = cli.paths_flag(
  "root",
  None,
  "Folders that hold the workdirs of sweeps, at any depth, their addresses in stores, or files "
  "that --pack wrote.",
  required=True,
)
PLOT = cli.path_flag("plot", "", "Also draw the loss curves to this file, .png or .svg.")
GAP_PLOT = cli.path_flag(
  "gap_plot", "", "Also draw what the recipes cost to this file, .png or .svg."
)
COMMON_LOSS = flags.DEFINE_bool(
  "common_loss", False, "Print how the optimizers reach one common loss in full precision, instead."
)
DEGRADATION = flags.DEFINE_string(
  "degradation",
  "",
  "Print this metric of the evaluation jobs, instead: loss_difference, kl, agreement, ...",
)
CELLS = cli.paths_flag(
  "cells",
  [],
  "With --degradation or --out: folders that evaluate --out wrote to, besides the runs' own eval/.",
)
SETTINGS = flags.DEFINE_list(
  "settings",
  [],
  "With --degradation or --out: only cells measured with these settings, documents=3,...",
)
OVERRIDES = cli.path_flag(
  "overrides", "", "Also write the values found in full precision to this file, for launch.local."
)
PACK = cli.path_flag(
  "pack", "", "Write all that reports read of the runs to this .tar.xz file, instead."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  _check_flags()
  found = _find_runs(ROOT.value)
  if PACK.value:
    print(packed_runs.pack_runs(found, PACK.value))
    return
  settings = dict(setting.split("=", 1) for setting in SETTINGS.value)
  if OUT.value:
    from beyond_outliers.analysis import page  # imports Jinja, which no other report needs

    options = {"roots": ROOT.value, "settings": settings, "folders": CELLS.value}
    print(page.write_page(found, OUT.value, **options))
    return
  if DEGRADATION.value:
    report.print_degradation(found, DEGRADATION.value, settings, CELLS.value)
    return
  chosen = (
    report.print_common_loss(found)
    if COMMON_LOSS.value
    else report.print_tuning(found, PLOT.value, GAP_PLOT.value)
  )
  if OVERRIDES.value:
    report.check_ended(found)
    report.write_overrides(OVERRIDES.value, found[0].config, chosen)


def _check_flags() -> None:
  """Refuses flags that the chosen report ignores or cannot use. Errors: ConfigError."""
  for flag, others in (
    (PLOT, (COMMON_LOSS, DEGRADATION, OUT)),
    (GAP_PLOT, (COMMON_LOSS, DEGRADATION, OUT)),
    (COMMON_LOSS, (DEGRADATION, OUT)),
    (DEGRADATION, (OUT,)),
    (OVERRIDES, (DEGRADATION, OUT)),
    (PACK, (PLOT, GAP_PLOT, COMMON_LOSS, DEGRADATION, OUT, OVERRIDES)),
  ):
    given = [f"--{other.name}" for other in others if other.value]
    require(
      not flag.value or not given,
      f"--{flag.name}",
      flag.value,
      f"{' and '.join(given)} asks for another report; give one",
    )
  for flag in (SETTINGS, CELLS):
    require(
      not flag.value or bool(DEGRADATION.value or OUT.value),
      f"--{flag.name}",
      ",".join(flag.value),
      "works only with --degradation or --out; give one of them",
    )
  for folder in CELLS.value:
    require(
      os.path.isdir(folder),
      "--cells",
      folder,
      "there is no such folder; give those that evaluate --out wrote to",
    )
  require(
    all("=" in setting for setting in SETTINGS.value),
    "--settings",
    ",".join(SETTINGS.value),
    "expected name=value,...",
  )
  require_once("--settings", [setting.partition("=")[0] for setting in SETTINGS.value])
  for flag in (PLOT, GAP_PLOT, OVERRIDES, OUT, PACK):
    require(
      os.path.isdir(os.path.dirname(flag.value.rstrip("/")) or "."),
      f"--{flag.name}",
      flag.value,
      "there is no such folder; make it first",
    )
  for flag in (PLOT, GAP_PLOT, OVERRIDES, PACK):
    require(
      not os.path.isdir(flag.value), f"--{flag.name}", flag.value, "is a folder; name a file in it"
    )
  for flag in (PLOT, GAP_PLOT):
    require(
      not flag.value or style.is_writable(flag.value),
      f"--{flag.name}",
      flag.value,
      "figures are not written in this format; give a name that ends in .png or .svg",
    )
  if OUT.value:
    make_folder(OUT.value, ConfigError, "give a folder that can be written", "--out")


def _find_runs(roots: list[str]) -> list[runs.Run]:
  """The runs below all roots, each once even if roots overlap.

  Errors: ConfigError if a root does not exist, or none holds a run."""
  for root in roots:
    stores.check_address(root)
    require(
      stores.is_address(root) or os.path.isdir(root) or packed_runs.archive_of(root) is not None,
      "--root",
      root,
      "there is no such folder; give those that hold the runs' workdirs",
    )
  every = (run for root in roots for run in packed_runs.find_runs(root))
  found = list({os.path.realpath(run.path): run for run in every}.values())
  require(
    bool(found),
    "--root",
    ",".join(roots),
    "holds no run; give the folders that hold the runs' workdirs",
  )
  return found


if __name__ == "__main__":
  cli.run_command(main)
