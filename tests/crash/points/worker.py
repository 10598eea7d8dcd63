"""The process that is killed: python -m tests.crash.points.worker STAGE SCENARIO TREE JOURNAL [BUG]

STAGE is `prepare`, `run`, or `count`: the same as `run`, and prints how often each crash point was
reached. The crash point itself comes by the environment, as in any process of OchreDB.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from ochredb import crash_points

from .journal import Journal
from .plants import PLANTS
from .scenarios import SCENARIOS
from .stage import Stage


def main(arguments: list[str]) -> None:
    what, name, tree, journal, *bugs = arguments
    scenario = SCENARIOS[name]
    for bug in bugs:
        PLANTS[bug].put()
    stage = Stage(Path(tree), Journal(journal), setattr)
    if what == "prepare":
        scenario.prepare(stage)
        return
    hits: Counter[str] = Counter()
    if what == "count":
        crash_points.observe(lambda point: hits.update([point]))
    scenario.run(stage)
    if what == "count":
        crash_points.observe(None)
        print(json.dumps(hits))


if __name__ == "__main__":
    main(sys.argv[1:])
