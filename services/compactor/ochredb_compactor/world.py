"""What compaction, merging and collecting work with: the store, the catalog's tables, settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ochredb.catalog.jobs import Jobs
from ochredb.catalog.logs import LogTable
from ochredb.catalog.namespace import Namespace
from ochredb.catalog.objects import ObjectTable
from ochredb.catalog.versions import VersionTable
from ochredb.clock import Clock
from ochredb.ids import IdSource
from ochredb.parts.manifest import Manifest
from ochredb.parts.open_parts import OpenParts
from ochredb.storage.base import LocalStore
from ochredb_compactor.config import CompactorConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Components, not settings: each is shared with the other roles of the process.

    before_commit: told of a new part before a version names it, so that readers can open it.
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
    before_commit: Callable[[str, Manifest], None] = lambda _collection, _manifest: None
