"""Processes of one run: how many there are, which one this is, and where they meet.

Given by a flag, or by the environment variables of what started them. JAX's own detection
(`jax.distributed`) is only used for TPUs: under Slurm it gives each process one device, however
many the task was given; it doesn't know Open MPI from version 5 on; and on Kubernetes it asks the
API server, for which a pod needs a library and a permission.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib
import re
import socket
from collections.abc import Callable, Mapping

from beyond_outliers.errors import ConfigError, Failure

Environment = Mapping[str, str]

EXPECTED = "expected 'auto', HOST:PORT or HOST:PORT,COUNT,INDEX"

# Ports above those that Linux gives to outgoing connections; JAX uses the same range.
FIRST_PORT, PORTS = 61440, 4096
KUBERNETES_PORT = 55527  # JAX's port there; it can be fixed, since each pod has its own address
GOOGLE = "0x1ae0"  # vendor of TPUs on the PCI bus
PCI, GPUS = pathlib.Path("/sys/bus/pci/devices"), pathlib.Path("/dev")


@dataclasses.dataclass(frozen=True)
class Membership:
  """One process among those of a run. Fields that are None are left to JAX, on TPUs.

  devices: numbers of the host's GPUs that belong to this process; None: all that it can see."""

  source: str  # where this was found
  address: str | None = None  # HOST:PORT, where process 0 listens
  count: int | None = None
  index: int | None = None
  devices: tuple[int, ...] | None = None


def membership(text: str, environment: Environment) -> Membership:
  """Membership from --distributed: 'auto', HOST:PORT (the rest is found), or HOST:PORT,COUNT,INDEX.

  Errors: ConfigError; if nothing is found, it names what was looked for."""
  address, *numbers = text.split(",")
  if text != "auto":
    _check_address("--distributed", text, address)
  if numbers:
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
      raise ConfigError(f"--distributed = {text!r}: {EXPECTED}")
    return _checked(Membership("--distributed", address, int(numbers[0]), int(numbers[1])))
  for source, (variables, find) in CLUSTERS.items():
    if all(variable in environment for variable in variables) and (
      found := find(environment, source)
    ):
      return _checked(found if text == "auto" else dataclasses.replace(found, address=address))
  looked_for = "; ".join(
    f"{source} (no {', '.join(v for v in variables if v not in environment) or 'TPU here'})"
    for source, (variables, _) in CLUSTERS.items()
  )
  raise ConfigError(
    f"--distributed = {text!r}: nothing here says how many processes there are and which this one "
    f"is; looked for {looked_for}; start with srun, mpirun or a JobSet, or give "
    "HOST:PORT,COUNT,INDEX"
  )


def check_free(address: str) -> None:
  """Errors: Failure if process 0 cannot listen at the address's port. JAX's service would crash, or
  share the port with another run's service, which would end that run's processes."""
  port = int(address.rpartition(":")[-1])
  both = socket.has_dualstack_ipv6()  # IPv4 and IPv6, both of which JAX listens on
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
  except OSError as error:
    if error.errno is not None and error.errno in (errno.EADDRINUSE, errno.EACCES):
      raise Failure(
        f"{address}, where the processes of a run meet: process 0 cannot listen on port {port} "
        f"({os.strerror(error.errno)}); use another port, or stop what is using this one"
      ) from None


def _checked(found: Membership) -> Membership:
  if found.count is not None and found.index is not None and not 0 <= found.index < found.count:
    raise ConfigError(
      f"{found.source}: process {found.index} of {found.count}; processes count from 0, and there "
      "must be at least one"
    )
  return found


def _check_address(field: str, value: str, address: str) -> None:
  host, _, port = address.rpartition(":")
  if not (host and port.isdecimal() and 0 < int(port) < 65536):
    raise ConfigError(f"{field} = {value!r}: {EXPECTED}")


def _number(environment: Environment, name: str) -> int:
  value = environment[name]
  if not value.isdecimal():
    raise ConfigError(f"{name} = {value!r}: expected a number; give HOST:PORT,COUNT,INDEX")
  return int(value)


def _port(environment: Environment, port: int) -> int:
  """The port, or the one that JAX's variable gives, for when the usual one is taken."""
  name = "JAX_COORDINATOR_PORT"
  return _number(environment, name) if name in environment else port


