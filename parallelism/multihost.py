"""Which process of which job this is, and the start of ``jax.distributed``: before anything touches a device.

A job is a coordinator (``host:port``, where process 0 listens), a number of processes and the index of each. Each of
the three is taken from the first that says it:

1. flags: what the caller passes;
2. ``JAX_COORDINATOR_ADDRESS``, ``JAX_PROCESS_COUNT``, ``JAX_PROCESS_INDEX``;
3. the scheduler: MPI (Open MPI, or PMI as of MPICH and Intel MPI), a Slurm step, or an indexed Job of Kubernetes.

Where nobody says anything, a TPU host of several asks ``jax.distributed``, which knows them; everything else is one
process. ``JAX_COORDINATOR_PORT`` changes the port where a scheduler gives only the host.
"""

from __future__ import annotations

import dataclasses
import os
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from parallelism.errors import UserError
from parallelism.rollcall import roll_call

PORT = 8476
"""Where process 0 listens if nobody says otherwise and nothing tells jobs of one machine apart."""

CONNECT_SECONDS = 300

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_COUNT", "JAX_PROCESS_INDEX"

Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Processes:
    """A job's processes, and which of them this is.

    coordinator: ``host:port`` of process 0; None where JAX finds it (``by_jax``), and of one process that was given
    none: with one it is connected like several, and on CPU computes the same bits as these.
    count, index: how many there are, and this one. found: who said so, for people.
    devices: the local devices that this process uses; None for all that it sees.
    by_jax: a pod of TPU hosts; ``start`` asks JAX and returns what it found.
    """

    coordinator: str | None = None
    count: int = 1
    index: int = 0
    found: str = "one process"
    devices: tuple[int, ...] | None = None
    by_jax: bool = False

    def __str__(self) -> str:
        at = f", coordinator {self.coordinator}" if self.coordinator else ""
        return f"process {self.index} of {self.count} ({self.found}{at})"


@dataclasses.dataclass
class _Found:
    """What is known so far, each value with where it is from."""

    coordinator: tuple[str, str] | None = None
    count: tuple[int, str] | None = None
    index: tuple[int, str] | None = None
    local: tuple[int, int] | None = None  # index on this host, number on this host

    def fill(self, other: _Found) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None:
                setattr(self, field.name, getattr(other, field.name))


def detect(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    environment: Environment = os.environ,
) -> Processes:
    """The job that flags (the first three) and environment describe; touches no device and no network.

    Raises UserError for half a description and for values that cannot be.
    """
    found = _Found(
        (coordinator, "--coordinator") if coordinator is not None else None,
        (count, "--processes") if count is not None else None,
        (index, "--process") if index is not None else None,
    )
    for source in (_variables, *SCHEDULERS):
        # A count that is said to be 1 ends the search: the scheduler's index is of a job that is not this one's.
        if found.count is not None and found.count[0] == 1:
            break
        found.fill(source(environment))
    if found.coordinator is None and found.count is None and found.index == _kubernetes(environment).index:
        found.index = None  # any indexed Job has one, of pods that need not belong together
    if found == _Found() and _tpu_pod(environment):
        return Processes(found="TPU pod", by_jax=True)
    return _checked(found, environment)


def _checked(found: _Found, environment: Environment) -> Processes:
    """``found`` as a job, if it is a whole one."""
    if found.count is not None and found.count[0] < 1:
        raise UserError(f"processes: found {found.count[0]} ({found.count[1]}), expected at least 1")
    alone = found.count is not None and found.count[0] == 1
    parts = {"coordinator": found.coordinator, "processes": found.count, "process": found.index}
    given = {name: value for name, value in parts.items() if value is not None}
    missing = [name for name in parts if name not in given]
    if missing and given and not alone:
        flags = {"coordinator": ADDRESS, "processes": COUNT, "process": INDEX}
        have = ", ".join(f"{name}={value} ({source})" for name, (value, source) in given.items())
        want = ", ".join(f"--{name} or {flags[name]}" for name in missing)
        raise UserError(f"processes: found {have} without {' and '.join(missing)}: give {want} too, or none of them")
    count, index = found.count or (1, ""), found.index or (0, "")
    if not 0 <= index[0] < count[0]:
        raise UserError(
            f"processes: found index {index[0]} ({index[1]}) of {count[0]} ({count[1]}), expected 0 to {count[0] - 1}"
        )
    if found.coordinator is None or (alone and found.coordinator[1] not in ("--coordinator", ADDRESS)):
        return Processes(found=count[1] or Processes.found)
    address, source = found.coordinator
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"processes: coordinator {address!r} ({source}), expected HOST:PORT")
    sources = dict.fromkeys(source for _, source in given.values())
    return Processes(address, count[0], index[0], ", ".join(sources), _own_device(found.local, environment))


