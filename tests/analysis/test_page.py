"""The page of HTML about runs made by hand: complete, self-contained, reproducible, and honest
about what it lacks."""

import csv
import html.parser
import os
import re
import shutil
import subprocess
import time
from xml.etree import ElementTree

import pytest
from workdirs import cell, workdir

from beyond_outliers import runs
from beyond_outliers.analysis import along_training, page, plots
from beyond_outliers.analysis.page.evidence import RunGroup
from beyond_outliers.analysis.page.sections import SECTIONS
from beyond_outliers.analysis.page.svg import inlined
from beyond_outliers.analysis.page.task_section import scored_tasks
from beyond_outliers.analysis.page.text import own_roots
from configs import adamw, muon, psgd, soap

HOSTILE = """<script>alert("1")</script>&'$x_1^$ \x01"""
METHOD = "</text><image href='x'/>$\\frac"
CHROMIUM = shutil.which("chromium")
PARTS = ("R", "R_in", "A", "B", "C", "gain", "local")
OUTLIERS = ("max_to_median", "max_to_mean", "kurtosis", "sqnr")


def units(size):
  """Rows as `propagation.decompose` has them, of two blocks."""
  inside = {"attention/q": "linear", "attention/o": "linear", "mlp/up": "linear", "": "block"}
  names = [(f"layers/{b}/{n}".rstrip("/"), kind) for b in range(2) for n, kind in inside.items()]
  rows = []
  for at, (name, kind) in enumerate([*names, ("final_norm", "norm"), ("head", "linear")], 1):
    values = dict(zip(PARTS, (size, 0.1, 0.7 * size, 0.2 * size, 0.1 * size, 0.9), strict=False))
    ratios = dict.fromkeys(("predicted_gain", "spectral_ratio", "alignment_ratio"), 1.0)
    values |= ratios if kind == "linear" else dict.fromkeys(ratios)
    if at == 1:
      values["gain"] = None  # no error comes in
    rows.append({"name": name, "kind": kind, **values, "local": 0.1 * at})
  return rows


def sweep(root, size="nano", parameters=(3_934_086, 786_432), **options):
  """Three optimizers, two seeds, full precision and one recipe, with cells of all kinds."""
  for number, module in enumerate((adamw, muon, soap)):
    for seed in range(2):
      losses = {20: 6.0, 100: 5.0 + 0.1 * number + 0.01 * seed}
      losses[200] = losses[100] - 0.5 - 0.2 * (2 - number)
      shared = {"size": size, "parameters": parameters, "checkpoints": (100, 200), **options}
      run = workdir(root, module, 0.1, seed, losses, **shared)
      worse = {step: loss + 0.1 for step, loss in losses.items()}
      workdir(root, module, 0.1, seed, worse, recipe="quest_w4a4", **shared)
      for step in (100, 200):
        loss, cost = losses[step], 0.1 * (number + 1) + 0.01 * seed
        seen = {f"outliers/{name}/linear": 5.0 - cost for name in OUTLIERS}
        cell(run, step, "none", "none", {"loss": loss, **seen})
        for method, share in (("rtn", 1.0), (METHOD, 0.1)):
          lost = {"loss": loss + share * cost, "loss_difference": share * cost, "kl": cost}
          lost["loss_difference_interval"] = [0.9 * cost, 1.1 * cost]
          cell(run, step, "rtn_w4a4", method, lost, R_L=share * cost, units=units(share * cost))


