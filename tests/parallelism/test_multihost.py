"""Which process of which job: read off flags and the variables that launchers set."""

import socket

import pytest

from parallelism.errors import UserError
from parallelism.multihost import Processes, detect, start

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "rack3-node[007-009,12],login1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "host:99", "JAX_PROCESS_COUNT": "3", "JAX_PROCESS_INDEX": "1"}


def test_nothing_said_is_one_process():
    assert detect(environment={}) == Processes(None, 1, 0, "one process")


def test_a_slurm_step():
    found = detect(environment=SLURM)
    host, _, port = found.coordinator.partition(":")
    assert (host, found.count, found.index, found.found) == ("rack3-node007", 8, 5, "Slurm")
    assert found.devices == (1,)  # two processes on a host: one GPU each
    assert 61440 <= int(port) < 65536
    assert detect(environment={**SLURM, "SLURM_STEP_ID": "1"}).coordinator != found.coordinator


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[01-4]", "n01"), ("n[3,5]b,m", "n3b"), ("a[1]-b[2-4]", "a1-b2")],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert detect(environment={**SLURM, "SLURM_STEP_NODELIST": nodes}).coordinator.startswith(first + ":")


def test_a_batch_script_of_slurm_without_a_step_is_one_process():
    script = {k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_NTASKS": "8"}
    assert detect(environment=script).count == 1


def test_a_gpu_that_slurm_has_picked_is_not_picked_again():
    assert detect(environment={**SLURM, "CUDA_VISIBLE_DEVICES": "3"}).devices is None
    assert detect(environment={**SLURM, "CUDA_VISIBLE_DEVICES": "0,1"}).devices == (1,)
    assert detect(environment={**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}).devices is None


def test_open_mpi_also_inside_a_slurm_job():
    found = detect(environment={**SLURM, **OPEN_MPI})
    assert found.coordinator.startswith("10.96.0.1:")
    assert (found.count, found.index, found.found, found.devices) == (4, 1, "Open MPI, OMPI_COMM_WORLD_SIZE, "
        "OMPI_COMM_WORLD_RANK", (1,))  # fmt: skip
    one_host = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "JAX_COORDINATOR_PORT": "1234"}
    assert detect(environment=one_host).coordinator == "127.0.0.1:1234"


def test_pmi_knows_where_process_0_is_on_one_host_only():
    assert detect(environment=PMI).coordinator == "127.0.0.1:8476"
    many = {**PMI, "MPI_LOCALNRANKS": "1"}
    with pytest.raises(UserError, match=r"without coordinator: give --coordinator or JAX_COORDINATOR_ADDRESS too"):
        detect(environment=many)
    assert detect("a:1", environment=many).coordinator == "a:1"


def test_a_pod_of_an_indexed_job_whose_manifest_says_the_rest():
    found = detect(environment={**POD, "JAX_COORDINATOR_ADDRESS": "job-0.svc:8476", "JAX_PROCESS_COUNT": "4"})
    assert (found.coordinator, found.count, found.index) == ("job-0.svc:8476", 4, 2)


def test_pods_that_do_not_belong_together_are_processes_of_their_own():
    assert detect(environment=POD).count == 1


@pytest.mark.parametrize("hosts", [{"TPU_WORKER_HOSTNAMES": "a,b"}, {"MEGASCALE_COORDINATOR_ADDRESS": "a"}])
def test_a_tpu_pod_is_left_to_jax(hosts):
    assert detect(environment=hosts).by_jax
    assert detect(environment={**POD, **hosts}).by_jax
    assert not detect(environment={**hosts, "JAX_PLATFORMS": "cpu"}).by_jax
    assert detect("a:1", 2, 0, environment=hosts) == Processes("a:1", 2, 0, "--coordinator, --processes, --process")


def test_flags_override_variables_and_these_the_scheduler():
    found = detect(environment={**SLURM, **VARIABLES})
    assert (found.coordinator, found.count, found.index) == ("host:99", 3, 1)
    found = detect(index=2, environment={**SLURM, **VARIABLES})
    assert (found.coordinator, found.count, found.index) == ("host:99", 3, 2)
    alone = detect(count=1, environment={**SLURM, **VARIABLES})
    assert (alone.coordinator, alone.count, alone.index) == (None, 1, 0)


def test_one_process_connects_to_a_coordinator_that_it_was_given():
    assert detect("a:1", 1, 0, {}).coordinator == "a:1"
    assert detect(environment={**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).coordinator is None


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (
            {"coordinator": "a:1"},
            {},
            r"found coordinator=a:1 \(--coordinator\) without processes and process: give --pro",
        ),
        ({"count": 2}, {}, "without coordinator and process"),
        ({"index": 0}, {}, "without coordinator and processes"),
        ({"index": 3}, VARIABLES, r"found index 3 \(--process\) of 3 \(JAX_PROCESS_COUNT\), expected 0 to 2"),
        ({"count": 1, "index": 1}, {}, "found index 1"),
        ({"count": 0, "index": 0}, {}, r"processes: found 0 \(--processes\), expected at least 1"),
        ({"coordinator": "a"}, VARIABLES, r"coordinator 'a' \(--coordinator\), expected HOST:PORT"),
        ({}, {**VARIABLES, "JAX_PROCESS_COUNT": "two"}, "JAX_PROCESS_COUNT='two' in the environment, expected a whole"),
        ({}, {**SLURM, "SLURM_STEP_NODELIST": ",n1"}, "SLURM_STEP_NODELIST=',n1' in the environment, expected names"),
    ],
)
def test_half_a_description_and_impossible_ones_are_one_line(flags, environment, message):
    with pytest.raises(UserError, match=message) as error:
        detect(**flags, environment=environment)
    assert "\n" not in str(error.value)


def test_a_port_that_is_taken_is_told_before_anybody_waits():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of this machine.*cannot be used"):
            start(Processes(f"127.0.0.1:{port}", 2, 0, "test"))
