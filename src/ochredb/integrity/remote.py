"""A server checks its own store; we ask how far it is until there is a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import orjson

from ochredb.api.transport import API_PREFIX
from ochredb.backup.archive import Progress
from ochredb.backup.remote import Questions
from ochredb.clock import Clock
from ochredb.errors import Unavailable
from ochredb.integrity.report import Report

_PATH = f"{API_PREFIX}/checks"
_POLL_S = 0.2


def check_remote(
    url: str,
    headers: Mapping[str, str],
    clock: Clock,
    progress: Progress,
    *,
    repair: bool = False,
) -> Report:
    """See `ochredb.integrity.check`. Given up here, the check is given up there.

    repair: the server also builds anew what is derived and damaged; findings say whether it did.
    """
    query = {"repair": "true"} if repair else {}
    questions = Questions(url, headers, clock, offers="checks")
    try:
        started = _document(url, questions.ask("POST", _PATH, repeat=False, **query))
        path = f"{_PATH}/{quote(str(started.get('id')))}"
        try:
            while True:
                state = _document(url, questions.ask("GET", path, repeat=True))
                if state.get("report") is not None:
                    return Report.from_document(state["report"])
                if state.get("error") is not None:
                    raise Unavailable(f"{url}: the check failed: {state['error']}")
                progress(
                    str(state.get("what")),
                    int(state.get("done_bytes", 0)),
                    int(state.get("total_bytes", 0)),
                )
                clock.sleep(_POLL_S)
        finally:
            questions.ask("DELETE", path, repeat=False)
    finally:
        questions.close()


def _document(url: str, body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Unavailable(f"{url} does not answer like OchreDB: {error}") from error
    if not isinstance(document, dict):
        raise Unavailable(f"{url} does not answer like OchreDB")
    return document
