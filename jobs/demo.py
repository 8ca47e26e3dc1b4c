"""The main job on a corpus made here: clips of the open body walking, rendered by this package.

  make demo        or        python jobs/demo.py [folder]

No download, no licensed file, no GPU. The HMR weights are random (seeded): boxes, identities,
cameras and tables are real, the body poses are not, and every table, log and picture says so.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pandas as pd

import fourdh_batch as fb
from fourdh_batch.cli import run_job, show
from fourdh_batch.synthetic.corpus import make_corpus
from fourdh_batch.video.decode import read_frames
from fourdh_batch.view.overlay import contact_sheet

SHEET_FRAMES = 8


def main(folder: Path) -> int:
    corpus, tables = folder / "corpus", folder / "tables"
    started = time.monotonic()
    clips = make_corpus(corpus, fb.load_body())
    print(f"made {len(clips)} clips in {corpus} ({time.monotonic() - started:.0f} s)\n")

    words = [f"input={corpus}", f"output={tables}", f"detector.path={corpus / 'boxes.parquet'}"]
    code = run_job(Path(__file__).with_suffix(".yaml"), words)
    if code != 0:
        return code

    tracks = fb.read_tracks(str(tables))
    columns = [
        "video_id",
        "frame_index",
        "pts_s",
        "track_id",
        "state",
        "score",
        "cam_t_m",
        "weights",
    ]
    with pd.option_context("display.width", 120, "display.max_columns", 20, "display.precision", 2):
        print("\nfb.read_tracks(...), the first row of every person:\n")
        print(tracks.groupby(["video_id", "track_id"]).head(1)[columns].to_string())
        print("\nfb.read_table(..., 'videos'):\n")
        videos = fb.read_table(str(tables), "videos")
        print(
            videos[["video_id", "status", "frames_decoded", "num_shots", "num_tracks"]].to_string()
        )

    busiest = str(tracks["video_id"].value_counts().index[0])
    overlay = folder / "overlay.mp4"
    show(str(tables), busiest, overlay)
    count = int(videos.set_index("video_id").loc[busiest, "frames_decoded"])
    step = max(1, count // SHEET_FRAMES)
    frames = [read_frames(str(overlay), i, i + 1).rgb[0] for i in range(0, count, step)]
    contact_sheet(frames[:SHEET_FRAMES], folder / "contact_sheet.png", columns=4)
    print("\nweights: untrained. Identities are real, body poses mean nothing.")
    print(f"look at  {folder / 'contact_sheet.png'}\n         {overlay}\n         {tables}/tracks")
    return 0


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    words = sys.argv[1:]
    if len(words) > 1 or any(word.startswith("-") for word in words):
        print(f"expected at most one folder, got {' '.join(words)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(Path(words[0] if words else "demo_output").resolve()))
