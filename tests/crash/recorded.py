"""From the files that a storm's processes wrote to the events of a history.

What became of a write that was cut off its idempotency key tells, which the catalog keeps.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ochredb.testing.history import Event
from ochredb.testing.history_events import Named, Outcome, Read, Write

Keys = dict[tuple[str, str], tuple[int, int]]  # (collection, key) -> first and last offset.


class Recorded:
    """Reads one file after the other, and counts.

    expected: statuses of failed requests that are no problem. died: when, by file, in nanoseconds;
    who recorded there was killed.
    """

    def __init__(
        self, problem: Callable[[str], None], *, expected: frozenset[int] = frozenset({404})
    ) -> None:
        self.died: dict[str, int] = {}
        self.operations: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.unknown = self.landed_unknown = self.repeated = 0
        self._problem, self._expected = problem, expected
        self._sent: set[str] = set()  # Keys of writes.

    def events(self, path: str, keys: Keys, live: set[str]) -> Iterator[Event]:
        """A process's events. live: collections that are there at the end, with all their keys."""
        process, died = Path(path).stem, self.died.get(path)
        for first, second in pairs(path, self._problem):
            kind = first.pop("kind")
            status = second.get("status")
            self.operations[f"{kind} {first['verb']}"] += 1
            if status is not None:
                self.statuses[status] += 1
            if status is not None and status >= 400 and status not in self._expected:
                self._problem(f"{process}: status {status} for {first}: {second.get('error')}")
            outcome = _outcome(status)
            ends = {"begin": first["begin"], "end": second.get("end", died)}
            fields: dict[str, Any] = {"process": process, **ends}
            if kind == "read":
                if outcome == "done" or outcome == "not_found":
                    yield Read(
                        **fields, verb=first["verb"], collection=first["collection"],
                        body=first["body"], outcome=outcome, answer=second.get("answer"),
                    )  # fmt: skip
            elif kind == "name":
                found = second.get("collection", first.get("collection"))
                yield Named(
                    **fields, verb=first["verb"], name=first["name"], outcome=outcome,
                    collection=found,
                )  # fmt: skip
            else:
                yield self._write(fields, first, second, outcome, keys, live)

    def _write(
        self,
        fields: dict[str, Any],
        first: dict[str, Any],
        second: dict[str, Any],
        outcome: Outcome,
        keys: Keys,
        live: set[str],
    ) -> Write:
        collection = first["collection"]
        self.repeated += first["key"] in self._sent
        self._sent.add(first["key"])
        stored = keys.get((collection, first["key"]))
        offsets = (second["first"], second["last"]) if "first" in second else stored
        if outcome == "unknown":
            self.unknown += 1
            self.landed_unknown += stored is not None
            if collection in live:
                outcome = "refused" if stored is None else "done"
                # Perhaps only another attempt has landed, after this one's process had died.
                fields["end"] = time.monotonic_ns()
        elif outcome == "done" and collection in live and (stored is None or stored != offsets):
            self._problem(f"acknowledged at {offsets}, kept as {stored}: {first}")
        if outcome == "done" and offsets is None:
            outcome = "unknown"  # Of a collection that is gone, and its keys with it.
        first_offset, last_offset = offsets if outcome == "done" and offsets else (None, None)
        return Write(
            **fields, verb=first["verb"], collection=collection, body=first["body"],
            key=first["key"], outcome=outcome, deleted=second.get("deleted"),
            first_offset=first_offset, last_offset=last_offset,
        )  # fmt: skip


def pairs(
    path: str, problem: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Both lines of each operation; the second is empty if the process did not get to it."""
    begun: dict[int, dict[str, Any]] = {}
    for text in bytes_of(path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # The last line of a killed process.
            continue
        if "failed" in line:
            problem(f"{Path(path).stem} failed:\n{line['failed']}")
        elif "begin" in line:
            begun[line["n"]] = line
        elif "end" in line:
            yield begun.pop(line["n"]), line
    for line in begun.values():
        yield line, {}


def _outcome(status: int | None) -> Outcome:
    if status is None or status >= 500:
        return "unknown"
    if status == 404:
        return "not_found"
    return "done" if status < 300 else "refused"


def bytes_of(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:  # Killed before its first step.
        return b""
