"""Random faults of every kind against real jobs, for as long as wanted.

    python -m tests.soak [minutes] [seed]        or        make soak

Each round has an output of its own. A job is started on it, processes, nodes and the driver are
killed, videos crash or hang their decoder, models and tracker raise, requests to the store fail;
the job is started again until it says that all is done. Then the tables must be those of an
undisturbed run, to the last bit, and the root must pass `fourdh verify`. The dice are seeded, and
the seed is printed; when exactly a process dies still depends on the machine.

A video that happens to be hit twice while it runs alone is given up, as it should be; then the
next run is asked to retry it.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourdh_batch.pipeline.corpus import read_corpus
from fourdh_batch.tables.verify import verify_root
from tests.fault_tools import (
    Bench,
    Faults,
    Pass,
    Run,
    Tables,
    assert_same_tables,
    num_redone,
    tables_of,
    undisturbed_tables,
)
from tests.media import BoxCorpus
from tests.s3_proxy import ENVIRONMENT, Fault, S3Proxy, has_endpoint, s3_endpoint

MAX_JOBS = 15  # of one round
COMMON = [
    "plan.videos_per_shard=4",
    "cluster.gpu_actors=1",
    "cluster.checkpoint_frames=64",
    "video.stall_timeout_s=20",
    "cluster.progress_timeout_s=60",
]
WORLDS = ("disk", "cluster", "bucket")


@dataclass
class Figures:
    """What a soak has seen."""

    rounds: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    frames_redone: int = 0
    seconds: float = 0.0
    undisturbed_s: float = 0.0
    given_up: int = 0
    shards_failed: int = 0

    def show(self) -> None:
        rounds = ", ".join(f"{n} {world}" for world, n in sorted(self.rounds.items()))
        print(f"rounds            {sum(self.rounds.values())} ({rounds}), {self.jobs} jobs")
        print(f"faults            {sum(self.faults.values())}")
        for kind, count in sorted(self.faults.items()):
            print(f"  {kind:28} {count}")
        share = self.frames_redone / max(1, self.frames)
        print(f"frames redone     {self.frames_redone} of {self.frames} ({share:.0%})")
        print(f"videos given up   {self.given_up}, made good by a retry")
        print(f"shards failed     {self.shards_failed}, made good by a rerun")
        lost = self.seconds - self.undisturbed_s
        print(f"time lost         {lost:.0f} s beside {self.undisturbed_s:.0f} s undisturbed")


class Soak:
    """One after another, rounds in one of the worlds: local disk, several nodes, a bucket."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.dice = random.Random(seed)
        self.figures = Figures()
        self.corpus = BoxCorpus(folder / "in")
        self.names = [f"{number}.mp4" for number in range(9)]
        for number, name in enumerate(self.names[:-1]):
            self.corpus.add(name, num_frames=24 + 8 * number, seed=number, miss=0.15)
        self.corpus.add(self.names[-1], num_frames=300, seed=99, miss=0.2, cut_at=140)
        self.undisturbed_s: dict[str, float] = {}
        self.expected: Tables = {}

    def run(self, minutes: float, proxy: S3Proxy | None) -> None:
        worlds = [world for world in WORLDS if world != "bucket" or proxy is not None]
        for world in worlds:
            self._round(world, proxy, disturbed=False)
        self.figures = Figures()
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            number = sum(self.figures.rounds.values())
            self._round(worlds[number % len(worlds)], proxy, disturbed=True)

    def _round(self, world: str, proxy: S3Proxy | None, *, disturbed: bool) -> None:
        number = sum(self.figures.rounds.values())
        where = self.folder / f"{world}-{number}-{'disturbed' if disturbed else 'calm'}"
        out = str(where / "out")
        env: dict[str, str] = {}
        if world == "bucket":
            assert proxy is not None
            out = f"s3://soak-{os.getpid()}/{where.name}"
            env = {**ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.url}
        words = [*self.corpus.settings(Path("out")), f"output={out}", *COMMON]
        started = time.monotonic()
        with ExitStack() as stack:
            faults: Faults
            if world == "cluster":
                words.append("cluster.gpu_actors=2")
                faults = stack.enter_context(Bench(where, nodes=[2, 2, 2]))
            else:
                faults = Faults(where)
            jobs = 0
            passes: list[Pass] = []
            while True:
                rules = self._rules(world) if disturbed and jobs < MAX_JOBS - 3 else []
                done = sum(self.figures.faults.values())
                faults.rules = rules
                if proxy is not None:
                    proxy.reset()
                    if rules and world == "bucket":
                        proxy.faults = self._bad_store()
                if isinstance(faults, Bench):
                    run = faults.run(words, timeout_s=900)
                else:
                    run = self._job(faults, words, env, calm=not rules)
                jobs += 1
                passes += faults.passes()
                self._count(faults, proxy if world == "bucket" else None)
                met = sum(self.figures.faults.values()) - done
                print(f"  {world} {number}, job {jobs}: {met} faults, {_text(run)}", flush=True)
                self.figures.shards_failed += len(run.failed_shards)
                if run.exit_code == 0:
                    break
                assert jobs < MAX_JOBS, "the job does not come to an end"
                assert disturbed, run
                if run.exit_code == 3:
                    self.figures.given_up += run.statuses.get("quarantined", 0)
                    words = [*words, "plan.retry_quarantined=true"]
        seconds = time.monotonic() - started
        if proxy is not None:
            proxy.reset()
        found = tables_of(out)
        if not self.expected:
            self.expected = undisturbed_tables(
                [*self.corpus.settings(self.folder / "undisturbed"), *COMMON]
            )
        assert_same_tables(found, self.expected)
        videos = read_corpus(str(self.corpus.folder))
        report = verify_root(out, corpus=[(v.video_id, v.fingerprint) for v in videos])
        assert report.exit_code == 0, report.problems
        if not disturbed:
            self.undisturbed_s[world] = seconds
        self.figures.rounds[world] += 1
        self.figures.jobs += jobs
        self.figures.frames_redone += num_redone(passes)
        self.figures.frames += int(found["videos"]["frames_decoded"].sum())
        self.figures.seconds += seconds
        self.figures.undisturbed_s += self.undisturbed_s[world]
        print(f"{world} {number}: as undisturbed after {jobs} jobs, {seconds:.0f} s", flush=True)

    def _rules(self, world: str) -> list[dict[str, Any]]:
        """Up to four faults in the processes of one job."""
        places = [
            ("models", ("kill", "exit", "raise", "hang")),
            ("track", ("kill", "exit", "raise")),
            ("decode", ("kill", "segv", "hang")),
            ("publish", ("kill", "raise")),
            ("commit", ("kill", "raise")),
            ("committed", ("kill",)),
        ]
        rules = []
        for _ in range(self.dice.randint(1, 4)):
            at, kinds = self.dice.choices(places, (4, 4, 3, 1, 1, 1))[0]
            rule: dict[str, Any] = {"at": at, "do": self.dice.choice(kinds), "times": 1}
            if at in ("models", "track", "decode"):
                rule["video"] = self.dice.choice(self.names)
                if rule["video"] == self.names[-1]:
                    rule["frame"] = self.dice.randrange(300)
            rules.append(rule)
        if world == "cluster":
            video = self.dice.choice(self.names)
            at = self.dice.choice(("models", "track"))
            rules.append({"at": at, "do": "ask", "video": video, "times": 1})
        return rules

    def _bad_store(self) -> list[Fault]:
        kinds = [("503", ""), ("500", ""), ("reset", "GET"), ("cut", "PUT"), ("forget", "PUT")]
        faults = [
            Fault(kind, method=method, share=self.dice.choice((0.02, 0.05)), times=None)
            for kind, method in self.dice.sample(kinds, 3)
        ]
        if self.dice.random() < 0.3:  # one shard's objects cannot be put
            faults.append(Fault("503", method="PUT", path=r"/blocks/part-0001-00001", times=None))
        return faults

    def _job(self, faults: Faults, words: list[str], env: dict[str, str], *, calm: bool) -> Run:
        """The job's script; killed at a random moment every other time."""
        driver = faults.start(words, env=env)
        started = time.monotonic()
        if not calm and self.dice.random() < 0.5:
            typical = max(self.undisturbed_s.values())
            moment = self.dice.uniform(0, 1.5 * typical)
            while driver.exit_code is None and time.monotonic() - started < moment:
                time.sleep(0.01)
            if driver.exit_code is None:
                driver.kill()
                self.figures.faults["driver killed"] += 1
                return Run(message=f"driver killed after {moment:.1f} s")
        code = driver.wait(1200)
        run = Run(exit_code=code, message=driver.said[-500:] if code else "")
        if summary := driver.summary:
            run.statuses = summary["videos"]
            run.failed_shards = summary["shards"]["failed"]
        return run

    def _count(self, faults: Faults, proxy: S3Proxy | None) -> None:
        for number, rule in enumerate(faults.rules):
            kind = "node lost" if rule["do"] == "ask" else f"{rule['at']}: {rule['do']}"
            self.figures.faults[kind] += faults.times_met(number)
        if proxy is not None:
            for request in proxy.requests:
                if request.fault:
                    self.figures.faults[f"request: {request.fault}"] += 1


def _text(run: Run) -> str:
    if run.exit_code is None:
        return f"{run.error} {run.message}".strip()[:200].replace("\n", " ")
    return f"exit code {run.exit_code}, {run.statuses}"


def main(minutes: float, seed: int) -> None:
    print(f"seed {seed}, {minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, ExitStack() as stack:
        soak = Soak(Path(folder), seed)
        proxy = None
        if has_endpoint():
            import s3fs

            proxy = stack.enter_context(S3Proxy(s3_endpoint(), seed=seed))
            os.environ.update({**ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.url})
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(f"soak-{os.getpid()}")
        try:
            soak.run(minutes, proxy)
        finally:  # also of a soak that found something, or was ended
            soak.figures.show()


if __name__ == "__main__":
    main(
        float(sys.argv[1] if len(sys.argv) > 1 else 20),
        int(sys.argv[2] if len(sys.argv) > 2 else random.randrange(1 << 30)),
    )
