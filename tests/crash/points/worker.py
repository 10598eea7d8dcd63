"""The processes that are killed: forks of one that has imported everything and opened nothing.

`python -m tests.crash.points.worker` is a nursery. An order names a `stage`, a `scenario`, its
`tree` and `journal`, the `bugs` to plant, the crash `point` if any, and what `loss` needs. The
stages are `prepare`, `run`, and `count`: the same as `run`, and prints how often each crash point
was reached.

A crash point is armed as the environment of a process that starts would arm it; that it does is
tested with servers (`test_crash_points`), which are started as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  So that the children need not.

from ochredb import crash_points
from tests.crash.nursery import serve
from tests.crash.powerloss import begin

from .journal import Journal
from .plants import PLANTS
from .scenarios import SCENARIOS
from .stage import Stage


def main(order: dict[str, Any]) -> None:
    if order["loss"]:
        begin(order["loss"])
    scenario = SCENARIOS[order["scenario"]]
    for bug in order["bugs"]:
        PLANTS[bug].put()
    stage = Stage(Path(order["tree"]), Journal(order["journal"]), setattr)
    if order["stage"] == "prepare":
        scenario.prepare(stage)
        return
    hits: Counter[str] = Counter()
    if order["stage"] == "count":
        crash_points.observe(lambda point: hits.update([point]))
    else:
        crash_points.observe(crash_points.armed({crash_points.VARIABLE: order["point"]}))
    scenario.run(stage)
    if order["stage"] == "count":
        crash_points.observe(None)
        print(json.dumps(hits))


if __name__ == "__main__":
    serve(main)
