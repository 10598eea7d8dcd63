from ochredb.proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TriggerRequest(_message.Message):
    __slots__ = ("collection_id",)
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    def __init__(self, collection_id: _Optional[str] = ...) -> None: ...

class RebuildRequest(_message.Message):
    __slots__ = ("collection_id",)
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    def __init__(self, collection_id: _Optional[str] = ...) -> None: ...

class RebuildPartRequest(_message.Message):
    __slots__ = ("part_id",)
    PART_ID_FIELD_NUMBER: _ClassVar[int]
    part_id: str
    def __init__(self, part_id: _Optional[str] = ...) -> None: ...

class RebuildPartAnswer(_message.Message):
    __slots__ = ("rebuilt",)
    REBUILT_FIELD_NUMBER: _ClassVar[int]
    rebuilt: bool
    def __init__(self, rebuilt: _Optional[bool] = ...) -> None: ...

class HintRequest(_message.Message):
    __slots__ = ("collection_id", "last_offset")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    last_offset: int
    def __init__(self, collection_id: _Optional[str] = ..., last_offset: _Optional[int] = ...) -> None: ...

class CompactorStatus(_message.Message):
    __slots__ = ("paused", "tails", "merges", "jobs")
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    TAILS_FIELD_NUMBER: _ClassVar[int]
    MERGES_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    paused: bool
    tails: _containers.RepeatedCompositeFieldContainer[PendingWork]
    merges: _containers.RepeatedCompositeFieldContainer[PendingWork]
    jobs: _containers.RepeatedCompositeFieldContainer[JobStatus]
    def __init__(self, paused: _Optional[bool] = ..., tails: _Optional[_Iterable[_Union[PendingWork, _Mapping]]] = ..., merges: _Optional[_Iterable[_Union[PendingWork, _Mapping]]] = ..., jobs: _Optional[_Iterable[_Union[JobStatus, _Mapping]]] = ...) -> None: ...

class PendingWork(_message.Message):
    __slots__ = ("collection_id", "tail_rows", "tail_bytes", "time_us", "unsettled_rows")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    TAIL_ROWS_FIELD_NUMBER: _ClassVar[int]
    TAIL_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    UNSETTLED_ROWS_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    tail_rows: int
    tail_bytes: int
    time_us: int
    unsettled_rows: int
    def __init__(self, collection_id: _Optional[str] = ..., tail_rows: _Optional[int] = ..., tail_bytes: _Optional[int] = ..., time_us: _Optional[int] = ..., unsettled_rows: _Optional[int] = ...) -> None: ...

class JobStatus(_message.Message):
    __slots__ = ("collection_id", "kind", "owner", "running", "until_us", "attempts", "last_error")
    COLLECTION_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    UNTIL_US_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    collection_id: str
    kind: str
    owner: str
    running: bool
    until_us: int
    attempts: int
    last_error: str
    def __init__(self, collection_id: _Optional[str] = ..., kind: _Optional[str] = ..., owner: _Optional[str] = ..., running: _Optional[bool] = ..., until_us: _Optional[int] = ..., attempts: _Optional[int] = ..., last_error: _Optional[str] = ...) -> None: ...