def _own_device(local: tuple[int, int] | None, environment: Environment) -> tuple[int, ...] | None:
    """Of several processes on one host each takes one GPU, unless the scheduler shows it only that one already."""
    if local is None or local[1] == 1:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES"))
    return None if visible is not None and "," not in visible else (local[0],)


# --------------------------------------------------------------------------------------------------------- sources


def _number(environment: Environment, name: str) -> int:
    text = environment[name]
    if not re.fullmatch(r"\d{1,9}", text):
        raise UserError(f"processes: {name}={text!r} in the environment, expected a whole number")
    return int(text)


def _pair(environment: Environment, name: str) -> tuple[int, str] | None:
    return (_number(environment, name), name) if environment.get(name) else None


def _address(host: str, environment: Environment, port: int = PORT) -> str:
    return f"{host}:{environment.get('JAX_COORDINATOR_PORT', port)}"


def _port_of(job: str) -> int:
    """A port that jobs of one machine do not share, in the range that systems leave to such uses."""
    return 61440 + zlib.crc32(job.encode()) % 4096


def _variables(environment: Environment) -> _Found:
    address = environment.get(ADDRESS)
    return _Found((address, ADDRESS) if address else None, _pair(environment, COUNT), _pair(environment, INDEX))


def _open_mpi(environment: Environment) -> _Found:
    rank, size = _pair(environment, "OMPI_COMM_WORLD_RANK"), _pair(environment, "OMPI_COMM_WORLD_SIZE")
    if rank is None or size is None:
        return _Found()
    local = (_number(environment, f"OMPI_COMM_WORLD_LOCAL_{name}") for name in ("RANK", "SIZE"))
    here, on_host = local
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    # mpirun's own host: where it puts the first rank, unless it was told otherwise.
    mpirun = re.search(r"tcp6?://\[?([^\],]+?)[\],]|tcp://([^,:]+):", uri)
    job = environment.get("PMIX_NAMESPACE") or uri.partition(".")[0]
    host = "127.0.0.1" if on_host == size[0] else mpirun and (mpirun[1] or mpirun[2])
    address = _address(host, environment, _port_of(job) if job else PORT) if host else None
    return _Found((address, "Open MPI") if address else None, size, rank, (here, on_host))


def _pmi(environment: Environment) -> _Found:
    """MPICH, Intel MPI and Cray MPI say who there is, but not where."""
    rank, size = _pair(environment, "PMI_RANK"), _pair(environment, "PMI_SIZE")
    if rank is None or size is None:
        return _Found()
    local = None
    if "MPI_LOCALRANKID" in environment and "MPI_LOCALNRANKS" in environment:
        local = (_number(environment, "MPI_LOCALRANKID"), _number(environment, "MPI_LOCALNRANKS"))
    alone = local is not None and local[1] == size[0]
    return _Found((_address("127.0.0.1", environment), "PMI") if alone else None, size, rank, local)


