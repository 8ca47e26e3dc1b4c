"""Hugging Face detectors: tiny random models, saved and loaded through the door, offline.

The reference is the library's own `RTDetrImageProcessorPil` (preparation and post-processing).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from fourdh_batch.errors import CheckpointError
from fourdh_batch.masks import decode_rle
from fourdh_batch.models.detector import build_detector
from fourdh_batch.models.detector_transformers import Preparation, TransformersDetector, frame_masks
from fourdh_batch.types import Detections, FrameChunk

transformers = pytest.importorskip("transformers")

SLOW = pytest.mark.slow
LABELS = {0: "dog", 1: "Person", 2: "car"}
SIZE_PX = 64
FRAME_WH = (96, 60)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

TINY_DECODER = {
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [16, 16, 16],
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "num_queries": 30,
    "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_denoising": 0,
}


def tiny_config(family: str, labels: dict[int, str]) -> Any:
    common = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    if family == "rf_detr":
        backbone = {
            "model_type": "rf_detr_dinov2",
            "image_size": SIZE_PX,
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "num_windows": 2,
            "out_indices": [2, 4],
        }
        return transformers.RfDetrConfig(
            backbone_config=backbone,
            d_model=32,
            num_queries=30,
            group_detr=2,
            decoder_layers=2,
            decoder_self_attention_heads=2,
            decoder_cross_attention_heads=4,
            decoder_ffn_dim=32,
            intermediate_size=32,
            **common,
        )
    if family == "d_fine":
        backbone = transformers.HGNetV2Config(
            stage_in_channels=[8, 8, 16, 16],
            stage_mid_channels=[4, 4, 8, 8],
            stage_out_channels=[8, 16, 16, 16],
            stage_num_blocks=[1, 1, 1, 1],
            stage_downsample=[False, True, True, True],
            stage_light_block=[False, False, True, True],
            stage_kernel_size=[3, 3, 5, 5],
            stage_numb_of_layers=[1, 1, 1, 1],
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 16],
            depths=[1, 1, 1, 1],
            stem_channels=[3, 8, 8],
            out_features=["stage2", "stage3", "stage4"],
        )
        return transformers.DFineConfig(
            backbone_config=backbone, hidden_expansion=0.5, **TINY_DECODER, **common
        )
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    kind = {"rt_detr": transformers.RTDetrConfig, "rt_detr_v2": transformers.RTDetrV2Config}[family]
    return kind(backbone_config=backbone, **TINY_DECODER, **common)


MODELS = {
    "rt_detr": "RTDetrForObjectDetection",
    "rt_detr_v2": "RTDetrV2ForObjectDetection",
    "d_fine": "DFineForObjectDetection",
    "rf_detr": "RfDetrForObjectDetection",
    "rf_detr_seg": "RfDetrForInstanceSegmentation",
}


def save(folder: Path, kind: str, labels: dict[int, str] = LABELS) -> str:
    """A tiny model with weights large enough that frames and queries differ."""
    family = kind.removesuffix("_seg")
    torch.manual_seed(11)
    model = getattr(transformers, MODELS[kind])(tiny_config(family, labels))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("class_embed.bias"):
                tensor.zero_()  # else every score is near 0.01
            if tensor.dim() > 1:
                fan_in = tensor[0].numel()
                tensor.normal_(0, 1.2 * fan_in**-0.5, generator=generator)
    model.save_pretrained(folder)
    normalize = family == "rf_detr"
    processor = {
        "image_processor_type": "RfDetrImageProcessor" if normalize else "RTDetrImageProcessor",
        "size": {"height": SIZE_PX, "width": SIZE_PX},
        "resample": 2,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": normalize,
        **IMAGENET,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


class Saved(dict[str, str]):
    """Directories of tiny models, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, kind: str) -> str:
        self[kind] = save(self._folder / kind, kind)
        return self[kind]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("models"))


def load(path: str, **options: Any) -> TransformersDetector:
    options = {"device": "cpu", "min_score": 0.02, "batch_size": 2} | options
    return TransformersDetector(path, **options)


@pytest.fixture(scope="module")
def chunk() -> FrameChunk:
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (3, 6, 9, 3), dtype=np.uint8)
    rgb = np.stack([cv2.resize(frame, FRAME_WH, interpolation=cv2.INTER_CUBIC) for frame in small])
    t = np.arange(3)
    return FrameChunk("v", t, t, t / 25.0, rgb)


def library_processor(kind: str) -> Any:
    return transformers.RTDetrImageProcessorPil(
        size={"height": SIZE_PX, "width": SIZE_PX},
        do_normalize=kind.startswith("rf_detr"),
        **IMAGENET,
    )


def frame_of(found: Detections, row: int) -> tuple[np.ndarray, np.ndarray]:
    here = found.frame_row == row
    return found.bbox_xyxy_px[here], found.score[here]


