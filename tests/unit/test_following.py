"""What the tracker's settings make of a tracking process, and what they do to the fingerprint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fourdh_batch.config import load_config
from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.models.appearance import untrained_texture_encoder
from fourdh_batch.models.build_phalp import save_pose_predictor, untrained_pose_predictor
from fourdh_batch.models.checkpoint import write_safetensors
from fourdh_batch.models.smpl import load_body
from fourdh_batch.models.texture import body_atlas
from fourdh_batch.pipeline.engine import model_card
from fourdh_batch.pipeline.following import TrackerModels
from fourdh_batch.tracking.appearance import CompactMemory
from tests.weights import untrained_hmr2_file, untrained_predictor_file, untrained_texture_file


def write_atlas(folder: Path, *, turned: bool) -> None:
    atlas = body_atlas(load_body())
    folder.mkdir(exist_ok=True)
    face, weights = (a[::-1] if turned else a for a in (atlas.face, atlas.barycentric))
    np.save(folder / "fmap_256.npy", face)
    np.save(folder / "bmap_256.npy", weights)


def write_encoder(path: Path, seed: int) -> None:
    encoder = untrained_texture_encoder(seed)
    write_safetensors(path, encoder.state_dict(), {"kind": "texture_encoder", "origin": "trained"})


def settings(folder: Path, *more: str) -> list[str]:
    (folder / "detector.onnx").write_bytes(b"x")
    words = [f"hmr.weights={untrained_hmr2_file()}", "hmr.device=cpu", "detector.name=onnx"]
    return [*words, f"detector.path={folder / 'detector.onnx'}", *more]


def test_the_content_of_every_file_of_the_tracker_counts_in_the_fingerprint(
    tmp_path: Path,
) -> None:
    words = settings(
        tmp_path,
        f"tracker.texture_weights={tmp_path / 'texture.safetensors'}",
        f"tracker.predictor_weights={tmp_path / 'predictor.safetensors'}",
        f"tracker.atlas={tmp_path / 'atlas'}",
    )
    config = load_config(None, words)
    predictor = tmp_path / "predictor.safetensors"
    write_encoder(tmp_path / "texture.safetensors", 0)
    write_atlas(tmp_path / "atlas", turned=False)
    save_pose_predictor(untrained_pose_predictor(0), predictor)
    seen = [model_card(config).fingerprint]
    assert model_card(config).fingerprint == seen[0]
    write_encoder(tmp_path / "texture.safetensors", 1)
    seen.append(model_card(config).fingerprint)
    write_atlas(tmp_path / "atlas", turned=True)
    seen.append(model_card(config).fingerprint)
    save_pose_predictor(untrained_pose_predictor(1), predictor)
    seen.append(model_card(config).fingerprint)
    assert len(set(seen)) == 4


def test_the_card_says_which_cues_count(tmp_path: Path) -> None:
    def cues(*words: str) -> str:
        return model_card(load_config(None, settings(tmp_path, *words))).cues

    assert cues() == "location (ridge) + pose (last seen) + no texture"
    both = cues(
        f"tracker.predictor_weights={untrained_predictor_file()}",
        f"tracker.texture_weights={untrained_texture_file()}",
    )
    assert both == "location (ridge) + pose (predicted) + texture"
    assert cues("tracker.box_weight=2").endswith(" + no texture + boxes")
    ours = cues("tracker.box_weight=2", "tracker.log_cost=true")
    assert ours.endswith(" + no texture + boxes + log cost")


def test_missing_weights_are_found_before_anything_starts(tmp_path: Path) -> None:
    for name in ("texture_weights", "predictor_weights"):
        config = load_config(None, settings(tmp_path, f"tracker.{name}={tmp_path / 'no.pth'}"))
        with pytest.raises(CheckpointError, match=r"no\.pth"):
            model_card(config)


def test_looks_are_kept_as_maps_or_as_stored() -> None:
    config = load_config(None, [f"tracker.texture_weights={untrained_texture_file()}"])
    assert isinstance(TrackerModels(config, compact=True).new_tracker()._texture, CompactMemory)
    assert TrackerModels(load_config(None, [])).new_tracker()._texture is None
    assert TrackerModels(config).new_tracker()._texture is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_tracker_that_wants_a_gpu_and_has_none_says_what_to_do() -> None:
    words = [f"tracker.predictor_weights={untrained_predictor_file()}", "tracker.device=cuda"]
    models = TrackerModels(load_config(None, words))
    with pytest.raises(ConfigError, match=r"give it a share with cluster\.gpus_per_tracker"):
        models.new_tracker()
