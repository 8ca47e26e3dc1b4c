"""`make demo` to its end, on one short clip."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import av
import pytest

import fourdh_batch as fb
from fourdh_batch.video.decode import read_frames
from tests.conftest import REPO

NUM_FRAMES = 12


@pytest.fixture
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", REPO / "jobs" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_shows_what_it_made(
    demo: ModuleType,
    tmp_path: Path,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "SHOWN", ("gestures",))
    monkeypatch.setattr(demo, "NUM_FRAMES", NUM_FRAMES)
    folder = tmp_path / "a demo"
    assert demo.main([str(folder)]) == 0

    tracks = fb.read_tracks(str(folder / "tables"))
    assert set(tracks["frame_index"]) == set(range(NUM_FRAMES))
    assert (tracks["weights"] == "trained").all()
    told = capsys.readouterr().out
    for part in ("gestures.mp4", "PA-MPJPE", "IDF1", "contact_sheet.png"):
        assert part in told
    frames = read_frames(str(folder / "overlay_gestures.mp4"), 0, NUM_FRAMES).rgb
    plain = read_frames(str(folder / "corpus" / "gestures.mp4"), 0, NUM_FRAMES).rgb
    assert frames.shape == plain.shape
    below = slice(plain.shape[1] // 6, None)  # the caption, which is there without people, too
    changed = abs(frames[:, below].astype(int) - plain[:, below]).max(axis=3) > 60
    assert (changed.mean(axis=(1, 2)) > 0.02).all()  # drawn on
    with av.open(str(folder / "contact_sheet.png")) as container:
        sheet = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert sheet.std() > 20
    assert sheet.shape[1] >= plain.shape[2]
