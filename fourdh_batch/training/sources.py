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
    """Say so where people of both play the same motion capture."""
    if paths := paths_in_both(config, "synthetic"):
        logger.warning(
            "%s: in sources= and in held_out=: the held-out people play recordings that are "
            "trained on; give held_out= a folder of others",
            ", ".join(map(redact_uri, paths)),
        )
