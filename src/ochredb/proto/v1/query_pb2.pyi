from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetRequest(_message.Message):
    __slots__ = ("collection_id", "id_lengths", "ids", "where", "limit", "offset", "fields", "explain")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    ID_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    id_lengths: bytes
    ids: bytes
    where: Filter
    limit: int
    offset: int
    fields: int
    explain: bool
    def __init__(self, collection_id: _Optional[str] = ..., id_lengths: _Optional[bytes] = ..., ids: _Optional[bytes] = ..., where: _Optional[_Union[Filter, _Mapping]] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., fields: _Optional[int] = ..., explain: _Optional[bool] = ...) -> None: ...

class QueryRequest(_message.Message):
    __slots__ = ("collection_id", "embeddings", "vectors", "dimension", "n_results", "id_lengths", "ids", "where", "fields", "exact", "explain", "target_recall")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    N_RESULTS_FIELD_NUMBER: _ClassVar[int]
    ID_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    TARGET_RECALL_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    embeddings: bytes
    vectors: int
    dimension: int
    n_results: int
    id_lengths: bytes
    ids: bytes
    where: Filter
    fields: int
    exact: bool
    explain: bool
    target_recall: float
    def __init__(self, collection_id: _Optional[str] = ..., embeddings: _Optional[bytes] = ..., vectors: _Optional[int] = ..., dimension: _Optional[int] = ..., n_results: _Optional[int] = ..., id_lengths: _Optional[bytes] = ..., ids: _Optional[bytes] = ..., where: _Optional[_Union[Filter, _Mapping]] = ..., fields: _Optional[int] = ..., exact: _Optional[bool] = ..., explain: _Optional[bool] = ..., target_recall: _Optional[float] = ...) -> None: ...

