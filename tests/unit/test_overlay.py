from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch

from fourdh_batch.types import U8
from fourdh_batch.view.overlay import (
    MESH_OPACITY,
    contact_sheet,
    draw_frame,
    printable,
    track_colour,
    write_overlay_video,
)

BOX = (30, 40, 90, 150)
GREY = 100


def person(track_id: int = 3, state: str = "detected", frame_index: int = 0) -> dict[str, object]:
    return {
        "frame_index": frame_index,
        "track_id": track_id,
        "state": state,
        "bbox_xyxy_px": np.array(BOX, np.float32),
        "keypoints_2d_px": np.full(88, np.nan, np.float32),
        "focal_px": 200.0,
        "principal_point_px": np.array([160, 120], np.float32),
    }


def table(*rows: dict[str, object]) -> pd.DataFrame:
    columns = list(person())
    return pd.DataFrame(list(rows), columns=columns)


def grey(height: int = 240, width: int = 320) -> U8:
    return np.full((height, width, 3), GREY, np.uint8)


def is_colour(picture: U8, colour: tuple[int, int, int]) -> np.ndarray:
    return np.all(picture == np.array(colour, np.uint8), axis=2)


def decode(path: Path) -> list[U8]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_box_has_its_colour_on_the_border_and_nothing_inside() -> None:
    drawn = draw_frame(grey(), table(person()))
    mine = is_colour(drawn, track_colour(3))
    left, top, right, bottom = BOX
    assert mine[top, left : right + 1].all()
    assert mine[bottom, left : right + 1].all()
    assert mine[top : bottom + 1, left].all()
    assert mine[top : bottom + 1, right].all()
    assert (drawn[top + 5 : bottom - 5, left + 5 : right - 5] == GREY).all()
    assert (drawn[:, right + 5 :] == GREY).all()


def test_the_frame_that_was_given_stays_as_it_was() -> None:
    frame = grey()
    draw_frame(frame, table(person()), caption="a")
    assert (frame == GREY).all()


def test_a_label_with_the_identity_stands_on_the_box() -> None:
    one = draw_frame(grey(), table(person(1)))
    label = one[BOX[1] - 14 : BOX[1] - 1, BOX[0] : BOX[0] + 12]
    assert is_colour(label, track_colour(1)).mean() > 0.4
    ink = np.abs(label.astype(int) - np.array(track_colour(1))).sum(axis=2) > 200
    assert 5 < ink.sum() < ink.size / 2


def test_labels_of_people_who_overlap_do_not_cover_each_other() -> None:
    drawn = draw_frame(grey(), table(person(1), person(2)))
    first = is_colour(drawn, track_colour(1)).sum()
    alone = is_colour(draw_frame(grey(), table(person(1))), track_colour(1)).sum()
    border = 2 * (BOX[2] - BOX[0] + BOX[3] - BOX[1])
    assert first >= alone - border  # the second box lies on the first, the label does not


def test_a_predicted_box_is_dashed_and_faded() -> None:
    drawn = draw_frame(grey(), table(person(state="predicted")))
    edge = drawn[BOX[3], BOX[0] : BOX[2] + 1].astype(int)
    touched = np.abs(edge - GREY).max(axis=1) > 20
    assert 0.3 < touched.mean() < 0.7
    full = np.abs(np.array(track_colour(3)) - GREY)
    assert (np.abs(edge[touched] - GREY) < 0.6 * full.max()).all()


def test_a_skeleton_connects_its_joints_and_skips_unknown_ones() -> None:
    row = person()
    keypoints = np.full((44, 2), np.nan, np.float32)
    keypoints[[1, 8]] = [[200, 60], [200, 160]]  # neck, pelvis
    keypoints[2] = [1e30, 1e30]  # a wild shoulder
    keypoints[40] = [290, 200]  # not one of the 25 that are drawn
    row["keypoints_2d_px"] = keypoints.ravel()
    drawn = draw_frame(grey(), table(row))
    changed = np.any(drawn != GREY, axis=2)
    assert changed[65:155, 200].all()
    assert not changed[:, 210:].any()


