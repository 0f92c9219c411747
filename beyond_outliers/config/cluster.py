"""Processes of one run: how many there are, which this one is, and where they meet.

As given, or as what started them says in environment variables. JAX's own detection
(`jax.distributed`) is used for TPUs alone: of Slurm it takes one device a process, however many a
task was given; of Open MPI it knows no version from 5; of Kubernetes it asks the API server, for
which a pod needs a library and a permission.
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

# Ports above those that Linux gives to outgoing connections, as JAX takes them.
FIRST_PORT, PORTS = 61440, 4096
KUBERNETES_PORT = 55527  # each pod has an address of its own; JAX's port there
GOOGLE = "0x1ae0"  # vendor of TPUs on the PCI bus
PCI, GPUS = pathlib.Path("/sys/bus/pci/devices"), pathlib.Path("/dev")


@dataclasses.dataclass(frozen=True)
class Membership:
  """One process among those of a run. None: JAX finds it, on TPUs.

  devices: numbers of the host's GPUs that are this process's; None: all that it can see."""

  source: str  # what says so
  address: str | None = None  # HOST:PORT, where process 0 listens
  count: int | None = None
  index: int | None = None
  devices: tuple[int, ...] | None = None


def membership(text: str, environment: Environment) -> Membership:
  """What --distributed says: 'auto', HOST:PORT (the rest is found), or HOST:PORT,COUNT,INDEX.

  Errors: ConfigError, where nothing is found naming what was looked for."""
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
  """Failure where process 0 cannot listen on the port of an address: JAX's service would crash, or
  share the port with that of another run, and so end that run's processes."""
  port = int(address.rpartition(":")[-1])
  both = socket.has_dualstack_ipv6()  # of which JAX listens on both, too
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
  """JAX's variable for another port, in case it is taken."""
  name = "JAX_COORDINATOR_PORT"
  return _number(environment, name) if name in environment else port


def _from_jax(environment: Environment, source: str) -> Membership:
  address = environment["JAX_COORDINATOR_ADDRESS"]
  _check_address("JAX_COORDINATOR_ADDRESS", address, address)
  count, index = (_number(environment, name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
  return Membership(source, address, count, index)


def _from_tpu(environment: Environment, source: str) -> Membership | None:
  """JAX asks Google's metadata server, or on Kubernetes what GKE puts into a pod's environment."""
  tpus = any(file.read_text().strip() == GOOGLE for file in PCI.glob("*/vendor"))
  return Membership(source) if tpus or "TPU_WORKER_HOSTNAMES" in environment else None


def _from_open_mpi(environment: Environment, source: str) -> Membership:
  """Where mpirun was started, which is taken for process 0's host."""
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
  """A step that srun started; two steps of one job at once have ports of their own."""
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
  bound = "SLURM_GPUS_PER_TASK" in environment  # then a task sees its own alone
  devices = None if bound else _devices(environment, local, by_node[node])
  return Membership(source, f"{host}:{port}", sum(by_node), index, devices)


def _first_host(nodes: str) -> str:
  """The first of node[001-003,007],other, or of rack[1-2]-[3,5]."""
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
  """Pods of an indexed Job of a JobSet, whose names and numbers its YAML puts into the environment
  (launch/gke.py); of several Jobs alike, a slice each, the pods count on."""
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
  """The GPUs of one of the processes on a host: an equal run of those that all of them see.

  Errors: ConfigError where they cannot be shared equally."""
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


# Where a membership may be written, in the order in which it is looked for: mpirun within a job of
# Slurm has that one's variables too, and TPUs are found on Kubernetes too.
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
