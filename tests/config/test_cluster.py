"""Where processes find each other: by --distributed, or by variables of what started them.

Expected ports and hosts are those that JAX's own detection derives from the same variables."""

import pytest

from beyond_outliers.config import cluster
from beyond_outliers.errors import ConfigError

SLURM = {
  "SLURM_JOB_ID": "5000",
  "SLURM_STEP_ID": "0",
  "SLURM_STEP_NODELIST": "node[007-009,012],other",
  "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
  "SLURM_NODEID": "1",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "2",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
VERSION_4 = "1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911"
VERSION_4_SIX = "1314521088.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d:c083:150e::3000:2]:43370"
JOBSET = {
  "JOBSET_NAME": "run",
  "REPLICATED_JOB_NAME": "workers",
  "JOB_COMPLETION_INDEX": "1",
  "PROCESSES_PER_JOB": "4",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "first:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def found(environment, text="auto"):
  it = cluster.membership(text, environment)
  return it.source, it.address, it.count, it.index


@pytest.fixture(autouse=True)
def no_accelerators(monkeypatch, tmp_path):
  """Whatever this machine has."""
  monkeypatch.setattr(cluster, "PCI", tmp_path)
  monkeypatch.setattr(cluster, "GPUS", tmp_path)


@pytest.mark.parametrize(
  "environment, expected",
  [
    (JAX, ("JAX's variables", "first:1234", 2, 1)),
    (SLURM, ("Slurm", "node007:62344", 7, 3)),
    ({**SLURM, "SLURM_STEP_ID": "2"}, ("Slurm", "node007:64386", 7, 3)),
    ({**SLURM, "JAX_COORDINATOR_PORT": "99"}, ("Slurm", "node007:99", 7, 3)),
    ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": VERSION_4}, ("Open MPI", "10.96.0.1:62624", 4, 2)),
    (
      {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": VERSION_4_SIX},
      ("Open MPI", "[fe80::b9b:ac5d:9cf0:b858]:62880", 4, 2),
    ),
    ({**OPEN_MPI, "PMIX_NAMESPACE": "prterun-my-node-6885@1"}, ("Open MPI", "my-node:64229", 4, 2)),
    (JOBSET, ("Kubernetes", "run-workers-0-0.run:55527", 4, 1)),
    (
      {**JOBSET, "JOB_REPLICAS": "2", "JOB_INDEX": "1"},
      ("Kubernetes", "run-workers-0-0.run:55527", 8, 5),
    ),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, ("Cloud TPU", None, None, None)),
    # mpirun within a job of Slurm, and GKE's TPUs in a JobSet.
    ({**SLURM, **OPEN_MPI, "PMIX_NAMESPACE": "prterun-node-1@1"}, ("Open MPI", "node:61441", 4, 2)),
    ({**JOBSET, "TPU_WORKER_HOSTNAMES": "a,b"}, ("Cloud TPU", None, None, None)),
  ],
)
def test_what_the_variables_of_each_say(environment, expected):
  assert found(environment) == expected


def test_a_tpu_on_the_bus_is_left_to_jax(monkeypatch, tmp_path):
  (tmp_path / "0000:00:04.0").mkdir()
  (tmp_path / "0000:00:04.0" / "vendor").write_text("0x1ae0\n")
  assert found(SLURM)[0] == "Cloud TPU"


@pytest.mark.parametrize(
  "nodes, first",
  [
    ("vm", "vm"),
    ("a1,b[1-2]", "a1"),
    ("a[1,3]", "a1"),
    ("rack[2-3]-n[05-07],c", "rack2-n05"),
    ("n[01-02]-ib0", "n01-ib0"),
  ],
)
def test_the_first_of_slurms_nodes(nodes, first):
  assert found({**SLURM, "SLURM_STEP_NODELIST": nodes})[1] == f"{first}:62344"


@pytest.mark.parametrize(
  "more, tasks, devices",
  [
    ({}, "2", None),  # no GPU
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, "1", None),
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, "2", (4, 5, 6, 7)),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, "2", None),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "1"}, "2", None),
  ],
)
def test_processes_on_a_host_share_its_gpus(more, tasks, devices):
  """A task alone has all of them, of which JAX's own detection would take one."""
  local = {"SLURM_LOCALID": "0" if tasks == "1" else "1"}
  environment = {**SLURM, **local, "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x4)", **more}
  assert cluster.membership("auto", environment).devices == devices


def test_what_is_given_counts():
  assert found({}, "here:1234,2,1") == ("--distributed", "here:1234", 2, 1)
  assert found({}, "[::1]:1234,1,0") == ("--distributed", "[::1]:1234", 1, 0)
  assert found(SLURM, "here:1234") == ("Slurm", "here:1234", 7, 3)


@pytest.mark.parametrize(
  "text", ["here", "here:x,2,1", "here:1,2", "here:1,2,-1", ":1,2,0", "here:70000,2,0", "h:1,,", ""]
)
def test_what_is_given_otherwise_is_refused(text):
  with pytest.raises(ConfigError, match="expected 'auto', HOST:PORT or HOST:PORT,COUNT,INDEX"):
    cluster.membership(text, {})


@pytest.mark.parametrize(
  "environment, text, reason",
  [
    ({}, "here:1,2,2", "--distributed: process 2 of 2"),
    ({}, "here:1,0,0", "--distributed: process 0 of 0"),
    ({**SLURM, "SLURM_PROCID": "7"}, "auto", "Slurm: process 7 of 7"),
    ({**SLURM, "SLURM_PROCID": "x"}, "auto", "SLURM_PROCID = 'x': expected a number"),
    ({**SLURM, "SLURM_STEP_NODELIST": ""}, "auto", "SLURM_STEP_NODELIST = ''"),
    ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(3)"}, "auto", "SLURM_STEP_TASKS_PER_NODE"),
    ({**SLURM, "SLURM_NODEID": "4"}, "auto", "SLURM_NODEID = 4"),
    (
      {**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2"},
      "auto",
      "CUDA_VISIBLE_DEVICES = '0,1,2': 3 GPUs for 2 processes on one host",
    ),
    (OPEN_MPI, "auto", "Open MPI: neither OMPI_MCA_orte_hnp_uri"),
    ({**JAX, "JAX_COORDINATOR_ADDRESS": "first"}, "auto", "JAX_COORDINATOR_ADDRESS = 'first'"),
  ],
)
def test_what_does_not_fit_is_refused(environment, text, reason):
  with pytest.raises(ConfigError) as refusal:
    cluster.membership(text, environment)
  assert str(refusal.value).startswith(reason)


def test_where_nothing_is_found_the_refusal_says_what_was_looked_for():
  """Within an allocation of Slurm, but not started by srun."""
  job = {"SLURM_JOB_ID": "5000", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
  with pytest.raises(ConfigError) as refusal:
    cluster.membership("auto", job)
  message = str(refusal.value)
  assert "Slurm (no SLURM_STEP_ID, SLURM_STEP_NODELIST, SLURM_STEP_TASKS_PER_NODE)" in message
  assert all(name in message for name in cluster.CLUSTERS) and "\n" not in message
  assert "give HOST:PORT,COUNT,INDEX" in message
