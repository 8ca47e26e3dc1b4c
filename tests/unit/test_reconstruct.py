from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from fourdh_batch.geometry import crop_square
from fourdh_batch.masks import box_mask, decode_rle, encode_rle
from fourdh_batch.models.build import build_hmr2, untrained_hmr2
from fourdh_batch.models.hmr2 import Hmr2, HmrOutput
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.models.texture import TextureSampler, body_atlas, pack_texture
from fourdh_batch.pipeline.engine import Engine
from fourdh_batch.pipeline.reconstruct import Reconstruction, Reconstructor, _box_crops
from fourdh_batch.types import Detections, FrameChunk, People, RleMask
from fourdh_batch.video.crops import crop_batch, crop_masks

FIELDS = (
    "global_orient",
    "body_pose",
    "betas",
    "pred_cam",
    "box_center_px",
    "box_size_px",
    "keypoints_3d_m",
)
Boxes = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def model(body: SmplBody) -> Hmr2:
    """Seeded weights with read-outs loud enough that no rounding hides behind the mean."""
    model = untrained_hmr2("mini", body, device="cpu")
    with torch.no_grad():
        for name, gain in (("decpose", 30), ("decshape", 30), ("deccam", 5)):
            getattr(model.smpl_head, name).weight.mul_(gain)
    return model


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """MKL cuts a product by the number of threads, so the last bits belong to that number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_chunk(video_id: str, num_frames: int, height: int, width: int, seed: int) -> FrameChunk:
    rng = np.random.default_rng(seed)
    index = np.arange(10, 10 + num_frames)
    return FrameChunk(
        video_id=video_id,
        frame_index=index,
        pts=index * 100,
        pts_s=index / 25,
        rgb=rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8),
    )


def make_boxes(chunk: FrameChunk, num: int, seed: int) -> Boxes:
    rng = np.random.default_rng(seed)
    width, height = chunk.image_size_wh
    low = rng.uniform([-20, -20], [width * 0.6, height * 0.6], (num, 2))
    size = rng.uniform(30, 120, (num, 2))
    rows = np.sort(rng.integers(0, chunk.num_frames, num))
    return rows, np.concatenate([low, low + size], axis=1).astype(np.float32)


NO_BOXES = np.zeros(0, np.int64), np.zeros((0, 4), np.float32)


@pytest.fixture(scope="module")
def work() -> tuple[list[FrameChunk], list[Boxes]]:
    """Three videos of different sizes; nobody in the second."""
    chunks = [
        make_chunk("a", 4, 120, 160, 0),
        make_chunk("b", 2, 64, 64, 1),
        make_chunk("c", 3, 200, 90, 2),
    ]
    return chunks, [make_boxes(chunks[0], 5, 0), NO_BOXES, make_boxes(chunks[2], 4, 1)]


def bodies(reconstructor: Reconstructor, *work: Any) -> list[People]:
    found = reconstructor.reconstruct(*work)
    assert all(chunk.texture is None and chunk.appearance is None for chunk in found)
    return [chunk.people for chunk in found]


def assert_same(found: People, expected: People) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_people_come_back_in_the_order_of_their_boxes(model: Hmr2, work: Any) -> None:
    chunks, boxes = work
    people = bodies(Reconstructor(model), chunks, boxes)
    assert [len(p) for p in people] == [5, 0, 4]
    for chunk, (rows, bbox), found in zip(chunks, boxes, people, strict=True):
        center, size = crop_square(bbox)
        np.testing.assert_array_equal(found.box_center_px, center)
        np.testing.assert_array_equal(found.box_size_px, size)
        for i in range(len(rows)):
            one = slice(i, i + 1)
            inputs = (chunk.rgb, rows[one], center[one], size[one])
            with torch.inference_mode():
                expected = model(crop_batch(*(torch.from_numpy(a) for a in inputs)))
            np.testing.assert_array_equal(found.body_pose[i], expected.body_pose[0])
            np.testing.assert_array_equal(found.global_orient[i], expected.global_orient[0])
            np.testing.assert_array_equal(found.betas[i], expected.betas[0])
            np.testing.assert_array_equal(found.pred_cam[i], expected.pred_cam[0])
            np.testing.assert_array_equal(found.keypoints_3d_m[i], expected.keypoints_3d[0])


def test_a_person_is_the_same_whatever_its_companions(model: Hmr2, work: Any) -> None:
    chunks, boxes = work
    together = bodies(Reconstructor(model), chunks, boxes)
    # Another order of the chunks moves everybody to another place with other neighbours.
    turned = bodies(Reconstructor(model), chunks[::-1], boxes[::-1])
    for found, expected in zip(turned[::-1], together, strict=True):
        assert_same(found, expected)
    rows, bbox = boxes[0]
    for i in range(len(rows)):
        one = [(rows[i : i + 1], bbox[i : i + 1])]
        alone = bodies(Reconstructor(model), chunks[:1], one)
        assert_same(alone[0], together[0].take(slice(i, i + 1)))


@pytest.mark.parametrize("batch_size", [3, 8])
def test_batch_sizes_agree_to_rounding(model: Hmr2, work: Any, batch_size: int) -> None:
    one, many = (bodies(Reconstructor(model, batch_size=b), *work) for b in (1, batch_size))
    for found, expected in zip(many, one, strict=True):
        for name in FIELDS:
            np.testing.assert_allclose(
                getattr(found, name), getattr(expected, name), rtol=0, atol=1e-4, err_msg=name
            )


def test_read_only_frames_are_read_without_a_warning(model: Hmr2, work: Any) -> None:
    chunks, boxes = work
    expected = bodies(Reconstructor(model), chunks[:1], boxes[:1])
    rgb = chunks[0].rgb.copy()
    rgb.setflags(write=False)
    chunk = FrameChunk("a", chunks[0].frame_index, chunks[0].pts, chunks[0].pts_s, rgb)
    assert_same(bodies(Reconstructor(model), [chunk], boxes[:1])[0], expected[0])


def test_nothing_to_do(model: Hmr2, work: Any) -> None:
    chunks, _ = work
    reconstructor = Reconstructor(model)
    assert reconstructor.reconstruct([], []) == []
    found = bodies(reconstructor, chunks, [NO_BOXES] * 3)
    assert [len(people) for people in found] == [0, 0, 0]
    assert reconstructor.num_people == 0


class Counting(Hmr2):
    """Notes the sizes of its batches; pretends that larger ones exceed the memory."""

    fits: int
    seen: list[int]

    def forward(self, crops: torch.Tensor, *, with_vertices: bool = False) -> HmrOutput:
        self.seen.append(len(crops))
        if len(crops) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(crops, with_vertices=with_vertices)


def counting(model: Hmr2, *, fits: int) -> Counting:
    copy = Counting(
        model.backbone,
        model.smpl_head,
        model.body,
        size_name=model.size_name,
        weights_origin=model.weights_origin,
        weights_digest=model.weights_digest,
    )
    copy.fits, copy.seen = fits, []
    return copy


def test_batches_are_full_and_mix_videos(model: Hmr2, work: Any) -> None:
    counted = counting(model, fits=100)
    Reconstructor(counted, batch_size=4).reconstruct(*work)
    assert counted.seen == [4, 4, 4]  # nine people


def test_out_of_memory_halves_the_batch_and_loses_nobody(
    model: Hmr2, work: Any, caplog: pytest.LogCaptureFixture
) -> None:
    counted = counting(model, fits=2)
    reconstructor = Reconstructor(counted, batch_size=8)
    with caplog.at_level(logging.WARNING):
        found = bodies(reconstructor, *work)
    assert counted.seen == [8, 4, 2, 2, 2, 2, 2]
    assert reconstructor.batch_size == 2
    assert [r.message for r in caplog.records] == [
        "out of device memory: batches of 4 crops from now on",
        "out of device memory: batches of 2 crops from now on",
    ]
    for got, expected in zip(found, bodies(Reconstructor(model, batch_size=2), *work), strict=True):
        assert_same(got, expected)


def test_a_single_crop_that_does_not_fit_is_an_error(model: Hmr2, work: Any) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Reconstructor(counting(model, fits=0), batch_size=2).reconstruct(*work)


def test_results_that_are_not_finite_are_kept_and_named(
    body: SmplBody, model: Hmr2, work: Any, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["smpl_head.deccam.bias"][0] = float("nan")
    broken = build_hmr2("mini", body, weights, origin="imported", device="cpu")
    reconstructor = Reconstructor(broken)
    with caplog.at_level(logging.WARNING):
        found = bodies(reconstructor, *work)
    assert np.isnan(found[0].pred_cam[:, 0]).all()
    assert np.isfinite(found[0].body_pose).all()
    assert (reconstructor.num_people, reconstructor.num_non_finite) == (9, 9)
    frames = np.unique(work[0][2].frame_index[work[1][2][0]]).tolist()
    assert caplog.records[-1].message == f"video c, frames {frames}: results that are not finite"
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("row", "box", "message"),
    [
        (4, [0, 0, 9, 9], r"video a, frames from \[10\]: expected rows 0 to 3, got \[4\]"),
        (2, [0, 0, np.nan, 9], "video a, frame 12: expected a finite box .*, got"),
        (2, [5, 0, 5, 9], r"video a, frame 12: .* got \[5.0, 0.0, 5.0, 9.0\]"),
        (2, [0, 0, 9], r"expected rows \(1,\) and boxes \(1, 4\), got \(1,\) and \(1, 3\)"),
    ],
)
def test_wrong_boxes_are_refused_by_name(
    model: Hmr2, work: Any, row: int, box: list[float], message: str
) -> None:
    chunk = work[0][0]
    boxes = np.array([row]), np.array([box], np.float32)
    with pytest.raises(ValueError, match=message):
        Reconstructor(model).reconstruct([chunk], [boxes])


def test_batch_size_must_be_positive(model: Hmr2) -> None:
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        Reconstructor(model, batch_size=0)


# ---------------------------------------------------------------- how people look

Masks = list[list[RleMask] | None]


@pytest.fixture(scope="module")
def sampler(body: SmplBody) -> TextureSampler:
    return TextureSampler(body.faces, body_atlas(body))


@pytest.fixture(scope="module")
def masks(work: Any) -> Masks:
    """Ellipses for the first video; its boxes stand for the masks of the third."""
    chunk, (_, boxes) = work[0][0], work[1][0]
    width, height = chunk.image_size_wh
    y, x = np.mgrid[:height, :width]
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    dx, dy = (
        (axis - center[:, i, None, None]) / half[:, i, None, None] for i, axis in enumerate((x, y))
    )
    return [encode_rle(dx**2 + dy**2 < 1), [], None]


def mean_colour(packed: torch.Tensor) -> torch.Tensor:
    """Stands for the projection: sizes of batches do not change it."""
    assert packed.dtype == torch.uint8
    return packed.double().mean(dim=3).flatten(1)[:, :256].half()


def assert_same_looks(found: list[Reconstruction], expected: list[Reconstruction]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert_same(got.people, wanted.people)
        assert got.texture is not None
        np.testing.assert_array_equal(got.texture, wanted.texture)
        np.testing.assert_array_equal(got.appearance, wanted.appearance)


def test_textures_are_those_of_the_crops_masks_and_surfaces(
    model: Hmr2, sampler: TextureSampler, work: Any, masks: Masks
) -> None:
    chunks, boxes = work
    found = Reconstructor(model, sampler=sampler).reconstruct(chunks, boxes, masks)
    assert [one.texture.shape for one in found] == [(n, 4, 256, 256) for n in (5, 0, 4)]
    for chunk, (rows, bbox), given, got in zip(chunks, boxes, masks, found, strict=True):
        square = [torch.from_numpy(part) for part in crop_square(bbox)]
        for i in range(len(rows)):
            one = slice(i, i + 1)
            place = [part[one] for part in square]
            if given is None:
                mask = box_mask(bbox[i], chunk.rgb.shape[1:3])
            else:
                mask = decode_rle(given[i])
            dense = torch.from_numpy(mask[None] * np.uint8(255))
            mask_crop = crop_masks(dense, torch.zeros(1, dtype=torch.long), *place)
            with torch.inference_mode():
                frames = torch.from_numpy(chunk.rgb)
                crop = crop_batch(frames, torch.from_numpy(rows[one]), *place)
                out = model(crop, with_vertices=True)
                maps = sampler.sample(out.vertices, out.pred_cam_t, crop, mask_crop.clamp(max=1))
            np.testing.assert_array_equal(got.texture[one], pack_texture(maps).numpy())
            np.testing.assert_array_equal(got.people.pred_cam[one], out.pred_cam.numpy())
    num_seen = [one.texture[:, 3].any(axis=(1, 2)).sum() for one in found]
    assert num_seen[0] >= 3  # untrained weights may put bodies beyond the far plane
    assert num_seen[2] >= 2


def test_looks_are_the_same_whatever_the_companions(
    model: Hmr2, sampler: TextureSampler, work: Any, masks: Masks
) -> None:
    chunks, boxes = work
    reconstructor = Reconstructor(model, sampler=sampler, embed=mean_colour)
    together = reconstructor.reconstruct(chunks, boxes, masks)
    turned = reconstructor.reconstruct(chunks[::-1], boxes[::-1], masks[::-1])
    assert_same_looks(turned[::-1], together)
    first = together[0]
    for i in (0, 4):
        one = slice(i, i + 1)
        alone = reconstructor.reconstruct(
            chunks[:1], [(boxes[0][0][one], boxes[0][1][one])], [masks[0][one]]
        )
        assert first.appearance is not None
        wanted = Reconstruction(first.people.take(one), first.texture[one], first.appearance[one])
        assert_same_looks(alone, [wanted])


def test_without_looks_the_bodies_differ_by_rounding_only(
    model: Hmr2, sampler: TextureSampler, work: Any
) -> None:
    plain = bodies(Reconstructor(model), *work)
    found = Reconstructor(model, sampler=sampler).reconstruct(*work)
    for got, expected in zip(found, plain, strict=True):
        np.testing.assert_array_equal(got.people.body_pose, expected.body_pose)
        np.testing.assert_allclose(
            got.people.keypoints_3d_m, expected.keypoints_3d_m, rtol=0, atol=3e-6
        )


def test_a_box_stands_for_a_mask_in_every_bit() -> None:
    rng = np.random.default_rng(3)
    low = rng.uniform(-40, 120, (40, 2)).astype(np.float32)
    low[:20] = low[:20].round()  # whole numbers are where rounding shows
    boxes = np.concatenate([low, low + rng.uniform(2, 150, (40, 2)).round(1)], 1).astype(np.float32)
    square = [torch.from_numpy(part) for part in crop_square(boxes)]
    dense = torch.from_numpy(box_mask(boxes, (90, 130)) * np.uint8(255))
    expected = crop_masks(dense, torch.arange(40), *square)
    assert torch.equal(_box_crops(boxes, (90, 130), *square, torch.device("cpu")), expected)
    assert expected.any(dim=2).any(dim=1).sum() > 25


@pytest.mark.parametrize("batch_size", [2, 4])
def test_last_batches_are_filled_up_for_the_projection_too(
    model: Hmr2, sampler: TextureSampler, work: Any, masks: Masks, batch_size: int
) -> None:
    sizes = []

    def embed(packed: torch.Tensor) -> torch.Tensor:
        sizes.append(len(packed))
        return mean_colour(packed)

    reconstructor = Reconstructor(model, batch_size=batch_size, sampler=sampler, embed=embed)
    found = reconstructor.reconstruct(*work, masks)
    assert set(sizes) == {batch_size}
    one = Reconstructor(model, sampler=sampler, embed=mean_colour).reconstruct(*work, masks)
    for got, expected in zip(found, one, strict=True):
        assert got.appearance is not None
        assert got.appearance.dtype == np.float16
        assert got.appearance.shape == (len(got.people), 256)
        # the last bits of a body move some texels over the limit of visibility
        assert (got.texture != expected.texture).sum() <= 0.02 * got.texture.size


class Greedy(TextureSampler):
    """Pretends that more than two people at a time exceed the memory."""

    def sample(self, vertices: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        if len(vertices) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().sample(vertices, *rest, **more)


def test_out_of_memory_while_sampling_halves_the_batch_too(
    model: Hmr2, body: SmplBody, sampler: TextureSampler, work: Any, masks: Masks
) -> None:
    greedy = Reconstructor(
        model, batch_size=8, sampler=Greedy(body.faces, body_atlas(body)), embed=mean_colour
    )
    found = greedy.reconstruct(*work, masks)
    assert greedy.batch_size == 2
    two = Reconstructor(model, batch_size=2, sampler=sampler, embed=mean_colour)
    assert_same_looks(found, two.reconstruct(*work, masks))


def test_nobody_has_no_looks(model: Hmr2, sampler: TextureSampler, work: Any) -> None:
    reconstructor = Reconstructor(model, sampler=sampler, embed=mean_colour)
    (found,) = reconstructor.reconstruct(work[0][:1], [NO_BOXES])
    assert found.texture is not None
    assert found.appearance is not None
    assert (found.texture.shape, found.appearance.shape) == ((0, 4, 256, 256), (0, 256))


def test_masks_of_another_number_or_size_are_refused_by_name(
    model: Hmr2, work: Any, masks: Masks
) -> None:
    chunks, boxes = work
    message = r"video a, frames from \[10\]: expected 5 masks of \(120, 160\), got 4 of"
    with pytest.raises(ValueError, match=message):
        Reconstructor(model).reconstruct(chunks[:1], boxes[:1], [masks[0][:4]])
    small = [RleMask((2, 2), b"4")] * 4
    with pytest.raises(ValueError, match=r"video c, .* got 4 of \[\(2, 2\)\]"):
        Reconstructor(model).reconstruct(chunks[2:], boxes[2:], [small])


def test_vectors_need_maps(model: Hmr2) -> None:
    with pytest.raises(ValueError, match="embed: expected a sampler"):
        Reconstructor(model, embed=mean_colour)


class Finds:
    """A detector that finds what it is given, by video."""

    def __init__(self, found: dict[str, Detections]) -> None:
        self.found = found

    def detect(self, chunk: FrameChunk) -> Detections:
        return self.found[chunk.video_id]


@pytest.mark.parametrize("with_looks", [True, False])
def test_the_engine_hands_on_the_looks_of_the_boxes_that_it_keeps(
    model: Hmr2, sampler: TextureSampler, work: Any, masks: Masks, with_looks: bool
) -> None:
    chunks, boxes = work
    kept = np.array([True, False, True, False, True])
    found = {
        chunk.video_id: Detections(
            frame_row=rows,
            bbox_xyxy_px=bbox,
            score=kept.astype(np.float32)[: len(rows)],
            masks=given,
            mask_source="box" if given is None else "detector",
        )
        for chunk, (rows, bbox), given in zip(chunks, boxes, masks, strict=True)
    }
    if with_looks:
        reconstructor = Reconstructor(model, sampler=sampler, embed=mean_colour)
    else:
        reconstructor = Reconstructor(model)
    engine = Engine(
        Finds(found), reconstructor, score_threshold=0.5, min_width_px=0, min_height_px=0
    )
    wanted = reconstructor.reconstruct(
        chunks,
        [(rows[kept[: len(rows)]], bbox[kept[: len(rows)]]) for rows, bbox in boxes],
        [[masks[0][0], masks[0][2], masks[0][4]], [], None],
    )
    for got, expected in zip(engine.run(chunks), wanted, strict=True):
        assert_same(got.people, expected.people)
        assert (got.texture is not None) == (got.appearance is not None) == with_looks
        np.testing.assert_array_equal(got.texture, expected.texture)
        np.testing.assert_array_equal(got.appearance, expected.appearance)
