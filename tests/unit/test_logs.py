from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fourdh_batch import logs

SECRETS = ["hunter2", "abc123sig"]
logger = logging.getLogger("fourdh_batch.cluster.run")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger(logs.PACKAGE)
    before = list(root.handlers), root.level, package.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    package.setLevel(before[2])


def lines(monkeypatch: pytest.MonkeyPatch, style: str) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.set_up(style)
    return stream


def entries(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_says_whose_work_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = lines(monkeypatch, logs.JSON)
    with logs.about(run="r1", shard="s1"):
        with logs.about(video='a "b"\n.mp4'):
            logger.warning("%d frames\nand more", 3)
        with logs.about(shard=""):
            logger.info("no shard")
        logger.info("told", extra={"video": "c.mp4"})
    logger.error("nobody's")
    first, second, third, last = entries(stream)
    assert first.keys() == {"time", "level", "logger", "message", "run", "shard", "video", "pid"}
    assert first["video"] == 'a "b"\n.mp4'
    assert (first["run"], first["shard"], first["level"]) == ("r1", "s1", "WARNING")
    assert first["message"] == "3 frames\nand more"
    assert first["logger"] == "fourdh_batch.cluster.run"
    assert second["run"] == "r1"
    assert not second.keys() & {"shard", "video"}
    assert (third["shard"], third["video"]) == ("s1", "c.mp4")
    assert not last.keys() & set(logs.FIELDS)


def test_a_thread_says_nothing_of_what_another_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = lines(monkeypatch, logs.JSON)
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        with logs.about(video="other.mp4"):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    logger.warning("mine")
    done.set()
    thread.join()
    assert "video" not in entries(stream)[0]


def test_a_generator_that_is_left_in_the_middle_takes_its_fields_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = lines(monkeypatch, logs.JSON)

    def work() -> Iterator[int]:
        with logs.about(video="a.mp4"):
            yield 1
            yield 2

    with logs.about(shard="s"):
        running = work()
        next(running)
        running.close()
        logger.warning("after")
    assert entries(stream)[0]["shard"] == "s"
    assert "video" not in entries(stream)[0]


def test_text_adds_what_the_message_does_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = lines(monkeypatch, logs.TEXT)
    with logs.about(run="r1", shard="s1", video="a.mp4"):
        logger.warning("shard s1: slow")
        logger.warning("shard s1, video a.mp4: gone")
    logger.warning("alone")
    first, second, third = stream.getvalue().splitlines()
    assert first.endswith(" WARNING shard s1: slow (video a.mp4)")
    assert second.endswith(" WARNING shard s1, video a.mp4: gone")
    assert third.endswith(" WARNING alone")


@pytest.mark.parametrize("style", logs.FORMATS)
def test_no_secret_gets_into_the_log(monkeypatch: pytest.MonkeyPatch, style: str) -> None:
    stream = lines(monkeypatch, style)
    address = "https://user:hunter2@host/a.mp4?X-Amz-Signature=abc123sig"
    with logs.about(video="s3://key:hunter2@bucket/a.mp4"):
        logger.warning("read %s: attempt %d of %d", address, 1, 6)
        try:
            raise OSError(f"cannot open '{address}'")
        except OSError:
            logger.exception("failed")
    text = stream.getvalue()
    assert "https://***@host/a.mp4?***" in text
    assert "Traceback" in text
    assert not [secret for secret in SECRETS if secret in text]


def test_an_unprintable_name_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = lines(monkeypatch, logs.JSON)
    logger.warning("found", extra={"video": "caf\udce9.mp4"})
    assert stream.getvalue().isascii()
    assert entries(stream)[0]["video"] == "caf\udce9.mp4"


def test_a_second_set_up_takes_the_place_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first = lines(monkeypatch, logs.TEXT)
    second = lines(monkeypatch, logs.JSON)
    logger.info("once")
    logging.getLogger("botocore").info("chatter")
    assert first.getvalue() == ""
    assert [entry["message"] for entry in entries(second)] == ["once"]


def test_workers_show_the_driver_no_more_than_their_warnings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for style in logs.FORMATS:
        logs.set_up_worker(style)
        logger.info("in %s", style)
    assert [entry["message"] for entry in entries(stream)] == ["in json"]


def test_warnings_of_libraries_are_json_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = lines(monkeypatch, logs.JSON)
    logging.captureWarnings(True)
    # as `warnings.warn` does where it is not turned into an error
    import warnings

    warnings.showwarning("old", UserWarning, "a.py", 3)
    assert entries(stream)[0]["logger"] == "py.warnings"
