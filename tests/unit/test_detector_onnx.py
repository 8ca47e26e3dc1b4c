"""RTMDet and YOLOX layouts on tiny graphs that find what is blue (data/detector/make_graphs.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.models.detector import Detector, build_detector
from fourdh_batch.models.detector_onnx import yolox_people
from fourdh_batch.types import U8, FrameChunk

GRAPHS = Path(__file__).resolve().parents[1] / "data" / "detector"

BLUE, RED = (0, 0, 255), (255, 0, 0)


def chunk_of(frames: list[U8]) -> FrameChunk:
    t = np.arange(len(frames))
    return FrameChunk("v", t, t, t / 25.0, np.stack(frames))


def frame(
    size_wh: tuple[int, int],
    box: tuple[int, int, int, int] | None = None,
    color: tuple[int, int, int] = BLUE,
) -> U8:
    """A black frame with a filled rectangle."""
    picture = np.zeros((size_wh[1], size_wh[0], 3), dtype=np.uint8)
    if box is not None:
        picture[box[1] : box[3], box[0] : box[2]] = color
    return picture


def rtmdet(**settings: int | float) -> Detector:
    settings = {"input_size": 128, "batch_size": 2} | settings
    return build_detector("onnx", path=str(GRAPHS / "rtmdet_layout.onnx"), device="cpu", **settings)


def yolox(**settings: int | float) -> Detector:
    return build_detector("onnx", path=str(GRAPHS / "yolox_layout.onnx"), device="cpu", **settings)


def test_layouts_are_recognised_by_their_outputs() -> None:
    assert rtmdet().name == "onnx_rtmdet"
    assert yolox().name == "onnx_yolox"
    assert not rtmdet().gives_masks


@pytest.mark.parametrize("size_wh", [(256, 144), (144, 256), (128, 128), (64, 32)])
def test_boxes_come_back_in_pixels_of_the_frame(size_wh: tuple[int, int]) -> None:
    box = (size_wh[0] // 4, size_wh[1] // 4, size_wh[0] // 2, size_wh[1] * 3 // 4)
    found = rtmdet().detect(chunk_of([frame(size_wh, box)]))
    assert found.frame_row.tolist() == [0, 0]
    np.testing.assert_allclose(found.score, [0.9, 0.3], atol=1e-6)
    scale = max(size_wh) / 128  # one pixel of the network
    np.testing.assert_allclose(found.bbox_xyxy_px[0], box, atol=scale)


def test_only_the_colour_of_the_network_counts() -> None:
    """Frames are RGB, the network wants BGR: red must not pass for blue."""
    frames = [frame((128, 128), (10, 10, 50, 50), RED), frame((128, 128), (10, 10, 50, 50), BLUE)]
    assert set(rtmdet().detect(chunk_of(frames)).frame_row.tolist()) == {1}
    assert set(yolox().detect(chunk_of(frames)).frame_row.tolist()) == {1}


def test_a_frame_does_not_depend_on_its_companions() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 60, (5, 2))
    frames = [frame((160, 90), (x, y, x + 40, y + 30)) for x, y in corners]
    together = rtmdet(batch_size=3).detect(chunk_of(frames))
    for row, one in enumerate(frames):
        alone = rtmdet(batch_size=3).detect(chunk_of([one]))
        here = together.frame_row == row
        np.testing.assert_array_equal(together.bbox_xyxy_px[here], alone.bbox_xyxy_px)
        np.testing.assert_array_equal(together.score[here], alone.score)


def test_frames_left_over_from_a_long_batch_do_not_reappear() -> None:
    """The last batch is filled up; what fills it must not give boxes."""
    frames = [frame((128, 128), (10, 10, 50, 50))] * 4
    found = rtmdet(batch_size=3).detect(chunk_of(frames))
    assert found.frame_row.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_empty_frames_give_no_boxes() -> None:
    found = rtmdet().detect(chunk_of([frame((128, 96))] * 3))
    assert len(found) == 0
    assert found.bbox_xyxy_px.shape == (0, 4)


def test_the_floor_is_the_lower_of_default_and_threshold() -> None:
    one = chunk_of([frame((128, 128), (10, 10, 50, 50))])
    assert len(rtmdet().detect(one)) == 2
    assert len(rtmdet(min_score=0.5).detect(one)) == 1
    assert len(rtmdet(score_threshold=0.1).detect(one)) == 2


def test_yolox_cells_are_decoded() -> None:
    """Cell (2, 1) of stride 8 at half scale: centre (20, 12), 16 px wide; twice that here."""
    found = yolox().detect(chunk_of([frame((128, 64), (32, 16, 48, 32))]))
    np.testing.assert_allclose(found.bbox_xyxy_px, [[24, 8, 56, 40]], atol=1e-4)
    np.testing.assert_allclose(found.score, [0.95], atol=1e-6)


def test_yolox_boxes_are_cut_at_the_frame() -> None:
    found = yolox().detect(chunk_of([frame((64, 64), (0, 0, 8, 8))]))
    np.testing.assert_allclose(found.bbox_xyxy_px, [[0, 0, 12, 12]], atol=1e-4)


def test_yolox_strides_suppression_and_classes() -> None:
    """Two frames by hand, on an input of 64 x 32: 32 + 8 + 2 cells."""
    output = np.zeros((2, 42, 85), dtype=np.float32)
    # Frame 0: the better of two equal boxes, from stride 32 and stride 16, stays.
    output[0, 41] = 0
    output[0, 41, :6] = [0.5, 0.5, 0, 0, 0.9, 0.9]  # centre (48, 16), 32 x 32
    output[0, 32 + 2, :6] = [1.0, 1.0, np.log(2), np.log(2), 0.8, 0.9]  # stride 16, cell (2, 0)
    # Frame 1: a dog, and a person below the floor.
    output[1, 0, :7] = [0.5, 0.5, 0, 0, 1, 0, 1]
    output[1, 5, :6] = [0.5, 0.5, 0, 0, 0.4, 0.4]
    place, box, score = yolox_people(output, (32, 64), 0.2)
    assert place.tolist() == [0]
    np.testing.assert_allclose(box, [[32, 0, 64, 32]], atol=1e-4)
    np.testing.assert_allclose(score, [0.81], atol=1e-6)
    place, box, score = yolox_people(output, (32, 64), 0.1)
    assert place.tolist() == [0, 1]
    np.testing.assert_allclose(box[1], [40, 0, 48, 8], atol=1e-4)


def test_a_yolox_graph_that_decodes_itself_is_refused() -> None:
    output = np.zeros((1, 42, 85), dtype=np.float32)
    output[0, 3, :6] = [300, 200, 40, 90, 1, 1]
    with pytest.raises(CheckpointError, match="export the graph without decoding"):
        yolox_people(output, (32, 64), 0.2)


def test_digest_tells_weights_size_and_floor_but_not_the_batch() -> None:
    digest = rtmdet().digest
    assert rtmdet(batch_size=7, num_threads=2).digest == digest
    others = {rtmdet(input_size=96).digest, rtmdet(min_score=0.3).digest, yolox().digest}
    assert len(others | {digest}) == 4


def test_batches_of_a_fixed_graph_keep_its_size() -> None:
    frames = [
        frame((128, 64), (32, 16, 48, 32)),
        frame((128, 64)),
        frame((128, 64), (0, 0, 16, 16)),
    ]
    found = yolox(batch_size=8).detect(chunk_of(frames))
    assert found.frame_row.tolist() == [0, 2]


def test_a_size_that_the_graph_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes 64 x 64 px only, got 128"):
        yolox(input_size=128)
    with pytest.raises(ConfigError, match=r"multiple of 32, got \(100, 100\)"):
        rtmdet(input_size=100)


def test_a_graph_of_no_known_family_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"raw YOLOX.*got inputs .*outputs \[\[1, 3\]\]"):
        build_detector("onnx", path=str(GRAPHS / "other_layout.onnx"))


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x07" * 100])
def test_a_file_that_is_no_graph_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not an ONNX graph"):
        build_detector("onnx", path=str(path))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda"):
        build_detector("onnx", path=str(GRAPHS / "yolox_layout.onnx"), device="tpu")
