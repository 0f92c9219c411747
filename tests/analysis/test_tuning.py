"""The best learning rate by a sweep's workdirs, and the table and figure made from them."""

import math

import pytest
from workdirs import workdir

from beyond_outliers import config, runs
from beyond_outliers.analysis import plots, tables, tuning
from configs import adamw, muon


@pytest.fixture
def sweep(tmp_path):
  for rate, end in ((0.01, 5.0), (0.03, 4.0), (0.1, 4.5)):
    for seed in (0, 1):
      workdir(tmp_path, adamw, rate, seed, [6.0, end + 0.1 * seed])
  workdir(tmp_path, muon, 0.1, 0, [6.0, 3.9])
  workdir(tmp_path, muon, 0.3, 0, [6.0, 3.0], status="diverged")
  return runs.find(tmp_path)


def test_the_best_rate_is_of_the_mean_over_seeds(sweep):
  muons, adamws = tuning.tunings(sweep)  # best first
  assert (adamws.optimizer, adamws.learning_rate, adamws.at_the_edge) == ("adamw", 0.03, False)
  assert adamws.losses == pytest.approx({0.01: 5.55, 0.03: 4.55, 0.1: 5.05})
  assert [run.config.seed for run in adamws.best] == [0, 1]
  assert (muons.learning_rate, muons.at_the_edge) == (0.1, True), (
    "a run that diverged is no candidate"
  )
  assert muons.losses[0.3] == float("inf")


def test_rates_are_compared_on_common_seeds_alone(sweep, tmp_path):
  workdir(tmp_path / "more", adamw, 0.3, 1, [6.0, 4.05])
  adamws = tuning.tunings([*sweep, *runs.find(tmp_path / "more")])[-1]
  assert (
    adamws.losses == pytest.approx({0.01: 5.6, 0.03: 4.6, 0.1: 5.1, 0.3: 4.55})
    and adamws.learning_rate == 0.3
  )
  assert tuning.judged_without([adamws]) == [
    "rates are compared by the seeds that all of a sweep's have, without 0: adamw (none)"
  ]
  workdir(tmp_path / "other", adamw, 1.0, 7, [6.0, 4.0])
  with pytest.raises(config.ConfigError, match=r"adamw: the rates .* have no seed in common"):
    tuning.tunings([*sweep, *runs.find(tmp_path / "other")])


def test_the_table_has_the_neighbours_and_what_went_wrong(sweep):
  lines = tables.tuning_table(tuning.tunings(sweep)).splitlines()
  assert lines[2] == "| muon | 0.1 | 4.4000 | edge of the grid | inf at 0.3 | 0 | 0 | 4 |"
  assert lines[3] == "| adamw | 0.03 | 4.5500 | 5.5500 at 0.01 | 5.0500 at 0.1 | 0 | 0 | 4 |"


def test_the_figure_is_written(sweep, tmp_path):
  plots.plot_loss_curves(tuning.tunings(sweep), tmp_path / "curves.png")
  assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_recipes_are_sweeps_of_their_own(sweep, tmp_path):
  """Under the recipe another rate is best: no mean over both."""
  for rate, end in ((0.03, 4.9), (0.1, 4.8)):
    for seed in (0, 1):
      workdir(tmp_path / "qat", adamw, rate, seed, [6.0, end], recipe="quest_w4a4")
  found = tuning.tunings([*sweep, *runs.find(tmp_path / "qat")])
  assert [(t.recipe, t.optimizer, t.learning_rate) for t in found] == [
    ("none", "muon", 0.1),
    ("none", "adamw", 0.03),
    ("quest_w4a4", "adamw", 0.1),
  ]
  assert tables.retuning_table(found).splitlines()[2:] == [
    "| adamw | quest_w4a4 | 0.03 | 0.1 (edge of the grid) | 5.4000 | 5.3000 |"
  ]


def test_a_figure_of_nothing_is_refused(tmp_path):
  workdir(tmp_path, adamw, 0.1, 0, [6.0, 4.0], status="diverged")
  with pytest.raises(
    config.ConfigError, match=r"--plot = '.*curves.png': no learning rate has all its runs done"
  ):
    plots.plot_loss_curves(tuning.tunings(runs.find(tmp_path)), tmp_path / "curves.png")


def test_a_run_whose_last_loss_is_not_finite_has_none(tmp_path):
  """Whether an earlier loss was finite, none ever was, or none was measured."""
  for rate, losses in (
    (0.03, {1: 5.0, 2: 4.5}),
    (0.1, {1: 4.0, 2: None}),
    (0.3, {1: None, 2: None}),
  ):
    workdir(tmp_path, adamw, rate, 0, losses)
  workdir(tmp_path, adamw, 1.0, 0, {1: 4.0}, argument=",steps=2")
  (found,) = tuning.tunings(runs.find(tmp_path))
  assert (
    found.losses == {0.03: 4.5, 0.1: math.inf, 0.3: math.inf, 1.0: math.inf}
    and found.learning_rate == 0.03
  )


def test_a_rate_of_its_own_may_be_the_one_that_is_swept(tmp_path):
  """Muon's embedding has its own, which a swept one may equal; unequal ones are refused."""
  own = config.resolve(muon.get_config()).optimizer.groups["embedding"].optimizer.learning_rate
  for rate in (own, 10 * own):
    workdir(tmp_path, muon, rate, 0, [6.0, 4.0])
  assert set(tuning.tunings(runs.find(tmp_path))[0].losses) == {own, 10 * own}
  workdir(
    tmp_path,
    muon,
    100 * own,
    0,
    [6.0, 4.0],
    argument=f",optimizer.groups.embedding.learning_rate={2 * own}",
  )
  with pytest.raises(
    config.ConfigError,
    match=r"optimizer.groups.embedding.learning_rate: .*: such runs cannot be compared",
  ):
    tuning.tunings(runs.find(tmp_path))


