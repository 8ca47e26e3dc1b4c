"""The log of a process: text for people, or one JSON object a line; no secrets in either.

A record says whose work it is about: `run`, `shard`, `video`, `unit`, where they are known. They
come from the block that the thread is in (`with about(video=...)`) or from `extra` of the call.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from fourdh_batch.storage import redact

TEXT, JSON = FORMATS = "text", "json"
FIELDS = ("run", "shard", "video", "unit")
PACKAGE = "fourdh_batch"

_about: ContextVar[Mapping[str, str]] = ContextVar("fourdh_log")


@contextmanager
def about(**fields: str) -> Iterator[None]:
    """Until the end of the block, what this thread logs is about these.

    Args:
        fields: of `FIELDS`; "" takes one away that an outer block has set.
    """
    before = _about.get({})
    _about.set({**before, **fields})
    try:
        yield
    finally:
        # Not by token: a generator may be closed from another context than it was begun in.
        _about.set(before)


def set_up(
    style: str = TEXT, *, level: int = logging.INFO, handler: logging.Handler | None = None
) -> None:
    """Log this process to its standard error, from now on in this way alone.

    Libraries are heard from `WARNING` on.

    Args:
        style: of `FORMATS`.
        level: from which on this package is heard.
        handler: instead of standard error; shows time and level itself.
    """
    if handler is None:
        handler = logging.StreamHandler()
        handler.setFormatter(_Json() if style == JSON else _Text("%(asctime)s %(levelname)s "))
    else:
        handler.setFormatter(_Text())
    handler.addFilter(_say_about)
    root = logging.getLogger()
    for old in list(root.handlers):
        if _say_about in old.filters:
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(level)
    logging.captureWarnings(style == JSON)


def set_up_worker(style: str) -> None:
    """The same in a process that Ray has started, whose standard error is a file on its node.

    As text it is also what the driver shows, from `WARNING` on: the driver has its own lines.
    """
    set_up(style, level=logging.INFO if style == JSON else logging.WARNING)


def _say_about(record: logging.LogRecord) -> bool:
    """A filter that lets all pass."""
    known = _about.get({})
    for name in FIELDS:
        if not hasattr(record, name):
            setattr(record, name, known.get(name, ""))
    return True


class _Text(logging.Formatter):
    """Adds shard and video where the message does not name them; the run has a line of its own."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__(f"{prefix}%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        text = super().formatMessage(record)
        values = {name: getattr(record, name) for name in ("shard", "video")}
        unsaid = [f"{name} {value}" for name, value in values.items() if value not in text]
        return f"{text} ({', '.join(unsaid)})" if unsaid else text

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name in FIELDS if (value := getattr(record, name))},
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        said = {name: redact(str(value)) for name, value in entry.items()}
        return json.dumps({**said, "pid": record.process})