def test_left_limbs_are_lighter_than_right_ones() -> None:
    row = person()
    keypoints = np.full((44, 2), np.nan, np.float32)
    keypoints[[3, 4]] = [[200, 60], [200, 160]]  # right elbow, wrist
    keypoints[[6, 7]] = [[260, 60], [260, 160]]  # left
    row["keypoints_2d_px"] = keypoints.ravel()
    drawn = draw_frame(grey(), table(row)).astype(int)
    assert (drawn[100, 260] > drawn[100, 200]).any()
    assert (drawn[100, 260] >= drawn[100, 200]).all()


@pytest.mark.parametrize("height", [120, 240, 1080])
def test_captions_are_readable_and_grow_with_the_picture(height: int) -> None:
    frame = grey(height, height * 16 // 9)
    drawn = draw_frame(frame, table(), caption="clip.mp4  frame 7", warning="weights: untrained")
    changed = np.any(drawn != GREY, axis=2)
    rows = np.flatnonzero(changed.any(axis=1))
    assert rows[0] == 0
    assert max(16, 0.06 * height) < len(rows) < max(40, 0.16 * height)  # two lines
    text = drawn[: len(rows) // 2]
    ground = (text == 0).all(axis=2)
    ink = (text > 180).all(axis=2)
    assert ground.sum() > 3 * ink.sum() > 0
    amber = (drawn[..., 0] > 200) & (drawn[..., 2] < 120)
    assert amber.any()


def test_a_long_caption_stays_in_the_picture_and_keeps_both_ends() -> None:
    drawn = draw_frame(grey(), table(), caption="start " + "x" * 500 + " end")
    changed = np.any(drawn != GREY, axis=2)
    assert changed[:, 280:].any()
    assert np.flatnonzero(changed.any(axis=1))[-1] < 30


def test_letters_that_cannot_be_drawn_are_escaped() -> None:
    assert printable("naïve Größe") == "naive Gro\\xdfe"
    assert printable("人") == "\\u4eba"
    assert printable("a\nb\t") == "a\\nb\\t"
    draw_frame(grey(), table(), caption="人物 ünï.mp4 \U0001f600", warning="\x00")


def test_identities_have_stable_and_different_colours() -> None:
    colours = [track_colour(i) for i in range(30)]
    assert colours == [track_colour(i) for i in range(30)]
    gaps = [np.abs(np.subtract(a, b)).max() for i, a in enumerate(colours[:8]) for b in colours[:i]]
    assert min(gaps) > 40


@pytest.mark.parametrize(
    "box", [(-50, -60, 20, 30), (300, 200, 500, 400), (-1e9, -1e9, 1e9, 1e9), (np.nan,) * 4]
)
@pytest.mark.parametrize("state", ["detected", "predicted"])
def test_boxes_may_reach_beyond_the_picture(box: tuple[float, ...], state: str) -> None:
    row = person(state=state)
    row["bbox_xyxy_px"] = np.array(box, np.float32)
    assert draw_frame(grey(), table(row)).shape == (240, 320, 3)


def square(depth_m: float, half_m: float) -> torch.Tensor:
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]) * half_m
    return torch.cat([corners, torch.full((4, 1), depth_m)], dim=1)


def test_bodies_are_blended_in_and_the_nearer_hides_the_farther() -> None:
    faces = np.array([[0, 2, 1], [0, 3, 2]])  # facing the camera
    vertices = torch.stack([square(2.0, 0.8), square(4.0, 0.8)])
    drawn = draw_frame(
        grey(), table(person(1), person(2)), vertices_cam=vertices, faces=faces
    ).astype(float)
    alone = draw_frame(grey(), table(person(1)), vertices_cam=vertices[:1], faces=faces)
    assert (drawn[120, 160] == alone[120, 160]).all()  # the near one, 160 +- 80 px
    near = np.array(track_colour(1))
    mixed = (drawn[120, 160] - (1 - MESH_OPACITY) * GREY) / MESH_OPACITY
    assert np.corrcoef(mixed, near)[0, 1] > 0.999
    assert (drawn[120, 245] == GREY).all()


