"""Every night: bring the tables up to date with a corpus that has changed since yesterday.

New and changed videos go through the models, and nothing else does; removed ones leave the tables.
After a change of weights or settings everything they matter to is done again. What changed is
printed, and kept beside the record of the run: <output>/_runs/<run>-changes.parquet and .txt

  python jobs/nightly.py input=s3://corpus/videos output=s3://tables/videos \\
      hmr.weights=/models/hmr2.safetensors hmr.body=/models/SMPL_NEUTRAL.pkl \\
      hmr.extra_regressor=/models/SMPL_to_J19.pkl detector.path=/models/rtmdet_person.onnx
On a cluster, from cron (infra/nightly.yaml has it for Kubernetes):
  RAY_AUTH_MODE=token ray job submit --working-dir . -- python jobs/nightly.py input=... output=...

A night of which more than plan.max_removed (a fifth) of the videos is gone is refused: the input is
more likely a mount that failed. Quarantined videos stay as they are until their file changes, or
until plan.retry_quarantined=true. Two nights at once: the second one is refused. A night that was
cut off is continued by the same command, or by the next night.

Every setting is a key=value word. --json prints the closing summary as JSON. Exit codes: 0 all
done; 3 done, but some videos failed in part or wholly (table `failures`); 1 failed; 2 usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fourdh_batch.cli import job_main

if __name__ == "__main__":
    yaml = Path(__file__).with_suffix(".yaml")
    sys.exit(job_main(yaml, sys.argv[1:], description=__doc__, show_changes=True))
