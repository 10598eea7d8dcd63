"""Eight processes on one directory under kill -9, judged by the history checker: I1 to I8.

Meanwhile the wall clock is set back and ahead by hours.
OCHREDB_STORM_S (default 15) is how long the killing lasts; OCHREDB_STORM_SEED draws victims and
requests, as far as the operating system's scheduling lets it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from .faults.support import Faults
from .storm import Plan, Storm

DURATION_S = float(os.environ.get("OCHREDB_STORM_S", "15"))
SEED = int(os.environ.get("OCHREDB_STORM_SEED", "1"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="NOT TESTED: needs fork")
@pytest.mark.timeout(300 + 6 * DURATION_S)
def test_a_storm_loses_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    leaping: dict[str, Any] = {}
    if sys.platform.startswith("linux"):
        faults = Faults(tmp_path, data)
        leaping = {"set_clock": faults.clock_is_off, "environ": faults.environment}
    plan = Plan(directory=str(data), duration_s=DURATION_S, seed=SEED, **leaping)
    report = Storm(plan).run()
    print(report.summary(), file=sys.stderr)  # Seen with pytest -s.
    text = "\n".join(["", report.summary(), *report.problems[:10]])
    assert report.problems == [], text
    # A storm that tests nothing must not pass.
    assert report.kills >= DURATION_S, text
    assert report.writes >= DURATION_S, text
    assert report.reads >= 5 * DURATION_S, text
    assert report.unknown > 0, text
    assert report.repeated > 0, text
    assert report.leaps > 0 or not leaping, text
