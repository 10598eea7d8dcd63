"""Tenants and databases."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from ochredb.api.connect import connect
from ochredb.api.rest import Rest
from ochredb.api.settings import Settings
from ochredb.api.types import DEFAULT_TENANT, Database, Tenant


class AdminAPI:
    """Creates, lists and deletes tenants and databases. Usable from any thread."""

    def __init__(self, settings: Settings, *, rest: Rest | None = None) -> None:
        self._rest = rest if rest is not None else Rest(connect(settings))

    def create_tenant(self, name: str) -> None:
        """Raises UniqueConstraintError if it exists."""
        self._rest.call("POST", "tenants", body={"name": name})

    def get_tenant(self, name: str) -> Tenant:
        """Raises NotFoundError."""
        return Tenant(name=self._rest.call("GET", "tenants", name)["name"])

    def create_database(self, name: str, tenant: str = DEFAULT_TENANT) -> None:
        """Raises UniqueConstraintError if it exists."""
        self._rest.call("POST", "tenants", tenant, "databases", body={"name": name})

    def get_database(self, name: str, tenant: str = DEFAULT_TENANT) -> Database:
        """Raises NotFoundError."""
        answer = self._rest.call("GET", "tenants", tenant, "databases", name)
        return Database(id=answer["id"], name=answer["name"], tenant=answer["tenant"])

    def delete_database(self, name: str, tenant: str = DEFAULT_TENANT) -> None:
        """Delete a database and its collections. Raises NotFoundError."""
        self._rest.call("DELETE", "tenants", tenant, "databases", name)

    def list_databases(
        self,
        limit: int | None = None,
        offset: int | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Sequence[Database]:
        """The tenant's databases by name, or a page of them."""
        page = {"limit": limit, "offset": offset}
        answer = self._rest.call("GET", "tenants", tenant, "databases", query=page)
        return [
            Database(id=item["id"], name=item["name"], tenant=item["tenant"]) for item in answer
        ]

    def close(self) -> None:
        """Release what this client holds; a second call does nothing."""
        self._rest.close()

    def __enter__(self) -> AdminAPI:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.close()
