"""Train HMR 2.0; the weights it writes are what `hmr.weights=` of the main job takes.

A small model on people rendered here, on a CPU or one GPU:
  python jobs/train_hmr2.py output=/data/hmr2_mini
The same with motion capture, on a GPU, more of it:
  python jobs/train_hmr2.py output=/data/hmr2_mini loop.steps=200000 loop.precision=bf16 \\
      loop.data_workers=14 loop.batch_size=32 'sources=[{kind: synthetic, path: /data/mocap}]'
The published recipe on 8 GPUs (tars, ViTPose backbone, SMPL and mean parameters are the user's):
  python jobs/train_hmr2.py jobs/train_hmr2_full.yaml output=s3://bucket/hmr2 \\
      init_backbone=vitpose_backbone.pth mean_params=smpl_mean_params.npz \\
      body=SMPL_NEUTRAL.pkl extra_regressor=SMPL_to_J19.pkl \\
      real_poses=cmu_mocap.npz pose_histogram=amass_poses_hist100_SMPL+H_G.npy
On an output of the main job, as pseudo ground truth, with the body of that run:
  python jobs/train_hmr2.py output=/data/hmr2_ava init=hmr2.safetensors size=vit_h \\
      body=SMPL_NEUTRAL.pkl extra_regressor=SMPL_to_J19.pkl \\
      'sources=[{kind: tables, path: /data/tables}]'

A leading YAML file takes the place of jobs/train_hmr2.yaml; every setting is a key=value word.
--json prints the record `training.json`. The same command goes on where an interrupted one
stopped. Exit codes: 0 done; 1 failed; 2 usage. docs/TRAINING.md says more.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from fourdh_batch.cli import training_main
from fourdh_batch.config import TrainHmrConfig, to_dict

YAML = Path(__file__).with_suffix(".yaml")


def run(config: TrainHmrConfig) -> None:
    from fourdh_batch.training.build import build_hmr_task
    from fourdh_batch.training.distributed import train_everywhere
    from fourdh_batch.training.sources import warn_of_shared_people, warn_of_shared_recordings

    warn_of_shared_people(config)
    warn_of_shared_recordings(config)
    build = partial(build_hmr_task, config)
    train_everywhere(
        build, config.loop, config.output, to_dict(config), log_format=config.log.format
    )


def main(words: list[str]) -> int:
    return training_main(YAML, words, description=__doc__, kind=TrainHmrConfig, run=run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
