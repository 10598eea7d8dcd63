"""The events of a history, and what each must do to a model.

See `ochredb.testing.history`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from ochredb.testing.model import CollectionModel, Json, Refusal, canonical

Outcome = Literal["done", "refused", "not_found", "unknown"]
_COLUMNS = ("ids", "embeddings", "documents", "metadatas", "uris")


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One attempt at add, update, upsert or delete; `body` as in a REST request.

    end: None if no answer came; of an unknown outcome also when its process was certainly dead.
    outcome: "refused" means that it certainly has no effect.
    first_offset, last_offset: of a done write; last = first - 1 if it had nothing to do.
    deleted: what a done delete answered, if it was recorded.
    """

    process: str
    collection: str
    verb: str
    body: Json
    begin: int
    end: int | None
    outcome: Outcome
    key: str | None = None
    first_offset: int | None = None
    last_offset: int | None = None
    deleted: int | None = None

    def __post_init__(self) -> None:
        if self.outcome == "done" and None in (self.end, self.first_offset, self.last_offset):
            raise ValueError(f"a done write has an end and offsets: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One strong read that was answered.

    verb: get, count, query (exact; each answer has ids and distances), or last_offset.
    answer: as on the wire; the number itself for count and last_offset.
    """

    process: str
    collection: str
    verb: str
    body: Json
    begin: int
    end: int
    outcome: Literal["done", "not_found"] = "done"
    answer: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """One create (or get-or-create), drop or lookup of a name.

    collection: the id that a done create or lookup answered, or that a drop took away; None in a
        drop if that is not known.
    end: None if no answer came; then the outcome is unknown.
    """

    process: str
    verb: Literal["create", "drop", "lookup"]
    name: str
    begin: int
    end: int | None
    outcome: Literal["done", "refused", "not_found", "unknown"]
    collection: str | None = None


class Impossible(Exception):
    """An order of the writes is not possible; `read` is the number of one that it leaves over."""

    def __init__(self, kind: str, text: str, read: int | None = None) -> None:
        super().__init__(text)
        self.kind, self.text, self.read = kind, text, read


def first_of(write: Write) -> int:
    assert write.first_offset is not None
    return write.first_offset


def size_of(write: Write) -> int:
    assert write.last_offset is not None
    return write.last_offset - first_of(write) + 1


def apply(model: CollectionModel, write: Write) -> int | None:
    """Returns how many records a delete must have answered. Raises Impossible."""
    if write.verb == "delete":
        return model.delete(write.body)
    try:
        model.write(write.verb, write.body)
    except Refusal as refusal:
        raise Impossible("wrong answer", f"{shown(write)} must be refused: {refusal}") from None
    return None


def as_read(write: Write) -> Read:
    """A delete that found nothing is a read of nothing."""
    assert write.end is not None
    return Read(
        process=write.process, collection=write.collection, verb="matches", body=write.body,
        begin=write.begin, end=write.end, answer=0,
    )  # fmt: skip


def answer_of(model: CollectionModel, read: Read) -> object:
    match read.verb:
        case "get":
            return model.get(read.body)
        case "count":
            return len(model.records)
        case "query":
            wanted = read.body.get("n_results", 10)
            try:
                nearest = model.query(read.body)
            except Refusal:
                return None
            return {
                "ids": [found.ids[:wanted] for found in nearest],
                "distances": [found.distances[:wanted] for found in nearest],
            }
        case "last_offset":
            return model.operations
        case "matches":
            return len(model.matching(read.body))
        case _:
            raise ValueError(f"no such read: {read.verb}")


def singles(model: CollectionModel, write: Write) -> Iterator[Write]:
    """The write's operations one by one, as a torn one would apply them."""
    if write.verb == "delete":
        ids = write.body.get("ids")
        if ids is None or "where" in write.body or "where_document" in write.body:
            ids = model.matching(write.body)[: write.body.get("limit")]
        bodies: list[Json] = [{"ids": [name]} for name in ids]
    else:
        columns = {name: write.body[name] for name in _COLUMNS if write.body.get(name)}
        bodies = [
            {name: [column[row]] for name, column in columns.items()}
            for row in range(len(write.body["ids"]))
        ]
    for body in bodies:
        yield replace(write, body=body)


def shown(event: Write | Read) -> str:
    """Short, for a message."""
    body = canonical(event.body)
    text = f"{event.verb} by {event.process} [{event.begin}, {event.end}] {body[:300]}"
    if isinstance(event, Write):
        return f"{text} (offsets {event.first_offset} to {event.last_offset}, key {event.key})"
    return f"{text}, answered {canonical(event.answer)[:600]}"
