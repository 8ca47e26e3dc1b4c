"""Track again: bodies that another pose engine or an earlier run has made in, tables out.

No video is decoded and no GPU is used.

  python jobs/track.py input=/data/tables output=/data/tables_gate50 tracker.gate=50
  python jobs/track.py input=/data/4D-Humans/outputs/results output=/data/tables layout=phalp
  python jobs/track.py input=/data/cliff output=/data/tables layout=cliff image_size=1280x720

The input is the output root of an earlier run, or a file, folder or glob of one of the layouts in
docs/POSE_ENGINES.md. Every setting is a key=value word. --json prints the closing summary as JSON.
A rerun does only what is new or changed; an interrupted run continues. Exit codes: 0 all done; 3
done, but some videos failed in part or wholly (table `failures`); 1 failed; 2 usage.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from fourdh_batch import cli
from fourdh_batch.config import describe_settings, load_config

YAML = Path(__file__).with_suffix(".yaml")


def main(words: list[str]) -> int:
    from fourdh_batch.pipeline import retrack

    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\nSettings of this job:\n\n{retrack.SETTINGS_HELP}")
        print(f"Settings of all jobs; defaults may differ in {YAML.name}:\n")
        print(describe_settings())
        return cli.DONE
    as_json = "--json" in words

    def run() -> int:
        settings, rest = retrack.split_settings([word for word in words if word != "--json"])
        config = load_config(YAML, rest)
        with cli._progress() as on_progress:
            report = retrack.retrack(config, settings, on_progress=on_progress)
        if as_json:
            print(json.dumps(cli._summary(report)))
        else:
            cli._print_summary(report)
        return report.exit_code

    signal.signal(signal.SIGTERM, cli._stop)  # so that the lease is given back
    return cli._guarded(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
