"""What is true in a simulation: every log as it was committed, and what reads may say of it."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import orjson

from ochredb.catalog.jobs import Lease
from ochredb.fragment import decode
from ochredb.storage.memory import MemoryStore
from ochredb.testing.simulation.catalog import Change
from ochredb.types import Op, Operations


class Value(NamedTuple):
    """A record. `seq`: the offset at which it was first inserted."""

    seq: int
    document: str | None
    number: int | None
    vector: tuple[float, ...]


State = dict[str, Value]


def rows(state: State) -> list[tuple[str, Value]]:
    """In the order that `get` promises."""
    return sorted(state.items(), key=lambda item: item[1].seq)


def fold(state: State, first_offset: int, operations: Operations) -> State:
    """The state after a request: what the design's section 7 says, one operation at a time."""
    state = dict(state)
    for place, name in enumerate(operations.ids):
        known, offset = state.get(name), first_offset + place
        if operations.op is Op.DELETE:
            state.pop(name, None)
        elif known is None and operations.op in (Op.ADD, Op.UPSERT):
            state[name] = _changed(Value(offset, None, None, ()), operations, place)
        elif known is not None and operations.op in (Op.UPDATE, Op.UPSERT):
            state[name] = _changed(known, operations, place)
    return state


def _changed(value: Value, operations: Operations, place: int) -> Value:
    if operations.embeddings is not None:
        if operations.embedded is None or operations.embedded[place]:
            value = value._replace(vector=tuple(operations.embeddings[place].tolist()))
    if operations.documents is not None and operations.documents[place] is not None:
        value = value._replace(document=operations.documents[place])
    change = None if operations.metadatas is None else operations.metadatas[place]
    if change is not None and "n" in (parsed := orjson.loads(change)):
        value = value._replace(number=parsed["n"])
    return value


@dataclass(slots=True)
class Truth:
    """One collection. offsets[i]: the log's end after the i-th request, states[i] what it left.

    acknowledged: the newest offset that some client was told of. seen: that some read has shown.
    """

    id: str
    offsets: list[int] = field(default_factory=lambda: [0])
    states: list[State] = field(default_factory=lambda: [{}])
    requests: dict[int, Operations] = field(default_factory=dict)  # By first offset.
    keys: dict[str, int] = field(default_factory=dict)  # Clients' idempotency keys.
    acknowledged: int = 0
    seen: int = 0
    is_dropped: bool = False

    @property
    def last_offset(self) -> int:
        return self.offsets[-1]

    def before(self, first_offset: int) -> State:
        return self.states[bisect_left(self.offsets, first_offset - 1)]


@dataclass(frozen=True, slots=True)
class Reading:
    """A read that has begun: it must show this offset or a later one, unless it is of nothing."""

    truth: Truth
    floor: int
    was_dropped: bool


