"""Train the texture encoder of the tracker, by telling a whole outfit from a part of it.

  python jobs/train_appearance.py output=/data/appearance
  python jobs/train_appearance.py output=/data/appearance map_px=256 loop.steps=50000 \\
      loop.precision=bf16 loop.data_workers=8

Outfits are drawn, painted on the body and laid out as the pipeline would see them. The weights it
writes are what `tracker.texture_weights=` of the main job takes. Every setting is a key=value
word. --json prints the record `training.json`. The same command goes on where an interrupted one
stopped. Exit codes: 0 done; 1 failed; 2 usage. docs/TRAINING.md says more.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from fourdh_batch.cli import training_main
from fourdh_batch.config import TrainAppearanceConfig, to_dict

YAML = Path(__file__).with_suffix(".yaml")


def run(config: TrainAppearanceConfig) -> None:
    from fourdh_batch.training.appearance import build_appearance_task
    from fourdh_batch.training.distributed import train_everywhere

    build = partial(build_appearance_task, config)
    train_everywhere(
        build, config.loop, config.output, to_dict(config), log_format=config.log.format
    )


def main(words: list[str]) -> int:
    return training_main(YAML, words, description=__doc__, kind=TrainAppearanceConfig, run=run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
