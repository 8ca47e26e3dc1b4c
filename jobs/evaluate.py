"""The tables of the paper, ours beside the published figures, on the user's own copies of the data.

3D pose (3DPW, Human3.6M, EMDB 1), 2D pose (LSP-Extended, COCO, PoseTrack), tracking (PoseTrack),
action recognition (AVA). What is not given is reported as not given.

  python jobs/evaluate.py hmr.weights=hmr2.safetensors hmr.body=SMPL_NEUTRAL.pkl \\
      hmr.extra_regressor=SMPL_to_J19.pkl evaluate.metadata=/data/hmr2_evaluation_data \\
      evaluate.images_3dpw=/data/3DPW evaluate.images_coco=/data/coco
  python jobs/evaluate.py evaluate.posetrack_annotations=/data/posetrack/annotations/val \\
      evaluate.posetrack_tables=/data/tables

The 3D and 2D figures run HMR 2.0 on the data sets' own boxes. The tracking figures score tables
that a run has made of PoseTrack's videos; the figures of actions score a csv of predictions.
docs/EVALUATION.md says what each number is. Every setting is a key=value word; --json prints the
figures as JSON. Exit codes: 0 done; 1 failed; 2 usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fourdh_batch.cli import benchmarks_main

YAML = Path(__file__).with_suffix(".yaml")


def main(words: list[str]) -> int:
    return benchmarks_main(YAML, words, description=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