class SearchPartsRequest(_message.Message):
    __slots__ = ("snapshot", "part_ids", "get", "query", "keys_only")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    PART_IDS_FIELD_NUMBER: _ClassVar[int]
    GET_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    KEYS_ONLY_FIELD_NUMBER: _ClassVar[int]
    snapshot: Snapshot
    part_ids: _containers.RepeatedScalarFieldContainer[str]
    get: GetRequest
    query: QueryRequest
    keys_only: bool
    def __init__(self, snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., part_ids: _Optional[_Iterable[str]] = ..., get: _Optional[_Union[GetRequest, _Mapping]] = ..., query: _Optional[_Union[QueryRequest, _Mapping]] = ..., keys_only: _Optional[bool] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("collection_id", "state", "revision", "dimension", "version", "indexed_offset", "next_offset", "floor_offset")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INDEXED_OFFSET_FIELD_NUMBER: _ClassVar[int]
    NEXT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    FLOOR_OFFSET_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    state: str
    revision: int
    dimension: int
    version: int
    indexed_offset: int
    next_offset: int
    floor_offset: int
    def __init__(self, collection_id: _Optional[str] = ..., state: _Optional[str] = ..., revision: _Optional[int] = ..., dimension: _Optional[int] = ..., version: _Optional[int] = ..., indexed_offset: _Optional[int] = ..., next_offset: _Optional[int] = ..., floor_offset: _Optional[int] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("id_lengths", "ids", "document_lengths", "documents", "uri_lengths", "uris", "metadata_lengths", "metadatas", "embeddings", "dimension", "splits", "distances", "seqs", "any_lives", "last_offset", "plan_json")
    ID_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    URI_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    URIS_FIELD_NUMBER: _ClassVar[int]
    METADATA_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    METADATAS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    SPLITS_FIELD_NUMBER: _ClassVar[int]
    DISTANCES_FIELD_NUMBER: _ClassVar[int]
    SEQS_FIELD_NUMBER: _ClassVar[int]
    ANY_LIVES_FIELD_NUMBER: _ClassVar[int]
    LAST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    PLAN_JSON_FIELD_NUMBER: _ClassVar[int]
    id_lengths: bytes
    ids: bytes
    document_lengths: bytes
    documents: bytes
    uri_lengths: bytes
    uris: bytes
    metadata_lengths: bytes
    metadatas: bytes
    embeddings: bytes
    dimension: int
    splits: bytes
    distances: bytes
    seqs: bytes
    any_lives: bool
    last_offset: int
    plan_json: bytes
    def __init__(self, id_lengths: _Optional[bytes] = ..., ids: _Optional[bytes] = ..., document_lengths: _Optional[bytes] = ..., documents: _Optional[bytes] = ..., uri_lengths: _Optional[bytes] = ..., uris: _Optional[bytes] = ..., metadata_lengths: _Optional[bytes] = ..., metadatas: _Optional[bytes] = ..., embeddings: _Optional[bytes] = ..., dimension: _Optional[int] = ..., splits: _Optional[bytes] = ..., distances: _Optional[bytes] = ..., seqs: _Optional[bytes] = ..., any_lives: _Optional[bool] = ..., last_offset: _Optional[int] = ..., plan_json: _Optional[bytes] = ...) -> None: ...

class KeepCopiesRequest(_message.Message):
    __slots__ = ("objects",)
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    objects: _containers.RepeatedCompositeFieldContainer[StoredObject]
    def __init__(self, objects: _Optional[_Iterable[_Union[StoredObject, _Mapping]]] = ...) -> None: ...

class StoredObject(_message.Message):
    __slots__ = ("key", "size")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    key: str
    size: int
    def __init__(self, key: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class KeepCopiesReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CountRequest(_message.Message):
    __slots__ = ("collection_id",)
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    def __init__(self, collection_id: _Optional[str] = ...) -> None: ...

class CountReply(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class IndexingStatusRequest(_message.Message):
    __slots__ = ("collection_id",)
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    def __init__(self, collection_id: _Optional[str] = ...) -> None: ...

class IndexingStatusReply(_message.Message):
    __slots__ = ("num_indexed_ops", "num_unindexed_ops", "num_quarantined_ops")
    NUM_INDEXED_OPS_FIELD_NUMBER: _ClassVar[int]
    NUM_UNINDEXED_OPS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUARANTINED_OPS_FIELD_NUMBER: _ClassVar[int]
    num_indexed_ops: int
    num_unindexed_ops: int
    num_quarantined_ops: int
    def __init__(self, num_indexed_ops: _Optional[int] = ..., num_unindexed_ops: _Optional[int] = ..., num_quarantined_ops: _Optional[int] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[FilterNode]
    def __init__(self, nodes: _Optional[_Iterable[_Union[FilterNode, _Mapping]]] = ...) -> None: ...

class FilterNode(_message.Message):
    __slots__ = ("compare", "one_of", "list_contains", "document_contains", "document_matches", "id_in", "all_of", "any_of")
    COMPARE_FIELD_NUMBER: _ClassVar[int]
    ONE_OF_FIELD_NUMBER: _ClassVar[int]
    LIST_CONTAINS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_CONTAINS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_MATCHES_FIELD_NUMBER: _ClassVar[int]
    ID_IN_FIELD_NUMBER: _ClassVar[int]
    ALL_OF_FIELD_NUMBER: _ClassVar[int]
    ANY_OF_FIELD_NUMBER: _ClassVar[int]
    compare: Compare
    one_of: OneOf
    list_contains: ListContains
    document_contains: Pattern
    document_matches: Pattern
    id_in: IdIn
    all_of: int
    any_of: int
    def __init__(self, compare: _Optional[_Union[Compare, _Mapping]] = ..., one_of: _Optional[_Union[OneOf, _Mapping]] = ..., list_contains: _Optional[_Union[ListContains, _Mapping]] = ..., document_contains: _Optional[_Union[Pattern, _Mapping]] = ..., document_matches: _Optional[_Union[Pattern, _Mapping]] = ..., id_in: _Optional[_Union[IdIn, _Mapping]] = ..., all_of: _Optional[int] = ..., any_of: _Optional[int] = ...) -> None: ...

class Scalar(_message.Message):
    __slots__ = ("text", "integer", "number", "flag")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    text: str
    integer: int
    number: float
    flag: bool
    def __init__(self, text: _Optional[str] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., flag: _Optional[bool] = ...) -> None: ...

class Compare(_message.Message):
    __slots__ = ("key", "op", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    op: str
    value: Scalar
    def __init__(self, key: _Optional[str] = ..., op: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...

class OneOf(_message.Message):
    __slots__ = ("key", "text_lengths", "texts", "integers", "numbers", "flags", "negated")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TEXT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    INTEGERS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    NEGATED_FIELD_NUMBER: _ClassVar[int]
    key: str
    text_lengths: bytes
    texts: bytes
    integers: _containers.RepeatedScalarFieldContainer[int]
    numbers: _containers.RepeatedScalarFieldContainer[float]
    flags: _containers.RepeatedScalarFieldContainer[bool]
    negated: bool
    def __init__(self, key: _Optional[str] = ..., text_lengths: _Optional[bytes] = ..., texts: _Optional[bytes] = ..., integers: _Optional[_Iterable[int]] = ..., numbers: _Optional[_Iterable[float]] = ..., flags: _Optional[_Iterable[bool]] = ..., negated: _Optional[bool] = ...) -> None: ...

class ListContains(_message.Message):
    __slots__ = ("key", "value", "negated")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    NEGATED_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: Scalar
    negated: bool
    def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ..., negated: _Optional[bool] = ...) -> None: ...

class Pattern(_message.Message):
    __slots__ = ("text", "negated")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    NEGATED_FIELD_NUMBER: _ClassVar[int]
    text: str
    negated: bool
    def __init__(self, text: _Optional[str] = ..., negated: _Optional[bool] = ...) -> None: ...

class IdIn(_message.Message):
    __slots__ = ("id_lengths", "ids", "negated")
    ID_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    NEGATED_FIELD_NUMBER: _ClassVar[int]
    id_lengths: bytes
    ids: bytes
    negated: bool
    def __init__(self, id_lengths: _Optional[bytes] = ..., ids: _Optional[bytes] = ..., negated: _Optional[bool] = ...) -> None: ...
