"""JobSets: fields of the published schemas, what is done after which exit code, names that fit, and
no value that Kubernetes would read as another."""

import copy
import pathlib
import re
import shlex

import commands
import pytest
import yaml

from beyond_outliers.config import cluster
from beyond_outliers.errors import ConfigError
from launch import gke, jobset
from launch.jobs import Job

ROOT = pathlib.Path(__file__).parents[2]
CLUSTER = jobset.Cluster(
  "registry/beyond_outliers:1", "sweep-12345678", claim=("runs", "/mnt/runs")
)

# Of JobSet v1alpha2 (api/jobset/v1alpha2/jobset_types.go), the fields of a spec that people write,
# those of a Job and its Pods are Kubernetes', from its client's models.
JOB_SET = {
  "JobSet": {"apiVersion": "str", "kind": "str", "metadata": "V1ObjectMeta", "spec": "JobSetSpec"},
  "JobSetSpec": {
    "replicatedJobs": "list[ReplicatedJob]",
    "network": "object",
    "successPolicy": "object",
    "failurePolicy": "FailurePolicy",
    "suspend": "bool",
    "ttlSecondsAfterFinished": "int",
  },
  "ReplicatedJob": {
    "name": "str",
    "template": "V1JobTemplateSpec",
    "replicas": "int",
    "dependsOn": "list[DependsOn]",
  },
  "DependsOn": {"name": "str", "status": ("Ready", "Complete")},
  "FailurePolicy": {"maxRestarts": "int", "rules": "list[FailurePolicyRule]"},
  "FailurePolicyRule": {
    "name": "str",
    "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    "onJobFailureReasons": "list[str]",
    "targetReplicatedJobs": "list[str]",
  },
}
REQUIRED = {
  "ReplicatedJob": ("name", "template"),
  "DependsOn": ("name", "status"),
  "FailurePolicyRule": ("name", "action"),
}


def fields_of(kind):
  if kind in JOB_SET:
    return JOB_SET[kind]
  models = pytest.importorskip("kubernetes.client.models", reason="comes with the extra launch")
  model = getattr(models, kind)
  return {name: model.openapi_types[field] for field, name in model.attribute_map.items()}


def check(value, kind, where=""):
  """Fails where the schema has no such field, or one of another type; models check what they
  require as they are made."""
  if isinstance(kind, tuple):
    assert value in kind, where
  elif many := re.fullmatch(r"list\[(.+)\]", kind):
    assert isinstance(value, list), where
    for number, inner in enumerate(value):
      check(inner, many[1], f"{where}[{number}]")
  elif each := re.fullmatch(r"dict[\[(]str, (.+)[\])]", kind):
    assert isinstance(value, dict) and all(isinstance(key, str) for key in value), where
    for key, inner in value.items():
      check(inner, each[1], f"{where}.{key}")
  elif kind in ("str", "int", "bool"):
    assert type(value).__name__ == kind, f"{where}: {value!r} is no {kind}"
  elif kind == "object":
    return
  else:
    fields = fields_of(kind)
    assert isinstance(value, dict), where
    for key, inner in value.items():
      assert key in fields, f"{where}: {kind} has no {key}"
      check(inner, fields[key], f"{where}.{key}")
    for key in REQUIRED.get(kind, ()):
      assert key in value, f"{where}: {kind} needs {key}"
    if kind not in JOB_SET:
      from kubernetes.client import models

      model = getattr(models, kind)
      python = {name: field for field, name in model.attribute_map.items()}
      model(**{python[key]: inner for key, inner in value.items()})  # ValueError where one lacks


def a_job(kind="train", arguments=("--config=configs/soap.py:50m",), after=(), name="learning"):
  prefix = {"train": "train", "evaluate": "eval"}[kind]
  module = {"train": "beyond_outliers.main", "evaluate": "beyond_outliers.evaluate"}[kind]
  return Job(f"{prefix}-{name}", kind, module, arguments, f"/mnt/runs/{name}", after)


