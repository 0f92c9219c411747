"""Kubernetes launcher: a JobSet for each run of a sweep, on TPU slices or GPUs of GKE.

  python -m launch.gke --config=configs/shampoo_qat.py:1.5b --root=gs://BUCKET/shampoo \
    --image=REGISTRY/beyond_outliers:TAG --accelerator=v5litepod-256 --evaluate=behind --dry_run

prints the YAML; without --dry_run it is piped to `kubectl apply`. A run that was asked to stop (42)
starts again; one that was refused (2) or diverged (3) fails for good; any other failure restarts
the JobSet, which resumes from the newest checkpoint.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from absl import flags

from beyond_outliers import cli
from beyond_outliers.errors import ConfigError
from launch import jobs, jobset, remote, tpus
from launch.jobset import Nodes

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def define_flags() -> None:
  jobs.define_flags()
  remote.define_image(required=True)
  flags.DEFINE_string(
    "accelerator",
    None,
    "A slice of TPUs (v5litepod-256, v5p-128), or GPUs of a host (nvidia-h100-80gb:8).",
    required=True,
  )
  flags.DEFINE_integer("slices", 1, "Slices of TPUs that a run is spread over.", 1)
  flags.DEFINE_integer("hosts", 1, "Hosts with GPUs that a run is spread over.", 1)
  flags.DEFINE_string(
    "evaluate_accelerator",
    "",
    "Accelerator of the evaluation jobs; if empty, one slice, or host, like a run's.",
  )
  flags.DEFINE_integer("restarts", 10, "How often a run that failed is started again.", 0)
  flags.DEFINE_bool("spot", False, "Spot nodes, which cost less and may be taken away.")
  flags.DEFINE_string("namespace", "default", "Namespace of the JobSets.")
  flags.DEFINE_string("service_account", "", "Kubernetes account that may use the bucket.")
  flags.DEFINE_string("queue", "", "Local queue of Kueue, where the cluster has it.")
  flags.DEFINE_string("claim", "", "NAME:/PATH, a persistent volume claim mounted in every Pod.")


def parse_nodes(
  accelerator: str, slices: int = 1, hosts: int = 1, flag: str = "--accelerator"
) -> Nodes:
  """The nodes that flags ask for. Errors: ConfigError, naming the flag."""
  name, _, count = accelerator.partition(":")
  if name.startswith("nvidia-"):
    if not count.isdecimal() or not 1 <= int(count) <= 16 or not DNS_LABEL.fullmatch(name):
      raise ConfigError(
        f"{flag}={accelerator}: expected the GPUs of one host, such as nvidia-h100-80gb:8"
      )
    if slices > 1:
      raise ConfigError(
        f"--slices={slices}: slices are for TPUs; for hosts with GPUs give --hosts={slices}"
      )
    selector = {"cloud.google.com/gke-accelerator": name}
    return Nodes(selector, "nvidia.com/gpu", int(count), hosts, environment=_asked("cuda"))
  if hosts > 1:
    raise ConfigError(
      f"--hosts={hosts}: is for GPUs; the hosts of a slice follow from {flag}={accelerator}"
    )
  part = tpus.parse(accelerator, flag)
  selector = {
    "cloud.google.com/gke-tpu-accelerator": part.kind.label,
    "cloud.google.com/gke-tpu-topology": part.topology,
  }
  return Nodes(selector, "google.com/tpu", part.chips, part.hosts, slices, _asked("tpu"))


def _asked(platform: str) -> dict[str, str]:
  """Asks JAX for a platform: otherwise it would go on without one that fails to start."""
  return {"JAX_PLATFORMS": f"{platform},cpu"}


def parse_claim(text: str) -> tuple[str, str] | None:
  """(claim, mount path) of NAME:/PATH; None if empty. Errors: ConfigError."""
  name, _, path = text.partition(":")
  if text and not (DNS_LABEL.fullmatch(name) and path.startswith("/") and ":" not in path):
    raise ConfigError(f"--claim={text}: expected NAME:/PATH, a claim and where it is mounted")
  return (name, path.rstrip("/") or "/") if text else None


def described() -> str:
  """The YAML that the flags describe. Errors: ConfigError."""
  given = flags.FLAGS
  remote.check_image(given.image)
  for flag in ("namespace", "service_account", "queue"):
    value = given[flag].value
    if value and not DNS_LABEL.fullmatch(value):
      raise ConfigError(f"--{flag}={value}: expected lower-case letters, digits and hyphens")
  claim = parse_claim(given.claim)
  remote.check_files(given.config, given.root, [claim[1]] if claim else [])
  nodes = parse_nodes(given.accelerator, given.slices, given.hosts)
  evaluating = (
    parse_nodes(given.evaluate_accelerator, flag="--evaluate_accelerator")
    if given.evaluate_accelerator
    else parse_nodes(given.accelerator)
  )
  cluster = jobset.Cluster(
    given.image,
    jobs.title(given.config, given.root),
    given.restarts,
    given.namespace,
    given.spot,
    given.service_account,
    given.queue,
    claim,
  )
  return jobset.render(jobset.manifests(jobs.of_flags(), nodes, evaluating, cluster))


def launch(argv: list[str]) -> None:
  """Prints the JobSets, or passes them to kubectl."""
  del argv
  text = described()
  if flags.FLAGS.dry_run:
    print(text, end="")
    return
  if shutil.which("kubectl") is None:
    raise ConfigError(
      "kubectl: is not installed here; install it, or give --dry_run and apply the YAML elsewhere"
    )
  sys.exit(subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode)


if __name__ == "__main__":
  define_flags()
  cli.run_command(launch)