@pytest.mark.parametrize(
    "kind",
    [
        "d_fine",
        "rf_detr_seg",
        *(pytest.param(k, marks=SLOW) for k in ("rt_detr", "rt_detr_v2", "rf_detr")),
    ],
)
def test_boxes_equal_those_of_the_library(kind: str, saved: Saved, chunk: FrameChunk) -> None:
    detector = load(saved[kind], batch_size=3)
    found = detector.detect(chunk)
    assert detector.name == f"transformers_{kind.removesuffix('_seg')}"

    model = getattr(transformers, MODELS[kind]).from_pretrained(saved[kind], use_safetensors=True)
    prepare = detector._prepare
    with torch.inference_mode():
        outputs = model.eval()(pixel_values=prepare(chunk.rgb, torch.device("cpu"), torch.float32))
    results = library_processor(kind).post_process_object_detection(
        outputs, threshold=0.02, target_sizes=[(FRAME_WH[1], FRAME_WH[0])] * 3
    )
    total = 0
    for row, result in enumerate(results):
        is_person = result["labels"] == 1
        boxes, scores = frame_of(found, row)
        # The library keeps the best 30 of all classes together, we every person.
        count = int(is_person.sum())
        assert count <= len(scores)
        np.testing.assert_array_equal(scores[:count], result["scores"][is_person].numpy())
        expected = result["boxes"][is_person].numpy()
        limit = np.array([*FRAME_WH, *FRAME_WH])
        np.testing.assert_allclose(boxes[:count], np.clip(expected, 0, limit), atol=1e-4)
        total += count
    assert total >= 5
    assert found.score.std() > 0.005


@pytest.mark.parametrize("kind", ["d_fine", pytest.param("rt_detr_v2", marks=SLOW)])
def test_the_whole_way_agrees_with_the_library(kind: str, saved: Saved, chunk: FrameChunk) -> None:
    """From the frame on, at the size of the network: a grey level moves boxes of a random one."""
    rgb = np.ascontiguousarray(chunk.rgb.repeat(2, axis=1)[:, :SIZE_PX, :SIZE_PX])
    found = load(saved[kind], batch_size=3).detect(
        FrameChunk("v", chunk.frame_index, chunk.pts, chunk.pts_s, rgb)
    )
    processor = library_processor(kind)
    model = getattr(transformers, MODELS[kind]).from_pretrained(saved[kind], use_safetensors=True)
    with torch.inference_mode():
        outputs = model.eval()(**processor(images=list(rgb), return_tensors="pt"))
    results = processor.post_process_object_detection(
        outputs, threshold=0.02, target_sizes=[(64, 64)] * 3
    )
    for row, result in enumerate(results):
        is_person = result["labels"] == 1
        boxes, scores = frame_of(found, row)
        count = int(is_person.sum())
        assert count > 0
        np.testing.assert_allclose(scores[:count], result["scores"][is_person], atol=1e-5)
        expected = np.clip(result["boxes"][is_person].numpy(), 0, 64)
        np.testing.assert_allclose(boxes[:count], expected, atol=1e-3)


@pytest.mark.parametrize(("width", "height"), [(96, 60), (40, 130), (64, 64)])
def test_preparation_is_within_a_grey_level_of_pil(width: int, height: int) -> None:
    rng = np.random.default_rng(2)
    rgb = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    for kind, normalize in (("d_fine", False), ("rt_detr", True)):
        processor = transformers.RTDetrImageProcessorPil(
            size={"height": SIZE_PX, "width": SIZE_PX}, do_normalize=normalize, **IMAGENET
        )
        expected = processor(images=list(rgb), return_tensors="pt")["pixel_values"]
        prepare = Preparation(processor.to_dict(), kind, None, "model")
        got = prepare(rgb, torch.device("cpu"), torch.float32)
        level = 1 / 255 / (min(IMAGENET["image_std"]) if normalize else 1)
        difference = (got - expected).abs()
        assert difference.max() <= level * 1.001
        if width >= height:  # Pillow goes down first where that is cheaper; then more pixels differ
            assert (difference > level / 2).float().mean() < 0.03


def test_rf_detr_is_scaled_without_a_low_pass() -> None:
    """Its published processor interpolates between the four nearest pixels, also scaling down."""
    rng = np.random.default_rng(2)
    rgb = rng.integers(0, 256, (1, 150, 200, 3), dtype=np.uint8)
    processor = {"size": {"height": 48, "width": 64}, "do_normalize": True, **IMAGENET}
    got = Preparation(processor, "rf_detr", None, "m")(rgb, torch.device("cpu"), torch.float32)
    expected = cv2.resize(rgb[0].astype(np.float32) / 255, (64, 48), interpolation=cv2.INTER_LINEAR)
    expected = (expected - np.array(IMAGENET["image_mean"])) / np.array(IMAGENET["image_std"])
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["d_fine", "rf_detr_seg"])
def test_a_frame_does_not_depend_on_its_companions(
    kind: str, saved: Saved, chunk: FrameChunk
) -> None:
    detector = load(saved[kind])
    t = np.arange(2)
    first = detector.detect(FrameChunk("v", t, t, t / 25.0, chunk.rgb[:2]))
    second = detector.detect(FrameChunk("v", t, t, t / 25.0, chunk.rgb[[2, 1]]))
    for a, b in zip(frame_of(first, 1), frame_of(second, 1), strict=True):
        np.testing.assert_array_equal(a, b)
    # A short batch is filled up; another place in the batch may change the last bit.
    alone = detector.detect(FrameChunk("v", t[:1], t[:1], t[:1] / 25.0, chunk.rgb[1:2]))
    np.testing.assert_allclose(alone.score, frame_of(first, 1)[1], rtol=1e-5)
    np.testing.assert_allclose(alone.bbox_xyxy_px, frame_of(first, 1)[0], atol=1e-3)