def _slurm(environment: Environment) -> _Found:
    """A step, as ``srun`` starts it: the batch script and an interactive shell have a job but no step of their own."""
    if not all(environment.get(f"SLURM_{x}") for x in ("JOB_ID", "PROCID", "STEP_NODELIST", "STEP_NUM_TASKS")):
        return _Found()
    job = f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_STEP_ID', '0')}"
    # The first host of 'node001', 'node001,host2', 'node[001-015],host2' or 'rack[1,3]-node[2-4]'.
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    host = re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first[0] if first else "")
    if not host:
        raise UserError(f"processes: SLURM_STEP_NODELIST={nodes!r} in the environment, expected names of hosts")
    local = None
    if "SLURM_LOCALID" in environment and "SLURM_STEP_TASKS_PER_NODE" in environment:
        # '2', '4(x3)', '4(x3),2': the most is enough to know whether hosts are shared.
        counts = re.findall(r"(\d+)(?:\(x\d+\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
        local = (_number(environment, "SLURM_LOCALID"), max(map(int, counts), default=1))
    address = _address(host, environment, _port_of(job))
    count = _number(environment, "SLURM_STEP_NUM_TASKS")
    return _Found((address, "Slurm"), (count, "Slurm"), (_number(environment, "SLURM_PROCID"), "Slurm"), local)


def _kubernetes(environment: Environment) -> _Found:
    """A pod of an indexed Job knows its index; the manifest says the rest (``scripts/launch/jobset.yaml``)."""
    if "KUBERNETES_SERVICE_HOST" not in environment or not environment.get("JOB_COMPLETION_INDEX"):
        return _Found()
    return _Found(index=(_number(environment, "JOB_COMPLETION_INDEX"), "Kubernetes"))


SCHEDULERS: tuple[Callable[[Environment], _Found], ...] = (_open_mpi, _pmi, _slurm, _kubernetes)
"""mpirun inside a Slurm job has the job's variables too, so it comes first."""


def _tpu_pod(environment: Environment) -> bool:
    """Whether this is a TPU host with others beside it, as far as the environment or the machine says so."""
    if "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu"):
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    from jax._src import cloud_tpu_init  # jax has no public name for it

    # On Google's virtual machines only the metadata server knows, and only JAX asks it.
    return cloud_tpu_init.running_in_cloud_tpu_vm and not hosts and "TPU_SKIP_MDS_QUERY" not in environment


# ----------------------------------------------------------------------------------------------------------- start


def start(processes: Processes, heartbeat_seconds: float = 100.0) -> Processes:
    """Connects the processes of a job; returns who they are. Without a coordinator there is nothing to connect.

    Call it before anything asks JAX for its devices. Blocks until all are there, at most five minutes.
    heartbeat_seconds: how long a process may be silent before JAX itself aborts the others without saying who it was;
    longer than the limit of ``liveness``, which does say.
    Raises UserError as ``rollcall`` does: the coordinator's port is taken, others do not come, or are of another job.
    """
    if processes.coordinator is None and not processes.by_jax:
        return processes
    # It would catch SIGTERM for itself from here on; ``liveness`` has its own agreement on when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {}
    if not processes.by_jax:
        assert processes.coordinator is not None
        roll_call(processes.coordinator, processes.count, processes.index, CONNECT_SECONDS)
        options = {
            "coordinator_address": processes.coordinator,
            "num_processes": processes.count,
            "process_id": processes.index,
            "local_device_ids": processes.devices,
            "cluster_detection_method": "deactivate",
        }
    jax.distributed.initialize(
        **options, initialization_timeout=CONNECT_SECONDS, heartbeat_timeout_seconds=int(heartbeat_seconds)
    )
    if processes.by_jax:
        return dataclasses.replace(
            processes,
            coordinator=coordinator_address(),
            count=jax.process_count(),
            index=jax.process_index(),
            by_jax=False,
        )
    return processes


def job() -> tuple[int, int]:
    """Index of this process and number of processes, as ``start`` connected them; asks no device."""
    from jax._src import distributed  # jax.process_index makes the devices

    return distributed.global_state.process_id, distributed.global_state.num_processes


def coordinator_address() -> str | None:
    """``host:port`` where ``start`` found process 0; None in a job of one process."""
    from jax._src import distributed  # jax has no public name for it

    return distributed.global_state.coordinator_address


def store() -> Any:
    """The client of the job's key-value store, which ``start`` connected."""
    from jax._src import distributed  # jax has no public name for it

    if distributed.global_state.client is None:
        raise ValueError("jax.distributed is not initialised in a job of several processes")
    return distributed.global_state.client
