"""Reports on sweeps: python -m beyond_outliers.analysis --root=runs/tuning,runs/qat [--plot=curves.png --gap_plot=gap.png].

Prints each recipe's best learning rates, and where there is more than one recipe what each costs
each optimizer. --common_loss prints instead how the optimizers come to one loss, --degradation what
quantization after training costs them, from the cells of evaluation jobs. --overrides=FILE writes
the rates, or rates and lengths, for launch.local.
"""

from __future__ import annotations

from absl import app, flags
from etils import epath

from beyond_outliers import cli, runs
from beyond_outliers.analysis import plots, ptq_degradation, qat_gap, tables, tuning
from beyond_outliers.config.checks import require

ROOT = flags.DEFINE_list(
  "root", None, "Folders with the workdirs of sweeps, at any depth.", required=True
)
PLOT = flags.DEFINE_string("plot", "", "Also draw the loss curves into this PNG file.")
GAP_PLOT = flags.DEFINE_string(
  "gap_plot", "", "Also draw what the recipes cost into this PNG file."
)
COMMON_LOSS = flags.DEFINE_bool(
  "common_loss", False, "How the optimizers come to one loss in full precision, instead."
)
DEGRADATION = flags.DEFINE_string(
  "degradation", "", "What evaluation jobs found, instead: loss_difference, kl, agreement, ..."
)
CELLS = flags.DEFINE_list(
  "cells",
  [],
  "With --degradation: folders that evaluate --out wrote to, beside the runs' own eval/.",
)
SETTINGS = flags.DEFINE_list(
  "settings", [], "With --degradation: only cells that were measured under these, documents=3,..."
)
OVERRIDES = flags.DEFINE_string(
  "overrides", "", "Also write what was found in full precision to this file, for launch.local."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  check_flags()
  for root in ROOT.value:
    require(
      epath.Path(root).exists(),
      "--root",
      root,
      "there is no such folder; give those that hold the runs' workdirs",
    )
  # Roots may overlap.
  found = list({run.path.resolve(): run for root in ROOT.value for run in runs.find(root)}.values())
  require(
    bool(found),
    "--root",
    ",".join(ROOT.value),
    "holds no run; give the folders that hold the runs' workdirs",
  )
  if DEGRADATION.value:
    settings = dict(setting.split("=", 1) for setting in SETTINGS.value)
    print(
      ptq_degradation.table(ptq_degradation.cells(found, settings, CELLS.value), DEGRADATION.value)
    )
    return
  chosen = report_common_loss(found) if COMMON_LOSS.value else report_tuning(found)
  if OVERRIDES.value:
    tuning.write_overrides(OVERRIDES.value, found[0].config.size, chosen)


def check_flags() -> None:
  """Errors: ConfigError for what the report that is asked for would not draw or write, or could
  not."""
  for flag, others in (
    (PLOT, (COMMON_LOSS, DEGRADATION)),
    (GAP_PLOT, (COMMON_LOSS, DEGRADATION)),
    (COMMON_LOSS, (DEGRADATION,)),
    (OVERRIDES, (DEGRADATION,)),
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
      not flag.value or bool(DEGRADATION.value),
      f"--{flag.name}",
      ",".join(flag.value),
      "belongs to --degradation",
    )
  for folder in CELLS.value:
    require(
      epath.Path(folder).exists(),
      "--cells",
      folder,
      "there is no such folder; give those that evaluate had as --out",
    )
  require(
    all("=" in setting for setting in SETTINGS.value),
    "--settings",
    ",".join(SETTINGS.value),
    "expected name=value,...",
  )
  for flag in (PLOT, GAP_PLOT, OVERRIDES):
    require(
      epath.Path(flag.value).parent.exists(),
      f"--{flag.name}",
      flag.value,
      "there is no such folder; make it first",
    )


def report_tuning(found: list[runs.Run]) -> list[tuning.Tuning]:
  """Returns what was tuned in full precision."""
  tunings = tuning.tuning(found)
  recipes = list(dict.fromkeys(t.recipe for t in tunings))
  require(
    not GAP_PLOT.value or len(recipes) > 1,
    "--gap_plot",
    GAP_PLOT.value,
    f"the runs are all of recipe {recipes[0]!r}; add to --root the same under another",
  )
  for recipe in recipes:
    own = [t for t in tunings if t.recipe == recipe]
    print(f"learning rates, recipe {recipe}\n\n{tables.tuning(own)}\n")
    for t in own:
      if t.at_the_edge and len(t.losses) > 1:
        print(
          f"{t.optimizer}: {t.learning_rate:g} lies on the edge of its grid {sorted(t.losses)}; "
          "widen it"
        )
  if len(recipes) > 1:
    differences, left_out = qat_gap.gaps(found)
    print(f"full precision against recipe\n\n{tables.gaps(differences)}\n")
    if any(len(t.losses) > 1 for t in tunings if t.recipe != tuning.FULL_PRECISION):
      print(f"learning rates tuned under a recipe\n\n{tables.retuning(tunings)}\n")
    print("\n".join(["left out:", *left_out]) if left_out else "nothing was left out")
    if GAP_PLOT.value:
      plots.gaps(differences, GAP_PLOT.value)
  if PLOT.value:
    plots.loss_curves(tunings, PLOT.value)
  return [t for t in tunings if t.recipe == tuning.FULL_PRECISION]


def report_common_loss(found: list[runs.Run]) -> list[tuning.Landing]:
  loss, landings = tuning.common_loss(found)
  print(f"common loss: {loss:.4f} nats\n\n{tables.common_loss(landings, loss)}")
  return landings


if __name__ == "__main__":
  cli.run(main)