class Reader(html.parser.HTMLParser):
  """The tags of a page, and its text by section."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self.section, self.open = [], {}, "", []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag == "section":
      self.section = dict(attrs)["id"]

  def handle_data(self, data):
    self.text[self.section] = self.text.get(self.section, "") + data


def written(root, out, **options):
  out.mkdir(parents=True, exist_ok=True)
  path = page.write_page(runs.find(root), out, **options)
  with open(path) as file:
    return file.read()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  sweep(root / "nano")
  hostile = root / HOSTILE
  workdir(hostile, psgd, 0.1, 0, [6.0, 5.0] * 100, status="diverged")
  workdir(hostile, psgd, 0.1, 1, [6.0, 5.0], status="running", argument=",steps=200")
  workdir(root / "small", adamw, 0.1, 0, {20: 6.0, 200: 5.5}, size="0.3m", parameters=(300, 200))
  workdir(root / "other", adamw, 0.1, 0, {20: 6.0, 200: 5.6}, fingerprint="of other data")
  broken = workdir(root / "broken", adamw, 0.1, 0, [6.0, 5.0])
  (broken / "status.json").write_text("{")
  return root


@pytest.fixture(scope="module")
def report(root, tmp_path_factory):
  """(the page's text, its folder)."""
  folder = tmp_path_factory.mktemp("page")
  began = time.perf_counter()
  text = written(root, folder)
  print(f"a report over {len(runs.find(root))} runs: {time.perf_counter() - began:.1f} s")
  return text, folder


def test_without_data_every_section_says_what_is_missing_and_what_makes_it(tmp_path):
  folder = workdir(tmp_path / "runs", adamw, 0.1, 0, [6.0, 5.0], status="running")
  (folder / "metrics.jsonl").write_text("")
  text = written(tmp_path / "runs", tmp_path / "page")
  found = Reader(text).text
  assert [key for key in found if key] == [*SECTIONS, "every_run"]
  for key in SECTIONS.keys() - {"answer", "runs", "tuning", "left_out"}:
    assert "Missing:" in found[key] and "python -m " in found[key], key
  assert "running" in found["runs"] and str(folder) in found["left_out"]
  assert "<svg" not in text and not re.search(r"\bnan\b", text)


def test_scores_of_tasks_are_means_over_seeds_and_one_seed_has_its_error_over_examples(tmp_path):
  def scores(accuracy):
    return {"last_word": {"acc": accuracy, "acc_stderr": 0.05, "perplexity": 2e3}}

  for seed, accuracy in enumerate((0.2, 0.4)):
    cell(workdir(tmp_path, adamw, 0.1, seed, [5.0, 4.0]), 2, tasks=scores(accuracy))
  run = workdir(tmp_path, muon, 0.1, 0, [5.0, 4.0])
  cell(run, 2, tasks=scores(0.3))
  lost = {"loss": 4.1, "loss_difference": 0.1}
  cell(run, 2, "rtn_w4a4", "rtn", lost, R_L=0.1, tasks=scores(0.1))
  part = scored_tasks(None, RunGroup(runs.find(tmp_path), [], {}, []))
  assert part.runs == 3 and [table.rows() for table in part.tables] == [
    [
      ["none", "none", "last_word/acc", "0.3000 ± 0.1000", "0.3000 ± 0.0500"],
      ["rtn_w4a4", "rtn", "last_word/acc", "–", "0.1000 ± 0.0500"],
    ]
  ]


def answers(accuracy, content="a" * 64):
  return {"tasks": {"piqa": {"acc": accuracy, "acc_stderr": 0.05}}, "content": content}


def scores_of(root):
  part = scored_tasks(None, RunGroup(runs.find(root), [], {}, []))
  return [row[2:] for table in part.tables for row in table.rows()], part


def test_a_run_s_scores_count_once_though_it_was_looked_at_twice(tmp_path):
  """An evaluation on few documents runs no tasks again; cells of earlier steps are in no mean."""
  for seed, accuracy in enumerate((0.2, 0.4)):
    run = workdir(tmp_path, adamw, 0.1, seed, {100: 5.0, 200: 4.0})
    cell(run, 200, **answers(accuracy))
    cell(run, 200, documents=3)
    cell(run, 100, **answers(0.9))
  behind = workdir(tmp_path, adamw, 0.1, 2, {100: 5.0, 200: 4.0}, status="preempted")
  cell(behind, 100, **answers(0.9))
  rows, part = scores_of(tmp_path)
  assert rows == [["piqa/acc", "0.3000 ± 0.1000"]]
  assert f"{behind}: preempted at step 200 of 200, no cell of it counts" in part.left_out


def test_scores_of_unlike_questions_are_rows_of_their_own(tmp_path):
  for seed, content in enumerate("ab"):
    run = workdir(tmp_path, adamw, 0.1, seed, {100: 5.0, 200: 4.0})
    cell(run, 200, **answers(0.2 + 0.2 * seed, content * 64))
  rows, part = scores_of(tmp_path)
  assert rows == [
    ["piqa@aaaaaaaa/acc", "0.2000 ± 0.0500"],
    ["piqa@bbbbbbbb/acc", "0.4000 ± 0.0500"],
  ]
  assert "different questions" in part.sentences[0]


def test_models_that_were_asked_under_other_settings_are_no_seeds(tmp_path):
  run = workdir(tmp_path, adamw, 0.1, 0, {100: 5.0, 200: 4.0})
  for windows in (8, 32):
    of_model = {"calibration_windows": windows, **answers(0.01 * windows)}
    cell(run, 200, "rtn_w4a4", "gptq", {"loss": 4.1, "loss_difference": 0.1}, **of_model)
  rows, part = scores_of(tmp_path)
  assert not rows and "calibration_windows = [8, 32]" in part.missing


def test_files_of_an_earlier_page_go_and_no_others(tmp_path):
  for at, module in enumerate((adamw, muon)):
    size = ("nano", "0.3m")[at]
    workdir(tmp_path / "runs" / str(at), module, 0.1, 0, {20: 5.0, 200: 4.0}, size=size)
  out = tmp_path / "page"
  written(tmp_path / "runs", out)
  own = out / "answer.mine.csv"
  own.write_text("kept")
  both = {path.name for path in out.iterdir()}
  assert "answer.nano_200.csv" in both
  written(tmp_path / "runs" / "1", out)
  left = {path.name for path in out.iterdir()}
  assert "answer.0.3m_200.csv" in left and own.read_text() == "kept"
  assert not any("nano" in name for name in left) and left < both


def test_commands_of_a_page_name_roots_that_hold_no_other_runs(tmp_path):
  """The given roots, or folders in them where a root holds runs of several groups."""
  names = ["/r/a/1", "/r/a/2", "/r/b/1", "/s/1"]
  assert own_roots(["/r", "/s"], names, names) == ["/r", "/s"]
  assert own_roots(["/r", "/s"], names[:2], names) == ["/r/a"]
  assert own_roots(["/r/a", "/r/b", "/s"], names[1:], names) == ["/r/a/2", "/r/b", "/s"]
  assert own_roots(["/r/b/1", "/s"], names[2:3], names[2:]) == ["/r/b/1"]
  assert own_roots(["s3://x"], ["s3://x/a/1"], ["s3://x/a/1", "s3://x/b"]) == ["s3://x/a"]
  here = os.getcwd()
  assert own_roots(["runs"], [f"{here}/runs/a"], [f"{here}/runs/a"]) == ["runs"]
  assert own_roots(["runs/"], [f"{here}/runs/a"], [f"{here}/runs/{x}" for x in "ab"]) == ["runs/a"]


def test_runs_that_cannot_be_read_are_left_out_by_name(tmp_path):
  folder = workdir(tmp_path / "runs", adamw, 0.1, 0, [6.0, 5.0])
  (folder / "manifest.json").write_text("{}")
  found = Reader(written(tmp_path / "runs", tmp_path / "page")).text
  assert f"{folder}/manifest.json: lacks" in found["left_out"]
  assert [key for key in found if key] == [*SECTIONS, "every_run"]


def test_a_figure_inside_the_page_has_its_ink_its_paper_and_ids_of_its_own():
  text = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
    width="100pt" height="50pt"><metadata>m</metadata><defs><path id="p" style="stroke: #000000"/>
    </defs><g clip-path="url(#c)"><use xlink:href="#p" style="fill: #ffffff; stroke: #0072b2"/>
    <text>&lt;script&gt; id="x" #000000</text></g></svg>"""
  found = inlined(text, "one", 'a "figure" <b>')
  assert 'id="one-p"' in found and 'href="#one-p"' in found and "url(#one-c)" in found
  assert found.startswith("<svg") and 'style="fill: currentColor' in found
  assert "stroke: currentColor" in found and "fill: var(--paper); stroke: #0072b2" in found
  assert '&lt;script&gt; id="x" #000000</text>' in found and "<metadata" not in found
  assert 'aria-label="a &quot;figure&quot; &lt;b&gt;"' in found


@pytest.mark.slow
def test_with_data_no_section_of_the_sweep_is_missing(report):
  found = Reader(report[0])
  assert [key for key in found.text if key] == [*SECTIONS, "every_run"]
  drawn = {key: found.text[key].count("SVG") for key in SECTIONS}
  figures = ("losses", "degradation", "depth", "parts", "gains", "predictors", "gap", "along")
  assert all(drawn[key] for key in (*figures, "landings")), drawn
  assert "Without psgd, of which no run is done." in found.text["landings"]
  assert "+0.1000 ± 0.0000" in found.text["gap"]
  assert "+0.1050 ± 0.0050" in found.text["answer"] and "R_L" in found.text["answer"]


@pytest.mark.slow
def test_runs_that_did_not_end_are_shown_as_such(report):
  found = Reader(report[0]).text
  for key in ("runs", "every_run"):
    assert "diverged" in found[key] and "running" in found[key]
  assert "diverged at step 200 of 200" in found["left_out"]
  assert "broken/adamw/none-0.1-0/status.json" in found["left_out"]


@pytest.mark.slow
def test_sizes_and_data_have_parts_of_their_own(report):
  found = Reader(report[0]).text
  for key in ("runs", "tuning"):
    assert "0.3m, 200 steps" in found[key] and "nano, 200 steps" in found[key]
  assert "data.fingerprint: 'abc'" in found["runs"] and "'of other data'" in found["runs"]


@pytest.mark.slow
def test_the_page_needs_no_other_file_and_no_network(report):
  text, folder = report
  files = set(os.listdir(folder))
  for tag, attributes in Reader(text).tags:
    assert tag not in ("script", "link", "img", "image", "iframe", "object", "embed"), tag
    assert not any(name.startswith("on") for name in attributes)
    for name in ("src", "href", "xlink:href", "srcset"):
      where = attributes.get(name) or "#"
      assert where[0] == "#" or where in files or where == "https://arxiv.org/abs/2509.23500"
  assert not re.search(r"@import|url\((?!#)", text)
  ids = [attributes["id"] for _, attributes in Reader(text).tags if "id" in attributes]
  assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_names_are_text_wherever_they_stand(report):
  text, folder = report
  assert "alert(" in text and "<script" not in text and "<image" not in text and "\x01" not in text
  for name in os.listdir(folder):
    if name.endswith(".svg"):
      drawn = ElementTree.parse(folder / name)
      assert not list(drawn.iter("{http://www.w3.org/2000/svg}image"))
      assert list(drawn.iter("{http://www.w3.org/2000/svg}text")), "text stays text"
    elif name.endswith(".csv"):
      with open(folder / name, newline="") as file:
        rows = list(csv.reader(file))
      assert rows and all(len(row) == len(rows[0]) for row in rows)
  assert "$\\frac" in (folder / "degradation.nano_200.svg").read_text()


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(report, root, tmp_path):
  text, folder = report
  assert written(root, tmp_path / "again") == text
  for name in os.listdir(folder):
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium, to open the page")
def test_a_browser_opens_the_page_without_a_complaint(report, tmp_path):
  options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
  options += ["--no-first-run", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
  address = f"file://{report[1] / page.PAGE}"
  opened = subprocess.run(
    [CHROMIUM, *options, "--dump-dom", address], capture_output=True, text=True, timeout=300
  )
  assert opened.returncode == 0 and "CONSOLE" not in opened.stderr, opened.stderr
  found = Reader(opened.stdout).text
  assert [key for key in found if key] == [*SECTIONS, "every_run"]


def test_what_is_not_finite_ends_no_report(tmp_path):
  """Nor does a huge loss fill the page with digits."""
  for module, loss in ((adamw, 4.5), (muon, 1e300), (soap, float("inf"))):
    run = workdir(tmp_path / "runs", module, 0.1, 0, {100: 5.0, 200: loss}, checkpoints=(200,))
    cell(run, 200, "none", "none", {"loss": 4.5})
    lost = {"loss": float("inf"), "loss_difference": float("inf")}
    cell(run, 200, "rtn_w4a4", "rtn", lost, R_L=float("nan"), units=units(float("nan")))
  found = Reader(written(tmp_path / "runs", tmp_path / "page")).text
  assert "no error is finite" in found["depth"] and "not finite" in found["degradation"]
  assert "1e+300" in found["answer"] and not re.search(r"\d{20}", str(found))


def test_one_size_has_no_law_and_its_rho_is_in_no_table(tmp_path):
  """A fit to three seeds of one size converges, but to a share that the data do not determine."""
  for module in (adamw, muon):
    for seed in range(3):
      for recipe, loss in (("none", 4.5), ("quest_w4a4", 4.6)):
        losses = {100: 5.0, 200: loss + 0.01 * seed}
        workdir(tmp_path / "runs", module, 0.1, seed, losses, recipe=recipe)
  found = Reader(written(tmp_path / "runs", tmp_path / "page")).text
  assert "all runs are of one size" in found["law"] and "rho" not in found["answer"]


def test_cells_of_other_folders_are_named_those_of_no_run_too(tmp_path):
  run = workdir(tmp_path / "runs", adamw, 0.1, 0, {100: 5.0, 200: 4.5})
  cell(run, 200, "none", "none", {"loss": 4.5})
  cell(run, 200, "rtn_w4a4", "rtn", {"loss": 4.7, "loss_difference": 0.2})
  (run / "eval").rename(tmp_path / "cells")
  lost = workdir(tmp_path / "lost", muon, 0.1, 0, {100: 5.0, 200: 4.5})
  cell(lost, 200, "none", "none", {"loss": 4.5})
  folders = [tmp_path / "cells", lost / "eval"]
  text = written(tmp_path / "runs", tmp_path / "page", folders=folders)
  for key in ("answer", "degradation"):
    assert f"--cells={tmp_path}/cells" in Reader(text).text[key]
  assert f"{lost}/eval: 1 of 1 cells are of none of these runs" in Reader(text).text["left_out"]


def test_a_panel_has_something_to_compare(tmp_path):
  """A method with cells of one checkpoint has no panel along training; one optimizer alone has no
  figure at the common loss."""
  run = workdir(tmp_path / "runs", adamw, 0.1, 0, {100: 5.0, 200: 4.5}, checkpoints=(100, 200))
  for step, methods in ((100, ["rtn"]), (200, ["rtn", "gptq"])):
    cell(run, step, "none", "none", {"loss": 5.0})
    for method in methods:
      cell(run, step, "rtn_w4a4", method, {"loss": 5.2, "loss_difference": 0.2})
  found = runs.find(tmp_path / "runs")
  along = along_training.frame(found)
  assert set(along["method"]) == {"rtn", "gptq"}
  assert len(plots.plot_along_training(along).axes) == 2  # delta, and the rate below it
  text = Reader(written(tmp_path / "runs", tmp_path / "page")).text
  assert "gptq" not in text["along"] and "SVG" not in text["landings"]
