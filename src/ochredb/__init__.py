"""OchreDB: a vector database with Chroma's client API. Code for Chroma runs with one changed line.

>>> import ochredb as chromadb
>>> client = chromadb.PersistentClient("./data")
>>> notes = client.get_or_create_collection("notes")
>>> notes.add(ids=["1", "2"], documents=["a red fox", "a sleeping dog"])
>>> notes.query(query_texts=["foxes"], n_results=1)["ids"]
[['1']]
"""

# ruff: noqa: F405
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ochredb.public import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_DATABASE",
    "DEFAULT_TENANT",
    "URI",
    "AdminAPI",
    "AdminClient",
    "AuthorizationError",
    "BatchSizeExceededError",
    "ChromaAuthError",
    "ChromaError",
    "Client",
    "ClientAPI",
    "Collection",
    "CollectionConfiguration",
    "CollectionMetadata",
    "CreateCollectionConfiguration",
    "Documents",
    "DuplicateIDError",
    "EmbeddingFunction",
    "Embeddings",
    "EphemeralClient",
    "GetResult",
    "HttpClient",
    "IDAlreadyExistsError",
    "IDs",
    "Include",
    "InternalError",
    "InvalidArgumentError",
    "InvalidDimensionException",
    "InvalidHTTPVersion",
    "InvalidUUIDError",
    "Metadata",
    "Metadatas",
    "NotFoundError",
    "PersistentClient",
    "QueryResult",
    "QuotaError",
    "RateLimitError",
    "ReadLevel",
    "Settings",
    "TokenTransportHeader",
    "URIs",
    "UniqueConstraintError",
    "UpdateCollectionConfiguration",
    "UpdateCollectionMetadata",
    "UpdateMetadata",
    "VersionMismatchError",
    "Where",
    "WhereDocument",
    "__version__",
]

_SUBPACKAGES = ("api", "embedding_functions")


def __getattr__(name: str) -> Any:
    # On first use: a server imports this package too, and needs nothing of the client.
    if name in __all__:
        value = globals()[name] = getattr(importlib.import_module("ochredb.public"), name)
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"ochredb.{name}")
    raise AttributeError(f"module 'ochredb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