def test_segmenter_gives_masks_of_the_frame(saved: Saved, chunk: FrameChunk) -> None:
    detector = load(saved["rf_detr_seg"], batch_size=3)
    assert detector.gives_masks
    found = detector.detect(chunk)
    assert found.mask_source == "detector"
    assert found.masks is not None

    model = transformers.RfDetrForInstanceSegmentation.from_pretrained(
        saved["rf_detr_seg"], use_safetensors=True
    )
    with torch.inference_mode():
        pixels = detector._prepare(chunk.rgb, torch.device("cpu"), torch.float32)
        outputs = model.eval()(pixel_values=pixels)
    for row in range(3):
        score = outputs.logits[row, :, 1].sigmoid()
        queries = torch.argsort(score, descending=True, stable=True)
        here = np.flatnonzero(found.frame_row == row)
        for detection, query in zip(here[:10], queries[:10], strict=True):
            logits = outputs.pred_masks[row, query].numpy()
            expected = cv2.resize(logits, FRAME_WH, interpolation=cv2.INTER_LINEAR) > 0
            got = decode_rle(found.masks[detection])
            assert got.shape == (FRAME_WH[1], FRAME_WH[0])
            assert (got != expected).mean() < 1e-3
    areas = [decode_rle(mask).mean() for mask in found.masks]
    assert 0.01 < np.mean(areas) < 0.99


def test_masks_are_scaled_up_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 12, 12, generator=torch.Generator().manual_seed(0))
    whole = frame_masks(logits, (60, 96))
    monkeypatch.setattr("fourdh_batch.models.detector_transformers.MASK_BLOCK_PIXELS", 2 * 60 * 96)
    assert frame_masks(logits, (60, 96)) == whole
    assert len(whole) == 7


@pytest.mark.slow
def test_half_precision_runs_and_stays_close(saved: Saved, chunk: FrameChunk) -> None:
    for kind in ("rf_detr", "d_fine"):
        full, half = load(saved[kind]), load(saved[kind], half=True)
        assert full.digest != half.digest
        a, b = full.detect(chunk), half.detect(chunk)
        for row in range(3):
            np.testing.assert_allclose(
                frame_of(a, row)[1].max(), frame_of(b, row)[1].max(), atol=0.05
            )


def test_digest_tells_weights_size_and_floor_but_not_the_batch(saved: Saved) -> None:
    digest = load(saved["d_fine"]).digest
    assert load(saved["d_fine"], batch_size=5).digest == digest
    others = [load(saved["d_fine"], min_score=0.3), load(saved["d_fine"], input_size=96)]
    others.append(load(saved["rf_detr_seg"]))
    assert len({digest, *(other.digest for other in others)}) == 4


def test_another_input_size_is_used(saved: Saved, chunk: FrameChunk) -> None:
    found = build_detector(
        "transformers", path=saved["d_fine"], device="cpu", input_size=96, min_score=0.02
    ).detect(chunk)
    assert len(found) > 0
    assert found.score.tolist() != load(saved["d_fine"]).detect(chunk).score.tolist()


# --- refusals ----------------------------------------------------------------------------------


def test_a_model_without_a_person_lists_its_labels(tmp_path: Path) -> None:
    path = save(tmp_path, "rf_detr", {0: "cat", 1: "dog"})
    with pytest.raises(CheckpointError, match=r"'person' .* got 0 among \['cat', 'dog'\]"):
        load(path)


def test_missing_tensors_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = save(tmp_path, "rf_detr")
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = next(name for name in sorted(tensors) if "class_embed" in name)
    del tensors[dropped]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors of RfDetrForObjectDetection are not in"):
        load(path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, "rf_detr")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"expected config\.json, model\.safetensors"):
        load(path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "rf_detr")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"expected config\.json, model\.safetensors"):
        load(path)


def test_a_missing_processor_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "rf_detr")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [{"size": {"shortest_edge": 800, "longest_edge": 1333}}, {"resample": 0}, {"do_resize": False}],
)
def test_a_processor_that_works_otherwise_is_refused(
    change: dict[str, object], tmp_path: Path
) -> None:
    path = save(tmp_path, "rf_detr")
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"expected do_resize to a size of height and width"):
        load(path)


def test_another_family_is_refused(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a model of d_fine, .* got 'vit'"):
        load(str(tmp_path))


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}})
    )
    marker = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nOwnConfig = None\n")
    with pytest.raises(CheckpointError, match="expected config"):
        load(str(tmp_path))
    assert not marker.exists()
