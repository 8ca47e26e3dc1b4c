"""Files of seeded random weights, for tests in which bodies need not mean anything."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from fourdh_batch.models.appearance import KIND, untrained_texture_encoder
from fourdh_batch.models.build import save_hmr2, untrained_hmr2
from fourdh_batch.models.build_phalp import save_pose_predictor, untrained_pose_predictor
from fourdh_batch.models.checkpoint import write_safetensors
from fourdh_batch.models.smpl import load_body


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="untrained-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def untrained_hmr2_file(size: str = "tiny") -> Path:
    path = _folder() / f"{size}.safetensors"
    save_hmr2(untrained_hmr2(size, load_body(), device="cpu"), path, origin="untrained")
    return path


@cache
def untrained_predictor_file() -> Path:
    path = _folder() / "predictor.safetensors"
    save_pose_predictor(untrained_pose_predictor(), path)
    return path


@cache
def untrained_texture_file() -> Path:
    path = _folder() / "texture.safetensors"
    weights = untrained_texture_encoder().state_dict()
    write_safetensors(path, weights, {"kind": KIND, "origin": "untrained"})
    return path
