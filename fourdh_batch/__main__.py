"""`python -m fourdh_batch` is `fourdh`."""

from __future__ import annotations

from fourdh_batch.cli import main

main()
