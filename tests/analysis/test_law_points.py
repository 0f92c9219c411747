"""Points of a scaling law from workdirs: which runs of sweeps they are, and what is left out."""

import math

import numpy as np
import pytest
from workdirs import workdir

from beyond_outliers import config, runs
from beyond_outliers.analysis import law_points, scaling_law
from beyond_outliers.errors import WorkdirError
from configs import adamw, muon

LADDER = ("0.3m", "0.6m", "1m", "2m")
A, ALPHA, E = 30.0, 0.3, 2.0
WORTH = {("adamw", "quest_w4a4"): 0.86, ("muon", "none"): 1.2}  # parameters; all others 1


def ladder(root, seeds=2, best=0.1, sizes=LADDER, recipes=("none", "quest_w4a4")):
  """Sweeps of two optimizers over four sizes, at 20 tokens per parameter: losses follow the law at
  the best rate, and are worse at the others; under the recipe, the next rate is even better."""
  for number, size in enumerate(sizes):
    batch = 32 if size == "2m" else 16
    steps = 100 * 2**number * 16 // batch
    N = steps * batch * 256 // 20
    for module in (adamw, muon):
      for recipe in recipes:
        worth = WORTH.get((module.__name__.split(".")[-1], recipe), 1.0)
        loss = A / (worth * N) ** ALPHA + E
        for rate, off in ((best, 0.0), (3 * best, -0.1 if recipe != "none" else 0.3)):
          for seed in range(seeds):
            workdir(
              root / size,
              module,
              rate,
              seed,
              {steps: loss * math.exp(0.001 * (-1) ** seed) + off},
              recipe=recipe,
              size=size,
              parameters=(N, N // 4),
            )


def test_a_planted_law_comes_back_from_workdirs(tmp_path):
  ladder(tmp_path)
  points, left_out = law_points.of_runs(runs.find(tmp_path))
  assert tuple(points) == law_points.OF_RUNS and len(points) == 4 * 2 * 2 * 2
  assert set(points.learning_rate) == {0.1} and set(points["size"]) == set(LADDER)
  assert np.allclose(points.tokens / points.parameters, 20, rtol=1e-3)
  assert len(left_out) == 16
  assert "adamw, none, 0.3m, 100 steps: learning rate 0.1 is taken, the best; not 0.3" in left_out
  assert (
    "muon, quest_w4a4, 2m, 400 steps: learning rate 0.1 is taken, the best in full precision; "
    "not 0.3" in left_out
  )
  law = scaling_law.fit(points, resamples=0)
  assert law.left_out == []
  assert law.params["alpha"] == pytest.approx(ALPHA, rel=0.02)
  assert law.params["E"] == pytest.approx(E, rel=0.02)
  assert law.rho["adamw", "quest_w4a4"] == pytest.approx(0.86, rel=0.01)
  assert law.rho["muon", "quest_w4a4"] == pytest.approx(1 / 1.2, rel=0.01)


def test_a_recipe_that_was_not_run_at_the_tuned_rate_has_its_own_best(tmp_path):
  for rate, loss in ((0.1, 4.0), (0.3, 4.5)):
    workdir(tmp_path, adamw, rate, 0, {260: loss})
  for rate, loss in ((0.3, 4.6), (1.0, 4.9)):
    workdir(tmp_path, adamw, rate, 0, {260: loss}, recipe="quest_w4a4")
  workdir(tmp_path, muon, 0.5, 0, {260: 4.2}, recipe="quest_w4a4")  # nothing in full precision
  points, left_out = law_points.of_runs(runs.find(tmp_path))
  rates = points.set_index(["optimizer", "recipe"]).learning_rate.to_dict()
  assert rates == {
    ("adamw", "none"): 0.1,
    ("adamw", "quest_w4a4"): 0.3,
    ("muon", "quest_w4a4"): 0.5,
  }
  assert left_out == [
    "adamw, none, nano, 260 steps: learning rate 0.1 is taken, the best; not 0.3",
    "adamw, quest_w4a4, nano, 260 steps: learning rate 0.3 is taken, its own best: 0.1, the best "
    "in full precision, was not run; not 1",
  ]


def test_runs_without_a_last_loss_are_named(tmp_path):
  workdir(tmp_path, adamw, 0.1, 0, {260: 4.0})
  under_way = workdir(tmp_path, adamw, 0.1, 1, {260: 4.0}, status="running")
  broke = workdir(tmp_path, adamw, 0.1, 2, {260: None}, status="diverged")
  blind = workdir(tmp_path, adamw, 0.1, 3, {100: 4.0}, argument=",steps=260")
  workdir(tmp_path, muon, 0.1, 0, {260: 4.0}, status="failed")
  workdir(tmp_path, muon, 0.3, 0, {260: 4.0}, status="failed")
  points, left_out = law_points.of_runs(runs.find(tmp_path))
  assert list(points.seed) == [0] and list(points.optimizer) == ["adamw"]
  assert f"{under_way}: running at step 260 of 260" in left_out
  assert f"{broke}: diverged at step 260 of 260" in left_out
  assert f"{blind}: done, but without a finite eval/loss at step 260" in left_out
  assert left_out[-1] == (
    "muon, none, nano, 260 steps: no learning rate has all its seeds done, recipe none"
  )


@pytest.mark.parametrize(
  "options,message",
  [
    ({"fingerprint": "other"}, "data.fingerprint: 'abc' in .*, 'other' in .*cannot be compared"),
    ({"tokenizer": "letters"}, "data.tokenizer: 'words' in .*, 'letters' in .*cannot be compared"),
    ({"argument": ",context=128"}, "context: 256 in .*, 128 in"),
    ({"argument": ",schedule.cooldown=0.5"}, "schedule.cooldown: 0.2 in .*, 0.5 in"),
    ({"argument": ",model.mlp=swiglu"}, "model.mlp: 'relu2' in .*, 'swiglu' in"),
    ({"argument": ",optimizer.b2=0.5"}, "optimizer.b2: .* in .*, 0.5 in"),
    ({}, "0.1-0 and .*0.1-0 have the same optimizer, recipe, learning rate, seed and length"),
  ],
)
def test_runs_of_no_one_law_are_refused(tmp_path, options, message):
  workdir(tmp_path / "one", adamw, 0.1, 0, {260: 4.0})
  workdir(tmp_path / "two", adamw, 0.1, 0, {260: 4.0}, **options)
  with pytest.raises(config.ConfigError, match=message):
    law_points.of_runs(runs.find(tmp_path))


def test_sizes_may_differ_in_what_makes_a_model_larger(tmp_path):
  """Even with the same name and number of steps, they are not duplicates."""
  workdir(tmp_path / "one", adamw, 0.1, 0, {260: 4.0})
  workdir(tmp_path / "two", adamw, 0.1, 0, {260: 3.9}, argument=",model.blocks=3")
  workdir(tmp_path / "three", adamw, 0.1, 0, {260: 3.8}, argument=",batch_size=16")
  points, left_out = law_points.of_runs(runs.find(tmp_path))
  assert len(points) == 3 and not left_out
  assert sorted(points.tokens) == [260 * 8 * 256] * 2 + [260 * 16 * 256]


def test_too_few_points_are_refused_with_the_number_it_takes(tmp_path):
  ladder(tmp_path, seeds=1, sizes=LADDER[:1])
  points, _ = law_points.of_runs(runs.find(tmp_path))
  with pytest.raises(
    config.ConfigError, match=r"points = '4 runs': the law has 6 parameters .* at least 7 runs"
  ):
    scaling_law.fit(points)


def test_a_table_of_no_runs_is_refused(tmp_path):
  workdir(tmp_path, adamw, 0.1, 0, {260: 4.0}, status="running")
  points, left_out = law_points.of_runs(runs.find(tmp_path))
  assert points.empty and tuple(points) == law_points.OF_RUNS and len(left_out) == 1
  with pytest.raises(config.ConfigError, match=r"points: there are no runs"):
    scaling_law.fit(points)


@pytest.mark.parametrize(
  "name,text,message",
  [
    ("metrics.jsonl", "{\n", r"metrics.jsonl:1: not a row of metrics"),
    ("manifest.json", "{", r"manifest.json: is not the JSON that was written"),
    ("manifest.json", '{"time": "now"}', r"manifest.json: lacks data.directory"),
    ("config.json", '{"size": 3}', r"config.json: .*restore it"),
    ("status.json", "[]", r"status.json: is a JSON list"),
  ],
)
def test_one_damaged_run_among_many_is_named(tmp_path, name, text, message):
  workdir(tmp_path, adamw, 0.1, 0, {260: 4.0})
  broken = workdir(tmp_path, adamw, 0.1, 1, {260: 4.0})
  (broken / name).write_text(text)
  with pytest.raises(WorkdirError, match=rf"0\.1-1/{message}"):
    law_points.of_runs(runs.find(tmp_path))
