"""Real jobs that meet real faults, and what must be true of their tables afterwards.

    with Bench(tmp_path) as bench:
        bench.rules = [{"at": "models", "do": "kill", "video": "a.mp4", "times": 1}]
        run = bench.run(words)
    assert run.exit_code == 0
    assert_same_tables(tables_of(out), undisturbed)

A bench is a process of its own with a Ray of its own, for some jobs one behind the other; what its
rules can do is described in `tests/fault/inject/sitecustomize.py`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

import fourdh_batch as fb
from fourdh_batch.cluster.run import run_job
from fourdh_batch.config import JobConfig, load_config
from fourdh_batch.pipeline.engine import build_engine, model_card
from fourdh_batch.pipeline.plan import plan_shards, read_corpus
from fourdh_batch.pipeline.shard import process_shard
from fourdh_batch.storage import Store
from fourdh_batch.tables.schema import TABLES

REPO = Path(__file__).resolve().parents[1]
INJECT = REPO / "tests" / "fault" / "inject"
JOB = REPO / "jobs" / "ava_pseudogt.py"
OBJECT_STORE_BYTES = 256 << 20
Tables = dict[str, pd.DataFrame]


# --- tables ------------------------------------------------------------------------------------


def tables_of(root: Path | str) -> Tables:
    """All tables in the order of their content, as committed; checks what must hold of any output.

    Nothing but what is committed lies there, no row twice, and nothing is left of the work.
    """
    tables = {}
    for name in TABLES:
        frame = fb.read_table(str(root), name)
        keys = [k for k in ("video_id", "frame_index", "track_id") if k in frame]
        tables[name] = frame.sort_values(keys, kind="stable").reset_index(drop=True)
        if "://" not in str(root):
            assert len(pd.read_parquet(Path(root) / name)) == len(frame), name
    assert not tables["tracks"].duplicated(["video_id", "frame_index", "track_id"]).any()
    assert not tables["videos"].duplicated(["video_id"]).any()
    if "://" not in str(root):
        assert not [p for p in (Path(root) / "_work").rglob("*") if p.is_file()]
        assert not [p for p in Path(root).rglob("*.tmp") if not p.name.startswith(".")]
    return tables


def undisturbed_tables(words: Sequence[str]) -> Tables:
    """What a job gives that nothing disturbs: here, in this process, without Ray."""
    config = load_config(None, words)
    card, engine, store = model_card(config), build_engine(config), Store(config.output)
    for shard in plan_shards(
        store,
        config.dataset,
        read_corpus(config.input),
        videos_per_shard=config.plan.videos_per_shard,
        mb_per_shard=config.plan.mb_per_shard,
    ):
        process_shard(shard, engine, store, config, card)
    return tables_of(config.output)


def without(tables: Tables, video_id: str) -> Tables:
    """The rows of all other videos, whole numbers as such also where a null stood among them."""
    return {
        name: frame[frame["video_id"] != video_id].reset_index(drop=True).convert_dtypes()
        for name, frame in tables.items()
    }


def assert_same_tables(found: Tables, expected: Tables) -> None:
    """Equal to the last bit, `shard_id` included."""
    for name in TABLES:
        pd.testing.assert_frame_equal(found[name], expected[name], check_exact=True, obj=name)


def redo_limit(config: JobConfig, *, deaths: int = 1) -> int:
    """Frames that may go through the models again for so many deaths of a process.

    What a process held at its death: per unit at most what was not saved yet, and the chunks that
    were under way: decoded ahead, in the models, and on their way to the tracker.
    """
    cluster = config.cluster
    in_flight = (cluster.chunks_ahead + 2) * config.video.chunk_frames
    return deaths * cluster.units_per_actor * (cluster.checkpoint_frames + in_flight)


# --- a process that runs jobs ------------------------------------------------------------------


@dataclass
class Run:
    """How a job ended: the `RunReport`, or the error that it raised."""

    exit_code: int | None = None
    frames: int = 0
    frames_run: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    failed_shards: dict[str, str] = field(default_factory=dict)
    error: str = ""
    message: str = ""
    log: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def story(self) -> str:
        """All of it, for the message of an assertion."""
        return "\n".join(
            [f"{self.exit_code} {self.statuses} {self.error}", self.message, *self.log]
        )

    def said(self, text: str) -> bool:
        """Whether a line of the log holds this."""
        return any(text in line for line in self.log)


@dataclass(frozen=True)
class Pass:
    """Frames `first` to `last` of a video that have gone through the models of a process."""

    video: str
    first: int
    last: int
    pid: int
    node_id: str

    @property
    def num_frames(self) -> int:
        return self.last + 1 - self.first


class Driver:
    """The job's script as a process.

    Attributes:
        pid, exit_code: of the process; None while it runs.
    """

    def __init__(self, words: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self._told, self._said = log.with_suffix(".json"), log.with_suffix(".log")
        with self._told.open("wb") as told, self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, str(JOB), *words, "--json"],
                env=dict(env),
                cwd=REPO,
                stdout=told,
                stderr=said,
            )
        self.pid = self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    @property
    def said(self) -> str:
        """What stands in its log."""
        return self._said.read_text(errors="replace")

    @property
    def summary(self) -> dict[str, Any]:
        """What it printed at its end; empty where it did not come to that."""
        return json.loads(self._told.read_text() or "{}")

    def wait(self, timeout_s: float = 800.0) -> int:
        """Its exit code, at its end."""
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL for the driver alone, as the kernel would; its Ray has to notice by itself."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()


class Faults:
    """A file of rules, what has come of them, and the environment that makes them work.

    Args:
        folder: the file is put there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "rules.json"
        self._drivers: list[Driver] = []
        self.rules = []

    @property
    def rules(self) -> list[dict[str, Any]]:
        return self._rules

    @rules.setter
    def rules(self, rules: Sequence[Mapping[str, Any]]) -> None:
        """New rules; what the former ones did, and all passes, are forgotten."""
        self.renew(rules)
        Path(f"{self._file}.frames").unlink(missing_ok=True)

    def renew(self, rules: Sequence[Mapping[str, Any]]) -> None:
        """New rules; what the former ones did is forgotten."""
        for old in self._file.parent.glob(f"{self._file.name}.[0-9]*"):
            old.unlink()
        self._rules = [dict(rule) for rule in rules]
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(self._rules))
        part.rename(self._file)

    def environment(self) -> dict[str, str]:
        """Of the processes that shall know the rules."""
        path = [str(INJECT), str(REPO), os.environ.get("PYTHONPATH", "")]
        env = {
            **os.environ,
            "PYTHONPATH": ":".join(filter(None, path)),
            "FOURDH_TEST_FAULTS": str(self._file),
            "PYTHONWARNINGS": "ignore",
            # A machine that is busy with other tests starves niced processes.
            "RAY_worker_niceness": "0",
            "RAY_raylet_start_wait_time_s": "120",
        }
        env.pop("RAY_ADDRESS", None)
        return env

    def start(self, words: Iterable[str], *, env: Mapping[str, str] | None = None) -> Driver:
        """The job's script as a process that knows the rules, and may be killed."""
        log = self._file.parent / f"driver{len(self._drivers)}"
        driver = Driver([*words], {**self.environment(), **(env or {})}, log)
        self._drivers.append(driver)
        return driver

    def stop(self) -> None:
        """Let no driver live longer than the test that started it."""
        for driver in self._drivers:
            driver.kill()

    def times_met(self, number: int) -> int:
        """How often a rule was acted on."""
        return sum(
            path.name.rpartition(".")[2].isdigit()
            for path in self._file.parent.glob(f"{self._file.name}.{number}.*")
        )

    def note(self, number: int) -> str | None:
        """The node of the process that has left a note by this rule; None where none has."""
        path = Path(f"{self._file}.{number}.note")
        return path.read_text() if path.exists() else None

    def wait_for(self, number: int, driver: Driver, *, timeout_s: float = 800.0) -> str:
        """The same, once it is there."""
        deadline = time.monotonic() + timeout_s
        while (node := self.note(number)) is None:
            assert driver.exit_code is None, driver.said
            assert time.monotonic() < deadline, "the fault was not met"
            time.sleep(0.02)
        return node

    def passes(self) -> list[Pass]:
        """Every chunk that has gone through the models, also in processes that were killed."""
        path = Path(f"{self._file}.frames")
        if not path.exists():
            return []
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        return [Pass(v, int(a), int(b), int(pid), node) for v, a, b, pid, node in rows]

    def num_frames(self) -> int:
        """Frames that have gone through the models."""
        return sum(chunk.num_frames for chunk in self.passes())

    def num_redone(self) -> int:
        """Frames that have gone through the models more than once, counted each time."""
        return num_redone(self.passes())


