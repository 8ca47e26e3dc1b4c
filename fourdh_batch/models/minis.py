"""The small trained models of this package, for which the word `mini` stands in place of a path.

Made by `jobs/train_*.py` on synthetic people; `assets/mini/CARDS.md` says of each with what
command, on which data, and how good it is.
"""

from __future__ import annotations

from pathlib import Path

MINI = "mini"
FOLDER = Path(__file__).resolve().parents[1] / "assets" / "mini"
HMR2 = "hmr2.safetensors"
TEXTURE = "appearance.safetensors"
PREDICTOR = "pose_predictor.safetensors"
# Folders for `detector.name=transformers`, and the words for them.
DETECTOR, SEGMENTER = "detector", "segmenter"
MINI_SEGMENTER = "mini-segmenter"
DETECTOR_WORDS = {MINI: DETECTOR, MINI_SEGMENTER: SEGMENTER}


def shipped(path: str | Path, name: str) -> Path:
    """The path itself, or for the word `mini` that of the shipped model of this name.

    Resolved where a file is opened: every machine has its own copy of the package.
    """
    return FOLDER / name if str(path) == MINI else Path(path)


def shipped_detector(path: str | Path) -> Path:
    """As `shipped`, of a detector: there are two, `DETECTOR_WORDS`."""
    name = DETECTOR_WORDS.get(str(path))
    return Path(path) if name is None else FOLDER / name
