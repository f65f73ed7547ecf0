"""Which of how many processes this is, and where process 0 is found. jax is imported only if a cluster has to be asked.

The three numbers come from flags, else from variables, else from the cluster that started the program:

    --coordinator HOST:PORT   JAX_COORDINATOR_ADDRESS   where process 0 listens
    --processes N             JAX_NUM_PROCESSES         how many there are
    --process I               JAX_PROCESS_ID            which of them this is, 0 .. N - 1

    --wait SECONDS                                      how long to wait for all of them at the start

Clusters are recognised by the variables that they set, and asked as jax asks them: Slurm, Open MPI, Cloud TPU (also in
GKE) and Kubernetes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deltaformer_jax.host.arguments import value_of
from deltaformer_jax.host.processes import has_tpus

# What is asked for: the field of Place -> its flag and its variable.
ASKED = {
    "coordinator": ("coordinator", "JAX_COORDINATOR_ADDRESS"),
    "count": ("processes", "JAX_NUM_PROCESSES"),
    "index": ("process", "JAX_PROCESS_ID"),
}
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = {"count": "OMPI_COMM_WORLD_SIZE", "index": "OMPI_COMM_WORLD_RANK"}
# Variables of other launchers, which tell how many processes there are, but not where the first one runs: MPICH and
# Intel MPI, SkyPilot, torchrun and Kubeflow.
COUNTS = ("PMI_SIZE", "SKYPILOT_NUM_NODES", "WORLD_SIZE")
# jax's classes -> what they are called in the first line of a run.
CLUSTERS = {
    "SlurmCluster": "Slurm",
    "OmpiCluster": "Open MPI",
    "GkeTpuCluster": "GKE",
    "GceTpuCluster": "Cloud TPU",
    "K8sCluster": "Kubernetes",
}
WAIT_SECONDS = 300.0  # for all processes to come: a cluster may take minutes to start the last one
LOOKUP_SECONDS = 300  # for the name of process 0's host to become known


class Place(NamedTuple):
    """Process `index` of `count`; `coordinator` is HOST:PORT of process 0; `source` says who told.

    devices: the numbers of this host's GPUs that this process takes; None: all. wait: the seconds in which all have to
    come.
    """

    coordinator: str
    count: int
    index: int
    source: str
    devices: tuple[int, ...] | None = None
    wait: float = WAIT_SECONDS

    @property
    def line(self) -> str:
        return f"{self.count} processes, this is {self.index}, coordinator {self.coordinator}, from {self.source}"


def find(argv: Sequence[str], environ: Mapping[str, str]) -> Place | None:
    """The place of this process; None if it is alone, also if it is told that there is one process.

    Raises ValueError, naming the flag or variable, if a part is missing or wrong.
    """
    found: dict[str, Any] = {}
    sources = []
    for field, (flag, variable) in ASKED.items():
        given = value_of(flag, list(argv))
        name, text = (f"--{flag}", given) if given is not None else (variable, environ.get(variable, ""))
        if text:
            found[field] = text if field == "coordinator" else _number(name, text)
            sources.append("flags" if given is not None else "variables")
    if found.get("count") == 1:
        return None
    devices = None
    if len(found) < len(ASKED):
        cluster, theirs, devices = _of_cluster(environ, found)
        if not found and theirs.get("count", 1) == 1:
            if cluster is None:
                _check_alone(environ)
            return None
        found = {**theirs, **found}
        sources.append(cluster or "")
    if missing := [field for field in ASKED if field not in found]:
        flag, variable = ASKED[missing[0]]
        told = " and ".join(f"--{ASKED[field][0]}" for field in found)
        raise ValueError(
            f"--{flag}: missing, and {variable} is not set; {told} alone does not say which of several processes this "
            "is. Give --coordinator HOST:PORT --processes N --process I, or --processes 1 for a run of its own"
        )
    source, wait = " and ".join(dict.fromkeys(filter(None, sources))), value_of("wait", list(argv))
    place = Place(
        **found, source=source, devices=devices, wait=WAIT_SECONDS if wait is None else _number("--wait", wait)
    )
    _check(place)
    return place


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} = {text!r}: not a whole number") from None


def _check(place: Place) -> None:
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"--coordinator {place.coordinator}: give HOST:PORT, the host of process 0 and a free port there, as in "
            "10.0.0.1:8476"
        )
    if place.count < 1:
        raise ValueError(f"--processes {place.count}: give the number of processes, 1 or more")
    if place.wait < 1:
        raise ValueError(f"--wait {place.wait}: give the seconds in which all processes have to come, 1 or more")
    if not 0 <= place.index < place.count:
        raise ValueError(
            f"--process {place.index}: of {place.count} processes; give a number from 0 to {place.count - 1}"
        )


def _check_alone(environ: Mapping[str, str]) -> None:
    """Raise ValueError if others were started with this process: as many runs in one workdir would spoil it."""
    several = next((name for name in COUNTS if environ.get(name, "1") not in ("", "0", "1")), None)
    if several is None and environ.get("JOB_COMPLETION_INDEX", "0") != "0":  # of an indexed job of Kubernetes
        several = "JOB_COMPLETION_INDEX"
    if several is not None:
        raise ValueError(
            f"--coordinator: missing, and {several} = {environ[several]} says that other processes were started with "
            "this one. Give --coordinator HOST:PORT --processes N --process I, or --processes 1 for runs of their own"
        )


def _of_cluster(environ: Mapping[str, str], found: dict[str, Any]) -> tuple[str | None, dict[str, Any], Any]:
    """(the cluster's name, what it tells of the fields not in `found`, the devices of this process)."""
    mpi = {field: int(environ[name]) for field, name in OPEN_MPI.items() if name in environ}
    if len(mpi) == len(OPEN_MPI) and (mpi["count"] == 1 or "coordinator" in found):
        local = environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
        return "Open MPI", mpi, _own_devices(environ, None if local is None else int(local))
    if mpi and "OMPI_MCA_orte_hnp_uri" not in environ:  # from version 5 on
        raise ValueError(
            f"--coordinator: missing; Open MPI started {mpi.get('count')} processes, but does not tell where the first "
            "one runs. Give --coordinator HOST:PORT, or --processes 1 for runs of their own"
        )
    slurm = all(name in environ for name in SLURM) and environ["SLURM_NTASKS"] != "1"
    kubernetes = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()
    kubernetes = kubernetes and importlib.util.find_spec("kubernetes") is not None
    if slurm or mpi or kubernetes or has_tpus():
        return _asked_by_jax(found)
    return None, {}, None


def _asked_by_jax(found: dict[str, Any]) -> tuple[str | None, dict[str, Any], Any]:
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    from jax._src.clusters import ClusterEnv

    try:
        for cluster in ClusterEnv._cluster_types:
            if cluster.opt_in_only_method or not cluster.is_env_present():
                continue
            theirs: dict[str, Any] = {"count": cluster.get_process_count(), "index": cluster.get_process_id()}
            if "coordinator" not in found and theirs["count"] > 1:
                theirs["coordinator"] = cluster.get_coordinator_address(
                    timeout_secs=LOOKUP_SECONDS, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
                )
            local = None if running_in_cloud_tpu_vm else cluster.get_local_process_id()
            return CLUSTERS.get(cluster.__name__, cluster.__name__), theirs, _own_devices(os.environ, local)
    except Exception as error:  # of a metadata server, a Kubernetes client, a name server
        raise ValueError(
            f"--coordinator: missing, and asking the cluster failed: {type(error).__name__}: {error}. Give "
            "--coordinator HOST:PORT --processes N --process I, or --processes 1 for a run of its own"
        ) from error
    return None, {}, None


def _own_devices(environ: Mapping[str, str], local: int | None) -> tuple[int, ...] | None:
    """Of process number `local` on its host: the GPU of that number; None, all that it sees, if these are its own.

    Slurm's --gpus-per-task shows each task its own GPUs alone, numbered from 0 in each.
    """
    if local is None or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    seen = [one for one in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    own = len(seen) == 1 or local >= len(seen) or environ.get("SLURM_GPUS_PER_TASK") == str(len(seen))
    return None if seen and own else (local,)
