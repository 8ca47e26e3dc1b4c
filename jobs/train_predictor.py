"""Train the pose predictor of the tracker, by telling hidden poses of a track again.

  python jobs/train_predictor.py output=/data/predictor
  python jobs/train_predictor.py output=s3://bucket/predictor \\
      'sources=[{kind: tables, path: s3://tables/ava}]' \\
      'held_out=[{kind: tables, path: s3://tables/ava_val}]' \\
      dim=512 depth=16 num_heads=16 head_dim=64 mlp_dim=512 smpl_dim=1024 \\
      loop.steps=200000 loop.workers=8

Without sources it learns from people who are made here, without pictures. The weights it writes
are what `tracker.predictor_weights=` of the main job takes. All rows of tables are held in memory,
1 kB each. Every setting is a key=value word. --json prints the record
`training.json`. The same command goes on where an interrupted one stopped. Exit codes: 0 done; 1
failed; 2 usage. docs/TRAINING.md says more.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from fourdh_batch.cli import training_main
from fourdh_batch.config import TrainPredictorConfig, to_dict

YAML = Path(__file__).with_suffix(".yaml")


def run(config: TrainPredictorConfig) -> None:
    from fourdh_batch.training.distributed import train_everywhere
    from fourdh_batch.training.predictor import build_predictor_task
    from fourdh_batch.training.sources import paths_in_both, warn_of_shared_recordings

    warn_of_shared_recordings(config)
    build = partial(build_predictor_task, config)
    # Whether some videos of a root are held out decides what is trained on.
    settings = {**to_dict(config), "split_roots": paths_in_both(config, "tables")}
    train_everywhere(build, config.loop, config.output, settings, log_format=config.log.format)


def main(words: list[str]) -> int:
    return training_main(YAML, words, description=__doc__, kind=TrainPredictorConfig, run=run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
