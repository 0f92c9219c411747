"""Task files of others: nothing that they name is run unless they are trusted."""

import json
import re

import pytest
import yaml

pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

from beyond_outliers.errors import ConfigError
from beyond_outliers.evaluate import harness, offline_tasks, task_code

EXAMPLES = [{"context": "x", "choices": ["b", "c"], "answer": 0}] * 2
# A program that leaves a file where it was run.
PROGRAM = """
import pathlib
pathlib.Path(__file__).with_name("was_run").touch()
def function(documents=None, *arguments, **options):
  return documents
"""
REACHING = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


@pytest.fixture
def folder(tmp_path):
  """A folder with a task `plain`, and a program beside it."""
  folder = tmp_path / "tasks"
  offline_tasks.write_task(folder, "plain", EXAMPLES)
  (folder / "program.py").write_text(PROGRAM)
  return folder


def with_lines(folder, *lines, name="hostile", without=()):
  """The task with other lines added, under a name of its own."""
  kept = [
    line
    for line in (folder / "plain.yaml").read_text().splitlines()
    if line.split(":")[0] not in ("task", *without)
  ]
  (folder / f"{name}.yaml").write_text("\n".join([f"task: {name}", *kept, *lines]) + "\n")
  return name


def metric(name, **fields):
  listed = {"metric": name, "aggregation": "mean", "higher_is_better": True, **fields}
  return f"metric_list: {json.dumps([listed])}"


HOSTILE = {
  "function": (["process_docs: !function program.function"], "!function program.function"),
  "function as a key": (["metadata: {!function program.function : 1}"], "!function"),
  "function in a list": (["metadata: [1, [!function program.function]]"], "!function"),
  "class": (["class: !function program.Task"], "!function program.Task"),
  "class by name": (["class: program.Task"], "class = 'program.Task'"),
  "data by function": (["custom_dataset: program.function"], "custom_dataset = "),
  "code of data": (["dataset_kwargs: {trust_remote_code: true}"], "trust_remote_code = True"),
  "script": (["dataset_path: ./program.py"], "dataset_path = './program.py': is a program"),
  "pickles": (["dataset_path: pandas"], "dataset_path = 'pandas': is a program"),
  "metric": ([metric("./program.py")], "metric_list = './program.py': is not one of the harness's"),
  "metric of a hub": ([metric("acc", hf_evaluate=True)], "metric_list = 'acc': is not one"),
  "unsafe": (["unsafe_code: true"], "unsafe_code = True"),
  "prompts": (["use_prompt: 'promptsource:x'"], "use_prompt = 'promptsource:x'"),
  "outside": (["include: ../outside.yaml"], "include = '../outside.yaml': is in none of"),
  "absolute": (["include: [{outside}]"], "include = '/.*/outside.yaml': is in none of"),
}


@pytest.mark.parametrize("lines, message", HOSTILE.values(), ids=HOSTILE)
def test_what_would_run_is_refused_by_file_and_field(lines, message, folder):
  outside = folder.parent / "outside.yaml"
  outside.write_text("process_docs: !function tasks.program.function\n")
  lines = [line.replace("{outside}", str(outside)) for line in lines]
  replaced = {line.split(":")[0] for line in lines}
  name = with_lines(folder, *lines, without=replaced)
  with pytest.raises(ConfigError, match=rf"hostile.yaml: [^\n]*{message}[^\n]*$") as refused:
    harness.load_tasks([name], [folder])
  assert "--trust_task_code" in str(refused.value)
  assert not (folder / "was_run").exists()
  assert harness.load_tasks(["plain"], [folder]), "a task is not refused for those beside it"


@pytest.mark.parametrize("text", ["!!python/name:os.system", "!!python/object/apply:os.getcwd []"])
def test_objects_of_python_are_no_values(text):
  with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
    yaml.load(f"metadata: {text}", task_code._Reader)


def test_members_and_what_is_included_are_looked_at(folder):
  with_lines(folder, "process_docs: !function program.function", "tag: some_tag", name="member")
  (folder / "part.yml").write_text("process_docs: !function program.function\n")
  with_lines(folder, "include: part.yml", name="including")
  (folder / "group.yaml").write_text("group: family\ntask: [plain, member]\n")
  (folder / "over.yaml").write_text("group: over\ntask: [{group: inner, task: [some_tag]}]\n")
  inline = {"group": "inline", "task": [{"task": "plain", "class": "program.Task"}]}
  (folder / "inline.yaml").write_text(json.dumps(inline))
  for name in ("family", "over", "some_tag", "including", "inline"):
    with pytest.raises(ConfigError, match=r"yaml|yml: .*--trust_task_code"):
      harness.load_tasks([name], [folder])
  assert not (folder / "was_run").exists()


def test_an_included_file_of_another_folder_that_was_given_is_read(folder, tmp_path):
  offline_tasks.write_task(tmp_path / "other", "other", EXAMPLES)
  (folder / "mine.yaml").write_text(f"include: {tmp_path / 'other' / 'other.yaml'}\ntask: mine\n")
  with pytest.raises(ConfigError, match="is in none of --task_folders"):
    harness.load_tasks(["mine"], [folder])
  assert harness.load_tasks(["mine"], [folder, tmp_path / "other"])


@pytest.mark.parametrize("field", ["doc_to_text", "doc_to_target"])
@pytest.mark.parametrize(
  "template", [REACHING, "{{ ''|attr('__class__') }}", "{{ ''['__cl' ~ 'ass__'].mro() }}"]
)
def test_a_template_does_not_reach_python(field, template, folder):
  name = with_lines(folder, f"{field}: {json.dumps(template)}", without=(field,))
  with pytest.raises(ConfigError, match=r"^tasks = hostile: [^\n]*(unsafe|undefined)[^\n]*$"):
    harness.load_tasks([name], [folder])


def test_what_is_trusted_is_run(folder):
  name = with_lines(folder, "process_docs: !function program.function")
  (task,) = harness.load_tasks([name], [folder], trust_code=True)
  assert (folder / "was_run").exists() and len(task.objects[0].eval_docs) == 2
  name = with_lines(folder, f"doc_to_text: {json.dumps(REACHING)}", without=("doc_to_text",))
  ((task,),) = (each.objects for each in harness.load_tasks([name], [folder], trust_code=True))
  assert re.search("class 'type'", str(task.doc_to_text(task.eval_docs[0])))
