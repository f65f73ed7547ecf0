"""Which of how many processes this is, from flags, variables and clusters; and that a process alone asks nobody."""

import subprocess
import sys

import pytest

from deltaformer_jax.host import processes
from deltaformer_jax.processes import place as places
from deltaformer_jax.processes.place import Place, find

FLAGS = ["train.py", "--coordinator", "10.0.0.1:8476", "--processes=4", "--process", "3"]
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
OPEN_MPI_4 = {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}


@pytest.fixture
def in_environment(monkeypatch):
    """Sets the variables, for jax too, and returns them."""

    def be(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return variables

    return be


def test_flags_and_variables():
    assert find(FLAGS, {}) == Place("10.0.0.1:8476", 4, 3, "flags")
    assert find(["train.py"], VARIABLES) == Place("a:1", 2, 0, "variables")
    assert find(["train.py", "--process=1"], VARIABLES) == Place("a:1", 2, 1, "variables and flags")
    line = "4 processes, this is 3, coordinator 10.0.0.1:8476, from flags"
    assert find(FLAGS, VARIABLES).line == line
    assert find(FLAGS, {}).wait == 300 and find([*FLAGS, "--wait=900"], {}).wait == 900


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        # jax's port for a job's number, and one GPU for each process of a host.
        (SLURM, Place("node007:62344", 2, 1, "Slurm", (0,))),
        (OPEN_MPI_4, Place("10.96.0.1:62624", 4, 2, "Open MPI", (1,))),
    ],
)
def test_clusters(variables, expected, in_environment):
    assert find(["train.py"], in_environment(variables)) == expected


@pytest.mark.parametrize(
    ("visible", "per_task", "local", "devices"),
    [
        ("0,1,2,3", "", "3", (3,)),
        ("5", "1", "3", None),  # --gpus-per-task shows a task its own alone, number 0 to JAX
        ("5", "", "0", None),
        ("4,5", "2", "1", None),
        ("0,1,2,3", "1", "3", (3,)),  # and --gpu-bind=none all of them
        ("", "", "3", (3,)),
    ],
)
def test_the_gpus_of_a_task(visible, per_task, local, devices, in_environment):
    variables = {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_PER_TASK": per_task, "SLURM_LOCALID": local}
    assert find(["train.py"], in_environment(SLURM | variables)).devices == devices
    mpi = OPEN_MPI_4 | variables | {"OMPI_COMM_WORLD_LOCAL_RANK": local}
    assert find(["train.py", "--coordinator=b:7"], mpi).devices == devices


def test_flags_come_before_the_cluster(in_environment):
    found = find(["train.py", "--coordinator=b:7"], in_environment(SLURM))
    assert (found.coordinator, found.count, found.index) == ("b:7", 2, 1)
    # From version 5 on, Open MPI does not say where the first process is.
    assert find(["train.py", "--coordinator=b:7"], OPEN_MPI) == Place("b:7", 4, 2, "flags and Open MPI", (1,))


def test_tpu_hosts_are_asked(monkeypatch, in_environment):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.GkeTpuCluster, "wait_for_coordinator", lambda *_: None)
    hosts = {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "t-0"}
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    found = find(["train.py"], in_environment({**hosts, **slices}))
    assert found[:4] == ("t-0:8482", 4, 3, "GKE")
    alone = in_environment({**hosts, "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"})
    assert find(["train.py"], in_environment({**alone, "TPU_WORKER_HOSTNAMES": "t-0", "TPU_WORKER_ID": "0"})) is None


@pytest.mark.parametrize(
    ("argv", "variables"),
    [
        ([], {}),
        (["--processes=1"], VARIABLES),
        (["--processes=1"], SLURM),
        ([], {**SLURM, "SLURM_NTASKS": "1"}),
        ([], {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}),
        ([], {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}),  # in a batch script, not started by srun
        ([], {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0", "PMI_SIZE": "1"}),
        (["--processes=1"], {"PMI_SIZE": "4"}),
    ],
)
def test_alone(argv, variables, in_environment):
    assert find(["train.py", *argv], in_environment(variables)) is None


@pytest.mark.parametrize(
    ("argv", "variables", "message"),
    [
        (["--processes=2"], {}, "--coordinator: missing, and JAX_COORDINATOR_ADDRESS is not set; --processes alone"),
        ([], {"JAX_COORDINATOR_ADDRESS": "a:1"}, "--processes: missing, and JAX_NUM_PROCESSES is not set"),
        (["--coordinator=a:1", "--processes=2"], {}, "--process: missing.*or --processes 1 for a run of its own"),
        ([*FLAGS[1:], "--process=4"], {}, "--process 4: of 4 processes; give a number from 0 to 3"),
        ([*FLAGS[1:], "--process=-1"], {}, "--process -1: of 4"),
        ([*FLAGS[1:], "--processes=0"], {}, "--processes 0: give the number of processes, 1 or more"),
        ([*FLAGS[1:], "--processes=two"], {}, "--processes = 'two': not a whole number"),
        ([], {**VARIABLES, "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID = 'x': not a whole number"),
        ([*FLAGS[1:], "--coordinator=host"], {}, "--coordinator host: give HOST:PORT"),
        ([*FLAGS[1:], "--coordinator=host:99999"], {}, "--coordinator host:99999: give HOST:PORT"),
        ([], OPEN_MPI, "Open MPI started 4 processes, but does not tell where the first one runs"),
        (["--coordinator"], {}, "--coordinator: give a value"),
        ([], {"PMI_SIZE": "4", "PMI_RANK": "0"}, "--coordinator: missing, and PMI_SIZE = 4 says that other processes"),
        ([], {"SKYPILOT_NUM_NODES": "2"}, "SKYPILOT_NUM_NODES = 2.*or --processes 1 for runs of their own"),
        ([], {"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_INDEX = 3 says"),
        ([*FLAGS[1:], "--wait=0"], {}, "--wait 0: give the seconds"),
        ([*FLAGS[1:], "--wait=5m"], {}, "--wait = '5m': not a whole number"),
    ],
)
def test_what_is_missing_or_wrong_is_named(argv, variables, message):
    with pytest.raises(ValueError, match=message):
        find(["train.py", *argv], variables)


def test_a_cluster_that_does_not_answer_is_named(monkeypatch, in_environment):
    monkeypatch.setattr(places, "has_tpus", lambda: False)
    broken = in_environment({**SLURM, "SLURM_NTASKS": "many"})
    with pytest.raises(ValueError, match="asking the cluster failed: ValueError"):
        find(["train.py"], broken)


def test_a_process_alone_imports_neither_jax_nor_numpy():
    code = (
        "import os, sys\n"
        "import deltaformer_jax.train\n"
        "assert deltaformer_jax.train._place(['train.py', '--workdir=x']) is None\n"
        "assert not {'jax', 'numpy', 'flax', 'absl', 'subprocess', 'multiprocessing'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
