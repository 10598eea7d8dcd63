"""Fixtures for the official client's tests; the server's address comes by the environment."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import chromadb
import pytest
from chromadb.config import Settings


@pytest.fixture(scope="session")
def host() -> str:
    return os.environ["OCHREDB_HOST"]


@pytest.fixture(scope="session")
def port() -> int:
    return int(os.environ["OCHREDB_PORT"])


@pytest.fixture
def name() -> str:
    """A collection, database or tenant name that no other test uses."""
    return f"official-{uuid.uuid4().hex}"


@pytest.fixture
def client(host: str, port: int) -> Any:
    return chromadb.HttpClient(host=host, port=port)


@pytest.fixture
def admin(host: str, port: int) -> Any:
    settings = Settings(
        chroma_api_impl="chromadb.api.fastapi.FastAPI",
        chroma_server_host=host,
        chroma_server_http_port=port,
    )
    return chromadb.AdminClient(settings)


@pytest.fixture
def collection(client: Any, name: str) -> Iterator[Any]:
    """An empty collection without an embedding function; dropped afterwards."""
    yield client.create_collection(name, embedding_function=None)
    client.delete_collection(name)
