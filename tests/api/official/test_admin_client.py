"""chromadb.AdminClient: tenants and databases, and that collections stay inside theirs."""

from __future__ import annotations

from typing import Any

import chromadb
import pytest
from chromadb.errors import NotFoundError


def test_tenants_and_databases(admin: Any, host: str, port: int, name: str) -> None:
    tenant, database = f"{name}-t", f"{name}-d"
    admin.create_tenant(tenant)
    assert admin.get_tenant(tenant)["name"] == tenant
    admin.create_database(database, tenant)
    found = admin.get_database(database, tenant)
    assert (found["name"], found["tenant"]) == (database, tenant)
    assert [d["name"] for d in admin.list_databases(tenant=tenant)] == [database]

    inside = chromadb.HttpClient(host=host, port=port, tenant=tenant, database=database)
    outside = chromadb.HttpClient(host=host, port=port)
    inside.create_collection(name, embedding_function=None).add(ids=["a"], embeddings=[[1.0]])
    assert [c.name for c in inside.list_collections()] == [name]
    assert inside.count_collections() == 1
    with pytest.raises(NotFoundError):
        outside.get_collection(name)

    admin.delete_database(database, tenant)
    with pytest.raises(NotFoundError):
        admin.get_database(database, tenant)


def test_a_client_of_a_missing_tenant_or_database_is_refused(
    host: str, port: int, name: str
) -> None:
    with pytest.raises(Exception, match=r"(?i)tenant|not found"):
        chromadb.HttpClient(host=host, port=port, tenant=f"{name}-missing")
    with pytest.raises(NotFoundError):
        chromadb.HttpClient(host=host, port=port, database=f"{name}-missing")