def written(listed, accelerator="v5p-128", slices=1, hosts=1, cluster=CLUSTER):
  nodes = gke.parse_nodes(accelerator, slices, hosts)
  made = jobset.manifests(listed, nodes, gke.parse_nodes("v5litepod-4"), cluster)
  read = list(yaml.safe_load_all(jobset.render(made)))
  assert read == made
  return read


def replicated(manifest):
  return {part["name"]: part for part in manifest["spec"]["replicatedJobs"]}


def pod(part):
  return part["template"]["spec"]["template"]["spec"]


PAIR = [a_job(), a_job("evaluate", after=("train-learning",))]
SPREAD = [("v5p-128", 2, 1), ("v5litepod-1", 1, 1), ("nvidia-h100-80gb:8", 1, 4)]


@pytest.mark.parametrize(("accelerator", "slices", "hosts"), SPREAD)
def test_fields_are_those_of_the_published_schemas(accelerator, slices, hosts):
  everything = jobset.Cluster("image", "sweep", 3, "ns", True, "account", "queue", ("runs", "/mnt"))
  beside = a_job("evaluate", name="beside")
  made = written([*PAIR, beside], accelerator, slices, hosts, everything)
  assert len(made) == 2
  for manifest in made:
    check(manifest, "JobSet")


def test_the_check_finds_fields_that_are_not_there():
  (manifest,) = written(PAIR)
  broken = copy.deepcopy(manifest)
  pod(broken["spec"]["replicatedJobs"][0])["nodeSelectors"] = {}
  with pytest.raises(AssertionError, match="V1PodSpec has no nodeSelectors"):
    check(broken, "JobSet")


def test_two_slices_of_v5p_are_two_jobs_of_sixteen_pods_with_four_chips():
  (manifest,) = written([a_job()], "v5p-128", 2)
  run = replicated(manifest)["run"]
  job = run["template"]["spec"]
  assert (run["replicas"], job["completions"], job["parallelism"]) == (2, 16, 16)
  assert pod(run)["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "4x4x4",
  }
  (container,) = pod(run)["containers"]
  assert container["resources"] == {"limits": {"google.com/tpu": "4"}}
  assert container["args"][-2:] == ["--distributed=auto", "--config.mesh.dcn_data=2"]
  annotations = manifest["metadata"]["annotations"]
  assert annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"]


def test_one_host_is_one_process():
  (manifest,) = written([a_job()], "v5litepod-8")
  (container,) = pod(replicated(manifest)["run"])["containers"]
  assert not [word for word in container["args"] if "distributed" in word]


def outcome(manifest, part, exit_code):
  """What Kubernetes and JobSet do when a Pod of the part ends with this code, by their rules."""
  job = replicated(manifest)[part]["template"]["spec"]
  action = "Count"
  for rule in job["podFailurePolicy"]["rules"]:
    if exit_code in rule.get("onExitCodes", {}).get("values", ()):
      action = rule["action"]
      break
  if exit_code == 0:
    return "complete"
  if action == "Ignore":
    return "another Pod"
  if action == "Count" and job["backoffLimit"]:
    return "another Pod, so many times"
  reason = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
  for rule in manifest["spec"]["failurePolicy"]["rules"]:
    if reason in rule.get("onJobFailureReasons", [reason]) and part in rule.get(
      "targetReplicatedJobs", [part]
    ):
      return rule["action"]
  return "RestartJobSet"


@pytest.mark.parametrize(
  ("code", "run", "evaluation"),
  [
    (0, "complete", "complete"),
    (1, "RestartJobSet", "another Pod, so many times"),
    (2, "FailJobSet", "FailJobSet"),
    (3, "FailJobSet", "FailJobSet"),
    (42, "another Pod", "another Pod"),
    (137, "RestartJobSet", "another Pod, so many times"),
  ],
)
def test_what_is_done_after_each_exit_code(code, run, evaluation):
  (manifest,) = written(PAIR)
  assert outcome(manifest, "run", code) == run
  assert outcome(manifest, "eval", code) == evaluation
  for part in replicated(manifest).values():
    # A policy of exit codes needs Pods that are not restarted in place; a node that is taken away
    # is no failure.
    assert pod(part)["restartPolicy"] == "Never"
    conditions = [
      condition
      for rule in part["template"]["spec"]["podFailurePolicy"]["rules"]
      if rule["action"] == "Ignore"
      for condition in rule.get("onPodConditions", ())
    ]
    assert conditions == [{"type": "DisruptionTarget", "status": "True"}]


