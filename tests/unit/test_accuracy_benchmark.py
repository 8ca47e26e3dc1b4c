"""The accuracy benchmark replaces nothing but its own, its ablations differ by the cue alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourdh_batch.config import load_config
from fourdh_batch.pipeline.following import TrackerModels
from tests.benchmark.accuracy import MARKER, require_ours, run
from tests.benchmark.accuracy_trackers import OneCueLessModels


def test_motion_capture_survives_an_output_beside_it(tmp_path: Path) -> None:
    walk = tmp_path / "mocap" / "walk.npz"
    walk.parent.mkdir()
    walk.touch()
    with pytest.raises(ValueError, match=f"motion={walk.parent}.*{tmp_path / 'mocap'}"):
        run([f"motion={walk.parent}", f"output={tmp_path}"])
    with pytest.raises(ValueError, match=f"motion={tmp_path}"):
        run([f"motion={tmp_path}", f"output={tmp_path / 'inside'}"])
    with pytest.raises(ValueError, match=r"mocap.*expected an empty folder.*motion=/elsewhere"):
        run(["motion=/elsewhere", f"output={tmp_path}"])
    assert walk.exists()


def test_an_earlier_run_may_be_replaced(tmp_path: Path) -> None:
    require_ours(tmp_path / "not_there", "")
    require_ours(tmp_path, "")
    (tmp_path / "tables").mkdir()
    with pytest.raises(ValueError, match="expected an empty folder"):
        require_ours(tmp_path, "")
    (tmp_path / MARKER).touch()
    require_ours(tmp_path, "")


def test_a_word_without_a_value_is_named() -> None:
    with pytest.raises(ValueError, match="expected key=value words, got foo"):
        run(["foo"])


def test_an_ablation_has_the_settings_of_the_job() -> None:
    config = load_config(None, ["tracker.compat=true", "tracker.max_age=9", "tracker.gate=7"])
    ours = TrackerModels(config).new_tracker().settings
    assert ours.compat
    assert OneCueLessModels(config).new_tracker().settings == ours
