"""The import direction of the package, and the one door of every heavy library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fourdh_batch"

# A module may import what stands on a lower level; names on one level never import each other.
LEVELS: list[set[str]] = [
    {"types", "errors"},
    {"geometry", "storage", "rasterizer", "masks"},
    {"config", "logs", "video", "models", "tracking", "tables", "view"},
    {"synthetic", "evaluate"},
    {"pipeline", "training"},
    {"cluster"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}

# library: the modules that may import it
DOORS: dict[str, set[str]] = {
    "av": {"video.scan", "video.decode", "view.overlay", "synthetic.corpus"},
    "decord": {"video.decode"},
    "tensorboard": set(),
    "cv2": {
        *("video.shots", "models.detector", "models.detector_onnx", "view.overlay"),
        *("training.augment", "training.tars", "evaluate.benchmarks"),
    },
    "ray": {
        *("cluster.decoding", "cluster.metrics", "cluster.model_actor", "cluster.run"),
        *("cluster.tracker_actor", "training.distributed"),
    },
    "smplx": {"models.smpl"},
    "onnxruntime": {"models.detector_onnx"},
    "transformers": {"models.detector_transformers"},
    "detectron2": {"models.detector_detectron2"},
    "fsspec": {"storage"},
    "omegaconf": {"config"},
    "pickle": {"models.unpickle"},
    "trackeval": {"evaluate.tracking"},
    "typer": {"cli"},
    "s3fs": set(),
    "torchvision": set(),
    "timm": set(),
    "pytorch3d": set(),
    "chumpy": set(),
}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", modules())
def test_imports_go_in_one_direction(name: str) -> None:
    top = name.split(".")[0]
    for target in imports(modules()[name]):
        if not target.startswith("fourdh_batch."):
            continue
        other = target.split(".")[1]
        if other in (top, "__version__"):
            continue
        assert other in LEVEL_OF, f"{name} imports {target}, which has no level"
        assert LEVEL_OF[other] < LEVEL_OF[top], f"{name} must not import {target}"


@pytest.mark.parametrize("name", modules())
def test_a_heavy_library_stays_behind_its_door(name: str) -> None:
    for target in imports(modules()[name]):
        library = target.split(".")[0]
        if library in DOORS:
            assert name in DOORS[library], f"{name} must not import {library}"


@pytest.mark.parametrize(
    "name",
    ["cluster.decoding", "cluster.tracker_actor", "pipeline.retrack", "tables.reader"],
)
def test_light_processes_do_without_the_model_libraries(name: str) -> None:
    heavy = "torch", "onnxruntime", "transformers", "smplx"
    code = f"import sys, fourdh_batch.{name}; print(*({heavy} & sys.modules.keys()))"
    code = code.replace(str(heavy), repr(set(heavy)))
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == ""
