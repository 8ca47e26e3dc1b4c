"""Figures over steps, as TensorBoard reads them: the only door to its writer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fourdh_batch.errors import ConfigError
from fourdh_batch.storage import Store, is_local

FOLDER = "logs"


class Curve:
    """Writes event files below an output; those of a store are copied there by `publish`.

    Args:
        output: folder or prefix.
        first_step: steps that are written from here on; what an interrupted run wrote of them
            before is not shown any more.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, output: str, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "training logs need the package tensorboard, which is not installed: "
                "pip install 'fourdh_batch[train]'"
            ) from error
        self._store = None if is_local(output) else Store(output)
        self._spool = tempfile.TemporaryDirectory() if self._store else None
        root = self._spool.name if self._spool else str(Path(output) / FOLDER)
        self._folder = Path(root)
        self._writer: Any = SummaryWriter(root, purge_step=first_step)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures of a step; names such as ``train/loss``."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def publish(self) -> None:
        """Make what was written seen."""
        self._writer.flush()
        if self._store:
            for path in sorted(self._folder.iterdir()):
                self._store.put_file(path, f"{FOLDER}/{path.name}")

    def __enter__(self) -> Curve:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            self._writer.close()
            if self._spool:
                self._spool.cleanup()
