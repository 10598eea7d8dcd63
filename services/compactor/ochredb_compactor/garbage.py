"""Garbage: objects that nobody refers to any more, and orphans that nobody ever did (I6).

A version keeps its objects for some seconds after another has replaced it. An unreferenced object
is deleted a grace period after its *last* reference went. An orphan is found by listing: an object
without a row, older than the grace period by its own name and by the store's clock. A row that says
so is committed before it is deleted and kept for a week, so a writer that slept past the sweep
conflicts at its commit instead of referring to nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from ochredb.crash_points import reach
from ochredb.errors import Conflict, StorageFull
from ochredb.ids import uuid7_time_us
from ochredb.parts.writer import discard
from ochredb.storage.base import DeletesMany, delete_all
from ochredb_compactor.world import World

log = logging.getLogger("ochredb.compactor")

PREFIXES = ("deleted/", "fragments/", "parts/")
_BATCH = 500
_COLLECTIONS_PER_COMMIT = 100  # Writers wait for one transaction: a few milliseconds.
# The sweep stops if more than this share of all objects, and more than a few, look orphaned: then
# the catalog is more likely to be the wrong one than the objects to be garbage.
_ORPHAN_SHARE_MAX = 0.2
_ORPHANS_ALWAYS_ALLOWED = 100
_SWEPT_RETENTION_S = 7 * 86_400.0


def collect(world: World, step: Callable[[], None]) -> int:
    """Let replaced versions go, delete objects without references since long enough.

    Returns how many objects it deleted.
    """
    config, ages = world.config, world.ages
    cutoff, ahead = ages.before_us(config.grace_s), ages.after_us(config.grace_s)
    let_go(world, ages.before_us(config.replaced_retention_s), step)
    world.objects.stamp_anew(ahead, cutoff)
    deleted = 0
    while True:
        world.objects.mark_due(cutoff, _BATCH)
        keys = world.objects.deleting(_BATCH)
        if not keys:
            return deleted
        gone = _delete(world, keys, step)
        deleted += gone
        if gone < len(keys):
            return deleted  # Some could not be deleted now: they come first again next time.


def garbage_due(world: World) -> bool:
    """Whether `collect` has anything to do. Cost: four small reads."""
    config, ages = world.config, world.ages
    replaced_before = ages.before_us(config.replaced_retention_s)
    cutoff, ahead = ages.before_us(config.grace_s), ages.after_us(config.grace_s)
    return world.versions.any_replaced(replaced_before, ahead) or world.objects.any_due(
        cutoff, ahead
    )


def let_go(world: World, replaced_before_us: int, step: Callable[[], None]) -> None:
    """Release what only versions refer to that were replaced before then."""
    ahead, batch = world.ages.after_us(world.config.grace_s), _COLLECTIONS_PER_COMMIT
    while world.versions.release_replaced(replaced_before_us, batch, ahead) == batch:
        step()


def find_orphans(world: World, cutoff_us: int | None = None) -> tuple[list[str], int]:
    """Keys without a row that are old enough, and the number of objects looked at. Dry run.

    cutoff_us: made before then; by default a grace period ago.
    """
    grace_s = world.config.grace_s
    cutoff = world.ages.before_us(grace_s) if cutoff_us is None else cutoff_us
    ahead = world.ages.after_us(grace_s)
    orphans: list[str] = []
    seen = 0
    for prefix in PREFIXES:
        batch: list[str] = []
        for item in world.store.list(prefix):
            seen += 1
            if not cutoff < max(_named_time_us(item.key), item.modified_us) <= ahead:
                batch.append(item.key)
            if len(batch) == _BATCH:
                orphans += _unknown(world, batch)
                batch = []
        orphans += _unknown(world, batch)
    return orphans, seen


def sweep(world: World, step: Callable[[], None]) -> int:
    """Delete orphans; returns how many. Refuses, with a logged error, if they are too many."""
    world.objects.forget_swept(world.ages.before_us(_SWEPT_RETENTION_S))
    orphans, seen = find_orphans(world)
    if len(orphans) > max(_ORPHANS_ALWAYS_ALLOWED, _ORPHAN_SHARE_MAX * seen):
        log.error("sweep refused: %d of %d objects look orphaned", len(orphans), seen)
        return 0
    swept = 0
    for start in range(0, len(orphans), _BATCH):
        condemned = world.objects.condemn(orphans[start : start + _BATCH], world.clock.now_us())
        for keys in _at_once(world, condemned):
            for problem in delete_all(world.store, keys).values():
                raise problem
            for _ in keys:
                reach("sweep.deleted")
            swept += len(keys)
            step()
    return swept


@contextlib.contextmanager
def discarding(
    world: World, objects: Sequence[tuple[str, int]], *, before_commit: bool = False
) -> Iterator[None]:
    """Delete the objects that only a commit would have named if it loses, or meets a full disk.

    Any other error may mean that the commit took effect: then nothing is touched, unless this is
    `before_commit`.
    """
    try:
        yield
    except BaseException as error:
        if before_commit or isinstance(error, Conflict | StorageFull):
            discard(world.store, [key for key, _ in objects])
        raise


def _delete(world: World, keys: Sequence[str], step: Callable[[], None]) -> int:
    """Delete what can be deleted; one that cannot does not keep the others (I9)."""
    gone = []
    for batch in _at_once(world, keys):
        problems = delete_all(world.store, batch)
        for key, error in problems.items():
            log.warning("cannot delete %s: %s", key, error)
        for key in batch:
            if key not in problems:
                reach("gc.deleted")
                gone.append(key)
        step()
    world.objects.forget(gone)
    return len(gone)


def _at_once(world: World, keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """In as many steps as the store deletes them best."""
    size = _BATCH if isinstance(world.store, DeletesMany) else 1
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def _unknown(world: World, keys: Sequence[str]) -> list[str]:
    known = world.objects.known(keys)
    return [key for key in keys if key not in known]


def _named_time_us(key: str) -> int:
    """The time in the uuid7 that is the key's second part; 0 if there is none."""
    try:
        return uuid7_time_us(key.split("/")[1])
    except (IndexError, ValueError):
        return 0
