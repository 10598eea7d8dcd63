from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Operations(_message.Message):
    __slots__ = ("fragment", "checksum", "key_types")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    KEY_TYPES_FIELD_NUMBER: _ClassVar[int]
    fragment: bytes
    checksum: int
    key_types: _containers.RepeatedCompositeFieldContainer[KeyType]
    def __init__(self, fragment: _Optional[bytes] = ..., checksum: _Optional[int] = ..., key_types: _Optional[_Iterable[_Union[KeyType, _Mapping]]] = ...) -> None: ...

class KeyType(_message.Message):
    __slots__ = ("key", "type")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    key: str
    type: str
    def __init__(self, key: _Optional[str] = ..., type: _Optional[str] = ...) -> None: ...

class AppendRequest(_message.Message):
    __slots__ = ("collection_id", "operations", "idempotency_key", "request_hash", "request_id", "expect_last_offset")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_HASH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECT_LAST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    operations: Operations
    idempotency_key: str
    request_hash: bytes
    request_id: str
    expect_last_offset: int
    def __init__(self, collection_id: _Optional[str] = ..., operations: _Optional[_Union[Operations, _Mapping]] = ..., idempotency_key: _Optional[str] = ..., request_hash: _Optional[bytes] = ..., request_id: _Optional[str] = ..., expect_last_offset: _Optional[int] = ...) -> None: ...

class Appended(_message.Message):
    __slots__ = ("first_offset", "last_offset", "deleted", "was_repeated")
    FIRST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    LAST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    WAS_REPEATED_FIELD_NUMBER: _ClassVar[int]
    first_offset: int
    last_offset: int
    deleted: int
    was_repeated: bool
    def __init__(self, first_offset: _Optional[int] = ..., last_offset: _Optional[int] = ..., deleted: _Optional[int] = ..., was_repeated: _Optional[bool] = ...) -> None: ...

class EvaluatedRequest(_message.Message):
    __slots__ = ("begin", "operations")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    begin: EvaluatedBegin
    operations: Operations
    def __init__(self, begin: _Optional[_Union[EvaluatedBegin, _Mapping]] = ..., operations: _Optional[_Union[Operations, _Mapping]] = ...) -> None: ...

class EvaluatedBegin(_message.Message):
    __slots__ = ("collection_id", "idempotency_key", "request_hash", "request_id")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_HASH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    idempotency_key: str
    request_hash: bytes
    request_id: str
    def __init__(self, collection_id: _Optional[str] = ..., idempotency_key: _Optional[str] = ..., request_hash: _Optional[bytes] = ..., request_id: _Optional[str] = ...) -> None: ...

class EvaluatedReply(_message.Message):
    __slots__ = ("evaluate", "appended")
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    APPENDED_FIELD_NUMBER: _ClassVar[int]
    evaluate: Evaluate
    appended: Appended
    def __init__(self, evaluate: _Optional[_Union[Evaluate, _Mapping]] = ..., appended: _Optional[_Union[Appended, _Mapping]] = ...) -> None: ...

class Evaluate(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class RecordNothingRequest(_message.Message):
    __slots__ = ("collection_id", "idempotency_key", "request_hash")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_HASH_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    idempotency_key: str
    request_hash: bytes
    def __init__(self, collection_id: _Optional[str] = ..., idempotency_key: _Optional[str] = ..., request_hash: _Optional[bytes] = ...) -> None: ...

class RepeatedRequest(_message.Message):
    __slots__ = ("collection_id", "idempotency_key", "request_hash")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_HASH_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    idempotency_key: str
    request_hash: bytes
    def __init__(self, collection_id: _Optional[str] = ..., idempotency_key: _Optional[str] = ..., request_hash: _Optional[bytes] = ...) -> None: ...

class RepeatedReply(_message.Message):
    __slots__ = ("appended",)
    APPENDED_FIELD_NUMBER: _ClassVar[int]
    appended: Appended
    def __init__(self, appended: _Optional[_Union[Appended, _Mapping]] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("collection_id", "first_offset", "last_offset")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    LAST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    first_offset: int
    last_offset: int
    def __init__(self, collection_id: _Optional[str] = ..., first_offset: _Optional[int] = ..., last_offset: _Optional[int] = ...) -> None: ...

class LogFragment(_message.Message):
    __slots__ = ("first_offset", "last_offset", "fragment")
    FIRST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    LAST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    first_offset: int
    last_offset: int
    fragment: bytes
    def __init__(self, first_offset: _Optional[int] = ..., last_offset: _Optional[int] = ..., fragment: _Optional[bytes] = ...) -> None: ...

class LogStatusRequest(_message.Message):
    __slots__ = ("collection_id",)
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    def __init__(self, collection_id: _Optional[str] = ...) -> None: ...

class LogStatus(_message.Message):
    __slots__ = ("floor_offset", "indexed_offset", "last_offset", "tail_bytes")
    FLOOR_OFFSET_FIELD_NUMBER: _ClassVar[int]
    INDEXED_OFFSET_FIELD_NUMBER: _ClassVar[int]
    LAST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    TAIL_BYTES_FIELD_NUMBER: _ClassVar[int]
    floor_offset: int
    indexed_offset: int
    last_offset: int
    tail_bytes: int
    def __init__(self, floor_offset: _Optional[int] = ..., indexed_offset: _Optional[int] = ..., last_offset: _Optional[int] = ..., tail_bytes: _Optional[int] = ...) -> None: ...
