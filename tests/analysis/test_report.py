"""The report as a person asks for it: what it cannot do is said in one line, and nothing is left
out silently."""

import json

import commands
import pytest
from workdirs import workdir

from beyond_outliers import config, runs
from beyond_outliers.analysis import report, tuning
from beyond_outliers.config.sums import unsealed
from configs import adamw, muon

# what is wrong -> (arguments, what the one line on stderr holds); {sweep}, {other}, {empty} are
# folders
REFUSED = {
  "no folder": (
    ["--root={sweep},{sweep}/nobody"],
    ["--root = '", "nobody': there is no such folder"],
  ),
  "no runs": (["--root={empty}"], ["--root = '", "empty': holds no run"]),
  "runs that do not compare": (
    ["--root={sweep},{other}/adamw"],
    ["model.blocks: 2 in", "3 in", "report on them separately"],
  ),
  "no run done": (
    ["--root={sweep}", "--common_loss"],
    ["['muon']: no run of 2 steps is done; finish one"],
  ),
  "no cells": (
    ["--root={sweep}", "--degradation=kl"],
    ["--degradation = 'kl'", "beyond_outliers.evaluate"],
  ),
  "cells of no report": (
    ["--root={sweep}", "--settings=documents=3"],
    ["--settings = 'documents=3': works only with --degradation"],
  ),
  "no value": (
    ["--root={sweep}", "--degradation=kl", "--settings=documents"],
    ["--settings = 'documents': expected name=value"],
  ),
  "a setting twice": (
    ["--root={sweep}", "--degradation=kl", "--settings=documents=3,documents=0"],
    ["--settings = 'documents': is given twice"],
  ),
  "no folder of cells": (
    ["--root={sweep}", "--degradation=kl", "--cells={empty}/no"],
    ["--cells = '", "no such folder"],
  ),
  "one recipe": (
    ["--root={sweep}", "--gap_plot=gap.png"],
    ["--gap_plot = 'gap.png': all runs have the recipe 'none'"],
  ),
  "a figure of a kind that nobody writes": (
    ["--root={sweep}", "--plot={empty}/curves.text"],
    ["--plot = '", "curves.text': ", "give a name that ends in .png or .svg"],
  ),
  "a figure that does not say its kind": (
    ["--root={sweep}", "--gap_plot={empty}/gap"],
    ["--gap_plot = '", "gap': ", "give a name that ends in .png or .svg"],
  ),
  "another report's figure": (
    ["--root={sweep}", "--common_loss", "--plot=x.png"],
    ["--plot = 'x.png': --common_loss asks for"],
  ),
  "a figure of the page's": (
    ["--root={sweep}", "--out={empty}/page", "--plot=x.png"],
    ["--plot = 'x.png': --out asks for another report"],
  ),
  "a report and a packed file": (
    ["--root={sweep}", "--out={empty}/page", "--pack={empty}/x.tar.xz"],
    ["--pack = '", "x.tar.xz': --out asks for another report"],
  ),
  "a packed file of another kind": (
    ["--root={sweep}", "--pack={empty}/x.zip"],
    ["--pack = ", "x.zip: give a name that ends in .tar.xz"],
  ),
  "one of two reports": (
    ["--root={sweep}", "--out={empty}/page", "--degradation=kl"],
    ["--degradation = 'kl': --out asks for another report"],
  ),
  "no folder around the page's": (
    ["--root={sweep}", "--out={empty}/no/page"],
    ["--out = '", "no such folder; make it first"],
  ),
  "a file in the place of the page's folder": (
    ["--root={sweep}", "--out={sweep}/adamw/none-0.1-0/config.json"],
    ["--out = '", "config.json': ", "give a folder that can be written"],
  ),
  "a folder that nothing can be written into": (
    ["--root={sweep}", "--out=/proc/page"],
    ["--out = '/proc/page': ", "give a folder that can be written"],
  ),
  "no folder for a file": (
    ["--root={sweep}", "--overrides={empty}/no/tuned.json"],
    ["--overrides = '", "no such folder"],
  ),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
  root = tmp_path_factory.mktemp("report")
  folders = {name: root / name for name in ("sweep", "other", "empty")}
  folders["empty"].mkdir()
  workdir(folders["sweep"], adamw, 0.1, 0, [6.0, 4.0])
  workdir(folders["sweep"], muon, 0.1, 0, [6.0, 4.0], status="diverged")
  workdir(folders["other"], adamw, 0.1, 1, [6.0, 4.0], argument=",model.blocks=3")
  given = [
    [argument.format(**folders) for argument in arguments] for arguments, _ in REFUSED.values()
  ]
  running = folders["other"] / "under way"
  for rate, status in ((0.1, "done"), (0.3, "running"), (1.0, "failed")):
    workdir(running, adamw, rate, 0, [6.0, 4.0], status=status)
  tuned = f"--overrides={root / 'tuned.json'}"
  asked = [[f"--root={folders['sweep']}", tuned], [f"--root={running}", tuned]]
  answers, _ = commands.answers("analysis.__main__", [*given, *asked])
  return dict(zip([*REFUSED, "nothing", "under way"], answers, strict=True))


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_is_one_line_of_the_command(told, what):
  code, said = told[what]
  assert code == 2, said
  *before, line = said.splitlines()
  assert line.startswith("error: ") and not before
  assert all(part in line for part in REFUSED[what][1]), said


def test_seeds_that_not_all_rates_have_are_told(tmp_path, capsys):
  for rate, seed in ((0.1, 0), (0.1, 1), (0.3, 0)):
    workdir(tmp_path, adamw, rate, seed, [6.0, 4.0])
  report.print_tuning(runs.find(tmp_path))
  assert (
    "rates are compared by the seeds that all of a sweep's have, without 1: adamw (none)\n"
    in (capsys.readouterr().out)
  )


def test_a_report(told):
  code, said = told["nothing"]
  assert code == 0 and "learning rates, recipe none" in said and "| adamw | 0.1 | 4.5000 |" in said


def test_runs_that_are_not_done_are_told_and_no_rates_written_meanwhile(told):
  assert (
    "muon/none-0.1-0: diverged at step 2 of 2, so its loss counts as infinite" in told["nothing"][1]
  )
  code, said = told["under way"]
  running = "none-0.3-0: running at step 2 of 2, so its loss counts as infinite"
  assert (
    f"{running}\n" in said
    and "none-1.0-0: failed at step 2 of 2, so its loss counts as infinite\n" in said
  )
  last = said.splitlines()[-1]
  assert (
    code == 2 and last.startswith("error: --overrides: ") and f"{running} (2 such runs)" in last
  )


def test_what_was_found_is_written_for_the_launcher(tmp_path):
  for module, rate in ((muon, 0.1), (adamw, 0.03)):
    workdir(tmp_path, module, rate, 0, [6.0, 3.0 + rate])
  found, c = tuning.tunings(runs.find(tmp_path)), config.resolve(adamw.get_config())
  report.write_overrides(tmp_path / "tuned.json", c, found)
  written, _ = unsealed(json.loads((tmp_path / "tuned.json").read_text()))
  assert written == {
    "size": "nano",
    "model": {
      **{"vocab": 2048, "blocks": 2, "heads": 3, "kv_heads": 1, "d_head": 128, "d_model": 384},
      **{"mlp_hidden": 1536, "mlp": "relu2", "tied": True},
    },
    "overrides": {
      "muon": {"optimizer.learning_rate": 0.1},
      "adamw": {"optimizer.learning_rate": 0.03},
    },
  }
  with pytest.raises(config.ConfigError, match="one entry per optimizer"):
    report.write_overrides(tmp_path / "tuned.json", c, [*found, found[0]])
