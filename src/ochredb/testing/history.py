"""Was what clients saw possible? A pure check of a recorded history of operations.

A history is a list of events: who did what, when it began and ended, what was answered. Times are
integers of one clock that all processes share (CLOCK_MONOTONIC of a machine, steps of a simulator);
equal times count as overlapping. `check` decides for each collection, exactly:

* linearizable: there is one order of all writes, that of the log's offsets, in which no write comes
  before one that had ended before it began; each read equals the model at one place of that order,
  behind all that had ended before the read began and before all that began after it had ended. So
  no acknowledged write is lost, no strong read is stale, and no reader goes back behind another;
* atomic: those places lie between requests, never inside one;
* dense: offsets have neither holes nor overlaps;
* exactly once: attempts with one idempotency key are one write;
* names: a collection is found from its creation to its drop, and only then.

A write whose outcome is unknown may have landed or not: the check finds out, by the holes that it
must fill and by what was read. It places them by search, so there should be few in one hole; a
recorder that learns the outcome afterwards (by the key) adds an attempt that says so.

    verdict = check([Write(...), Read(...)])
    assert not verdict.violations
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ochredb.testing.history_events import (
    Impossible,
    Named,
    Read,
    Write,
    answer_of,
    apply,
    as_read,
    first_of,
    shown,
    singles,
    size_of,
)
from ochredb.testing.history_names import NameViolation, check_names
from ochredb.testing.model import CollectionModel, canonical

_STATES_MAX = 5_000  # Of one collection's search: beyond, too much is unknown.

Event = Write | Read | Named


@dataclass(frozen=True, slots=True)
class Violation:
    """kind: lost write, stale read, future read, torn read, wrong read, wrong answer, reordered,
    applied twice, not dense, wrongly found, wrongly missing, two of one name, or undecided."""

    kind: str
    collection: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind} in {self.collection}: {self.text}"


@dataclass(slots=True)
class Verdict:
    """Violations, at most a few of each collection; the counts show that something was checked."""

    violations: list[Violation] = field(default_factory=list)
    collections: int = 0
    writes: int = 0
    reads: int = 0
    unknown: int = 0
    unknown_landed: int = 0
    operations: int = 0


def check(history: Iterable[Event]) -> Verdict:
    """Judge a history. Cost: about one model's work for each event.

    Raises ValueError for a history that contradicts itself (one key, two requests).
    """
    verdict = Verdict()
    writes: dict[str, list[Write]] = defaultdict(list)
    reads: dict[str, list[Read]] = defaultdict(list)
    named: list[Named] = []
    seen: list[tuple[str, bool, int, int]] = []
    for event in history:
        if isinstance(event, Named):
            named.append(event)
            continue
        if isinstance(event, Write):
            writes[event.collection].append(event)
        elif event.outcome == "done":
            reads[event.collection].append(event)
        if event.end is not None and event.outcome in ("done", "not_found"):
            seen.append((event.collection, event.outcome == "done", event.begin, event.end))
    found: Iterable[NameViolation] = check_names(named, seen)
    verdict.violations += [Violation(*violation) for violation in found]
    for collection in sorted(writes.keys() | reads.keys()):
        verdict.collections += 1
        _Collection(collection, writes[collection], reads[collection], verdict).judge()
    return verdict


@dataclass(slots=True)
class _State:
    """A place in the search: what has been laid out up to `position`, and the reads to explain."""

    model: CollectionModel
    position: int
    latest_begin: float  # Of the writes laid out: what had ended before it cannot follow.
    placed: list[Write]
    floating: list[Write]  # Writes of unknown outcome that are not laid out.
    open: list[int]  # Reads that began after all that must lie behind them, not yet explained.
    next_read: int = 0

    def key(self) -> object:
        """Equal for states from which the same is possible: other orders of the same writes."""
        rows = tuple(
            (name, record.embedding.tobytes(), repr((record.document, record.uri, record.metadata)))
            for name, record in self.model.records.items()
        )
        left = frozenset(id(write) for write in self.floating)
        return self.position, left, tuple(self.open), self.next_read, hash(rows)

    def branch(self) -> _State:
        return _State(
            copy.deepcopy(self.model), self.position, self.latest_begin, list(self.placed),
            list(self.floating), list(self.open), self.next_read,
        )  # fmt: skip


class _Collection:
    """The search for one collection's order. A read's number is its place in `self._reads`."""

    def __init__(
        self, name: str, attempts: Sequence[Write], reads: Sequence[Read], verdict: Verdict
    ) -> None:
        self._name, self._verdict = name, verdict
        verdict.reads += len(reads)
        known: list[Write] = []
        self._unknown: list[Write] = []
        reads = list(reads)
        for write in self._merged(attempts):
            if write.outcome == "unknown":
                self._unknown.append(write)
            elif size_of(write) == 0:
                reads.append(as_read(write))
            else:
                known.append(write)
        known.sort(key=lambda write: (write.first_offset, write.last_offset))
        self._known = known
        self._reads = sorted(reads, key=lambda read: read.begin)
        self._answers = [canonical(read.answer) for read in self._reads]
        verdict.writes += len(known)
        verdict.unknown += len(self._unknown)

    def judge(self) -> None:
        if self._dense_and_ordered():
            self._lay_out()

    def _violation(self, kind: str, text: str) -> None:
        self._verdict.violations.append(Violation(kind, self._name, text))

    # -- without the model

    def _merged(self, attempts: Sequence[Write]) -> Iterator[Write]:
        """One write for each key. It began with the first attempt, and is done with the first
        that is."""
        by_key: dict[object, list[Write]] = defaultdict(list)
        for number, write in enumerate(attempts):
            by_key[number if write.key is None else write.key].append(write)
        for same in by_key.values():
            if any((w.verb, w.body) != (same[0].verb, same[0].body) for w in same):
                raise ValueError(f"one key, two requests: {same}")
            done = [write for write in same if write.outcome == "done"]
            if len({(write.first_offset, write.last_offset) for write in done}) > 1:
                self._violation("applied twice", "; ".join(map(shown, done)))
            maybe = done or [write for write in same if write.outcome == "unknown"]
            if maybe:
                ends = [math.inf if write.end is None else write.end for write in maybe]
                end = min(ends) if done else max(ends)
                yield replace(
                    maybe[0],
                    begin=min(write.begin for write in same),
                    end=None if end == math.inf else int(end),
                )

    def _dense_and_ordered(self) -> bool:
        """Offsets of done writes: no overlap, and never against the order of time."""
        last, latest = 0, None
        for write in self._known:
            first, end = write.first_offset, write.end
            assert first is not None and end is not None and write.last_offset is not None
            if first <= last:
                self._violation("not dense", f"offset {first} is taken twice, by {shown(write)}")
                return False
            if latest is not None and end < latest.begin:
                self._violation(
                    "reordered", f"{shown(write)} had ended before {shown(latest)} began"
                )
                return False
            if latest is None or write.begin > latest.begin:
                latest = write
            last = write.last_offset
        return True

    # -- the search

    def _lay_out(self) -> None:
        self._starts = [first_of(write) for write in self._known]
        # earliest_ends[i]: of known[i:]. What comes before them must have begun by then.
        self._earliest_ends: list[float] = [math.inf]
        for write in reversed(self._known):
            assert write.end is not None
            self._earliest_ends.append(min(self._earliest_ends[-1], write.end))
        self._earliest_ends.reverse()
        self._lowest = self._lowest_positions()
        stack = [_State(CollectionModel(self._name), 0, -math.inf, [], list(self._unknown), [])]
        failure: tuple[Impossible, _State] | None = None
        tried: set[object] = set()
        while stack and len(tried) < _STATES_MAX:
            state = stack.pop()
            if state.key() in tried:
                continue
            tried.add(state.key())
            try:
                branches = self._advance(state)
            except Impossible as wrong:
                if failure is None or state.position > failure[1].position:
                    failure = wrong, state
                continue
            if not branches:
                self._verdict.unknown_landed += len(self._unknown) - len(state.floating)
                self._verdict.operations += state.position
                return
            stack.extend(reversed(branches))
        assert failure is not None
        reason, state = failure
        kind, text = reason.kind, reason.text
        if reason.read is not None:
            kind, text = self._inexplicable(state, reason.read)
        if stack:
            text = f"too much is unknown; the best of {_STATES_MAX} tries: {kind}: {text}"
            kind = "undecided"
        self._violation(kind, text)

    def _lowest_positions(self) -> list[int]:
        """For each read the last offset of what had ended before it began."""
        ended = sorted((write.end or 0, write.last_offset or 0) for write in self._known)
        lowest, last, at = [], 0, 0
        for read in self._reads:
            while at < len(ended) and ended[at][0] < read.begin:
                last = max(last, ended[at][1])
                at += 1
            lowest.append(last)
        return lowest

    def _advance(self, state: _State) -> list[_State]:
        """Lay out one write after the other, until there is a choice: the states to go on from.

        None is left at the end of everything. Raises Impossible.
        """
        while True:
            self._explain_reads(state)
            following = bisect_left(self._starts, state.position + 1)
            if following < len(self._known) and self._starts[following] == state.position + 1:
                self._place(state, self._known[following])
                continue
            at_end = following == len(self._known)
            if at_end and not state.open and state.next_read == len(self._reads):
                return []
            room = math.inf if at_end else self._starts[following] - state.position - 1
            branches = self._fillings(state, room, self._earliest_ends[following])
            if not branches:
                if at_end:
                    raise Impossible("", "", state.open[0])
                raise Impossible(
                    "not dense",
                    f"no write fills offsets {state.position + 1} to {self._starts[following] - 1}",
                )
            return branches

    def _fillings(self, state: _State, room: float, begun_by: float) -> list[_State]:
        """The states after each unknown write that may come next, the earliest begun first."""
        branches = []
        for write in sorted(state.floating, key=lambda write: write.begin):
            if write.begin > begun_by:
                continue
            branch = state.branch()
            try:
                self._place(branch, write)
            except Impossible:
                continue
            if 0 < branch.position - state.position <= room:
                branch.floating.remove(write)
                branches.append(branch)
        return branches

    def _place(self, state: _State, write: Write) -> None:
        """The next write in the log is this one."""
        if write.end is not None and write.end < state.latest_begin:
            raise Impossible("reordered", f"{shown(write)} had ended before one ahead of it began")
        for number in state.open:
            if self._reads[number].end < write.begin:
                raise Impossible("", "", number)
        before = state.model.operations
        deleted = apply(state.model, write)
        size = state.model.operations - before
        if write.first_offset is not None and size != size_of(write):
            raise Impossible("wrong answer", f"{shown(write)} must have taken {size} offsets")
        if write.deleted not in (None, deleted):
            raise Impossible("wrong answer", f"{shown(write)} must have deleted {deleted} records")
        state.position += size
        state.latest_begin = max(state.latest_begin, write.begin)
        state.placed.append(write)

    def _explain_reads(self, state: _State) -> None:
        """Strike out the reads that equal the model here and may not come later.

        The first place is the best one: whoever began after this read has ended may not go back
        behind it.
        """
        reads = self._reads
        while state.next_read < len(reads) and self._lowest[state.next_read] <= state.position:
            state.open.append(state.next_read)
            state.next_read += 1
        left: list[int] = []
        earliest_end = math.inf  # Of the reads that are left: who began later must wait for them.
        for number in state.open:
            read = reads[number]
            if earliest_end >= read.begin and self._explains(state.model, number):
                continue
            left.append(number)
            earliest_end = min(earliest_end, read.end)
        state.open = left

    def _explains(self, model: CollectionModel, number: int) -> bool:
        return canonical(answer_of(model, self._reads[number])) == self._answers[number]

    # -- saying what is wrong

    def _inexplicable(self, state: _State, number: int) -> tuple[str, str]:
        """Kind and text for a read that no allowed place explains."""
        read = self._reads[number]
        lowest, highest = self._lowest[number], state.position
        rest = [write for write in self._known if first_of(write) > state.position]
        writes = [*state.placed, *rest]
        kind = "wrong read"
        model = CollectionModel(self._name)
        if self._explains(model, number):
            kind = "stale read"
        for write in writes:
            for single in singles(model, write):
                if kind == "wrong read" and self._explains(model, number):
                    kind = "torn read"
                apply(model, single)
            if self._explains(model, number):
                if model.operations <= highest:
                    kind = "stale read"  # Behind a write that had ended, or behind another read.
                elif kind != "stale read":
                    kind = "future read"
        if kind == "wrong read" and self._without_one(writes, lowest, highest, number):
            kind = "lost write"
        text = f"{shown(read)} must equal the state at one of offsets {lowest} to {highest}"
        return kind, text

    def _without_one(self, writes: list[Write], lowest: int, highest: int, number: int) -> bool:
        """Whether the read would be right if one of the latest acknowledged writes were not."""
        acknowledged = [write for write in self._known if (write.last_offset or 0) <= lowest]
        for missing in acknowledged[-100:]:
            model, position = CollectionModel(self._name), 0
            for write in writes:
                before = model.operations
                if write is not missing:
                    apply(model, write)
                    position += model.operations - before
                else:
                    position += size_of(write)
                if lowest <= position <= highest and self._explains(model, number):
                    return True
        return False
