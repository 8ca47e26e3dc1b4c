"""`make bench`: figures as ratios against a named baseline, measured in turn in one run.

  python -m tests.benchmark                 all of the quick ones
  python -m tests.benchmark decode tracker  some of them
  python -m tests.benchmark memory          the 30-minute video (minutes)
  python -m tests.benchmark planning        a million clips planned and planned again (minutes)
  python -m tests.benchmark remote_reading  videos in object storage (minutes)
  python -m tests.benchmark small_clips     two thousand of them (minutes)
  python -m tests.benchmark scheduling      1 to 16 model processes with a played GPU (minutes)
  python -m tests.benchmark thousand_gpus   what they would ask of driver and store (minutes)
  python -m tests.benchmark accuracy hmr=...  the whole pipeline against truth (minutes)

Each figure is the median of several interleaved rounds, with the smallest and the largest.
Absolute times are only meaningful on a named GPU: see `gpu_hmr2.py`.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

QUICK = ("decode", "hmr", "tracker", "keeping_up", "engine")
ALL = (
    *QUICK,
    "memory",
    "planning",
    "remote_reading",
    "small_clips",
    "scheduling",
    "thousand_gpus",
    "accuracy",
)
WITH_WORDS = {"accuracy"}  # take key=value words


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    if options := sorted(w for w in words if w.startswith("-") and w != "--json"):
        print(f"unknown: {', '.join(options)}; known: --json, --help", file=sys.stderr)
        return 2
    given = [word for word in words if "=" in word]
    names = [word for word in words if not word.startswith("-") and "=" not in word] or list(QUICK)
    unknown = sorted(set(names) - set(ALL))
    if unknown:
        print(f"unknown: {', '.join(unknown)}; known: {', '.join(ALL)}", file=sys.stderr)
        return 2
    if given and (others := sorted(set(names) - WITH_WORDS)):
        print(f"take no key=value words: {', '.join(others)}", file=sys.stderr)
        return 2
    for name in names:
        run = import_module(f"tests.benchmark.{name}").run
        figures = run(given) if name in WITH_WORDS else run()
        for figure in figures:
            if "--json" in words:
                print(json.dumps({"benchmark": name, **figure}))
                continue
            spread = figure.get("spread")
            text = f"{figure['value']:.3g} {figure['unit']}"
            if spread:
                text += f"  ({spread[0]:.3g} to {spread[1]:.3g})"
            print(f"{name:8} {figure['what']:70} {text}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
