"""Who is to blame for a death, on errors that Ray really raises."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import ray
from ray.exceptions import NodeDiedError, ObjectLostError

from fourdh_batch.cluster.run import Blame, blame
from fourdh_batch.errors import (
    CheckpointError,
    DecodeStalledError,
    SchemaError,
    StorageError,
    WorkerDiedError,
)


@ray.remote(max_restarts=0, max_task_retries=0)
class Victim:
    def die(self) -> None:
        os._exit(1)

    def raises(self, error: Exception) -> None:
        raise error

    def calls(self, other: Any) -> None:
        ray.get(other.die.remote())


def error_of(ref: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        ray.get(ref)
    return caught.value


def test_a_process_that_dies_makes_suspects_of_what_it_had_begun(local_ray: None) -> None:
    error = error_of(Victim.remote().die.remote())
    assert blame(error, had_begun=True) is Blame.SUSPECT
    assert blame(error, had_begun=False) is Blame.NOBODY


@pytest.mark.parametrize("raised", [NodeDiedError("x"), ObjectLostError("0", None, "x")])
def test_what_is_lost_with_a_node_under_a_model_process_is_nobodys_fault(
    local_ray: None, raised: Exception
) -> None:
    error = error_of(Victim.remote().raises.remote(raised))
    assert blame(error, had_begun=True) is Blame.NOBODY


def test_a_tracker_that_dies_under_a_model_process_is_seen_through_its_caller(
    local_ray: None,
) -> None:
    error = error_of(Victim.remote().calls.remote(Victim.remote()))
    assert blame(error, had_begun=True) is Blame.SUSPECT


@pytest.mark.parametrize(
    ("raised", "verdict"),
    [
        (CheckpointError("x"), Blame.STOP),
        (SchemaError("x"), Blame.CODE),
        (StorageError("x"), Blame.STORAGE),
        (WorkerDiedError("x", video="v", frame_index=3, stage="decode"), Blame.SUSPECT),
        (DecodeStalledError("x", video="v"), Blame.SUSPECT),
        (KeyError("x"), Blame.CODE),
        (MemoryError("x"), Blame.CODE),
    ],
)
def test_errors_raised_in_a_worker_keep_their_kind(
    local_ray: None, raised: Exception, verdict: Blame
) -> None:
    error = error_of(Victim.remote().raises.remote(raised))
    assert blame(error, had_begun=True) is verdict
    cause = getattr(error, "cause", error)
    assert str(cause) == str(raised)


LOSE_A_NODE = """
import ray, logging
from ray.cluster_utils import Cluster
from fourdh_batch.cluster.run import blame

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
node = cluster.add_node(num_cpus=1, resources={"there": 1})
ray.init(address=cluster.address, log_to_driver=False)

@ray.remote(resources={"there": 1}, max_restarts=0, max_task_retries=0)
class Sleeper:
    def sleep(self, seconds):
        import time
        time.sleep(seconds)

sleeper = Sleeper.remote()
ray.get(sleeper.sleep.remote(0))
running = sleeper.sleep.remote(600)
cluster.remove_node(node, allow_graceful=False)
try:
    ray.get(running, timeout=60)
except Exception as error:
    print("verdict", blame(error, had_begun=True).value)
"""


@pytest.mark.slow
def test_a_lost_node_is_nobodys_fault() -> None:
    run = [sys.executable, "-W", "ignore", "-c", LOSE_A_NODE]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=180)
    assert "verdict nobody" in done.stdout.splitlines(), done.stdout[:500] + done.stderr[-2000:]
