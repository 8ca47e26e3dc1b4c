"""Video files in, SMPL parameters with track IDs in Parquet tables out.

Here:
  python jobs/ava_pseudogt.py input=/data/videos output=/data/tables \\
      hmr.weights=hmr2.safetensors hmr.body=SMPL_NEUTRAL.pkl \\
      hmr.extra_regressor=SMPL_to_J19.pkl detector.path=rtmdet_person.onnx
On a cluster:
  RAY_AUTH_MODE=token ray job submit --working-dir . -- \\
      python jobs/ava_pseudogt.py input=s3://corpus/ava output=s3://tables/ava \\
      hmr.weights=/models/hmr2.safetensors hmr.body=/models/SMPL_NEUTRAL.pkl \\
      hmr.extra_regressor=/models/SMPL_to_J19.pkl detector.path=/models/rtmdet_person.onnx

Every setting is a key=value word. --json prints the closing summary as JSON. A rerun does only what
is new or changed; an interrupted run continues. Exit codes: 0 all done; 3 done, but some videos
failed in part or wholly (table `failures`); 1 failed; 2 usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fourdh_batch.cli import job_main

if __name__ == "__main__":
    sys.exit(job_main(Path(__file__).with_suffix(".yaml"), sys.argv[1:], description=__doc__))
