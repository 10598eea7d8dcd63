"""OchreDB: a vector database with Chroma's client API. Code for Chroma runs with one changed line.

>>> import ochredb as chromadb
>>> client = chromadb.PersistentClient("./data")
>>> notes = client.get_or_create_collection("notes")
>>> notes.add(ids=["1", "2"], documents=["a red fox", "a sleeping dog"])
>>> notes.query(query_texts=["foxes"], n_results=1)["ids"]
[['1']]
"""

from ochredb.api.admin import AdminAPI
from ochredb.api.client import (
    AdminClient,
    Client,
    ClientAPI,
    EphemeralClient,
    HttpClient,
    PersistentClient,
)
from ochredb.api.collection import Collection
from ochredb.api.configuration import (
    CollectionConfiguration,
    CreateCollectionConfiguration,
    UpdateCollectionConfiguration,
)
from ochredb.api.exceptions import (
    AuthorizationError,
    BatchSizeExceededError,
    ChromaAuthError,
    ChromaError,
    DuplicateIDError,
    IDAlreadyExistsError,
    InternalError,
    InvalidArgumentError,
    InvalidDimensionException,
    InvalidHTTPVersion,
    InvalidUUIDError,
    NotFoundError,
    QuotaError,
    RateLimitError,
    UniqueConstraintError,
    VersionMismatchError,
)
from ochredb.api.settings import Settings, TokenTransportHeader
from ochredb.api.types import (
    DEFAULT_DATABASE,
    DEFAULT_TENANT,
    URI,
    CollectionMetadata,
    Documents,
    Embeddings,
    GetResult,
    IDs,
    Include,
    Metadata,
    Metadatas,
    QueryResult,
    ReadLevel,
    UpdateCollectionMetadata,
    UpdateMetadata,
    URIs,
    Where,
    WhereDocument,
)
from ochredb.embedding_functions import EmbeddingFunction

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
