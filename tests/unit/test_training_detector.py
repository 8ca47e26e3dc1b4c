"""The detector's training on networks that take a second."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fourdh_batch.config import LoopConfig, TrainDetectorConfig, load_config
from fourdh_batch.errors import ConfigError
from fourdh_batch.models.detector_transformers import (
    DetectorSize,
    TransformersDetector,
    untrained_detector,
)
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.training.detector import DetectorTask
from fourdh_batch.training.detector_data import (
    POOL_FRAMES,
    FrameExample,
    FrameExamples,
    _cut,
    _mirrored,
    collate_frames,
)
from fourdh_batch.training.loop import RECORD, train
from fourdh_batch.types import FrameChunk

pytest.importorskip("transformers")

SIZE = DetectorSize(
    height=64, width=64, dim=32, num_queries=10, decoder_layers=1,
    backbone_widths=(8, 16, 16, 32), levels=2,
)  # fmt: skip
LOOP = LoopConfig(learning_rate=2e-3, clip_norm=0.1)


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


def examples(body: SmplBody, reuse: int) -> FrameExamples:
    return FrameExamples(
        body, (), seed=1, size_hw=(64, 64), reuse=reuse, num_places=1, num_outfits=4
    )


@pytest.fixture(scope="module")
def source(body: SmplBody) -> FrameExamples:
    return examples(body, 1)


def person(left: int, top: int, right: int, bottom: int) -> FrameExample:
    """A red rectangle on grey."""
    rgb = torch.full((3, 64, 64), 90, dtype=torch.uint8)
    owner = torch.full((64, 64), -1, dtype=torch.int16)
    rgb[0, top:bottom, left:right] = 250
    owner[top:bottom, left:right] = 0
    box = torch.tensor([[left + right, top + bottom, 2 * (right - left), 2 * (bottom - top)]])
    return FrameExample(rgb, box / 128, torch.ones(1), owner)


RECTANGLES = [
    *(person(8, 10, 24, 50), person(36, 6, 60, 40), person(20, 30, 34, 62)),
    person(2, 2, 20, 30),
]


NOBODY = FrameExample(
    torch.full((3, 64, 64), 90, dtype=torch.uint8),
    torch.zeros(0, 4),
    torch.zeros(0),
    torch.full((64, 64), -1, dtype=torch.int16),
)


def task(segment: bool, model: nn.Module | None = None) -> DetectorTask:
    return DetectorTask(
        model or untrained_detector(SIZE, segment=segment, seed=2),
        SIZE,
        segment=segment,
        loop=LOOP,
        examples=RECTANGLES,
        held_out={"frames": RECTANGLES},
        num_held_out=len(RECTANGLES),
    )


@pytest.mark.parametrize(
    "segment",
    [
        pytest.param(False, id="detector"),
        pytest.param(True, id="segmenter", marks=pytest.mark.slow),
    ],
)
def test_the_loss_falls_and_the_result_finds_what_it_learned(segment: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = task(segment)
    batch = collate_frames(RECTANGLES)
    losses = [float(trained.step(batch)["loss"]) for _ in range(120)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])

    digest = trained.save(tmp_path / "detector")
    detector = TransformersDetector(
        str(tmp_path / "detector"), device="cpu", min_score=0.3, batch_size=4
    )
    assert detector.gives_masks == segment
    assert len(digest) == 64
    rgb = batch.rgb.permute(0, 2, 3, 1).numpy().copy()
    t = np.arange(len(rgb))
    found = detector.detect(FrameChunk("v", t, t, t / 25.0, rgb))
    best = [np.flatnonzero(found.frame_row == i)[0] for i in t]
    truth = np.array([[8, 10, 24, 50], [36, 6, 60, 40], [20, 30, 34, 62], [2, 2, 20, 30]])
    assert np.abs(found.bbox_xyxy_px[best] - truth).mean() < 5
    if segment:
        assert found.masks is not None
        assert len(found.masks) == len(found.frame_row)


class Knowing(nn.Module):
    """Hands back the truth of the rectangles, and a box of nobody; masks of a quarter the side."""

    def __init__(self, score: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self._score = score

    def forward(self, pixel_values: Tensor) -> Any:
        boxes = torch.stack([torch.cat([e.boxes, torch.full((1, 4), 0.1)]) for e in RECTANGLES])
        logits = torch.tensor([[self._score], [-5.0]]).expand(len(boxes), 2, 1)
        small = torch.stack([(e.owner[None, ::4, ::4] == 0).float() - 0.5 for e in RECTANGLES])
        masks = torch.cat([small, -torch.ones(len(boxes), 1, 16, 16)], dim=1)
        return SimpleNamespace(logits=logits, pred_boxes=boxes, pred_masks=masks)


def test_figures_of_one_who_knows(body: SmplBody) -> None:
    batch = collate_frames(RECTANGLES)
    figures = task(False, Knowing(3.0)).evaluate([batch])
    assert figures == pytest.approx(
        {"ap": 1, "ap50": 1, "recall_half_visible": 1, "precision": 1, "mean_iou": 1}
    )
    unsure = task(False, Knowing(-1.0)).evaluate([batch])
    assert unsure["ap"] == 1  # the order is right
    assert unsure["recall_half_visible"] == 0
    assert np.isnan(unsure["precision"])


def test_masks_of_one_who_knows() -> None:
    figures = task(True, Knowing(3.0)).evaluate([collate_frames(RECTANGLES)])
    assert 0.8 < figures["mask_iou"] < 1  # told in blocks of 4 x 4 pixels
    assert figures["recall_half_visible"] == 1


def test_a_segmenter_that_finds_nobody_is_evaluated() -> None:
    segmenter = task(True)
    segmenter.modules["model"].eval()
    with torch.inference_mode():
        figures = segmenter.evaluate([collate_frames(RECTANGLES[:2])])
    assert figures["recall_half_visible"] == 0
    assert np.isnan(figures["mask_iou"])


def test_people_who_are_mostly_hidden_need_not_be_found() -> None:
    batch = collate_frames(
        [e._replace(visible_fraction=torch.tensor([0.3])) for e in RECTANGLES[:2]] + RECTANGLES[2:]
    )
    figures = task(False, Knowing(3.0)).evaluate([batch])
    assert figures["recall_half_visible"] == 1
    assert figures["precision"] == 1  # those who are found count as right


def test_an_example_follows_from_its_number(body: SmplBody, source: FrameExamples) -> None:
    other = examples(body, 1)
    assert_same(other[6], source[6])
    assert_same(other[5], source[5])
    assert not torch.equal(source[5].rgb, source[6].rgb)


def assert_same(a: FrameExample, b: FrameExample) -> None:
    for name in FrameExample._fields:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_every_frame_is_used_so_many_times(body: SmplBody) -> None:
    """Of the order alone; nothing is rendered."""
    source = examples(body, 3)
    first = [source._frame_of(n) for n in range(3 * POOL_FRAMES)]
    assert np.bincount(first).tolist() == [3] * POOL_FRAMES
    assert source._frame_of(3 * POOL_FRAMES) >= POOL_FRAMES
    assert [source._frame_of(n) for n in range(5)] == first[:5]


def test_boxes_and_pixels_of_changed_frames_agree(source: FrameExamples) -> None:
    num_people = 0
    for number in range(32):
        example = source[number]
        assert example.rgb.shape == (3, 64, 64)
        assert (example.boxes > 0).all()
        assert (example.boxes < 1).all()
        for n, (x, y, w, h) in enumerate((example.boxes * 64).tolist()):
            num_people += 1
            rows, columns = torch.nonzero(example.owner == n, as_tuple=True)
            assert len(rows) > 0
            assert abs(columns.float() + 0.5 - x).max() <= w / 2 + 2
            assert abs(rows.float() + 0.5 - y).max() <= h / 2 + 2
        assert int(example.owner.max()) < len(example.boxes)
    assert num_people > 32


@pytest.mark.parametrize(
    ("window", "size_hw"),
    [
        pytest.param((0, 0, 48, 32), (32, 48), id="as it is"),
        pytest.param((8, 4, 32, 24), (24, 32), id="cut"),
        pytest.param((0, 0, 48, 32), (96, 144), id="three times as large"),
        pytest.param((2, 5, 45, 27), (9, 15), id="a third"),
    ],
)
def test_pixels_stand_in_the_middle_of_boxes_mirrored_or_not(
    window: tuple[int, int, int, int], size_hw: tuple[int, int]
) -> None:
    """Exactly: a person whose pixels are those of the box, from pixel centre to pixel centre."""
    rgb = torch.zeros(32, 48, 3, dtype=torch.uint8)
    owner = torch.full((32, 48), -1, dtype=torch.int16)
    owner[8:20, 12:31] = 0
    rgb[owner == 0] = 200
    box = torch.tensor([[12.0, 8.0, 30.0, 19.0]])
    plain = _cut(rgb, box, torch.ones(1), owner, window, size_hw)
    scale = torch.tensor([size_hw[1], size_hw[0]])
    for example in (plain, _mirrored(plain)):
        rows, columns = torch.nonzero(example.owner == 0, as_tuple=True)
        middle = torch.stack([columns, rows]).double().mean(dim=1) + 0.5
        assert torch.allclose(middle, (example.boxes[0, :2] * scale).double(), atol=1e-5)
    mirrored = _mirrored(plain)
    assert torch.equal(mirrored.rgb.flip(2), plain.rgb)
    assert torch.allclose(mirrored.boxes[0, 0] + plain.boxes[0, 0], torch.ones(1))


def test_impossible_settings_are_told() -> None:
    words = ["height=100", "backbone_widths=[8,8]", "levels=4", "loop.data_workers=2", "dim=40"]
    with pytest.raises(ConfigError) as error:
        load_config(None, words, TrainDetectorConfig)
    for word in ("height", "backbone_widths", "levels", "reuse", "dim"):
        assert f"{word}: expected" in str(error.value)


@pytest.mark.parametrize(
    ("words", "num_places"),
    [
        (["levels=1"], 4),
        (["levels=3"], 4 + 16 + 64),
        (["segment=true", "levels=1"], 16),
    ],
)
def test_queries_are_no_more_than_places(words: list[str], num_places: int) -> None:
    words = ["height=64", "width=64", *words]
    message = f"num_queries: expected at most {num_places}, the places of the feature maps"
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*words, f"num_queries={num_places + 1}"], TrainDetectorConfig)
    config = load_config(None, [*words, f"num_queries={num_places}"], TrainDetectorConfig)

    def scores(num_queries: int) -> Tensor:
        size = replace(SIZE, levels=config.levels, num_queries=num_queries)
        model: Any = untrained_detector(size, segment=config.segment, seed=2).eval()
        with torch.inference_mode():
            logits: Tensor = model(pixel_values=torch.zeros(1, 3, 64, 64)).logits
        return logits

    assert scores(num_places).shape == (1, num_places, 1)
    with pytest.raises(RuntimeError, match="out of range"):
        scores(num_places + 1)


@pytest.mark.parametrize(
    ("segment", "head"),
    [(False, "model.decoder.class_embed.0.weight"), (True, "model.class_embed.weight")],
)
def test_a_batch_that_shows_nobody_is_learnt_from(segment: bool, head: str) -> None:
    torch.manual_seed(0)
    trained = task(segment)
    weight = trained.modules["model"].get_parameter(head)
    before = weight.clone()
    figures = trained.step(collate_frames([NOBODY] * 2))
    assert all(torch.isfinite(value) for value in figures.values())
    assert figures["loss"] > 0  # of the classes
    assert figures["loss_bbox"] == figures["loss_giou"] == 0
    if segment:
        assert figures["loss_mask_ce"] == figures["loss_mask_dice"] == 0
    assert not torch.equal(before, weight)


@pytest.mark.slow
def test_a_resumed_training_gives_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    records = []
    for name, lengths in (("whole", (4,)), ("halves", (2, 4))):
        for steps in lengths:
            loop = replace(LOOP, steps=steps, batch_size=2, cpu_threads=1, checkpoint_every=2)
            trained = task(False)
            trained.examples = Repeated()
            train(trained, loop, str(tmp_path / name), {"loop": {"steps": steps}})
        records.append(json.loads((tmp_path / name / RECORD).read_text()))
    assert records[0]["digest"] == records[1]["digest"]
    stored = {path.name for path in (tmp_path / "whole" / records[0]["weights"]).iterdir()}
    assert stored == {"config.json", "model.safetensors", "preprocessor_config.json"}


class Repeated:
    """Rectangles by number."""

    def __getitem__(self, number: int) -> FrameExample:
        return RECTANGLES[number % len(RECTANGLES)]
