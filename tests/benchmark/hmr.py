"""HMR 2.0 on a CPU: precision and batch size, mini and full size."""

from __future__ import annotations

import time
from typing import Any

import torch

from fourdh_batch.models.build import untrained_hmr2
from fourdh_batch.models.smpl import load_body
from tests.benchmark.timing import ratio


def run() -> list[dict[str, Any]]:
    body = load_body()
    figures = []
    for size, num_crops, rounds in (("mini", 16, 5), ("vit_h", 2, 2)):
        crops = torch.rand(num_crops, 3, 256, 256)
        model = {p: untrained_hmr2(size, body, device="cpu", precision=p) for p in ("fp32", "bf16")}

        def forward(precision: str, batch: int, model: Any = model, crops: Any = crops) -> None:
            with torch.inference_mode():
                for part in crops.split(batch or len(crops)):
                    model[precision](part)

        figures.append(
            ratio(
                f"{size}: bf16 backbone / fp32, wall time, batch {num_crops}",
                lambda: forward("bf16", 0),
                lambda: forward("fp32", 0),
                rounds=rounds,
                clock=time.perf_counter,
            )
        )
        figures.append(
            ratio(
                f"{size}: batch 1 / batch {num_crops}, fp32, wall time",
                lambda: forward("fp32", 1),
                lambda: forward("fp32", 0),
                rounds=rounds,
                clock=time.perf_counter,
            )
        )
    return figures
