import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchEngineRequest(_message.Message):
    __slots__ = ("interval",)
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    interval: _duration_pb2.Duration
    def __init__(self, interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WatchEngineResponse(_message.Message):
    __slots__ = ("time", "steps", "generated_tokens", "prompt_tokens", "adapters", "kv_blocks_used", "kv_blocks", "kv_blocks_cached", "resident_adapters", "adapter_bytes", "adapter_bytes_limit", "max_rows")
    TIME_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_LIMIT_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    steps: int
    generated_tokens: int
    prompt_tokens: int
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterRows]
    kv_blocks_used: int
    kv_blocks: int
    kv_blocks_cached: int
    resident_adapters: int
    adapter_bytes: int
    adapter_bytes_limit: int
    max_rows: int
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., steps: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[AdapterRows, _Mapping]]] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., resident_adapters: _Optional[int] = ..., adapter_bytes: _Optional[int] = ..., adapter_bytes_limit: _Optional[int] = ..., max_rows: _Optional[int] = ...) -> None: ...

class AdapterRows(_message.Message):
    __slots__ = ("adapter_id", "hidden", "prefill", "decode", "waiting")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    hidden: bool
    prefill: int
    decode: int
    waiting: int
    def __init__(self, adapter_id: _Optional[str] = ..., hidden: _Optional[bool] = ..., prefill: _Optional[int] = ..., decode: _Optional[int] = ..., waiting: _Optional[int] = ...) -> None: ...
