"""Clients: one tenant and database of one server, or of a node inside this process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any
from uuid import UUID

from ochredb.api import configuration as configurations
from ochredb.api import validate
from ochredb.api.admin import AdminAPI
from ochredb.api.collection import Collection
from ochredb.api.configuration import CreateCollectionConfiguration
from ochredb.api.connect import connect
from ochredb.api.rest import Rest
from ochredb.api.settings import Settings
from ochredb.api.types import (
    DEFAULT_DATABASE,
    DEFAULT_TENANT,
    CollectionMetadata,
    CollectionModel,
    DataLoader,
    UserIdentity,
)
from ochredb.embedding_functions.base import EmbeddingFunction
from ochredb.embedding_functions.lexical import DEFAULT_EMBEDDING_FUNCTION

_DEFAULT_SETTINGS = Settings()


class ClientAPI:
    """Collections of one tenant and database.

    Usable from any thread. Closing is optional, as everything acknowledged is durable already; it
    releases connections, or this client's share of the embedded node, early.
    """

    def __init__(
        self,
        tenant: str = DEFAULT_TENANT,
        database: str = DEFAULT_DATABASE,
        settings: Settings = _DEFAULT_SETTINGS,
        *,
        rest: Rest | None = None,
    ) -> None:
        self._settings = settings
        self._rest = rest if rest is not None else Rest(connect(settings))
        self._admin = AdminAPI(settings, rest=self._rest)
        try:
            self.set_tenant(str(tenant), str(database))
        except ConnectionError as error:
            self._rest.close()
            # What Chroma's client raises; later, a lost connection is a ConnectionError.
            raise ValueError(f"{error}. Is a server running there?") from error
        except BaseException:
            self._rest.close()
            raise

    def heartbeat(self) -> int:
        """The server's time, in nanoseconds since the epoch."""
        return int(self._rest.call("GET", "heartbeat")["nanosecond heartbeat"])

    def get_version(self) -> str:
        """The version of the API that the server speaks."""
        return str(self._rest.call("GET", "version"))

    def get_settings(self) -> Settings:
        return self._settings

    def get_max_batch_size(self) -> int:
        """How many records one add, update or upsert may carry."""
        return self._rest.batch_size_max

    def get_user_identity(self) -> UserIdentity:
        answer = self._rest.call("GET", "auth", "identity")
        names = {field.name for field in dataclasses.fields(UserIdentity)}
        return UserIdentity(**{key: answer[key] for key in answer.keys() & names})

    def reset(self) -> bool:
        """Delete everything, of all tenants. Refused unless the settings allow it."""
        return bool(self._rest.call("POST", "reset"))

    def set_tenant(self, tenant: str, database: str = DEFAULT_DATABASE) -> None:
        """Use another tenant and database from now on. Raises NotFoundError."""
        self._admin.get_tenant(tenant)
        self._admin.get_database(database, tenant)
        self.tenant, self.database = tenant, database

    def set_database(self, database: str) -> None:
        """Use another database of the tenant from now on. Raises NotFoundError."""
        self._admin.get_database(database, self.tenant)
        self.database = database

    def list_collections(
        self, limit: int | None = None, offset: int | None = None
    ) -> Sequence[Collection]:
        """The database's collections, or a page of them."""
        page = {"limit": limit, "offset": offset}
        documents = self._rest.call("GET", *self._path, "collections", query=page)
        return [
            Collection(client=self._rest, model=CollectionModel.from_json(document))
            for document in documents
        ]

    def count_collections(self) -> int:
        return int(self._rest.call("GET", *self._path, "collections_count"))

    def create_collection(
        self,
        name: str,
        schema: Mapping[str, Any] | None = None,
        configuration: CreateCollectionConfiguration | None = None,
        metadata: CollectionMetadata | None = None,
        embedding_function: EmbeddingFunction[Any] | None = DEFAULT_EMBEDDING_FUNCTION,
        data_loader: DataLoader | None = None,
        get_or_create: bool = False,
    ) -> Collection:
        """Create a collection.

        name: 3 to 512 of the characters a-z A-Z 0-9 . _ - with a letter or digit at both ends.
        schema: which indexes exist, as JSON; instead of a configuration.
        configuration: the index's distance and parameters, {"hnsw": {"space": "cosine"}}.
        embedding_function: makes vectors of texts; its name is stored. None for no function.
        get_or_create: return the collection of this name, unchanged, if there is one.

        Raises UniqueConstraintError if the name is taken.
        """
        with validate.blaming("create_collection"):
            _check_name(name)
            validate.check_metadata(metadata)
            function = configurations.chosen_function(
                embedding_function, (configuration or {}).get("embedding_function")
            )
            # A schema says it all; what the caller did not choose must not contradict it.
            silent = schema is not None and not configuration
            silent = silent and (function is None or configurations.is_default(function))
            body = {
                "name": name,
                "metadata": metadata,
                "configuration": None
                if silent
                else configurations.create_to_json(configuration or {}, function, metadata),
                "schema": _schema_json(schema),
                "get_or_create": get_or_create,
            }
        document = self._rest.call("POST", *self._path, "collections", body=body)
        return self._opened(document, function, data_loader)

    def get_or_create_collection(
        self,
        name: str,
        schema: Mapping[str, Any] | None = None,
        configuration: CreateCollectionConfiguration | None = None,
        metadata: CollectionMetadata | None = None,
        embedding_function: EmbeddingFunction[Any] | None = DEFAULT_EMBEDDING_FUNCTION,
        data_loader: DataLoader | None = None,
    ) -> Collection:
        """The collection of this name, created if there is none.

        One that exists keeps its schema, configuration and metadata, whatever is passed.
        """
        return self.create_collection(
            name, schema, configuration, metadata, embedding_function, data_loader, True
        )

    def get_collection(
        self,
        name: str,
        embedding_function: EmbeddingFunction[Any] | None = DEFAULT_EMBEDDING_FUNCTION,
        data_loader: DataLoader | None = None,
    ) -> Collection:
        """The collection of this name. Its stored embedding function is rebuilt by name.

        Raises NotFoundError, or ValueError if another embedding function is passed.
        """
        _check_name(name)
        document = self._rest.call("GET", *self._path, "collections", name)
        return self._opened(document, embedding_function, data_loader)

    def get_collection_by_id(
        self,
        id: UUID,  # noqa: A002 - Chroma's name.
        embedding_function: EmbeddingFunction[Any] | None = DEFAULT_EMBEDDING_FUNCTION,
        data_loader: DataLoader | None = None,
    ) -> Collection:
        """As `get_collection`, by id."""
        document = self._rest.call("GET", *self._path, "collections", "by-id", str(id))
        return self._opened(document, embedding_function, data_loader)

    def delete_collection(self, name: str) -> None:
        """Delete a collection and its records. Raises NotFoundError."""
        _check_name(name)
        self._rest.call("DELETE", *self._path, "collections", name)

    def close(self) -> None:
        """Release what this client holds; a second call does nothing."""
        self._rest.close()

    def __enter__(self) -> ClientAPI:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _path(self) -> tuple[str, ...]:
        return ("tenants", self.tenant, "databases", self.database)

    def _opened(
        self,
        document: dict[str, Any],
        function: EmbeddingFunction[Any] | None,
        data_loader: DataLoader | None,
    ) -> Collection:
        model = CollectionModel.from_json(document)
        configurations.check_stored_function(function, model.configuration_json)
        return Collection(self._rest, model, function, data_loader)


