"""The judges find what they are there to find: clusters with a bug are told from sound ones."""

from __future__ import annotations

import time

import pytest

from .cluster import Components, Shape
from .conftest import running
from .load import Load
from .members import Forks
from .storage import Storage


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("fault", "said"), [("lost", ("kept as None", "lost")), ("stale", ("stale read",)), ("", ())]
)
def test_a_planted_fault_is_found(
    components: Components,
    launcher: Forks,
    request: pytest.FixtureRequest,
    fault: str,
    said: tuple[str, ...],
) -> None:
    shape = Shape(mode="eager", settings={"OCHREDB_TEST_FAULT": fault})
    name = f"fault-{fault or 'none'}"
    with running(components, launcher, name, shape, request.node.nodeid) as cluster:
        load = Load(cluster, launcher, seed=1, name=name).start()
        time.sleep(6.0)
        load.stop()
        storage = Storage(cluster)
        try:
            load.read_everything()
            judged = load.judge(storage)
        finally:
            storage.close()
    assert judged.writes > 20, judged.summary()
    text = "\n".join(judged.problems)
    if not fault:
        assert text == ""
    else:
        assert any(words in text for words in said), text or "nothing was found"
