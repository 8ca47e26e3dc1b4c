"""Faults inside the processes of a real job, as a file of rules says.

Python imports a module of this name at its start. With this folder on `PYTHONPATH` and the path of
a JSON file in `FOURDH_TEST_FAULTS`, some functions of the package are wrapped once their module is
imported; the package itself knows nothing of this. A rule is an object with

    at      where: `decode` a chunk has been decoded; `models` a chunk goes into the models;
            `track` a chunk goes into the tracker; `publish` a shard's objects are to be made;
            `commit` they are there, the commit record is not; `committed` it is, too
    do      what: `kill` (SIGKILL), `exit`, `segv`, `hang`, `raise`, `ask` (leave a note for
            whoever made the rules, and wait), `tell` (leave the note and go on), `slow`
            (take half a second more)
    video   of this video only; left out: of any
    frame   in the chunk with this frame only; left out: in any
    times   so often at most; left out: always

Every chunk that has gone through the models becomes a line in `<rules>.frames`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

RULES = os.environ.get("FOURDH_TEST_FAULTS", "")
ASK_TIMEOUT_S = 900.0


def meet(at: str, video: str = "", first: int = 0, last: int = 0) -> None:
    """Do what the rules say of this place."""
    try:
        rules = json.loads(Path(RULES).read_text())
    except FileNotFoundError:
        return
    for number, rule in enumerate(rules):
        fits = rule["at"] == at and rule.get("video", video) == video
        if fits and first <= rule.get("frame", first) <= last and _claim(number, rule.get("times")):
            _act(rule["do"], f"{RULES}.{number}.note")


def _claim(number: int, times: int | None) -> bool:
    """Whether a rule has not been used up, by whatever process."""
    taken = 0
    while times is None or taken < times:
        try:
            Path(f"{RULES}.{number}.{taken}").touch(exist_ok=False)
        except FileExistsError:
            taken += 1
        else:
            return True
    return False


def _act(what: str, note: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "exit":
        os._exit(1)
    elif what == "segv":
        ctypes.string_at(0)
    elif what == "hang":
        time.sleep(3600)
    elif what == "slow":
        time.sleep(0.5)
    elif what == "raise":
        raise RuntimeError("an error as the test told")
    elif what in ("ask", "tell"):
        Path(f"{note}.part").write_text(_node_id())
        Path(f"{note}.part").rename(note)
        if what == "ask":
            time.sleep(ASK_TIMEOUT_S)
            os._exit(9)
    else:
        raise ValueError(f"unknown fault {what!r}")


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _count(chunk: Any) -> None:
    span = f"{chunk.frame_index[0]}\t{chunk.frame_index[-1]}"
    line = f"{chunk.video_id}\t{span}\t{os.getpid()}\t{_node_id()}\n"
    file = os.open(f"{RULES}.frames", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, line.encode())
    os.close(file)


def _wrap_decoding(module: Any) -> None:
    original = module.read_chunks

    def read_chunks(*args: Any, **options: Any) -> Any:
        for item in original(*args, **options):
            if hasattr(item, "rgb"):
                meet("decode", item.video_id, int(item.frame_index[0]), int(item.frame_index[-1]))
            yield item

    module.read_chunks = read_chunks


def _wrap_engine(module: Any) -> None:
    original = module.Engine.run

    def run(self: Any, chunks: Any) -> Any:
        for chunk in chunks:
            meet("models", chunk.video_id, int(chunk.frame_index[0]), int(chunk.frame_index[-1]))
        results = original(self, chunks)
        for chunk in chunks:
            _count(chunk)
        return results

    module.Engine.run = run


def _wrap_shard(module: Any) -> None:
    add, publish = module.UnitTracking.add, module.publish

    def add_chunk(self: Any, result: Any) -> None:
        meet("track", result.video_id, int(result.frame_index[0]), int(result.frame_index[-1]))
        add(self, result)

    def publish_shard(*args: Any, **options: Any) -> Any:
        meet("publish")
        return publish(*args, **options)

    module.UnitTracking.add, module.publish = add_chunk, publish_shard


def _wrap_manifest(module: Any) -> None:
    original = module.write_commit

    def write_commit(*args: Any) -> None:
        meet("commit")
        original(*args)
        meet("committed")

    module.write_commit = write_commit


WRAPPERS = {
    "fourdh_batch.cluster.decoding": _wrap_decoding,
    "fourdh_batch.pipeline.engine": _wrap_engine,
    "fourdh_batch.pipeline.shard": _wrap_shard,
    "fourdh_batch.tables.manifest": _wrap_manifest,
}


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        wrap = WRAPPERS.get(name)
        spec = PathFinder.find_spec(name, path, target) if wrap else None
        if spec is None or spec.loader is None or wrap is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if RULES:
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