def PersistentClient(  # noqa: N802 - Chroma's name.
    path: str | os.PathLike[str] = "./chroma",
    settings: Settings | None = None,
    tenant: str = DEFAULT_TENANT,
    database: str = DEFAULT_DATABASE,
) -> ClientAPI:
    """A client of the data in a directory, served by a node inside this process.

    All clients of one directory in one process share the node, and several processes may share a
    directory.
    """
    chosen = dataclasses.replace(
        settings or _DEFAULT_SETTINGS,
        is_persistent=True,
        persist_directory=os.fspath(path),
        chroma_server_host=None,
    )
    return ClientAPI(tenant, database, chosen)


def EphemeralClient(  # noqa: N802 - Chroma's name.
    settings: Settings | None = None,
    tenant: str = DEFAULT_TENANT,
    database: str = DEFAULT_DATABASE,
) -> ClientAPI:
    """A client of data in memory. All ephemeral clients of one process share the same data."""
    chosen = dataclasses.replace(
        settings or _DEFAULT_SETTINGS, is_persistent=False, chroma_server_host=None
    )
    return ClientAPI(tenant, database, chosen)


def HttpClient(  # noqa: N802 - Chroma's name.
    host: str = "localhost",
    port: int = 8000,
    ssl: bool = False,
    headers: dict[str, str] | None = None,
    settings: Settings | None = None,
    tenant: str = DEFAULT_TENANT,
    database: str = DEFAULT_DATABASE,
) -> ClientAPI:
    """A client of a server, OchreDB's (`ochredb run`) or Chroma's.

    headers: sent with every request, such as {"Authorization": "Bearer TOKEN"}.

    Raises ValueError if nobody listens there, or the settings name another host or port.
    """
    given = settings or _DEFAULT_SETTINGS
    host, port = str(host), int(port)
    if given.chroma_server_host not in (None, host):
        raise ValueError(f"the settings say host {given.chroma_server_host}, not {host}")
    if given.chroma_server_http_port not in (None, port, str(port)):
        raise ValueError(f"the settings say port {given.chroma_server_http_port}, not {port}")
    chosen = dataclasses.replace(
        given,
        chroma_server_host=host,
        chroma_server_http_port=port,
        chroma_server_ssl_enabled=bool(ssl),
        chroma_server_headers=headers,
    )
    return ClientAPI(tenant, database, chosen)


def Client(  # noqa: N802 - Chroma's name.
    settings: Settings = _DEFAULT_SETTINGS,
    tenant: str = DEFAULT_TENANT,
    database: str = DEFAULT_DATABASE,
) -> ClientAPI:
    """What the settings say: a server if they name a host, a directory, or (the default) memory."""
    return ClientAPI(tenant, database, settings)


def AdminClient(settings: Settings = _DEFAULT_SETTINGS) -> AdminAPI:  # noqa: N802 - Chroma's name.
    """Tenants and databases of whatever the settings say, as for `Client`."""
    return AdminAPI(settings)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a collection's name must be a non-empty str, not {name!r}")


def _schema_json(schema: Any) -> Any:
    """JSON as it is; an object that knows its JSON (such as chromadb's Schema) is asked for it."""
    serialize = getattr(schema, "serialize_to_json", None)
    return schema if serialize is None else serialize()