class Oracle:
    """Collects violations; the first one ends the simulation."""

    def __init__(self) -> None:
        self.collections: dict[str, Truth] = {}
        self.violations: list[str] = []
        self.never: set[str] = set()  # Documents of writes that were refused for good.
        self.parts: dict[tuple[str, int], set[str]] = {}  # Of each version of each collection.
        self.fences: dict[tuple[str, str], int] = {}
        self.objects: MemoryStore | None = None
        self.referenced: Callable[[str], bool] = lambda _key: False
        self.unreferenced_us: Callable[[str], int | None] = lambda _key: None
        self.lease_of_now: Callable[[], Lease | None] = lambda: None

    def violated(self, text: str) -> None:
        self.violations.append(text)

    # -- what the catalog and the store report

    def committed(self, changes: Sequence[Change]) -> None:
        self._parts_changed(changes)
        for change in changes:
            before = _named(change, change.before)
            after = _named(change, change.after)
            if change.table.name == "fragments" and before is None and after is not None:
                self._appended(after)
            elif change.table.name == "logs":
                self._log_changed(before, after)
            elif change.table.name == "jobs" and after is not None:
                self.fences[after["collection"], after["kind"]] = after["fence"]

    def _parts_changed(self, changes: Sequence[Change]) -> None:
        """A new version has parts of the one before it, and parts that nobody has seen yet."""
        made = {item.after[0] for item in changes if item.table.name == "parts" and item.after}
        for change in changes:
            row = _named(change, change.after)
            if change.table.name != "version_parts" or row is None:
                continue
            collection, version = row["collection"], row["version"]
            if row["part"] not in made | self.parts.get((collection, version - 1), set()):
                self.violated(f"I7: part {row['part']} came back in version {version}")
            self.parts.setdefault((collection, version), set()).add(row["part"])

    def _log_changed(self, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
        if before is None and after is not None:
            self.collections[after["collection"]] = Truth(after["collection"])
        elif before is not None and after is None:
            self.collections[before["collection"]].is_dropped = True
        elif before is not None and after is not None:
            if after["version"] - before["version"] not in (0, 1):
                self.violated(f"I7: version {before['version']} became {after['version']}")
            lease = self.lease_of_now()
            if lease is not None and before["version"] != after["version"]:
                if self.fences[lease.collection, lease.kind] != lease.fence:
                    self.violated(f"I7: {lease} had been taken over, and made a version")
            for name in ("next_offset", "indexed_offset", "floor_offset", "time_us"):
                if after[name] < before[name]:
                    self.violated(f"I2: {name} went from {before[name]} to {after[name]}")

    def _appended(self, row: dict[str, Any]) -> None:
        truth = self.collections[row["collection"]]
        if truth.is_dropped:
            self.violated(f"I6: {truth.id} was dropped, and is written to")
        if row["start"] != truth.last_offset + 1:
            self.violated(f"I2: offset {row['start']} follows {truth.last_offset}")
        payload = row["payload"]
        if payload is None:
            assert self.objects is not None
            payload = self.objects.get_range(row["object_key"], row["byte_start"], row["byte_stop"])
        operations = decode(payload)
        if len(operations) != row["stop"] - row["start"] + 1:
            self.violated(f"I3: {len(operations)} operations at {row['start']} to {row['stop']}")
        _, _, key = row["request_id"].rpartition("/")
        if key.startswith(("key-", "~")):  # A client's, or the name that a server gave it.
            if key in truth.keys:
                self.violated(f"I8: {key} was applied at {truth.keys[key]} and {row['start']}")
            truth.keys[key] = row["start"]
        for document in operations.documents or []:
            if document in self.never:
                self.violated(f"I12: {document!r} was refused, and is written")
        truth.requests[row["start"]] = operations
        truth.states.append(fold(truth.states[-1], row["start"], operations))
        truth.offsets.append(row["stop"])

    def deleting(self, key: str, now_us: int, grace_s: float) -> None:
        """Just before it is gone."""
        if self.referenced(key):
            self.violated(f"I6: {key} is deleted, and referred to")
        since_us = self.unreferenced_us(key)
        if since_us is not None and (now_us - since_us) / 1e6 < grace_s:
            self.violated(f"I6: {key} is deleted {(now_us - since_us) / 1e6} s after its last use")

    # -- what clients report

    def acknowledged(self, collection: str, first: int, last: int, sent: Operations) -> None:
        truth = self.collections[collection]
        found = truth.requests.get(first)
        if found is None or truth.last_offset < last:
            self.violated(f"I1: {first} to {last} of {collection} was acknowledged, not written")
        elif not _same(found, sent) or len(found) != last - first + 1:
            self.violated(f"I3: at {first} of {collection} is not what was acknowledged")
        truth.acknowledged = max(truth.acknowledged, last)

    def refused(self, sent: Operations) -> None:
        """For good: it must not be in the log, now or later."""
        for document in sent.documents or []:
            if document is not None:
                self.never.add(document)
        for truth in self.collections.values():
            for state in truth.states:
                if any(value.document in self.never for value in state.values()):
                    self.violated("I12: a refused write is in the log")

    def begin(self, collection: str) -> Reading:
        truth = self.collections[collection]
        return Reading(truth, max(truth.acknowledged, truth.seen), truth.is_dropped)

    def end(self, reading: Reading, what: str, agrees: Callable[[State], bool]) -> None:
        """The read must agree with a state between its beginning and now."""
        truth = reading.truth
        if reading.was_dropped:
            self.violated(f"I4: {what} of {truth.id}, which had been dropped")
        first = bisect_left(truth.offsets, reading.floor)
        for offset, state in zip(truth.offsets[first:], truth.states[first:], strict=True):
            if agrees(state):
                truth.seen = max(truth.seen, offset)
                return
        older = [
            offset
            for offset, state in zip(truth.offsets[:first], truth.states[:first], strict=True)
            if agrees(state)
        ]
        said = f"shows offset {older[-1]}" if older else "shows no state that there ever was"
        self.violated(
            f"I4: {what} of {truth.id} {said}; it had to be {reading.floor} to {truth.last_offset}"
        )

    def failed(self, reading: Reading, what: str, error: BaseException) -> None:
        self.violated(f"{what} of {reading.truth.id} failed: {type(error).__name__}: {error}")


def _named(change: Change, row: tuple[Any, ...] | None) -> dict[str, Any] | None:
    return None if row is None else dict(zip(change.table.columns, row, strict=True))


def _same(one: Operations, other: Operations) -> bool:
    if one.op is not other.op or one.ids != other.ids or one.documents != other.documents:
        return False
    if one.embeddings is None or other.embeddings is None:
        return one.embeddings is other.embeddings
    return bool(np.array_equal(one.embeddings, other.embeddings))


def random_write(rng: random.Random, token: str, ids: Sequence[str]) -> Operations:
    """One to three operations on these ids; its documents say which write it was."""
    op = rng.choice((Op.ADD, Op.UPSERT, Op.UPSERT, Op.UPDATE, Op.DELETE))
    chosen = rng.sample(ids, rng.randint(1, 3))
    if op is Op.DELETE:
        return Operations(op=op, ids=chosen)
    count = len(chosen)
    vectors = np.array([[rng.randint(0, 9), rng.randint(0, 9)] for _ in chosen], np.float32)
    operations = Operations(
        op=op,
        ids=chosen,
        embeddings=vectors,
        documents=[f"{token} {place}" for place in range(count)],
        metadatas=[orjson.dumps({"n": rng.randint(0, 9)}) for _ in chosen],
    )
    if op is Op.UPDATE and rng.random() < 0.5:
        return replace(operations, embeddings=None)
    return operations
