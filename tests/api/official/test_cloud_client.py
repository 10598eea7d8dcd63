"""chromadb.CloudClient: asks the server who it is, then works like the others."""

from __future__ import annotations

from typing import Any

import chromadb
import pytest


def cloud_client(host: str, port: int, **names: str) -> Any:
    return chromadb.CloudClient(
        api_key="ck-any-key", cloud_host=host, cloud_port=port, enable_ssl=False, **names
    )


def test_cloud_client_with_names(host: str, port: int, name: str) -> None:
    client = cloud_client(host, port, tenant="default_tenant", database="default_database")
    collection = client.create_collection(name, embedding_function=None)
    collection.upsert(ids=["a", "b"], embeddings=[[1.0, 0.0], [0.0, 1.0]], documents=["one", "two"])
    answer = collection.query(query_embeddings=[[0.1, 0.9]], n_results=1)
    assert (answer["ids"], answer["documents"]) == ([["b"]], [["two"]])
    client.delete_collection(name)


def test_cloud_client_learns_its_names_from_the_server(
    host: str, port: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHROMA_TENANT", raising=False)
    monkeypatch.delenv("CHROMA_DATABASE", raising=False)
    client = cloud_client(host, port)
    assert (client.tenant, client.database) == ("default_tenant", "default_database")
    client.create_collection(name, embedding_function=None)
    same = chromadb.HttpClient(host=host, port=port)
    assert name in [collection.name for collection in same.list_collections()]
    client.delete_collection(name)
