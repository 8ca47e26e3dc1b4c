"""The words that `jobs/demo.py` takes."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPO


def test_a_file_in_place_of_the_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    main: Callable[[list[str]], int] = runpy.run_path(str(REPO / "jobs" / "demo.py"))["main"]
    for word in (file, file / "below"):
        assert main([str(word)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{word}: expected a folder to write to")
