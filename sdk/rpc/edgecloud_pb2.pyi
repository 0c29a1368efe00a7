from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("protocol_version", "server_version", "model_name", "model_fingerprint", "tokenizer_fingerprint", "vocab_size", "dtype", "limits", "load", "exact", "tail_cuts", "boundary_codecs", "graph_cuts")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    TAIL_CUTS_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_CODECS_FIELD_NUMBER: _ClassVar[int]
    GRAPH_CUTS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    server_version: str
    model_name: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: str
    limits: Limits
    load: Load
    exact: str
    tail_cuts: _containers.RepeatedScalarFieldContainer[int]
    boundary_codecs: _containers.RepeatedScalarFieldContainer[str]
    graph_cuts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol_version: _Optional[int] = ..., server_version: _Optional[str] = ..., model_name: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ..., vocab_size: _Optional[int] = ..., dtype: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., exact: _Optional[str] = ..., tail_cuts: _Optional[_Iterable[int]] = ..., boundary_codecs: _Optional[_Iterable[str]] = ..., graph_cuts: _Optional[_Iterable[str]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_context_tokens", "max_draft_tokens", "max_message_bytes", "max_sessions")
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    max_context_tokens: int
    max_draft_tokens: int
    max_message_bytes: int
    max_sessions: int
    def __init__(self, max_context_tokens: _Optional[int] = ..., max_draft_tokens: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_sessions: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_sessions", "num_waiting", "num_free_pages", "num_pages", "pass_base_ms", "pass_per_token_ms", "pass_per_context_token_ms")
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PASS_BASE_MS_FIELD_NUMBER: _ClassVar[int]
    PASS_PER_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    PASS_PER_CONTEXT_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    num_sessions: int
    num_waiting: int
    num_free_pages: int
    num_pages: int
    pass_base_ms: float
    pass_per_token_ms: float
    pass_per_context_token_ms: float
    def __init__(self, num_sessions: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_free_pages: _Optional[int] = ..., num_pages: _Optional[int] = ..., pass_base_ms: _Optional[float] = ..., pass_per_token_ms: _Optional[float] = ..., pass_per_context_token_ms: _Optional[float] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("session_id", "context_start", "context_ids", "draft_ids", "sampling", "context_hash", "pair_hash")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_START_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_HASH_FIELD_NUMBER: _ClassVar[int]
    PAIR_HASH_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    context_start: int
    context_ids: _containers.RepeatedScalarFieldContainer[int]
    draft_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    context_hash: int
    pair_hash: int
    def __init__(self, session_id: _Optional[bytes] = ..., context_start: _Optional[int] = ..., context_ids: _Optional[_Iterable[int]] = ..., draft_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., context_hash: _Optional[int] = ..., pair_hash: _Optional[int] = ...) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("num_accepted", "next_token_id", "cached_length", "queue_ms", "compute_ms", "target_passes", "load")
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    TARGET_PASSES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    num_accepted: int
    next_token_id: int
    cached_length: int
    queue_ms: float
    compute_ms: float
    target_passes: float
    load: Load
    def __init__(self, num_accepted: _Optional[int] = ..., next_token_id: _Optional[int] = ..., cached_length: _Optional[int] = ..., queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., target_passes: _Optional[float] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class TailRequest(_message.Message):
    __slots__ = ("session_id", "context_start", "rows", "draft_ids", "sampling", "context_hash", "cut", "codec", "pair_hash", "assumed_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_START_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_HASH_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    PAIR_HASH_FIELD_NUMBER: _ClassVar[int]
    ASSUMED_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    context_start: int
    rows: bytes
    draft_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    context_hash: int
    cut: int
    codec: str
    pair_hash: int
    assumed_id: int
    def __init__(self, session_id: _Optional[bytes] = ..., context_start: _Optional[int] = ..., rows: _Optional[bytes] = ..., draft_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., context_hash: _Optional[int] = ..., cut: _Optional[int] = ..., codec: _Optional[str] = ..., pair_hash: _Optional[int] = ..., assumed_id: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "codec", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    codec: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., codec: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class InferRequest(_message.Message):
    __slots__ = ("cut", "inputs", "graph_hash")
    CUT_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    GRAPH_HASH_FIELD_NUMBER: _ClassVar[int]
    cut: str
    inputs: _containers.RepeatedCompositeFieldContainer[Tensor]
    graph_hash: int
    def __init__(self, cut: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., graph_hash: _Optional[int] = ...) -> None: ...

class InferReply(_message.Message):
    __slots__ = ("outputs", "queue_ms", "compute_ms", "num_batched")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_BATCHED_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[Tensor]
    queue_ms: float
    compute_ms: float
    num_batched: int
    def __init__(self, outputs: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., num_batched: _Optional[int] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("session_id", "context_start", "context_ids", "sampling", "context_hash", "max_new_tokens", "stop_token_ids", "pair_hash")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_START_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_HASH_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAIR_HASH_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    context_start: int
    context_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    context_hash: int
    max_new_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    pair_hash: int
    def __init__(self, session_id: _Optional[bytes] = ..., context_start: _Optional[int] = ..., context_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., context_hash: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., pair_hash: _Optional[int] = ...) -> None: ...

class DecodeReply(_message.Message):
    __slots__ = ("token_ids", "queue_ms", "compute_ms", "target_passes", "load")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    TARGET_PASSES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    queue_ms: float
    compute_ms: float
    target_passes: float
    load: Load
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., target_passes: _Optional[float] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("cached_length", "retry_after_ms", "model_fingerprint")
    CACHED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    cached_length: int
    retry_after_ms: int
    model_fingerprint: str
    def __init__(self, cached_length: _Optional[int] = ..., retry_after_ms: _Optional[int] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...
