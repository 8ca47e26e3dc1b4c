"""Where optional real material lives, and what every test may rely on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FOURDH_SHARED", REPO.parent / "shared"))
DATA = REPO / "tests" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real clips, small real models and the full goldens; skips where absent."""
    if not (SHARED / "parity").is_dir():
        pytest.skip("real clips and full goldens are not on this machine (set FOURDH_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of our own, with room for three model actors on a small machine."""
    import ray

    ray.init(
        address="local",
        num_cpus=12,
        object_store_memory=256 << 20,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
