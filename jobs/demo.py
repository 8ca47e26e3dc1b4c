"""The main job on people made here, with the small trained models, and how right it is.

  make demo        or        python jobs/demo.py [folder]

Renders four clips (people who cross, hide behind things, leave and come back, gesture) that no
model was trained on, runs the same job as any other on them, and compares the tables with the
truth. No download, no licensed file, no GPU. Boxes are given; bodies, identities and looks are the
models'.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pandas as pd

import fourdh_batch as fb
from fourdh_batch.cli import FAIL, USAGE, run_job, show, show_scores
from fourdh_batch.errors import FourdhError
from fourdh_batch.evaluate.report import evaluate
from fourdh_batch.synthetic.corpus import make_corpus
from fourdh_batch.synthetic.plans import draw_plan
from fourdh_batch.video.decode import read_frames
from fourdh_batch.view.overlay import contact_sheet

SEED = 1000  # trainings draw their people with hashed seeds of 64 bits (`loop.seed_of`)
SHOWN = ("crossing", "occlusion", "reentry", "gestures")
NUM_FRAMES = 75
SHEET_FRAMES = 4  # of each clip


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    if len(words) > 1 or any(word.startswith("-") for word in words):
        print(f"expected at most one folder, got {' '.join(words)}", file=sys.stderr)
        return USAGE
    folder = Path(words[0] if words else "demo_output").resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"{folder}: expected a folder to write to: {error.strerror}", file=sys.stderr)
        return USAGE
    try:
        return demo(folder)
    except FourdhError as error:  # TrackEval is not installed, say
        print(f"error: {error}", file=sys.stderr)
        return FAIL


def demo(folder: Path) -> int:
    corpus, tables = folder / "corpus", folder / "tables"
    started = time.monotonic()
    body = fb.load_body()
    plans = {
        feature: draw_plan(SEED, number, features=[feature], num_frames=NUM_FRAMES)
        for number, feature in enumerate(SHOWN)
    }
    clips = make_corpus(corpus, body, seed=SEED, clips=plans, num_frames=NUM_FRAMES)
    print(f"made {len(clips)} clips in {corpus} ({time.monotonic() - started:.0f} s)\n")

    words = [f"input={corpus}", f"output={tables}", f"detector.path={corpus / 'boxes.parquet'}"]
    code = run_job(Path(__file__).with_suffix(".yaml"), words)
    if code != 0:
        return code

    tracks = fb.read_tracks(str(tables))
    columns = ["video_id", "track_id", "frame_index", "pts_s", "state", "cam_t_m", "betas"]
    with pd.option_context("display.width", 120, "display.max_columns", 20, "display.precision", 2):
        first = tracks.groupby(["video_id", "track_id"]).head(1)[columns]
        print("\nfb.read_tracks(...), the first row of every person:\n")
        print(first.to_string(index=False, formatters={"cam_t_m": _short, "betas": _short}))
        print("\nfb.read_table(..., 'videos'):\n")
        videos = fb.read_table(str(tables), "videos")
        told = ["video_id", "status", "frames_decoded", "num_shots", "num_tracks", "num_rows"]
        print(videos[[name for name in told if name in videos]].to_string(index=False))

    print(f"\nagainst the truth, fourdh evaluate {tables} {corpus / 'truth.parquet'}:\n")
    show_scores(evaluate(str(tables), str(corpus / "truth.parquet"), body=body))

    frames = []
    for clip in clips:
        overlay = folder / f"overlay_{Path(clip.video_id).stem}.mp4"
        show(str(tables), clip.video_id, overlay)
        for i in range(SHEET_FRAMES):
            at = (2 * i + 1) * clip.num_frames // (2 * SHEET_FRAMES)
            frames.append(read_frames(str(overlay), at, at + 1).rgb[0])
    contact_sheet(frames, folder / "contact_sheet.png", columns=SHEET_FRAMES)
    print(f"\nlook at  {folder / 'contact_sheet.png'}\n         {folder}/overlay_*.mp4")
    print(f"         {tables}/tracks   ({time.monotonic() - started:.0f} s in all)")
    return 0


def _short(numbers: object) -> str:
    return " ".join(f"{number:.1f}" for number in list(numbers)[:3])  # type: ignore[call-overload]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
