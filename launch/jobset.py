"""JobSets of a sweep's jobs for Kubernetes: which Pods run on which nodes, and what follows each
exit code. Fields: jobset.x-k8s.io/v1alpha2 and Kubernetes' batch/v1."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from beyond_outliers.errors import ConfigError
from launch import jobs, remote
from launch.jobs import Job

Manifest = dict[str, Any]

LABEL = "beyond-outliers/sweep"
LONGEST = 63  # characters of the name of a Pod with a host name
EVALUATION_RETRIES = 2  # few: results are kept, but a cell that cannot be measured fails each time
GRACE_SECONDS = 600  # for saving, after a Pod is asked to stop
SPOT = "cloud.google.com/gke-spot"


@dataclasses.dataclass(frozen=True)
class Nodes:
  """Where the processes of one job run: one Pod per host."""

  selector: dict[str, str]  # labels of the nodes
  resource: str  # Kubernetes' name for a device
  devices: int  # per host
  hosts: int  # per slice
  slices: int = 1
  environment: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def processes(self) -> int:
    return self.hosts * self.slices


@dataclasses.dataclass(frozen=True)
class Cluster:
  """What all JobSets of a sweep share."""

  image: str
  sweep: str
  restarts: int = 10
  namespace: str = "default"
  spot: bool = False
  service_account: str = ""
  queue: str = ""  # of Kueue
  claim: tuple[str, str] | None = None  # for a persistent volume, and the path of its mount


def manifests(
  listed: Sequence[Job], nodes: Nodes, evaluating: Nodes, cluster: Cluster
) -> list[Manifest]:
  """One JobSet for each training, with the evaluation that waits for it, and one for each other
  evaluation. Errors: ConfigError for a report, since JobSets cannot wait for each other."""
  behind = {job.after[0]: job for job in listed if job.kind == "evaluate" and job.after}
  made = []
  for job in listed:
    if job.kind == "report":
      raise ConfigError(
        "--report: a JobSet does not wait for others; once they are done, run "
        f"{shlex.join(['python', '-m', job.module, *job.arguments])}"
      )
    if job.kind == "train":
      made.append(_job_set(job, nodes, behind.get(job.name), evaluating, cluster))
    elif not job.after:
      made.append(_job_set(job, evaluating, None, evaluating, cluster))
  return made


def _job_set(
  job: Job, nodes: Nodes, behind: Job | None, evaluating: Nodes, cluster: Cluster
) -> Manifest:
  most = max([nodes, evaluating], key=lambda n: len(f"{n.slices - 1}-{n.hosts - 1}"))
  name = _name(job, f"-eval-{most.slices - 1}-{most.hosts - 1}-abcde")
  # Ends the JobSet after a final exit code of a Job; below, also after an evaluation's last retry.
  rules = [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
  replicated = [_replicated("run", name, job, nodes, 0, cluster)]
  if behind is not None:
    rules.append({"name": "evaluation", "action": "FailJobSet", "targetReplicatedJobs": ["eval"]})
    retries = EVALUATION_RETRIES * evaluating.processes  # if one process fails, all of them do
    replicated.append(
      {
        **_replicated("eval", name, behind, evaluating, retries, cluster),
        "dependsOn": [{"name": "run", "status": "Complete"}],
      }
    )
  metadata: Manifest = {
    "name": name,
    "namespace": cluster.namespace,
    "labels": {LABEL: cluster.sweep},
    "annotations": {"beyond-outliers/workdir": job.workdir},
  }
  if cluster.queue:
    metadata["labels"]["kueue.x-k8s.io/queue-name"] = cluster.queue
  if nodes.resource == "google.com/tpu" and nodes.processes > 1:
    # Each Job gets a slice to itself.
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    metadata["annotations"][exclusive] = "cloud.google.com/gke-nodepool"
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      "failurePolicy": {
        "maxRestarts": cluster.restarts if job.kind == "train" else EVALUATION_RETRIES,
        "rules": rules,
      },
      "replicatedJobs": replicated,
    },
  }


def _replicated(
  part: str, name: str, job: Job, nodes: Nodes, retries: int, cluster: Cluster
) -> Manifest:
  policy = {
    "rules": [
      {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3]}},
      {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [jobs.STOPPED]}},
      {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
  }
  return {
    "name": part,
    "replicas": nodes.slices,
    "template": {
      "spec": {
        "completionMode": "Indexed",
        "completions": nodes.hosts,
        "parallelism": nodes.hosts,
        "backoffLimit": retries,
        "podFailurePolicy": policy,
        "template": {"spec": _pod(part, name, job, nodes, cluster)},
      }
    },
  }


def _pod(part: str, name: str, job: Job, nodes: Nodes, cluster: Cluster) -> Manifest:
  here = remote.across(job, nodes.processes, nodes.slices)
  command, arguments = remote.command(here)[:3], remote.command(here)[3:]
  container: Manifest = {
    "name": part,
    "image": cluster.image,
    "command": command,
    "args": [argument.replace("$", "$$") for argument in arguments],  # $(NAME) would be expanded
    "env": _environment(part, name, nodes),
    "resources": {"limits": {nodes.resource: str(nodes.devices)}},
  }
  spec: Manifest = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": GRACE_SECONDS,
    "nodeSelector": dict(nodes.selector),
    "containers": [container],
  }
  if cluster.spot:
    spec["nodeSelector"][SPOT] = "true"
    spec["tolerations"] = [
      {"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    ]
  if cluster.service_account:
    spec["serviceAccountName"] = cluster.service_account
  if cluster.claim:
    claim, folder = cluster.claim
    container["volumeMounts"] = [{"name": "runs", "mountPath": folder}]
    spec["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}]
  return spec


def _environment(part: str, name: str, nodes: Nodes) -> list[Manifest]:
  """Variables that --distributed=auto reads (config/cluster.py), and the nodes' own, such as the
  platform that must start. GKE adds those of TPU slices."""
  values = dict(nodes.environment)
  if nodes.processes > 1:
    values |= {
      "JOBSET_NAME": name,
      "REPLICATED_JOB_NAME": part,
      "PROCESSES_PER_JOB": str(nodes.hosts),
      "JOB_REPLICAS": str(nodes.slices),
    }
  environment: list[Manifest] = [{"name": key, "value": value} for key, value in values.items()]
  if nodes.processes > 1:
    index = "metadata.annotations['jobset.sigs.k8s.io/job-index']"
    environment.append({"name": "JOB_INDEX", "valueFrom": {"fieldRef": {"fieldPath": index}}})
  return environment


def _name(job: Job, longest_end: str) -> str:
  """Name of a JobSet: the job's, cut so that its Pods' names fit, and a digest of the workdir, so
  that sweeps in one cluster do not clash."""
  digest = hashlib.sha256(job.workdir.encode()).hexdigest()[:8]
  return f"{job.name[: LONGEST - len(longest_end) - 9].rstrip('-')}-{digest}"


class _Text(str):
  """Text that is always quoted, since Kubernetes would read 1e-3 as a number."""


class _Dumper(yaml.SafeDumper):
  def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
    super().increase_indent(flow, False)

  def ignore_aliases(self, data: Any) -> bool:
    return True


_Dumper.add_representer(
  _Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def render(made: Sequence[Manifest]) -> str:
  """YAML with one document per manifest."""
  quoted = [_quoted(manifest) for manifest in made]
  return yaml.dump_all(quoted, Dumper=_Dumper, sort_keys=False, width=10**9, explicit_start=True)


def _quoted(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _quoted(inner) for key, inner in value.items()}
  if isinstance(value, list):
    return [_quoted(inner) for inner in value]
  return _Text(value) if isinstance(value, str) else value
