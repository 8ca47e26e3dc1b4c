"""Train a small person detector, or a segmenter, on people rendered by this package.

  python jobs/train_detector.py output=/data/detector
  python jobs/train_detector.py output=/data/segmenter segment=true width=256 height=192
  python jobs/train_detector.py output=s3://bucket/detector motion=/data/mocap \\
      loop.precision=bf16 loop.steps=100000 loop.data_workers=14 reuse=1 \\
      width=320 height=256 dim=128 levels=3 'backbone_widths=[32,64,128,256]'

The folder it writes is what `detector.name=transformers detector.path=` of the main job takes.
Every setting is a key=value word. --json prints the record `training.json`. The same command goes
on where an interrupted one stopped. Exit codes: 0 done; 1 failed; 2 usage. docs/TRAINING.md says
more.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from fourdh_batch.cli import training_main
from fourdh_batch.config import TrainDetectorConfig, to_dict

YAML = Path(__file__).with_suffix(".yaml")


def run(config: TrainDetectorConfig) -> None:
    from fourdh_batch.training.detector import build_detector_task
    from fourdh_batch.training.distributed import train_everywhere

    build = partial(build_detector_task, config)
    train_everywhere(
        build, config.loop, config.output, to_dict(config), log_format=config.log.format
    )


def main(words: list[str]) -> int:
    return training_main(YAML, words, description=__doc__, kind=TrainDetectorConfig, run=run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
