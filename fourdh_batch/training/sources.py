"""Addresses that a training names twice: to train on, and to evaluate on."""

from __future__ import annotations

import logging

from fourdh_batch.config import TrainHmrConfig, TrainPredictorConfig
from fourdh_batch.storage import normal_uri, redact_uri

logger = logging.getLogger(__name__)


def paths_in_both(config: TrainHmrConfig | TrainPredictorConfig, kind: str) -> list[str]:
    """Paths of sources of one kind that are held out, too, however either is spelled."""
    held_out = {normal_uri(s.path) for s in config.held_out if s.kind == kind and s.path}
    trained = {s.path for s in config.sources if s.kind == kind and s.path}
    return sorted(path for path in trained if normal_uri(path) in held_out)


def warn_of_shared_recordings(config: TrainHmrConfig | TrainPredictorConfig) -> None:
    """Say so where people of both play the same motion capture: that of one folder, or of one and
    of a folder in it."""
    held_out, trained = (
        {normal_uri(s.path): s.path for s in sources if s.kind == "synthetic" and s.path}
        for sources in (config.held_out, config.sources)
    )
    paths = {path for own, path in trained.items() if any(_meet(own, other) for other in held_out)}
    if paths:
        logger.warning(
            "%s: in sources= and in held_out=: the held-out people play recordings that are "
            "trained on; give held_out= a folder of others",
            ", ".join(map(redact_uri, sorted(paths))),
        )


def _meet(one: str, other: str) -> bool:
    """Whether an address is the other, or lies in it."""
    one, other = (f"{uri.rstrip('/')}/" for uri in (one, other))
    return one.startswith(other) or other.startswith(one)


def warn_of_shared_people(config: TrainHmrConfig) -> None:
    """Say so where tables or tars are trained on and evaluated on: nothing parts them."""
    if paths := [path for kind in ("tables", "tars") for path in paths_in_both(config, kind)]:
        logger.warning(
            "%s: in sources= and in held_out=: the figures are of people who are trained on",
            ", ".join(map(redact_uri, paths)),
        )