def _from_jax(environment: Environment, source: str) -> Membership:
  address = environment["JAX_COORDINATOR_ADDRESS"]
  _check_address("JAX_COORDINATOR_ADDRESS", address, address)
  count, index = (_number(environment, name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
  return Membership(source, address, count, index)


def _from_tpu(environment: Environment, source: str) -> Membership | None:
  """JAX finds the rest, from Google's metadata server or, on GKE, from the pod's environment."""
  tpus = any(file.read_text().strip() == GOOGLE for file in PCI.glob("*/vendor"))
  return Membership(source) if tpus or "TPU_WORKER_HOSTNAMES" in environment else None


def _from_open_mpi(environment: Environment, source: str) -> Membership:
  """The processes meet on the host where mpirun was started, assumed to be process 0's."""
  count, index, local, together = (
    _number(environment, f"OMPI_COMM_WORLD_{name}")
    for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
  )
  # Up to version 4: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911, or tcp6://[fe80::1,...]:43370;
  # from 5 on: prterun-HOST-1234@1.
  uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
  job = environment.get("PMIX_NAMESPACE", "")
  old = re.match(r"(\d+)\.\d+;tcp6?://(?:\[(?P<six>[^],]+)|(?P<four>[^,:]+))", uri)
  new = re.match(r"prterun-(?P<host>.+)-(\d+)@\d+$", job)
  if old:
    host, number = old["four"] or f"[{old['six']}]", int(old[1]) // PORTS
  elif new:
    host, number = new["host"], int(new[2])
  else:
    raise ConfigError(
      f"{source}: neither OMPI_MCA_orte_hnp_uri = {uri!r} nor PMIX_NAMESPACE = {job!r} names "
      "mpirun's host; give --distributed=HOST:PORT, and the rest is found"
    )
  address = f"{host}:{_port(environment, FIRST_PORT + number % PORTS)}"
  return Membership(source, address, count, index, _devices(environment, local, together))


def _from_slurm(environment: Environment, source: str) -> Membership:
  """A step that srun started; concurrent steps of one job get different ports."""
  job, step, node, index, local = (
    _number(environment, f"SLURM_{name}")
    for name in ("JOB_ID", "STEP_ID", "NODEID", "PROCID", "LOCALID")
  )
  host = _first_host(environment["SLURM_STEP_NODELIST"])
  port = _port(environment, FIRST_PORT + (job + 1021 * step) % PORTS)
  by_node = _tasks_by_node(environment["SLURM_STEP_TASKS_PER_NODE"])
  if node >= len(by_node):
    raise ConfigError(
      f"SLURM_NODEID = {node}: SLURM_STEP_TASKS_PER_NODE = "
      f"{environment['SLURM_STEP_TASKS_PER_NODE']!r} lists fewer nodes; start with srun"
    )
  bound = "SLURM_GPUS_PER_TASK" in environment  # if so, a task sees only its own GPUs
  devices = None if bound else _devices(environment, local, by_node[node])
  return Membership(source, f"{host}:{port}", sum(by_node), index, devices)


def _first_host(nodes: str) -> str:
  """The first host of a list such as node[001-003,007],other or rack[1-2]-[3,5]."""
  first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
  if first is None:
    raise ConfigError(f"SLURM_STEP_NODELIST = {nodes!r}: expected names of nodes; start with srun")
  return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _tasks_by_node(text: str) -> list[int]:
  """Slurm's 2(x3),1 as [2, 2, 2, 1]."""
  found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
  if None in found:
    raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE = {text!r}: expected numbers; start with srun")
  return [int(part[1]) for part in found if part for _ in range(int(part[2] or 1))]


def _from_kubernetes(environment: Environment, source: str) -> Membership:
  """Pods of an indexed Job in a JobSet, whose YAML puts names and numbers into the environment
  (launch/gke.py); with a Job per slice, processes are numbered across all Jobs."""
  jobset, replicated = environment["JOBSET_NAME"], environment["REPLICATED_JOB_NAME"]
  index, together = (
    _number(environment, name) for name in ("JOB_COMPLETION_INDEX", "PROCESSES_PER_JOB")
  )
  jobs, job = (
    _number(environment, name) if name in environment else default
    for name, default in (("JOB_REPLICAS", 1), ("JOB_INDEX", 0))
  )
  host = f"{jobset}-{replicated}-0-0.{jobset}"  # the name that JobSet gives a pod
  address = f"{host}:{_port(environment, KUBERNETES_PORT)}"
  return Membership(source, address, jobs * together, job * together + index)


def _devices(environment: Environment, local: int, together: int) -> tuple[int, ...] | None:
  """The GPUs of one of the processes on a host: equally many consecutive ones for each.

  Errors: ConfigError if they cannot be shared equally."""
  if together == 1 or "JAX_LOCAL_DEVICE_IDS" in environment:
    return None
  visible = environment.get("CUDA_VISIBLE_DEVICES", "")
  known = len(visible.split(",")) if visible else len([*GPUS.glob("nvidia[0-9]*")])
  if known == 0:
    return None
  if known % together:
    raise ConfigError(
      f"CUDA_VISIBLE_DEVICES = {visible!r}: {known} GPUs for {together} processes on one host; "
      "start a number of processes that divides the GPUs evenly, or give each its own with "
      "JAX_LOCAL_DEVICE_IDS"
    )
  share = known // together
  return tuple(range(local * share, (local + 1) * share))


# Where to look for a membership, in order: mpirun within a Slurm job has Slurm's variables too, and
# Kubernetes may have TPUs.
CLUSTERS: dict[str, tuple[tuple[str, ...], Callable[[Environment, str], Membership | None]]] = {
  "JAX's variables": (
    ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    _from_jax,
  ),
  "Cloud TPU": ((), _from_tpu),
  "Open MPI": (
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")),
    _from_open_mpi,
  ),
  "Slurm": (
    tuple(
      f"SLURM_{name}"
      for name in (
        *("JOB_ID", "STEP_ID", "STEP_NODELIST", "STEP_TASKS_PER_NODE"),
        *("NODEID", "PROCID", "LOCALID"),
      )
    ),
    _from_slurm,
  ),
  "Kubernetes": (
    ("JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_COMPLETION_INDEX", "PROCESSES_PER_JOB"),
    _from_kubernetes,
  ),
}
