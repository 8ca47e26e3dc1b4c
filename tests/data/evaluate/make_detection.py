"""Makes detection.npz: invented boxes and what cocoapi says of them (pycocotools 2.0.11).

python tests/data/evaluate/make_detection.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NUM_FRAMES = 60


def main(path: Path) -> None:
    rng = np.random.default_rng(7)
    truth: list[list[float]] = []
    found: list[list[float]] = []
    for frame in range(NUM_FRAMES):
        for _ in range(rng.integers(0, 7)):
            box = random_box(rng)
            truth.append([frame, *box])
            for _ in range(rng.integers(0, 3)):
                moved = box + rng.normal(0, rng.choice([1, 6, 20]), 4)
                moved[2:] = np.maximum(moved[2:], 5)
                found.append([frame, *np.round(moved, 2), round(rng.uniform(), 2)])
        for _ in range(rng.integers(0, 3)):
            found.append([frame, *random_box(rng), round(rng.uniform(0, 0.7), 2)])
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "width": 640, "height": 480} for i in range(NUM_FRAMES)],
        "annotations": [
            record(row) | {"id": i + 1, "area": row[3] * row[4], "iscrowd": 0}
            for i, row in enumerate(truth)
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    coco.createIndex()
    result = coco.loadRes([record(row) | {"score": row[5]} for row in found])
    run = COCOeval(coco, result, "bbox")
    run.evaluate()
    run.accumulate()
    np.savez_compressed(
        path,
        num_frames=NUM_FRAMES,
        truth_xywh=np.array(truth),  # frame, box
        found_xywh=np.array(found),  # frame, box, score
        ap_per_iou=run.eval["precision"][:, :, 0, 0, 2].mean(axis=1),
        recall_per_iou=run.eval["recall"][:, 0, 0, 2],
    )


def random_box(rng: np.random.Generator) -> Any:
    return np.round([*rng.uniform(0, (500, 240)), *rng.uniform((20, 40), (120, 240))], 2)


def record(row: list[float]) -> dict[str, Any]:
    return {"image_id": int(row[0]), "category_id": 1, "bbox": [float(v) for v in row[1:5]]}


if __name__ == "__main__":
    main(Path(__file__).with_name("detection.npz"))