@pytest.mark.parametrize(
  "options,message",
  [
    ({"fingerprint": "other"}, "data.fingerprint: 'abc' in .*, 'other' in"),
    ({"argument": ",steps=100"}, "steps: 2 in .*, 100 in"),
    ({"argument": ",model.blocks=3"}, "model.blocks: 2 in .*, 3 in"),
    ({"argument": ",optimizer.b2=0.5"}, "optimizer.b2: .*: such runs cannot be compared"),
    ({"argument": ",max_gradient_norm=1.0"}, r"max_gradient_norm: 0\.0 in .*, 1\.0 in"),
    ({"argument": ",spikes.sigmas=6.0"}, r"spikes\.sigmas: 0\.0 in .*, 6\.0 in"),
    (
      {"jax": {"jax_enable_x64": False, "jax_random_seed_offset": 7}},
      "jax_random_seed_offset: None in .*, 7 in .*: such runs cannot be compared",
    ),
    ({}, "have the same optimizer, recipe, learning rate, seed and length"),
  ],
)
def test_runs_that_do_not_compare_are_refused(sweep, tmp_path, options, message):
  workdir(tmp_path / "other", adamw, 0.1, 0, [6.0, 4.0], **options)
  with pytest.raises(config.ConfigError, match=message):
    tuning.tunings([*sweep, *runs.find(tmp_path / "other")])


def test_runs_of_one_recipe_have_its_settings_in_common(sweep, tmp_path):
  for seed, backend in ((0, "aqt"), (1, "jax")):
    argument = f",quant.backend={backend}"
    workdir(tmp_path / "qat", adamw, 0.1, seed, [6.0], recipe="quest_w4a4", argument=argument)
  with pytest.raises(config.ConfigError, match=r"quant\.backend: 'aqt' in .*, 'jax' in"):
    tuning.check_comparable(runs.find(tmp_path / "qat"))
  for seed in (0, 1):  # each from a parent of its own
    argument = f",warm_start=runs/{seed}"
    workdir(tmp_path / "warm", adamw, 0.1, seed, [6.0, 4.0], recipe="quest_w4a4", argument=argument)
  warm = runs.find(tmp_path / "warm")
  tuning.check_comparable([*warm, *sweep])
  workdir(tmp_path / "fresh", adamw, 0.1, 0, [6.0, 4.0], recipe="quest_w4a4")
  with pytest.raises(config.ConfigError, match=r"warm_start: '' in .*, 'a run' in"):
    tuning.check_comparable([*runs.find(tmp_path / "fresh"), *warm])
  for seed, parts in ((0, 1), (1, 2)):
    argument = f",micro_batches={parts}"
    workdir(tmp_path / "int8", adamw, 0.1, seed, [6.0], recipe="int8_gradients", argument=argument)
  with pytest.raises(config.ConfigError, match=r"micro_batches: 1 in .*, 2 in"):
    tuning.check_comparable(runs.find(tmp_path / "int8"))


def test_runs_that_began_with_unlike_parameters_of_one_folder_are_refused(tmp_path):
  """Another run had come into the folder between the two, or one more checkpoint."""

  def warm(root, seed, at, parameters):
    parent = {"workdir": at, "run": f"run of {parameters}", "step": 9, "parameters": parameters}
    argument = f",warm_start={at}"
    given = {"argument": argument} | ({"parent": parent} if parameters else {})
    workdir(tmp_path / root, adamw, 0.1, seed, [6.0, 4.0], **given)

  found = [("/a", "one"), ("/a", "one"), ("/b", "other"), ("/a", "")]  # the last: not recorded
  for seed, (at, parameters) in enumerate(found):
    warm("alike", seed, at, parameters)
  alike = runs.find(tmp_path / "alike")
  tuning.check_comparable(alike)
  warm("unlike", 4, "/a", "other")
  told = "warm_start = '/a': parameters: 'one' in .*, 'other' in .*: such runs cannot be compared"
  with pytest.raises(config.ConfigError, match=told):
    tuning.tunings([*alike, *runs.find(tmp_path / "unlike")])
  # A pack names a run's neighbours without their folder: under two roots, they are different.
  warm("packed/0", 0, "parent", "one")
  warm("packed/1", 1, "parent", "other")
  tuning.check_comparable(runs.find(tmp_path / "packed"))


@pytest.mark.parametrize("change", ["eval.every=1", "average.decay=0.9", "log.every=7"])
def test_runs_may_differ_in_what_decides_no_loss(tmp_path, change):
  workdir(tmp_path, adamw, 0.1, 0, [6.0, 4.0])
  workdir(tmp_path, adamw, 0.1, 1, [6.0, 4.0], argument=f",{change}")
  tuning.check_comparable(runs.find(tmp_path))


def test_every_key_of_a_config_is_compared_or_listed(tmp_path):
  """A new key is compared unless MAY_DIFFER lists it with a reason; and all listed keys exist."""
  workdir(tmp_path, adamw, 0.1, 0, [6.0, 4.0])
  (run,) = runs.find(tmp_path)
  flat, listed = config.flatten(config.to_dict(run.config)), set()
  with_all, *of_one = tuning.in_common(run).values()
  for key in flat:
    may = {name for name in tuning.MAY_DIFFER if f"{key}.".startswith(f"{name}.")}
    assert (key in with_all) != bool(may), key
    section = key.split(".")[0]
    own = section in ("optimizer", "quant", "warm_start")
    assert any(key in values for values in of_one) == own, key
    listed |= may
  assert listed == set(tuning.MAY_DIFFER)
