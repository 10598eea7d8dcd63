"""The object store in S3, against a real one: Ceph's RGW, alone and behind a proxy that fails."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ochredb.checksum import xxh3
from ochredb.clock import SystemClock
from ochredb.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from ochredb.ids import IdSource
from ochredb.storage.base import LocalStore, ObjectStore
from ochredb.storage.cached import CachedStore
from ochredb.storage.s3 import S3Config, S3Store
from ochredb.testing.store_suite import MappableStoreSuite, StoreSuite
from tests.components.ceph import CephServer
from tests.components.s3_faults import S3Faults

_numbers = itertools.count()


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephServer]:
    server = CephServer.start(tmp_path_factory.mktemp("ceph"))
    yield server
    server.kill()


def config_of(ceph: CephServer, bucket: str, **others: object) -> S3Config:
    settings: dict[str, object] = {
        "endpoint_url": ceph.url,
        "access_key_id": ceph.access_key,
        "secret_access_key": ceph.secret_key,
        "prefix": "one/deployment",
    }
    return S3Config(bucket=bucket, **{**settings, **others})  # type: ignore[arg-type]


@pytest.fixture
def bucket(ceph: CephServer) -> str:
    return ceph.create_bucket(f"bucket-{next(_numbers)}")


@pytest.fixture
def s3(ceph: CephServer, bucket: str) -> Iterator[S3Store]:
    store = S3Store(config_of(ceph, bucket), SystemClock(), IdSource())
    yield store
    store.close()


class TestS3Store(StoreSuite):
    @pytest.fixture
    def store(self, s3: S3Store) -> ObjectStore:
        return s3


class TestCachedS3Store(MappableStoreSuite):
    @pytest.fixture
    def store(self, s3: S3Store, tmp_path: Path) -> Iterator[LocalStore]:
        store = CachedStore(s3, str(tmp_path / "cache"), 64 << 20, SystemClock(), IdSource())
        yield store
        store.close()
