"""The client's vocabulary: what users pass in and get back. Names and keys are Chroma's."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Protocol, TypeAlias, TypedDict, TypeVar
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from ochredb.explain import PlanStep

T = TypeVar("T")
OneOrMany: TypeAlias = T | list[T]

ID = str
IDs = list[ID]
URI = str
URIs = list[URI]
Document = str
Documents = list[Document]

Embedding: TypeAlias = NDArray[Any]  # One dimension; integers or floats.
Embeddings = list[Embedding]
PyEmbedding: TypeAlias = Sequence[float] | Sequence[int]
PyEmbeddings = list[PyEmbedding]
# One vector or several, as arrays or plain numbers.
AnyEmbeddings: TypeAlias = (
    Embedding | Sequence[Embedding] | Sequence[float] | Sequence[Sequence[float]]
)

Image = NDArray[Any]  # Two dimensions or more.
Images = list[Image]
Loadable = list[Image | None]
Embeddable: TypeAlias = Documents | Images

MetadataScalar: TypeAlias = str | int | float | bool
MetadataValue: TypeAlias = MetadataScalar | list[str] | list[int] | list[float] | list[bool] | None
Metadata: TypeAlias = Mapping[str, MetadataValue]
Metadatas = list[Metadata]
AnyMetadatas: TypeAlias = Metadata | Sequence[Metadata | None]  # One, or a list.
UpdateMetadata: TypeAlias = Mapping[str, MetadataValue]
CollectionMetadata = dict[str, Any]
UpdateCollectionMetadata = UpdateMetadata

# Filters are JSON; their grammar belongs to the server, which names the mistake.
Where: TypeAlias = Mapping[str, Any]
WhereDocument: TypeAlias = Mapping[str, Any]

Include = list[Literal["documents", "embeddings", "metadatas", "distances", "uris", "data"]]
INCLUDABLE = ("documents", "embeddings", "metadatas", "distances", "uris", "data")
IncludeMetadataDocuments: Include = ["metadatas", "documents"]
IncludeMetadataDocumentsEmbeddings: Include = ["metadatas", "documents", "embeddings"]
IncludeMetadataDocumentsDistances: Include = ["metadatas", "documents", "distances"]

Space = Literal["cosine", "l2", "ip"]

DEFAULT_TENANT = "default_tenant"
DEFAULT_DATABASE = "default_database"


class GetResult(TypedDict):
    """Records, column by column; a column that was not included is None.

    embeddings: float64[n, d] (the values are float32, at their shortest decimal).
    plan: what was executed, if that was asked for (and the server is one that tells); print it.
    """

    ids: IDs
    embeddings: NDArray[np.float64] | None
    documents: list[Document | None] | None
    uris: list[URI | None] | None
    data: Loadable | None
    metadatas: list[Metadata | None] | None
    included: Include
    plan: NotRequired[PlanStep]


class QueryResult(TypedDict):
    """For each query, in order: its nearest records, nearest first, column by column.

    plan: what was executed, if that was asked for (and the server is one that tells); print it.
    """

    ids: list[IDs]
    embeddings: list[NDArray[np.float64]] | None
    documents: list[list[Document | None]] | None
    uris: list[list[URI | None]] | None
    data: list[Loadable] | None
    metadatas: list[list[Metadata | None]] | None
    distances: list[list[float]] | None
    included: Include
    plan: NotRequired[PlanStep]


class DeleteResult(TypedDict):
    """How many records a delete removed (for a delete by ids alone: how many ids were given)."""

    deleted: int


class Tenant(TypedDict):
    name: str


class Database(TypedDict):
    id: str
    name: str
    tenant: str


@dataclass(frozen=True)
class UserIdentity:
    """Who the server says we are."""

    user_id: str
    tenant: str | None = None
    databases: list[str] | None = None


@dataclass(frozen=True)
class IndexingStatus:
    """How much of a collection's log is folded into indexed parts. Reads see all of it anyway.

    num_quarantined_ops: operations that could not be folded, which reads skip.
    """

    num_indexed_ops: int
    num_unindexed_ops: int
    total_ops: int
    op_indexing_progress: float
    num_quarantined_ops: int = 0


class ReadLevel(enum.StrEnum):
    """How fresh a read must be."""

    INDEX_AND_WAL = "index_and_wal"  # Every acknowledged write. The default.
    INDEX_ONLY = "index_only"  # What is indexed; cheaper, may lag.
    INDEX_AND_BOUNDED_WAL = "index_and_bounded_wal"  # A bounded part of what is not indexed yet.


class DataLoader(Protocol):
    """Loads what URIs point to, one item for each, None where there is nothing."""

    def __call__(self, uris: Sequence[URI | None]) -> Loadable: ...


@dataclass
class CollectionModel:
    """A collection as the server described it last."""

    id: UUID
    name: str
    configuration_json: dict[str, Any]
    schema: dict[str, Any] | None
    metadata: CollectionMetadata | None
    dimension: int | None
    tenant: str
    database: str

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> CollectionModel:
        return cls(
            id=UUID(document["id"]),
            name=document["name"],
            configuration_json=document["configuration_json"],
            schema=document.get("schema"),
            metadata=document.get("metadata"),
            dimension=document.get("dimension"),
            tenant=document["tenant"],
            database=document["database"],
        )