def num_redone(passes: Iterable[Pass]) -> int:
    """Frames that have gone through the models more than once, counted each time."""
    seen: Counter[tuple[str, int]] = Counter()
    for chunk in passes:
        seen.update((chunk.video, frame) for frame in range(chunk.first, chunk.last + 1))
    return sum(seen.values()) - len(seen)


class Bench(Faults):
    """A process that runs jobs in a Ray of its own.

    Args:
        folder: for rules and logs.
        nodes: cores of each node of a cluster beside a head without cores; none: one local node.
        env: further environment of all processes.
    """

    def __init__(
        self, folder: Path, *, nodes: Sequence[int] = (), env: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(folder)
        self._log = folder / "bench.log"
        self._nodes = nodes
        self._env = dict(env or {})

    def __enter__(self) -> Bench:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fault_tools", json.dumps(list(self._nodes))],
                cwd=REPO,
                env={**self.environment(), **self._env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def run(self, words: Sequence[str], *, timeout_s: float = 800.0) -> Run:
        """One job; returns how it ended.

        A process that `ask`s loses its node, one that `tell`s gets another one beside it.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        watchdog = threading.Timer(timeout_s, self.process.kill)
        watchdog.start()
        try:
            json.dump({"words": list(words), "rules": self._rules}, self.process.stdin)
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        tail = self._log.read_text(errors="replace")[-3000:]
        assert answer, f"no answer within {timeout_s:g} s:\n{tail}"
        return Run(**json.loads(answer))


# --- the other side ----------------------------------------------------------------------------


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _run_one(words: list[str]) -> Run:
    log = _Lines()
    package = logging.getLogger("fourdh_batch")
    package.setLevel(logging.INFO)
    package.addHandler(log)
    run = Run(log=log.lines)
    started = time.monotonic()
    try:
        report = run_job(load_config(None, words))
        run.exit_code = report.exit_code
        run.frames = sum(shard.num_frames for shard in report.shards)
        run.frames_run = report.frames_run
        run.failed_shards = report.failed_shards
        statuses: Counter[str] = Counter()
        for shard in report.shards:
            statuses.update(shard.statuses)
        run.statuses = dict(statuses)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        run.error, run.message = type(error).__name__, str(error)
    package.removeHandler(log)
    run.seconds = time.monotonic() - started
    return run


def _serve(nodes: list[int]) -> None:
    import ray

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    cluster: Any = None
    if nodes:
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES},
        )
        for num_cpus in nodes:
            cluster.add_node(num_cpus=num_cpus, object_store_memory=OBJECT_STORE_BYTES)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
    else:
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    for line in sys.stdin:
        task = json.loads(line)
        with ThreadPoolExecutor(1) as pool:  # a node can be started by the main thread only
            running = pool.submit(_run_one, task["words"])
            _watch(cluster, task["rules"], running)
        answers.write(json.dumps(asdict(running.result())) + "\n")
        answers.flush()
    ray.shutdown()
    if cluster is not None:
        cluster.shutdown()


def _watch(cluster: Any, rules: list[dict[str, Any]], running: Future[Run]) -> None:
    """Take nodes away, or add some, as the notes say."""
    file = os.environ["FOURDH_TEST_FAULTS"]
    done: set[int] = set()
    while not wait([running], timeout=0.02).done:
        for number, rule in enumerate(rules):
            note = Path(f"{file}.{number}.note")
            if number in done or cluster is None or not note.exists():
                continue
            done.add(number)
            if rule["do"] == "ask":
                node_id = note.read_text()
                [node] = [n for n in cluster.list_all_nodes() if n.node_id == node_id]
                cluster.remove_node(node, allow_graceful=False)
            else:
                cluster.add_node(num_cpus=rule["cpus"], object_store_memory=OBJECT_STORE_BYTES)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
