"""Track again: bodies that another pose engine or an earlier run has made in, tables out.

No video is decoded, and no GPU is used unless `tracker.device=cuda` asks for one.

  python jobs/track.py input=/data/tables output=/data/tables_gate50 tracker.gate=50
  python jobs/track.py input=4D-Humans/outputs/results output=/data/tables poses.layout=phalp
  python jobs/track.py input=/data/cliff output=/data/tables poses.layout=cliff \\
      poses.image_size=1280x720

The input is the output root of an earlier run, or a file, folder or glob of one of the layouts in
docs/POSE_ENGINES.md. Every setting is a key=value word. --json prints the closing summary as JSON.
A rerun does only what is new or changed; an interrupted run continues. Exit codes: 0 all done; 3
done, but some videos failed in part or wholly (table `failures`); 1 failed; 2 usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fourdh_batch.cli import job_main
from fourdh_batch.pipeline.retrack import retrack

YAML = Path(__file__).with_suffix(".yaml")


def main(words: list[str]) -> int:
    return job_main(YAML, words, description=__doc__, run=retrack)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