def test_an_evaluation_waits_for_its_training_or_has_a_jobset_of_its_own():
  beside = a_job("evaluate", name="beside")
  first, second = written([*PAIR, beside])
  assert replicated(first)["eval"]["dependsOn"] == [{"name": "run", "status": "Complete"}]
  assert list(replicated(second)) == ["run"] and "dependsOn" not in replicated(second)["run"]
  assert second["metadata"]["name"].startswith("eval-")


def test_pods_of_a_jobset_find_each_other():
  """As --distributed=auto reads their environment."""
  (manifest,) = written([a_job()], "nvidia-h100-80gb:8", hosts=4)
  name, run = manifest["metadata"]["name"], replicated(manifest)["run"]
  (container,) = pod(run)["containers"]
  assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
  environment = {one["name"]: one.get("value", "0") for one in container["env"]}
  environment["JOB_COMPLETION_INDEX"] = "3"  # as Kubernetes adds it to an indexed Job
  found = cluster.CLUSTERS["Kubernetes"][1](environment, "Kubernetes")
  assert (found.count, found.index) == (4, 3)
  assert found.address.startswith(f"{name}-run-0-0.{name}:")


HOSTILE = [
  *("$(rm -rf /)", "$(JOBSET_NAME)", "a$$b", "`id`", "'; echo", '"quoted"', "a: b", "#comment"),
  *("- item", "{x: y}", "1e-3", "0x10", "yes", "null", "~", "line\nbreak", "tab\t", "ünïcode 量"),
  *("%s", "&anchor", "*alias", "!tag", "---", "\\", "2026-11-28", " spaces "),
]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_arrive_as_they_are(value):
  """Kubernetes' reader of YAML takes more for numbers than Python's; it puts variables for $(NAME),
  and one $ for two."""
  argument = f"--config.data.path={value}"
  job = Job("train-x", "train", "beyond_outliers.main", (argument, value), f"/mnt/runs/{value}")
  (manifest,) = written([job])
  (container,) = pod(replicated(manifest)["run"])["containers"]
  assert [word.replace("$$", "$") for word in container["args"][:2]] == [argument, value]
  assert not re.search(r"(?<!\$)(\$\$)*\$\(", " ".join(container["args"]))
  for scalar in scalars(yaml.compose(jobset.render([manifest]))):
    assert scalar.style == '"' or scalar.tag.endswith((":int", ":bool")), scalar.value


def scalars(node):
  """Those of values; keys are this module's own words."""
  if isinstance(node, yaml.ScalarNode):
    yield node
  else:
    mapping = isinstance(node, yaml.MappingNode)
    for inner in [value for _, value in node.value] if mapping else node.value:
      yield from scalars(inner)


@pytest.mark.parametrize("name", ["x", "y" * 46, "a-" * 23 + "a"])
@pytest.mark.parametrize("slices", [1, 16])
def test_names_fit_and_are_of_their_workdir_alone(name, slices):
  listed = [a_job(name=name), a_job("evaluate", after=(f"train-{name}",), name=name)]
  (manifest,) = written(listed, "v5p-8192", slices)
  jobset_name = manifest["metadata"]["name"]
  assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", jobset_name) and "--" not in jobset_name
  for part in replicated(manifest).values():
    hosts = part["template"]["spec"]["completions"]
    pod_name = f"{jobset_name}-{part['name']}-{part['replicas'] - 1}-{hosts - 1}-abcde"
    assert len(pod_name) <= 63, pod_name
  elsewhere = [Job(*(*job_fields(listed[0])[:4], f"/mnt/other/{name}"))]
  assert written(elsewhere)[0]["metadata"]["name"] != written(listed[:1])[0]["metadata"]["name"]


def job_fields(job):
  return [job.name, job.kind, job.module, job.arguments, job.workdir]


