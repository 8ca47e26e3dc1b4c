"""The decoded frames of a video as runs."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from fourdh_batch.tables.frames import FrameRuns


def test_frames_come_back_from_a_few_runs() -> None:
    base = Fraction(1001, 30000)
    index = np.array([*range(500), *range(600, 20_000)])  # a hundred were lost
    pts_s = np.array([float(t * base) for t in index.tolist()])
    shot = (index >= 250).astype(np.int64) + (index >= 9000)
    size = np.where(index[:, None] < 15_000, (640, 360), (1280, 720))
    runs = FrameRuns()
    for row in zip(index.tolist(), pts_s.tolist(), shot.tolist(), size.tolist(), strict=True):
        runs.add(*row[:3], tuple(row[3]))
    text = runs.to_json()
    assert text.count("[") == 1 + 5
    frames = FrameRuns.from_json(text).frames()
    assert np.array_equal(frames.frame_index, index)
    assert np.array_equal(frames.shot_id, shot)
    assert np.array_equal(frames.image_size_wh, size)
    assert frames.pts_s == pytest.approx(pts_s, abs=1e-6)
    assert index[frames.is_shot_start].tolist() == [250, 9000]


def test_uneven_times_come_back_too() -> None:
    pts_s = np.round(np.cumsum(np.random.default_rng(0).uniform(0.01, 0.1, 200)), 3)
    runs = FrameRuns()
    for t, time in enumerate(pts_s.tolist()):
        runs.add(t, time, 0, (4, 2))
        if t % 50 == 7:
            runs = FrameRuns.from_json(runs.to_json())
    assert runs.frames().pts_s == pytest.approx(pts_s, abs=1e-6)


def test_no_frames() -> None:
    frames = FrameRuns.from_json(FrameRuns().to_json()).frames()
    assert len(frames.frame_index) == len(frames.is_shot_start) == 0
