"""An object store in a bucket of S3, or of whatever speaks its protocol.

An object is created by one plain PutObject with `If-None-Match: *`: whole or not at all, and by one
writer only. Nothing that must be conditional is ever a multipart upload: some endpoints ignore the
condition there without a word. So an object has 5 GiB at most.

A 5xx, a time-out or a lost reply says nothing about what a PUT did. Each create has a name, which
the object carries in its metadata; who does not know looks: the name is mine, so it has succeeded;
another's, so the key was taken; nothing there, so the same create is sent again, which can never
win over itself. boto3's own retries are off: they would turn such a success into "exists".

    store = S3Store(S3Config.from_url("s3://bucket/prefix"), SystemClock(), IdSource())
    store.check()          # at start: refuses an endpoint that does not honour the condition
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from ochredb.checksum import xxh3
from ochredb.clock import Clock
from ochredb.crash_points import reach
from ochredb.errors import (
    AlreadyExists,
    Corrupt,
    InvalidArgument,
    NotFound,
    OchreError,
    TooLarge,
    Unavailable,
)
from ochredb.ids import IdSource, uuid7_time_us
from ochredb.storage.base import RESERVED_PART, StoredObject, byte_views, check_key, is_key
from ochredb.storage.s3_body import Pieces, filler, read_all, whole
from ochredb.storage.s3_config import S3Config, connect
from ochredb.storage.s3_failures import SETTINGS_AT_FAULT, Attempts, Failure, Fate, failure_of

if TYPE_CHECKING:
    from ochredb.storage.base import Begin, Data, Take

T = TypeVar("T")

__all__ = ["OBJECT_BYTES_MAX", "S3Config", "S3Store"]

OBJECT_BYTES_MAX = 5 << 30
"""What one PutObject takes."""

_RANGE_BYTES = 8 << 20  # Larger objects are fetched in ranges of this size, some at a time.
_JOINED_BYTES_MAX = 4 << 20  # Below, one copy is cheaper than a hundred small sends.
_DELETED_AT_ONCE = 500
_BYTES_PER_S_MIN = 10 << 20  # A large upload may be begun anew for as much longer.
_PROBE_FOLDER = f"{RESERVED_PART}/probe/"
_PROBE_ABANDONED_US = 600_000_000
_WRITER, _CHECKSUM = "ochredb-writer", "ochredb-xxh3"  # In the object's own metadata.
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)\Z")


class S3Store:
    """`ObjectStore` in a bucket. Nothing is connected before the first call.

    May be used after a fork by either side: connections and threads belong to one process.
    """

    def __init__(
        self, config: S3Config, clock: Clock, ids: IdSource, rng: random.Random | None = None
    ) -> None:
        """rng: for pauses between attempts."""
        self.config = config
        self._clock, self._ids, self._rng = clock, ids, rng or random.Random()
        self._below = config.prefix + "/" if config.prefix else ""
        self._lock = threading.Lock()
        self._of_process = 0
        self._connected: Any = None
        self._fetchers: ThreadPoolExecutor | None = None

    # -- the store

    def create(self, key: str, data: Data) -> None:
        """See `ObjectStore`. One round trip; two above 4 MiB. Raises TooLarge too."""
        check_key(key)
        self._create(key, byte_views(data))

    def get(self, key: str) -> bytes:
        check_key(key)
        for last in (False, True):
            content, expected = self._get(key)
            if expected is None or xxh3(content) == expected:
                return content
            if last:
                raise Corrupt(f"{key} fails its checksum in {self.config.place}", key=key)
        raise AssertionError

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        check_key(key)
        if not 0 <= start <= stop:
            raise ValueError(f"range [{start}, {stop}) is not within {key}")
        if start == stop:
            size = int(self._look_at(key)["ContentLength"])
            if stop > size:
                raise ValueError(f"range [{start}, {stop}) is not within {key} of {size} bytes")
            return b""
        content = bytearray()

        def begin(size: int) -> Take:
            if stop > size:
                raise ValueError(f"range [{start}, {stop}) is not within {key} of {size} bytes")
            content.extend(bytes(stop - start))
            return filler(content, start)

        self._fetch(key, start, stop, begin)
        return bytes(content)

    def download(self, key: str, begin: Begin) -> int | None:
        """See `base.Downloads`. Some ranges at a time; 256 KiB of memory for each."""
        check_key(key)
        return self._fetch(key, 0, None, begin)

    def download_ranges(
        self, key: str, size: int, ranges: Sequence[tuple[int, int]], take: Take
    ) -> None:
        """See `base.Downloads`."""
        check_key(key)

        def opened(found: int) -> Take:
            if found != size:
                raise Corrupt(f"{key} has {found} bytes instead of {size}", key=key)
            return take

        pieces = [
            (first, min(first + _RANGE_BYTES, stop))
            for start, stop in ranges
            for first in range(start, stop, _RANGE_BYTES)
        ]
        with _together() as others:
            for first, end in pieces[1:]:
                others.append(self._pool().submit(self._fetch_range, key, first, end, opened))
            for first, end in pieces[:1]:
                self._fetch_range(key, first, end, opened)

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        """See `ObjectStore`. One round trip per 1,000 objects. The endpoint must list in byte
        order, as S3 does (its directory buckets do not)."""
        if prefix and not (is_key(prefix) or is_key(prefix + "x")):
            return  # No key starts like this.
        request: dict[str, Any] = {"Bucket": self.config.bucket, "Prefix": self._below + prefix}
        if after:
            request["StartAfter"] = self._below + after
        while True:
            page = self._repeated("list", prefix, lambda c: c.list_objects_v2(**request))
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self._below)
                if is_key(key) and key > after:  # Others may put something there, too.
                    modified_us = round(item["LastModified"].timestamp() * 1e6)
                    yield StoredObject(key, item["Size"], modified_us)
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        check_key(key)
        self._delete(key)

    def delete_many(self, keys: Sequence[str]) -> dict[str, OchreError]:
        """See `DeletesMany`. One request for 500 keys; one each where it does not know that one."""
        problems: dict[str, OchreError] = {}
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            batch = keys[start : start + _DELETED_AT_ONCE]
            for key in batch:
                check_key(key)
            try:
                problems.update(self._delete_batch(batch))
            except Unavailable as error:
                if error.detail.get("status", 500) >= 500:
                    problems.update(dict.fromkeys(batch, error))
                    continue
                for key in batch:
                    try:
                        self._delete(key)
                    except OchreError as problem:
                        problems[key] = problem
        return problems

    # -- life

    def check(self, writes: bool = True) -> None:
        """Try out all that the store will do; before anything is served. About ten round trips.

        writes: False for who only reads, with credentials that allow no more.

        Raises InvalidArgument for what only another configuration helps against (no such bucket, a
        key that is not known there, an endpoint that does not honour `If-None-Match: *` and would
        let a writer replace another's object), Unavailable for the rest.
        """
        try:
            for _ in self.list(""):
                break
        except Unavailable as error:
            setting = SETTINGS_AT_FAULT.get(str(error.detail.get("code")))
            if setting is None:
                raise
            raise InvalidArgument(f"{setting}: {error}") from error
        probe = _PROBE_FOLDER + self._ids.uuid7()
        try:
            self._look_at(probe)
        except NotFound:
            pass
        except Unavailable as error:
            if error.detail.get("status") == 403:
                raise Unavailable(
                    f"{error}; to tell an absent object, s3:ListBucket must be allowed"
                ) from error
            raise
        if writes:
            self._remove_old_probes()
            self._check_create_only(probe)

    def close(self) -> None:
        """Close connections and end threads. Idempotent."""
        with self._lock:
            pool, self._fetchers = self._fetchers, None
            client, self._connected = self._connected, None
        if self._of_process == os.getpid():
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)
            if client is not None:
                client.close()

    def _check_create_only(self, probe: str) -> None:
        self._create(probe, [memoryview(b"first")])
        try:
            self._create(probe, [memoryview(b"second")])
        except AlreadyExists:
            found, _ = self._get(probe)
            problem = "" if found == b"first" else f"it gave {found!r} back for b'first'"
        else:
            problem = (
                "it let a second create replace the first: it does not honour If-None-Match: * on "
                "PutObject, without which two writers can destroy each other's data"
            )
        self._delete(probe)
        if problem:
            raise InvalidArgument(f"{self.config.place} cannot hold a database: {problem}")

    def _remove_old_probes(self) -> None:
        """Of starts that died in `check`."""
        request = {"Bucket": self.config.bucket, "Prefix": self._below + _PROBE_FOLDER}
        page = self._repeated("list", _PROBE_FOLDER, lambda c: c.list_objects_v2(**request))
        for item in page.get("Contents", ()):
            key = item["Key"].removeprefix(self._below)
            with contextlib.suppress(ValueError):  # Not one of ours.
                made_us = uuid7_time_us(key.removeprefix(_PROBE_FOLDER))
                if made_us < self._clock.now_us() - _PROBE_ABANDONED_US:
                    self._delete(key)

    # -- creating

    def _create(self, key: str, views: Sequence[memoryview]) -> None:
        size = sum(view.nbytes for view in views)
        if size > OBJECT_BYTES_MAX:
            raise TooLarge(f"{key} has {size} bytes; an object has {OBJECT_BYTES_MAX} at most")
        checksum = xxhash.xxh3_64()
        for view in views:
            checksum.update(view)
        writer = self._ids.uuid7()
        request: dict[str, Any] = {
            **self._named(key),
            "IfNoneMatch": "*",
            "Metadata": {_WRITER: writer, _CHECKSUM: checksum.hexdigest()},
        }
        if self.config.encryption is not None:
            request["ServerSideEncryption"] = self.config.encryption
        if self.config.kms_key_id is not None:
            request["SSEKMSKeyId"] = self.config.kms_key_id
        joined = whole(views) if size <= _JOINED_BYTES_MAX else None
        attempts = self._attempts(size)
        while True:
            body = Pieces(views) if joined is None else joined
            failed = self._put(key, {**request, "Body": body})
            if failed is None:
                return
            if failed.fate is Fate.REFUSED:
                raise failed.error
            if failed.fate is not Fate.NOT_SENT:
                reach("s3.resolving")
                found = self._writer_of(key, attempts)
                if found == writer:
                    return
                if found is not None:
                    raise AlreadyExists(f"object {key} exists", key=key)
            attempts.pause(failed.error)

    def _put(self, key: str, request: dict[str, Any]) -> Failure | None:
        """One attempt; None if it is known to have succeeded."""
        reach("s3.creating")
        try:
            self._client().put_object(**request)
        except Exception as error:
            return self._failure(error, "create", key)
        reach("s3.created")
        return None

    def _writer_of(self, key: str, attempts: Attempts) -> str | None:
        """Who created the object; empty if it does not say, None if it is not there."""
        try:
            found = self._look_at(key, attempts)
        except NotFound:
            return None
        return str(found["Metadata"].get(_WRITER, ""))

    def _delete(self, key: str) -> None:
        reach("object.deleting")
        with contextlib.suppress(NotFound):  # As some endpoints say.
            self._repeated("delete", key, lambda c: c.delete_object(**self._named(key)))
        reach("object.deleted")

    def _delete_batch(self, keys: Sequence[str]) -> dict[str, OchreError]:
        named = [{"Key": self._below + key} for key in keys]
        request = {"Bucket": self.config.bucket, "Delete": {"Objects": named, "Quiet": True}}
        reach("object.deleting")
        answer = self._repeated("delete", keys[0], lambda c: c.delete_objects(**request))
        reach("object.deleted")
        return {
            item["Key"].removeprefix(self._below): Unavailable(
                f"cannot delete {item['Key']} in {self.config.place}: {item['Code']}"
            )
            for item in answer.get("Errors", ())
            if item["Code"] != "NoSuchKey"
        }

    # -- fetching

    def _get(self, key: str) -> tuple[bytes, int | None]:
        """The object and its checksum."""
        content = bytearray()

        def begin(size: int) -> Take:
            content.extend(bytes(size))
            return filler(content, 0)

        expected = self._fetch(key, 0, None, begin)
        return bytes(content), expected

    def _fetch(self, key: str, start: int, stop: int | None, begin: Begin) -> int | None:
        """Bytes [start, stop) into what `begin` gives; None: to the end. Returns the checksum.

        The answer to the first range says how long the object is; the others come beside it.
        """
        begun: tuple[int, Take] | None = None

        def opened(size: int) -> Take:
            nonlocal begun
            if begun is None:
                begun = size, begin(size)
                last = size if stop is None else stop
                for first in range(start + _RANGE_BYTES, last, _RANGE_BYTES):
                    others.append(
                        self._pool().submit(
                            self._fetch_range, key, first, min(first + _RANGE_BYTES, last), opened
                        )
                    )
            if begun[0] != size:
                raise Unavailable(f"{key} was replaced while it was read", key=key)
            return begun[1]

        end = start + _RANGE_BYTES if stop is None else min(stop, start + _RANGE_BYTES)
        with _together() as others:
            checksum = self._fetch_range(key, start, end, opened)
        return checksum

    def _fetch_range(self, key: str, start: int, stop: int, begin: Begin) -> int | None:
        """One range, again from its start if it breaks off. It may end beyond the object."""

        def fetch(client: Any) -> int | None:
            answer = client.get_object(**self._named(key), Range=f"bytes={start}-{stop - 1}")
            place = _CONTENT_RANGE.match(answer.get("ContentRange", ""))
            if place is None or int(place[1]) != start:
                raise self._no_ranges(key)
            size = int(place[3])
            with contextlib.closing(answer["Body"]) as body:
                read_all(body, start, min(stop, size) - start, begin(size))
            return _checksum_of(answer)

        try:
            return self._repeated("read", key, fetch)
        except _OutOfRange:  # As any range is of an empty object.
            found = self._look_at(key)
            begin(int(found["ContentLength"]))
            if start or int(found["ContentLength"]):
                raise self._no_ranges(key) from None
            return _checksum_of(found)

    def _no_ranges(self, key: str) -> Unavailable:
        return Unavailable(f"{self.config.place} does not answer with the range asked for", key=key)

    def _look_at(self, key: str, attempts: Attempts | None = None) -> dict[str, Any]:
        def look(client: Any) -> dict[str, Any]:
            found: dict[str, Any] = client.head_object(**self._named(key))
            return found

        return self._repeated("look at", key, look, attempts)

    # -- calls

    def _named(self, key: str) -> dict[str, str]:
        return {"Bucket": self.config.bucket, "Key": self._below + key}

    def _repeated(
        self,
        verb: str,
        key: str,
        call: Callable[[Any], T],
        attempts: Attempts | None = None,
    ) -> T:
        """What may be done twice, until it succeeds, is refused, or time is up."""
        attempts = attempts or self._attempts()
        while True:
            try:
                return call(self._client())
            except (OchreError, ValueError):
                raise
            except Exception as error:
                failed = self._failure(error, verb, key)
            if failed.fate is Fate.RANGE:
                raise _OutOfRange
            if failed.fate not in (Fate.UNKNOWN, Fate.NOT_SENT):
                raise failed.error
            attempts.pause(failed.error)

    def _attempts(self, size: int = 0) -> Attempts:
        allowed_s = self.config.deadline_s + size / _BYTES_PER_S_MIN
        return Attempts(self._clock, self._rng, allowed_s)

    def _failure(self, error: Exception, verb: str, key: str) -> Failure:
        return failure_of(error, verb, key, self.config.place)

    def _client(self) -> Any:
        """boto3's client of this process. Thread-safe; made by the first call, in about 0.3 s."""
        if self._connected is None or self._of_process != os.getpid():
            with self._lock:
                self._begin_process()
                if self._connected is None:
                    self._connected = connect(self.config)
        return self._connected

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            self._begin_process()
            if self._fetchers is None:
                self._fetchers = ThreadPoolExecutor(
                    max(1, self.config.connections_max // 2), thread_name_prefix="s3-fetch"
                )
            return self._fetchers

    def _begin_process(self) -> None:
        """Forget what belongs to the process that this one was forked from."""
        if self._of_process != os.getpid():
            self._connected = self._fetchers = None
            self._of_process = os.getpid()


@contextlib.contextmanager
def _together() -> Iterator[list[Future[int | None]]]:
    """Whatever is put into the list has ended when the block has; one failure ends the others."""
    others: list[Future[int | None]] = []
    try:
        yield others
        for other in others:
            other.result()
    except BaseException:
        for other in others:
            other.cancel()
        wait(others)  # What still runs would write to what the caller gives up.
        raise


def _checksum_of(answer: dict[str, Any]) -> int | None:
    text = answer["Metadata"].get(_CHECKSUM)
    return None if text is None else int(text, 16)


class _OutOfRange(Exception):
    """The object ends before the range begins."""
