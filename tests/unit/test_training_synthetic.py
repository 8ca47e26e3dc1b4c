from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fourdh_batch.config import LossConfig, SourceConfig, TrainHmrConfig
from fourdh_batch.models.smpl import load_body
from fourdh_batch.models.vit import IMAGE_HW
from fourdh_batch.synthetic.mocap import Recording
from fourdh_batch.training import build
from fourdh_batch.training.augment import Changes, make_example
from fourdh_batch.training.synthetic_people import SyntheticPeople


def test_rendered_people_follow_from_their_number_and_show_where_they_are() -> None:
    body = load_body()
    source = SyntheticPeople(body, (), seed=3, crop_px=256)
    people = {n: source.person(n) for n in (9, 0, 3)}
    again = SyntheticPeople(body, (), seed=3, crop_px=256).person(9)
    np.testing.assert_array_equal(people[9].image, again.image)
    np.testing.assert_array_equal(people[9].keypoints_2d, again.keypoints_2d)
    margin = (256 - IMAGE_HW[1]) // 2
    for person in people.values():
        plain = make_example(person)
        # Already framed: only mirrored and coloured.
        same = make_example(person, Changes(scale=1.3, rotation_deg=40.0, extreme_crop=0.5))
        np.testing.assert_array_equal(plain.crop, same.crop)
        mirrored = make_example(person, Changes(is_flipped=True))
        seen = mirrored.crop[:, :, margin:-margin]
        expected = plain.crop[:, :, ::-1][:, :, margin - 1 : -margin - 1]
        np.testing.assert_array_equal(seen, expected)  # about index 128: one pixel to the right
        assert (np.ptp(seen, axis=(0, 1)) > 0).all()  # no black column
        assert plain.keypoints_2d[:, 2].min() == 1
        assert 0.3 < np.ptp(plain.keypoints_2d[:, 1]) < 2.5


def test_everybody_who_is_held_out_with_motion_capture_plays_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight = np.zeros((1, 24, 3))
    recording = Recording("straight", straight, np.zeros((1, 3)), 30.0)
    sources: list[SyntheticPeople] = []

    def people(*args: Any, **options: Any) -> SyntheticPeople:
        sources.append(SyntheticPeople(*args, **options))
        return sources[-1]

    monkeypatch.setattr(build, "load_recordings", lambda path: [recording])
    monkeypatch.setattr(build, "SyntheticPeople", people)
    folders = [SourceConfig(path="somewhere")]
    config = TrainHmrConfig(
        init="mini", sources=folders, held_out=folders, loss=LossConfig(adversarial=0)
    )
    build.build_hmr_task(config, "cpu")
    num_straight = [
        sum(bool((s.person(n).body_pose == np.eye(3)).all()) for n in range(32)) for s in sources
    ]
    assert 8 < num_straight[0] < 24  # trained on
    assert num_straight[1] == 32
