"""The history checker finds what is planted, and finds nothing in what is possible."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest

from ochredb.testing.history import Event, Violation, check
from ochredb.testing.history_events import Named, Read, Write
from ochredb.testing.model import CollectionModel

C = "c"


def body(*ids: str, version: int = 0) -> dict[str, Any]:
    return {
        "ids": list(ids),
        "embeddings": [[float(version), 1.0] for _ in ids],
        "metadatas": [{"version": version} for _ in ids],
    }


def write(first: int, begin: int, end: int, *ids: str, **more: Any) -> Write:
    """An acknowledged upsert at offsets from `first` on."""
    version = more.pop("version", first)
    fields: dict[str, Any] = {
        "process": "w", "collection": C, "verb": "upsert", "body": body(*ids, version=version),
        "begin": begin, "end": end, "outcome": "done", "first_offset": first,
        "last_offset": first + len(ids) - 1,
    }  # fmt: skip
    return Write(**(fields | more))


def unknown(begin: int, *ids: str, **more: Any) -> Write:
    made = write(0, begin, 0, *ids, version=more.pop("version", 0))
    fields: dict[str, Any] = {"end": None, "outcome": "unknown"}
    return replace(made, first_offset=None, last_offset=None, **(fields | more))


def deletion(first: int, begin: int, end: int, request: dict[str, Any], size: int) -> Write:
    made = write(first, begin, end, *["x"] * size)
    return replace(made, verb="delete", body=request, deleted=size)


def state(*writes: Write) -> CollectionModel:
    model = CollectionModel(C)
    for item in writes:
        if item.verb == "delete":
            model.delete(item.body)
        else:
            model.write(item.verb, item.body)
    return model


def get(begin: int, end: int, *writes: Write, process: str = "r") -> Read:
    """A read that saw these writes, in this order, and nothing else."""
    answer = state(*writes).get({})
    return Read(process=process, collection=C, verb="get", body={}, begin=begin, end=end,
                answer=answer)  # fmt: skip


def kinds(*events: Event) -> list[str]:
    violations: list[Violation] = check(events).violations
    assert all(str(violation) for violation in violations)
    return [violation.kind for violation in violations]


A = write(1, 0, 10, "a", "b")
B = write(3, 20, 30, "a", "b")


def test_what_is_possible_is_not_reported() -> None:
    assert kinds(A, B, get(31, 32, A, B), get(11, 12, A), get(0, 5), get(0, 5, A)) == []
    # A read beside a write may see it or not, and the next one beside it too.
    assert kinds(A, B, get(21, 22, A), get(23, 24, A, B), get(25, 40, A, B)) == []
    # Beside each other writes may have either order, as the offsets say.
    late = write(3, 5, 30, "a")
    assert kinds(A, late, get(31, 32, A, late)) == []


def test_counts() -> None:
    verdict = check([A, B, unknown(40, "c"), get(50, 60, A, B)])
    assert (verdict.collections, verdict.writes, verdict.reads) == (1, 2, 1)
    assert (verdict.unknown, verdict.unknown_landed, verdict.operations) == (1, 0, 4)


def test_a_stale_read() -> None:
    assert kinds(A, B, get(31, 32, A)) == ["stale read"]
    assert kinds(A, B, get(31, 32)) == ["stale read"]


def test_readers_do_not_go_back_behind_one_another() -> None:
    slow = replace(B, end=100)
    newer, older = get(40, 50, A, slow, process="r1"), get(51, 60, A, process="r2")
    assert kinds(A, slow, newer, older) == ["stale read"]
    assert kinds(A, slow, newer, replace(older, begin=49)) == []
    # The same by way of a write of unknown outcome.
    lost = unknown(20, "a", "b", version=9)
    assert kinds(A, lost, get(40, 50, A, lost), get(51, 60, A)) == ["stale read"]


def test_a_lost_write() -> None:
    other = write(5, 40, 50, "c")
    assert kinds(A, B, other, get(60, 70, A, other)) == ["lost write"]
    # What was acknowledged was never in the log: others took its offsets.
    assert kinds(A, B, replace(other, first_offset=3, last_offset=3)) == ["not dense"]


def test_a_torn_batch() -> None:
    half = replace(B, body=body("a", version=3))
    assert kinds(A, B, get(21, 40, A, half)) == ["torn read"]
    gone = deletion(3, 20, 30, {"where": {"version": 1}}, 2)
    assert kinds(A, gone, get(21, 40, A, deletion(3, 20, 30, {"ids": ["a"]}, 1))) == ["torn read"]


def test_a_read_of_what_nobody_wrote() -> None:
    assert kinds(A, get(11, 12, A, write(3, 0, 0, "ghost"))) == ["wrong read"]


def test_a_read_of_what_nobody_has_begun_to_write() -> None:
    assert kinds(A, B, get(11, 12, A, B)) == ["future read"]


def test_reordered_writes() -> None:
    first, second = write(3, 0, 10, "a"), write(1, 20, 30, "a", "b")
    assert kinds(first, second) == ["reordered"]


def test_holes_and_overlaps() -> None:
    assert kinds(A, write(4, 20, 30, "a")) == ["not dense"]
    assert kinds(A, write(2, 5, 30, "a")) == ["not dense"]
    assert kinds(write(2, 0, 10, "a")) == ["not dense"]


def test_an_unknown_write_fills_a_hole_or_did_not_land() -> None:
    between = unknown(12, "c", version=7)
    after = write(4, 20, 30, "a")
    assert kinds(A, between, after, get(40, 50, A, between, after)) == []
    assert kinds(A, between, after, get(40, 50, A, after)) != []  # It landed, and is missing.
    direct = write(3, 20, 30, "a")
    assert kinds(A, between, direct, get(40, 50, A, direct)) == []
    assert kinds(A, between, direct, get(40, 50, A, direct, between)) == []  # It landed late.
    # One that had not begun when the hole was closed does not fill it.
    assert kinds(A, unknown(35, "c"), after) == ["not dense"]
    assert kinds(A, unknown(12, "c", "d"), after) == ["not dense"]
    # Nor does one whose process was dead before a write ahead of it began.
    dead = unknown(12, "c", end=15, version=7)
    assert kinds(A, dead, after) == []
    assert kinds(A, dead, B, write(6, 32, 40, "a")) == ["not dense"]


def test_reads_tell_which_of_several_unknown_writes_landed() -> None:
    several = [unknown(12, name, version=7) for name in "cdef"]
    after = write(5, 20, 30, "a")
    landed = (several[3], several[1])
    assert kinds(A, *several, after, get(40, 50, A, *landed, after)) == []
    assert kinds(A, *several, after, get(40, 50, A, several[0], after)) != []
    verdict = check([A, *several, after, get(40, 50, A, *landed, after)])
    assert verdict.unknown_landed == 2


def test_too_much_that_is_unknown_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ochredb.testing.history._STATES_MAX", 100)
    several = [unknown(12, f"u{number}", version=7) for number in range(14)]
    assert kinds(A, *several, get(40, 50, write(1, 0, 0, "ghost"))) == ["undecided"]


def test_attempts_with_one_key_are_one_write() -> None:
    lost = unknown(12, "c", version=7, key="k")
    again = write(3, 50, 60, "c", version=7, key="k")
    # The first attempt landed: a read before the second one saw it.
    assert kinds(A, lost, again, get(20, 30, A, lost), get(70, 80, A, lost)) == []
    assert kinds(A, lost, again, get(70, 80, A)) == ["stale read"]
    assert kinds(A, replace(lost, outcome="refused", end=13), again, get(20, 30, A)) == []


def test_a_write_applied_twice() -> None:
    once = write(3, 20, 30, "c", key="k")
    again = replace(once, begin=40, end=50, first_offset=4, last_offset=4)
    assert "applied twice" in kinds(A, once, again)
    # Unnoticed by the writer: a delete comes between, and the record is back.
    gone = deletion(4, 31, 35, {"ids": ["c"]}, 1)
    assert kinds(A, once, gone, get(60, 70, A, once)) != []
    late = replace(once, begin=40, end=50)
    assert kinds(A, once, gone, late, get(60, 70, A, once, gone)) == []
    assert kinds(A, once, gone, late, replace(get(60, 70), verb="last_offset", answer=5)) == [
        "wrong read"
    ]


def test_one_key_for_two_requests_is_no_history() -> None:
    with pytest.raises(ValueError, match="one key"):
        check([write(1, 0, 1, "a", key="k"), write(2, 2, 3, "b", key="k")])


def test_deletes_answer_what_they_deleted_and_take_as_many_offsets() -> None:
    right = deletion(3, 20, 30, {"where": {"version": 1}}, 2)
    assert kinds(A, right, get(40, 50, A, right)) == []
    assert kinds(A, replace(right, last_offset=3)) == ["wrong answer"]
    assert kinds(A, replace(right, deleted=1)) == ["wrong answer"]
    nothing = replace(right, body={"where": {"version": 8}}, last_offset=2, deleted=0)
    assert kinds(A, nothing) == []
    # Nothing was found although something was there all the time.
    assert kinds(A, replace(nothing, body=right.body)) == ["stale read"]


def test_a_write_that_had_to_be_refused() -> None:
    wrong = replace(B, body={"ids": ["a", "b"], "embeddings": [[1.0]] * 2})
    assert kinds(A, wrong) == ["wrong answer"]


def test_other_reads() -> None:
    def read(verb: str, answer: object, request: dict[str, Any] | None = None) -> Read:
        return Read(process="r", collection=C, verb=verb, body=request or {}, begin=40, end=50,
                    answer=answer)  # fmt: skip

    assert kinds(A, B, read("count", 2), read("last_offset", 4)) == []
    assert kinds(A, B, read("count", 1)) == ["torn read"]
    assert kinds(A, B, read("last_offset", 2)) == ["stale read"]
    request = {"query_embeddings": [[3.0, 1.0]], "n_results": 1}
    assert kinds(A, B, read("query", {"ids": [["a"]], "distances": [[0.0]]}, request)) == []
    assert kinds(A, B, read("query", {"ids": [["a"]], "distances": [[4.0]]}, request)) == [
        "stale read"
    ]
    with pytest.raises(ValueError, match="no such read"):
        kinds(A, read("peek", 1))


def named(verb: Any, begin: int, end: int | None, collection: str | None, **more: Any) -> Named:
    fields: dict[str, Any] = {"process": "n", "verb": verb, "name": "name", "outcome": "done"}
    return Named(**(fields | more), begin=begin, end=end, collection=collection)


def test_names() -> None:
    made, dropped = named("create", 0, 10, C), named("drop", 100, 110, C)
    early, late = named("lookup", 20, 30, C), named("lookup", 120, 130, C)
    missing = replace(late, outcome="not_found", collection=None)
    assert kinds(made, early, dropped, missing, named("create", 140, 150, "d")) == []
    assert kinds(made, early, dropped, late) == ["wrongly found"]
    assert kinds(made, replace(missing, begin=20, end=30), dropped) == ["wrongly missing"]
    assert kinds(made, replace(missing, begin=105, end=120), dropped) == []
    assert kinds(made, named("create", 20, 30, "d"), dropped) == ["two of one name"]
    assert kinds(replace(late, begin=0, end=1), named("create", 5, 8, C)) == ["wrongly found"]
    # A drop whose outcome nobody knows allows both.
    open_end = named("drop", 100, None, None, outcome="unknown")
    assert kinds(made, open_end, late, missing, named("create", 140, 150, "d")) == []


def test_a_collection_is_there_from_its_creation_to_its_drop() -> None:
    made, dropped = named("create", 0, 1, C), named("drop", 40, 50, C)
    gone = Read(process="r", collection=C, verb="count", body={}, begin=60, end=70,
                outcome="not_found")  # fmt: skip
    assert kinds(made, A, dropped, gone) == []
    assert kinds(made, A, dropped, replace(gone, begin=20, end=30)) == ["wrongly missing"]
    assert kinds(made, A, dropped, get(60, 70, A)) == ["wrongly found"]
    assert kinds(made, dropped, replace(A, begin=60, end=70)) == ["wrongly found"]


class Rendition:
    """A correct system, played at random: each operation counts at a moment between its ends."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.model, self.events, self.moment = CollectionModel(C), list[Event](), 0

    def play(self, steps: int) -> list[Event]:
        for step in range(steps):
            self.moment += self.rng.randrange(1, 20)
            begin = max(0, self.moment - self.rng.randrange(40))
            end = self.moment + self.rng.randrange(40)
            if self.rng.random() < 0.5:
                self.read(begin, end)
            else:
                self.write(step, begin, end)
        return self.events

    def read(self, begin: int, end: int) -> None:
        where = {"version": {"$lt": 30}}
        requests: list[dict[str, Any]] = [{}, {"ids": ["0", "1"]}, {"where": where}]
        request = self.rng.choice(requests)
        self.events.append(
            Read(process="r", collection=C, verb="get", body=request, begin=begin, end=end,
                 answer=copy.deepcopy(self.model.get(request)))
        )  # fmt: skip

    def write(self, step: int, begin: int, end: int) -> None:
        rng, model = self.rng, self.model
        ids = [str(rng.randrange(8)) for _ in range(rng.randrange(1, 4))]
        verb = rng.choice(["add", "upsert", "update", "delete"])
        request: dict[str, Any] = body(*set(ids), version=step)
        if verb == "delete":
            where = {"version": rng.randrange(step + 1)}
            request = {"where": where} if rng.random() < 0.5 else {"ids": ids}
        first, landed, answered = model.operations + 1, rng.random() < 0.95, rng.random() < 0.95
        deleted = None
        if landed and verb == "delete":
            deleted = model.delete(request)
        elif landed:
            model.write(verb, request)
        done = landed and answered
        self.events.append(
            Write(process="w", collection=C, verb=verb, body=request, begin=begin,
                  end=end if done else None, outcome="done" if done else "unknown",
                  first_offset=first if done else None, deleted=deleted if done else None,
                  last_offset=model.operations if done else None)
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_a_correct_system_passes_and_what_is_changed_in_it_is_found(seed: int) -> None:
    events = Rendition(seed).play(80)
    random.Random(seed).shuffle(events)
    assert kinds(*events) == []
    reads = [event for event in events if isinstance(event, Read) and event.body == {}]
    for victim in random.Random(seed).sample(reads, 2):
        others = [event for event in events if event is not victim]
        answer: dict[str, Any] = victim.answer
        assert kinds(*others, replace(victim, answer={**answer, "ids": ["ghost"]})) != []
        last = 10_000  # Behind everything.
        if answer != max(reads, key=lambda read: read.begin).answer:
            assert kinds(*others, replace(victim, begin=last, end=last + 1)) != []