def test_a_body_for_each_row_is_needed() -> None:
    faces = np.array([[0, 1, 2]])
    with pytest.raises(ValueError, match="2 bodies, got faces and 1 bodies"):
        draw_frame(
            grey(), table(person(1), person(2)), vertices_cam=square(2, 1)[None], faces=faces
        )
    other = person(2) | {"focal_px": 999.0}
    with pytest.raises(ValueError, match="one camera"):
        draw_frame(
            grey(),
            table(person(1), other),
            vertices_cam=torch.stack([square(2, 1), square(3, 1)]),
            faces=faces,
        )


def test_only_rgb_pictures_are_taken() -> None:
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8"):
        draw_frame(np.zeros((4, 4), np.uint8), table())


def test_a_video_has_every_frame_its_size_made_even_and_its_rate(tmp_path: Path) -> None:
    path = tmp_path / "größe 人.mp4"
    frames = ((10 + i, grey(121, 161)) for i in range(9))
    rows = table(person(3, frame_index=12), person(4, frame_index=13))
    assert write_overlay_video(frames, rows, path, fps=30000 / 1001, caption="clip.mp4") == 9
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(30000 / 1001)
        assert container.streams.video[0].codec_context.name == "h264"
    decoded = decode(path)
    assert len(decoded) == 9
    assert decoded[0].shape == (122, 162, 3)
    # frame 12 is the third; its border has the identity's colour, up to chroma subsampling
    edge = decoded[2][60:110, BOX[0]].astype(int).mean(axis=0)
    assert np.abs(edge - GREY).max() > 40
    assert np.abs(decoded[1][60:110, BOX[0]].astype(int).mean(axis=0) - GREY).max() < 10
    assert np.corrcoef(edge - GREY, np.array(track_colour(3)) - GREY)[0, 1] > 0.9
    assert list(tmp_path.iterdir()) == [path]


def test_a_video_that_changes_size_keeps_its_first(tmp_path: Path) -> None:
    frames = [(0, grey(120, 160)), (1, grey(240, 320))]
    assert write_overlay_video(frames, table(), tmp_path / "a.mp4", fps=25) == 2
    assert {frame.shape for frame in decode(tmp_path / "a.mp4")} == {(120, 160, 3)}


def test_bodies_are_asked_for_only_where_somebody_is(tmp_path: Path) -> None:
    asked: list[int] = []

    def posed(rows: pd.DataFrame) -> torch.Tensor:
        asked.extend(rows["frame_index"])
        return torch.stack([square(2, 0.5)] * len(rows))

    frames = ((i, grey(120, 160)) for i in range(4))
    faces = np.array([[0, 2, 1], [0, 3, 2]])
    rows = table(person(frame_index=1), person(4, frame_index=1), person(frame_index=3))
    path = tmp_path / "a.mp4"
    write_overlay_video(frames, rows, path, fps=25, posed_vertices=posed, faces=faces)
    assert asked == [1, 1, 3]


def test_a_failed_video_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[int, U8]]:
        yield 0, grey()
        raise OSError("decoder gave up")

    with pytest.raises(OSError, match="decoder gave up"):
        write_overlay_video(broken(), table(), tmp_path / "a.mp4", fps=25)
    with pytest.raises(ValueError, match="at least one frame"):
        write_overlay_video([], table(), tmp_path / "a.mp4", fps=25)
    with pytest.raises(ValueError, match="fps"):
        write_overlay_video([], table(), tmp_path / "a.mp4", fps=float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_a_contact_sheet_holds_every_picture(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    pictures = [np.full((20, 30, 3), 10 * i, np.uint8) for i in range(1, 6)]
    pictures[1] = pictures[1][:10]
    contact_sheet(pictures, path, columns=3)
    sheet = decode(path)[0]
    assert sheet.shape == (40, 90, 3)
    assert sheet[5, 5, 0] == 10
    assert sheet[5, 35, 0] == 20
    assert sheet[15, 35, 0] == 0  # the smaller one is padded
    assert sheet[25, 35, 0] == 50
    assert sheet[25, 65, 0] == 0
    with pytest.raises(ValueError, match="frames and columns"):
        contact_sheet([], path, columns=3)