def test_a_report_is_refused_with_its_command():
  page = ("--root=gs://bucket/a b", "--out=gs://bucket/a b/report")
  report = Job("report", "report", "beyond_outliers.analysis", page, "gs://bucket/a b")
  with pytest.raises(ConfigError, match=re.escape(shlex.join(page))):
    written([a_job(), report])


REFUSED = {
  ("v5p-100", 1, 1): "--accelerator=v5p-100: slices of v5p have 8, 16",
  ("nvidia-h100-80gb", 1, 1): "--accelerator=nvidia-h100-80gb: expected the GPUs of one host",
  ("nvidia-h100-80gb:0", 1, 1): "expected the GPUs of one host, such as nvidia-h100-80gb:8",
  (
    "nvidia-h100-80gb:8",
    2,
    1,
  ): "--slices=2: slices are for TPUs; for hosts with GPUs give --hosts=2",
  (
    "v5p-128",
    1,
    2,
  ): "--hosts=2: is for GPUs; the hosts of a slice follow from --accelerator=v5p-128",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_no_nodes_have_is_refused(given):
  with pytest.raises(ConfigError, match=re.escape(REFUSED[given])):
    gke.parse_nodes(*given)


@pytest.mark.parametrize("text", ["runs", "runs:mnt", ":/mnt", "Runs:/mnt", "runs:/a:b"])
def test_a_claim_is_a_name_and_a_path(text):
  with pytest.raises(ConfigError, match="expected NAME:/PATH"):
    gke.parse_claim(text)
  assert gke.parse_claim("runs:/mnt/") == ("runs", "/mnt") and gke.parse_claim("") is None


ARGUMENTS = (
  *("--config=configs/adamw.py", "--root=gs://bucket/sweep", "--image=registry/x:1"),
  *("--accelerator=v5litepod-16", "--where=seed=0,optimizer.learning_rate=0.003"),
)


def launch(*arguments, **environment):
  return commands.run("launch.gke", *commands.instead(ARGUMENTS, arguments), **environment)


def test_kubectl_gets_what_dry_run_prints(tmp_path):
  kubectl = tmp_path / "kubectl"
  kubectl.write_text(f'#!/bin/sh\necho "$@"\ncat > {tmp_path}/applied.yaml\nexit 5\n')
  kubectl.chmod(0o755)
  result = launch(PATH=f"{tmp_path}:/usr/bin:/bin")
  assert (result.returncode, result.stdout) == (5, "apply -f -\n"), result.stderr
  assert (tmp_path / "applied.yaml").read_text() == launch("--dry_run").stdout


REFUSED_FLAGS = {
  "--image=a b": "--image=a b: expected REGISTRY/NAME:TAG",
  "--namespace=Runs": "--namespace=Runs: expected lower-case letters, digits and hyphens",
  "--claim=runs": "--claim=runs: expected NAME:/PATH",
  "--root=/mnt/runs": "--root=/mnt/runs: would be lost with the machine that writes there",
  "--config=tests/conftest.py": "the image has beyond_outliers, configs of the clone",
  "--evaluate_accelerator=v5p-9": "--evaluate_accelerator=v5p-9: slices of v5p have 8",
  "--report": "--report: a JobSet does not wait for others; once they are done, run python -m",
}


@pytest.mark.parametrize("given", REFUSED_FLAGS)
def test_a_refusal_is_one_line_before_anything_starts(given):
  result = launch(given)
  assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
  assert result.stderr.startswith("error: ") and REFUSED_FLAGS[given] in result.stderr


def test_a_root_below_a_claim_is_kept():
  result = launch("--claim=runs:/mnt/runs", "--root=/mnt/runs/sweep", "--dry_run")
  (manifest,) = yaml.safe_load_all(result.stdout)
  spec = pod(replicated(manifest)["run"])
  assert spec["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}]
  assert spec["containers"][0]["volumeMounts"] == [{"name": "runs", "mountPath": "/mnt/runs"}]
  assert launch("--claim=runs:/mnt/runs", "--root=/mnt/runs-2", "--dry_run").returncode == 2


def test_without_kubectl_it_says_so():
  result = launch(PATH="/nowhere")
  assert result.returncode == 2 and result.stderr.startswith("error: kubectl: is not installed")
