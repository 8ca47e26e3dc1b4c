"""Tiny real videos, and the boxes that go with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pandas as pd

from fourdh_batch.types import U8
from tests.weights import untrained_hmr2_file


def write_video(path: Path, frames: U8, *, fps: int = 25, gop: int = 12) -> Path:
    """Encode (T, H, W, 3) RGB frames as H.264 in the container that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.options = {"preset": "ultrafast", "crf": "18", "threads": "1"}
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@dataclass
class BoxCorpus:
    """A folder of clips in which coloured blocks walk, and the file of their boxes."""

    folder: Path
    rows: list[dict[str, object]] = field(default_factory=list)

    @property
    def boxes(self) -> Path:
        return self.folder / "boxes.parquet"

    def add(
        self,
        name: str,
        *,
        num_frames: int = 30,
        num_people: int = 2,
        size_wh: tuple[int, int] = (192, 128),
        seed: int = 0,
        miss: float = 0.04,
        cut_at: int | None = None,
    ) -> Path:
        """One clip; each block is unseen in a share `miss` of its frames."""
        rng = np.random.default_rng(seed)
        width, height = size_wh
        place = rng.uniform(5, width - 60, num_people)
        speed = rng.uniform(-1.5, 1.5, num_people)
        colour = rng.integers(40, 255, (num_people, 3))
        frames = np.full((num_frames, height, width, 3), 90, dtype=np.uint8)
        for t in range(num_frames):
            if cut_at is not None and t >= cut_at:
                frames[t] = (15, 200, 235)
            for k in range(num_people):
                x = int(np.clip(place[k] + speed[k] * t, 0, width - 55))
                frames[t, 8:120, x : x + 52] = colour[k]
                if rng.random() > miss:
                    self.rows.append(
                        {
                            "video_id": name,
                            "frame_index": t,
                            "bbox_xyxy_px": [float(x), 8.0, float(x + 52), 120.0],
                            "score": float(rng.choice([0.5, 0.85, 0.95], p=[0.03, 0.47, 0.5])),
                        }
                    )
        path = write_video(self.folder / name, frames)
        self.save()
        return path

    def save(self) -> None:
        """Write the boxes; called by `add`."""
        frame = pd.DataFrame(
            self.rows, columns=["video_id", "frame_index", "bbox_xyxy_px", "score"]
        )
        frame = frame.astype({"frame_index": "int64", "score": "float32"})
        frame.to_parquet(self.boxes)

    def settings(self, output: Path) -> list[str]:
        """Words for a job over this corpus with the smallest untrained model."""
        return [
            f"input={self.folder}",
            f"output={output}",
            "dataset=blocks",
            f"hmr.weights={untrained_hmr2_file()}",
            "hmr.size=tiny",
            "hmr.device=cpu",
            "detector.name=boxes",
            f"detector.path={self.boxes}",
            "video.chunk_frames=16",
            "plan.videos_per_shard=2",
            "cluster.address=local",
        ]
