"""Which learning rate a sweep's workdirs speak for, and the table and figure made of them."""
import json

import pytest

from beyond_outliers import config, runs
from beyond_outliers.analysis import plots, protocol, tables
from configs import adamw, muon


def workdir(root, module, rate, seed, losses, status="done"):
  """A run as training leaves it, without the training."""
  folder = root / module.__name__.split(".")[-1] / f"{rate}-{seed}"
  folder.mkdir(parents=True)
  c = config.resolve(module.get_config(f"nano,optimizer.learning_rate={rate},seed={seed}"))
  (folder / "config.json").write_text(json.dumps(config.to_dict(c)))
  (folder / "manifest.json").write_text("{}")
  (folder / "status.json").write_text(json.dumps({"status": status, "step": len(losses)}))
  rows = [{"step": step, "train/loss": loss, "seconds": 2.0 * step, "skipped": 0.0} for step, loss in enumerate(losses, 1)]
  rows.append({"step": len(losses), "eval/loss": losses[-1] + 0.5})
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def sweep(tmp_path):
  for rate, end in ((0.01, 5.0), (0.03, 4.0), (0.1, 4.5)):
    for seed in (0, 1):
      workdir(tmp_path, adamw, rate, seed, [6.0, end + 0.1 * seed])
  workdir(tmp_path, muon, 0.1, 0, [6.0, 3.9])
  workdir(tmp_path, muon, 0.3, 0, [6.0, 3.0], status="diverged")
  return runs.find(tmp_path)


def test_the_best_rate_is_of_the_mean_over_seeds(sweep):
  muons, adamws = protocol.tuning(sweep)                               # best first
  assert (adamws.optimizer, adamws.learning_rate, adamws.at_the_edge) == ("adamw", 0.03, False)
  assert adamws.losses == pytest.approx({0.01: 5.55, 0.03: 4.55, 0.1: 5.05})
  assert [run.config.seed for run in adamws.best] == [0, 1]
  assert (muons.learning_rate, muons.at_the_edge) == (0.1, True), "a run that diverged is no candidate"
  assert muons.losses[0.3] == float("inf")


def test_rates_are_compared_on_common_seeds_alone(sweep, tmp_path):
  workdir(tmp_path / "more", adamw, 0.3, 1, [6.0, 4.05])
  adamws = protocol.tuning([*sweep, *runs.find(tmp_path / "more")])[-1]
  assert adamws.losses == pytest.approx({0.01: 5.6, 0.03: 4.6, 0.1: 5.1, 0.3: 4.55}) and adamws.learning_rate == 0.3
  workdir(tmp_path / "other", adamw, 1.0, 7, [6.0, 4.0])
  with pytest.raises(ValueError, match=r"adamw: the rates .* have no seed in common"):
    protocol.tuning([*sweep, *runs.find(tmp_path / "other")])


def test_the_table_has_the_neighbours_and_what_went_wrong(sweep):
  lines = tables.tuning(protocol.tuning(sweep)).splitlines()
  assert lines[2] == "| muon | 0.1 | 4.4000 | edge of the grid | inf at 0.3 | 0 | 0 | 4 |"
  assert lines[3] == "| adamw | 0.03 | 4.5500 | 5.5500 at 0.01 | 5.0500 at 0.1 | 0 | 0 | 4 |"


def test_the_figure_is_written(sweep, tmp_path):
  plots.loss_curves(protocol.tuning(sweep), tmp_path / "curves.png")
  assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
