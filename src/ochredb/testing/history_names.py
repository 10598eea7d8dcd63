"""The part of a history that is about names: creating, dropping and finding collections.

Each rule names what certainly is wrong, whatever the operations that overlap did: a drop or a
creation of unknown outcome may count from its beginning.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ochredb.testing.history_events import Named

NameViolation = tuple[str, str, str]  # Kind, collection or name, text.
Seen = tuple[str, bool, int, int]  # Collection, whether it was found, begin, end.


@dataclass(slots=True)
class _Life:
    """When a collection may have been there, and when it certainly was."""

    created_begin: float = math.inf
    created_end: float = math.inf
    drop_begin: float = math.inf
    drop_end: float = math.inf  # Of the first drop that was acknowledged.


def check_names(events: Sequence[Named], seen: Iterable[Seen]) -> Iterator[NameViolation]:
    """What is wrong with names, and with collections that were found or missed by their id."""
    lives: dict[str, _Life] = defaultdict(_Life)
    names: dict[str, set[str]] = defaultdict(set)
    drops_of_name: dict[str, list[Named]] = defaultdict(list)  # Of who knows which.
    creates_of_name: dict[str, list[int]] = defaultdict(list)
    for event in events:
        if event.verb == "create" and event.outcome == "unknown":
            creates_of_name[event.name].append(event.begin)
        if event.verb in ("create", "lookup") and event.collection is not None:
            names[event.name].add(event.collection)
            life = lives[event.collection]
            if event.end is not None and event.outcome == "done":
                life.created_end = min(life.created_end, event.end)
            if event.verb == "create":
                life.created_begin = min(life.created_begin, event.begin)
        elif event.verb == "drop" and event.outcome in ("done", "unknown"):
            if event.collection is None:
                drops_of_name[event.name].append(event)
            else:
                life = lives[event.collection]
                life.drop_begin = min(life.drop_begin, event.begin)
                if event.outcome == "done" and event.end is not None:
                    life.drop_end = min(life.drop_end, event.end)
    for name, drops in drops_of_name.items():
        for life in (lives[collection] for collection in names[name]):
            for drop in drops:
                if drop.end is None or drop.end >= life.created_begin:
                    life.drop_begin = min(life.drop_begin, drop.begin)
    yield from _by_id(lives, seen)
    for event in events:
        if event.verb != "lookup" or event.end is None:
            continue
        if event.outcome == "done" and event.collection is not None:
            life = lives[event.collection]
            if life.drop_end < event.begin:
                yield "wrongly found", event.collection, f"{event}: it had been dropped"
            begun = min([life.created_begin, *creates_of_name[event.name]])
            if begun > event.end:
                yield "wrongly found", event.collection, f"{event}: nobody had created it"
        elif event.outcome == "not_found":
            for collection in names[event.name]:
                life = lives[collection]
                if life.created_end < event.begin and life.drop_begin > event.end:
                    yield "wrongly missing", collection, f"{event}: it was there all the time"
    for name, collections in names.items():
        ordered = sorted(collections, key=lambda found: lives[found].created_end)
        for index, one in enumerate(ordered):
            for other in ordered[index + 1 :]:
                # Both had been answered and neither could be gone yet.
                if min(lives[one].drop_begin, lives[other].drop_begin) > lives[other].created_end:
                    yield "two of one name", name, f"{one} and {other} were there at once"


def _by_id(lives: dict[str, _Life], seen: Iterable[Seen]) -> Iterator[NameViolation]:
    for collection, found, begin, end in seen:
        life = lives.get(collection)
        if life is None:
            continue
        if found and life.drop_end < begin:
            yield "wrongly found", collection, f"used in [{begin}, {end}], after its drop"
        if not found and life.created_end < begin and life.drop_begin > end:
            yield "wrongly missing", collection, f"not found in [{begin}, {end}]"
