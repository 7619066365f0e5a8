"""Four processes, each with a host's memory of its own: one host is lost, then half of them."""

import shutil
from collections import Counter

import pytest
from test_train_layouts import Job, local, losses
from tiny_runs import write_recipe

from jaxsys.train.metrics import read

MESH = "fsdp=4"  # nothing that a host holds is held by another, but for what it keeps for a peer
HOSTS = "abcd"
DIES = """
import os, threading
from jaxsys.train.trainer import Trainer
launch = Trainer._launch
def dies(self, batches, step):
    self.manager.wait()  # so that it is known what is saved
    if step == {step} and "{hosts}".find(os.environ["JAXSYS_HOST"]) >= 0:
        if os.environ["JAXSYS_HOST"] == "a":
            threading.Event().wait(1)  # the others may still be asking it whether the save is done
        os.kill(os.getpid(), 9)
    return launch(self, batches, step)
Trainer._launch = dies
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, material):
    """A run on one host, to which nothing happened, and one that lost hosts; what that one said at each start."""
    root = tmp_path_factory.mktemp("hosts")
    recipe = write_recipe(root / "recipe.py", material)

    def job(run, hosts, before="", codes=()):
        settings = [f"run={root / run}", f"mesh={MESH}", "steps=9", "eval_batches=0", "checkpoint.every=1000"]
        if len(hosts) > 1:
            settings += [
                f"checkpoint.ram={root / 'memory'}", "checkpoint.ram_every=1", "checkpoint.peers=1", "liveness.dead=4",
            ]  # fmt: skip
        local_variables = local.variables
        try:
            local.variables = lambda index, *more: local_variables(index, *more) | {"JAXSYS_HOST": hosts[index]}
            started = Job(recipe, len(hosts), 4 // len(hosts), *settings, before=before)
        finally:
            local.variables = local_variables
        return started.finish(*codes)[0]

    job("whole", "a")
    said = [job("lost", HOSTS, DIES.format(step=4, hosts="c"), (3, 3, -9, 3))]
    (memory,) = [p for p in (root / "memory").iterdir() if (p / "own" / "a" / "step-00000004").exists()]
    for level in ("own", "peers"):
        shutil.rmtree(memory / level / "c")
    said.append(job("lost", HOSTS, DIES.format(step=6, hosts=HOSTS), (-9,) * 4))
    for level in ("own", "peers"):
        for host in "cd":
            shutil.rmtree(memory / level / host)
    said.append(job("lost", "ab"))
    return root / "whole", root / "lost", said


def test_a_lost_host_is_restored_from_its_peer_and_losses_go_on_bitwise(runs):
    whole, lost, said = runs
    assert "step 4 from ram" in said[1]
    assert "/peers/step-00000004" in said[1] and "/own/step-00000004" in said[1]
    expected, found = losses(whole), losses(lost)
    assert list(found) == list(expected) == list(range(1, 10))
    assert [found[step] for step in range(1, 7)] == [expected[step] for step in range(1, 7)]


def test_half_of_the_hosts_go_on_with_what_they_kept_for_the_others(runs):
    whole, lost, said = runs
    assert "step 6 from ram" in said[2] and "/peers/step-00000006" in said[2]
    expected, found = losses(whole), losses(lost)
    assert all(abs(found[step] - expected[step]) <= 1e-4 * expected[step] for step in range(7, 10))


def test_nobody_leaves_before_the_last_deletions_are_done(runs):
    assert "host b cannot be reached" not in runs[2][2]


def test_it_is_recorded_where_what_was_restored_came_from(runs):
    rows = [row for row in read(runs[1]) if "restore_sources" in row]
    assert [row["step"] for row in rows] == [4, 6]
    places = Counter(where.split(":")[0] for row in rows for where in row["restore_sources"])
    assert places["hosts"] and places["peers"]
