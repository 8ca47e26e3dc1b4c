"""Shot boundaries: the same scores and cuts as PySceneDetect's AdaptiveDetector."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from scenedetect import AdaptiveDetector, FrameTimecode, SceneManager, open_video

from fourdh_batch.types import F64, I64, U8
from fourdh_batch.video.decode import VideoReader
from fourdh_batch.video.shots import ContentScore, ShotRule, shot_starts
from tests.video_makers import make_video

KNOWN_CUTS = [50, 87, 150, 225, 255]  # of multishot_6shots_25fps.mp4


class Given(AdaptiveDetector):
    """The original's rule on given scores."""

    def _calculate_frame_score(self, timecode: FrameTimecode, frame_img: F64) -> float:
        return float(frame_img)


def cuts_of_original(scores: F64) -> list[int]:
    detector = Given()
    cuts: list[int] = []
    for index, score in enumerate(np.nan_to_num(scores)):
        cuts += [c.frame_num for c in detector.process_frame(FrameTimecode(index, 25.0), score)]
    return cuts


def noisy_scores(seed: int, num_frames: int = 400) -> F64:
    rng = np.random.default_rng(seed)
    scores = rng.gamma(2.0, 2.0, num_frames)
    scores[rng.random(num_frames) < 0.08] *= rng.uniform(3, 12)
    scores[rng.integers(0, num_frames, 20)] = 0.0
    scores[100:110] = 0.0
    scores[105] = rng.uniform(10, 30)  # a change among none
    scores[0] = np.nan
    return scores


def scene(number: int, frame: int, size: tuple[int, int]) -> U8:
    """A still scene with a little motion."""
    width, height = size
    rng = np.random.default_rng(number)
    small = rng.integers(0, 255, (5, 8, 3), dtype=np.uint8)
    rgb = cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)
    x = (7 * frame) % (width - 8)
    rgb[height // 2 : height // 2 + 8, x : x + 8] = 255
    return rgb


def scenes(lengths: list[int], size: tuple[int, int]) -> list[U8]:
    return [scene(n, i, size) for n, length in enumerate(lengths) for i in range(length)]


class TestScore:
    @pytest.mark.parametrize("size", [(640, 360), (360, 640), (200, 120), (256, 256), (257, 31)])
    def test_equals_the_original(self, size: tuple[int, int]) -> None:
        pictures = scenes([3, 3], size)
        score = ContentScore()
        ours = [score.push(rgb) for rgb in pictures]
        detector = AdaptiveDetector()
        factor = max(1.0, max(size) / 256)
        for index, rgb in enumerate(pictures):
            bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
            if factor > 1.0:
                shape = round(size[0] / factor), round(size[1] / factor)
                bgr = cv2.resize(bgr, shape, interpolation=cv2.INTER_LINEAR)
            detector.process_frame(FrameTimecode(index, 25.0), bgr)
            if index:
                assert ours[index] == detector._frame_score
        assert np.isnan(ours[0])
        assert ours[3] > 20 > max(ours[1], ours[2], ours[4], ours[5])

    def test_goes_on_where_the_picture_size_changes(self) -> None:
        score = ContentScore()
        small, large = scene(1, 0, (320, 180)), scene(1, 0, (640, 360))
        other = scene(2, 0, (320, 240))
        score.push(small)
        assert score.push(large) < 5
        assert score.push(other) > 20


class TestRule:
    @pytest.mark.parametrize("seed", range(12))
    def test_equals_the_original(self, seed: int) -> None:
        scores = noisy_scores(seed)
        index = np.arange(len(scores))
        cuts = cuts_of_original(scores)
        assert shot_starts(index, scores).tolist() == cuts
        assert cuts

    @pytest.mark.parametrize("piece", [1, 2, 3, 7, 32])
    def test_gives_the_same_cuts_however_the_scores_arrive(self, piece: int) -> None:
        scores = noisy_scores(3)
        index = np.arange(len(scores))
        rule, cuts = ShotRule(), []
        for at in range(0, len(scores), piece):
            decided = rule.decided_until
            new = rule.push(index[at : at + piece], scores[at : at + piece])
            assert all(decided <= cut < rule.decided_until for cut in new)
            cuts += new
        assert rule.decided_until == len(scores) - 2
        cuts += rule.finish()
        assert rule.decided_until == len(scores)
        assert cuts == shot_starts(index, scores).tolist()

    def test_counts_lost_frames_as_time(self) -> None:
        scores = np.full(40, 1.0)
        scores[[12, 20]] = 50.0
        index = np.arange(40)
        assert shot_starts(index, scores).tolist() == [20]
        index[10:] += 30
        assert shot_starts(index, scores).tolist() == [42]

    def test_refuses_frames_out_of_order(self) -> None:
        with pytest.raises(ValueError, match="frame 3 after frame 3"):
            ShotRule().push(np.array([3, 3]), np.array([1.0, 1.0]))

    def test_of_a_very_short_video_finds_none(self) -> None:
        for num_frames in range(5):
            rule = ShotRule()
            assert rule.push(np.arange(num_frames), np.full(num_frames, 99.0)) == []
            assert rule.finish() == []
            assert rule.decided_until == num_frames


def cuts_in(path: Path) -> tuple[list[int], I64]:
    rule, cuts, seen = ShotRule(), [], []
    with VideoReader(str(path)) as reader:
        for chunk in reader.chunks(16, score_shots=True):
            assert chunk.shot_scores is not None
            cuts += rule.push(chunk.frame_index, chunk.shot_scores)
            seen.append(chunk.frame_index)
    return cuts + rule.finish(), np.concatenate(seen)


def test_cuts_of_a_made_video(tmp_path: Path) -> None:
    lengths = [20, 17, 30, 16, 25]
    size = 320, 180
    path = make_video(tmp_path / "cuts.mp4", pictures=scenes(lengths, size), size=size, g="250")
    cuts, _ = cuts_in(path)
    assert cuts == np.cumsum(lengths)[:-1].tolist()


@pytest.mark.shared
def test_cuts_of_the_known_video(shared: Path) -> None:
    clip = shared / "videos" / "real" / "variants" / "multishot_6shots_25fps.mp4"
    cuts, _ = cuts_in(clip)
    assert cuts == KNOWN_CUTS


def real_clips() -> list[str]:
    from tests.conftest import SHARED

    index = SHARED / "videos" / "real" / "INDEX.csv"
    if not index.is_file():
        return ["none"]
    with index.open(newline="") as file:
        return [row["file"] for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name", real_clips())
def test_equals_pyscenedetect_on_the_whole_file(shared: Path, name: str) -> None:
    path = shared / "videos" / "real" / name
    cuts, index = cuts_in(path)
    manager = SceneManager()
    manager.add_detector(AdaptiveDetector())
    manager.detect_scenes(open_video(str(path), backend="pyav"))
    starts = [start.frame_num for start, _ in manager.get_scene_list()]
    assert cuts == starts[1:]
    assert len(index) > 0
