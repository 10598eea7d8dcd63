"""What compaction, merging and collecting work with: the store, the catalog's tables, settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ochredb.ages import Ages
from ochredb.catalog.jobs import Jobs
from ochredb.catalog.logs import LogTable
from ochredb.catalog.namespace import Namespace
from ochredb.catalog.objects import ObjectTable
from ochredb.catalog.versions import VersionTable
from ochredb.clock import Clock
from ochredb.hints.base import Hints, NoHints
from ochredb.ids import IdSource
from ochredb.parts.manifest import Manifest
from ochredb.parts.open_parts import OpenParts
from ochredb.storage.base import LocalStore
from ochredb.storage.space import Reserve
from ochredb_compactor.config import CompactorConfig
from ochredb_compactor.memory import MemoryBudget


@dataclass(slots=True)
class Counters:
    """Work done since the start. Written by the merging thread; `compact_now` may race with it.

    graph_insertions: vectors that were inserted into graphs, those of abandoned merges included.
    """

    graph_insertions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Components, not settings: each is shared with the other roles of the process.

    before_commit: told of a new part before a version names it, so that readers can open it.
    hints: told of new versions.
    """

    store: LocalStore
    logs: LogTable
    versions: VersionTable
    namespace: Namespace
    objects: ObjectTable
    jobs: Jobs
    clock: Clock
    ids: IdSource
    parts: OpenParts
    config: CompactorConfig
    reserve: Reserve = field(default_factory=Reserve)
    counters: Counters = field(default_factory=Counters)
    before_commit: Callable[[str, Manifest], None] = lambda _collection, _manifest: None
    hints: Hints = field(default_factory=NoHints)
    ages: Ages = field(init=False)
    memory: MemoryBudget = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ages", Ages(self.clock))
        object.__setattr__(self, "memory", MemoryBudget(self.config.memory_bytes))
