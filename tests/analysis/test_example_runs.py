"""Example runs, which notebooks read or train."""

import json
import shutil

import jax
import numpy as np
import pytest
from workdirs import workdir

from beyond_outliers import config
from beyond_outliers.analysis import example_runs
from beyond_outliers.errors import ConfigError, WorkdirError
from beyond_outliers.model import transformer
from configs import adamw, muon


def test_runs_of_a_folder_are_read_and_never_evaluated(tmp_path):
  with pytest.raises(
    WorkdirError, match=r"holds no run; give a folder that holds some, or one of colab"
  ):
    example_runs.find_or_train(str(tmp_path), [adamw])
  with pytest.raises(WorkdirError, match="colabb holds no run"):
    example_runs.find_or_train("colabb", [adamw])
  workdir(tmp_path, adamw, 0.1, 0, [5.0, 4.0])
  workdir(tmp_path, muon, 0.01, 0, [5.0, 4.0])
  found = example_runs.find_or_train(str(tmp_path), [adamw], ["none"])
  assert [run.config.optimizer.name for run in found] == ["adamw", "muon"]
  parts = ",".join(str(run.path) for run in found)
  assert [run.name for run in example_runs.find_or_train(parts, [])] == [run.name for run in found]
  example_runs.measure_cells(str(tmp_path), found, ["rtn_w4a4"])  # they have no checkpoint
  assert not list(tmp_path.rglob("eval"))


@pytest.mark.parametrize("name", example_runs.SMALL_RUNS)
def test_sizes_have_one_ratio_of_tokens_to_parameters(name):
  """The study's law holds at one ratio; law_points tolerates 5 %."""
  example, ratios = example_runs.SMALL_RUNS[name], []
  for size, steps in example.steps.items():
    c = config.resolve(adamw.get_config(f"{size},steps={steps},{example.overrides}"))
    shapes = jax.tree.leaves(transformer.shapes(transformer.Transformer(c.model)))
    parameters = sum(np.prod(x.shape) for x in shapes)
    ratios.append(steps * c.batch_size * c.context / parameters)
  assert max(ratios) < 1.05 * min(ratios)


def test_outliers_are_measured_where_a_notebook_reads_them(monkeypatch):
  """Elsewhere they are not, since that takes longer to compile than all the rest of a small run."""
  made = []
  monkeypatch.setattr(example_runs, "_trained", lambda where, given: made.append(given))
  example_runs.find_or_train("tiny", [adamw], ["none", "quest_w4a4"], ladder=True)
  measured = [(c.size, c.quant.recipe) for c in made if c.log.outliers_every]
  assert len(made) == 6 and measured == [("0.6m", "none")]


def test_a_run_of_another_configuration_is_not_taken_for_the_one_that_is_asked_for(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  c = adamw.get_config(f"0.6m,{example_runs.SMALL_RUNS['tiny'].overrides}")
  folder = tmp_path / "runs/tiny/optimizer=adamw,recipe=none,size=0.6m"
  shutil.copytree(workdir(tmp_path / "made", adamw, 0.1, 0, [5.0]), folder)
  (folder / "config.json").write_text(json.dumps(config.to_dict(config.resolve(c))))
  c.log.every = 3
  assert example_runs._trained("tiny", c).path == folder
  manifest = (folder / "manifest.json").read_text()
  under = {**json.loads(manifest), "jax": {"jax_enable_x64": True}}
  (folder / "manifest.json").write_text(json.dumps(under))
  with pytest.raises(WorkdirError, match="jax_enable_x64 = False: the run was trained under True"):
    example_runs._trained("tiny", c)
  (folder / "manifest.json").write_text(manifest)
  c.seed = 1
  with pytest.raises(ConfigError, match=f"{folder.relative_to(tmp_path)}: (.|\n)*seed: 0 .* 1 now"):
    example_runs._trained("tiny", c)
