"""Workers of a job write where its driver looks, or it stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourdh_batch.cluster import run
from fourdh_batch.cluster.tracker_actor import check_output
from fourdh_batch.errors import ConfigError
from fourdh_batch.pipeline.job import run_key
from fourdh_batch.storage import Store


def test_a_folder_without_the_record_of_the_run_is_another_one(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(ConfigError, match="expected the record of the run there"):
        check_output(store, "r1")
    store.write_bytes(run_key("r1"), b"{}")
    check_output(store, "r1")


def test_a_relative_output_is_where_the_driver_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run._place_for_all("out/a b") == str(tmp_path / "out" / "a b")
    assert run._place_for_all("/x/out") == "/x/out"
    assert run._place_for_all("s3://bucket/out") == "s3://bucket/out"


def test_a_submitted_job_may_not_write_into_its_own_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="expected an absolute path or object storage"):
        run._place_for_all("out")
    assert run._place_for_all(str(tmp_path)) == str(tmp_path)
