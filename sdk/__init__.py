"""edgecloud: a small model on the device drafts, a large model in the cloud verifies, and the text is the cloud's own.

    client = edgecloud.Client("build/smol", cloud="127.0.0.1:7070")
    reply = client.generate("Why is the sky blue?", max_new_tokens=64)

Names load when they are first used: importing this package loads neither torch nor transformers nor onnxruntime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecloud.aio import AsyncClient
    from edgecloud.bundle import Bundle
    from edgecloud.client import Client
    from edgecloud.edge.remote import TLS
    from edgecloud.edge.retry import Timeout
    from edgecloud.errors import (
        BundleCorruptError,
        BundleError,
        BundleKindError,
        BundleNotFoundError,
        BundleVersionError,
        CloudAuthError,
        CloudError,
        CloudOverloadedError,
        CloudRefusedError,
        CloudUnavailableError,
        ConfigError,
        ContextLengthError,
        DeadlineExceededError,
        EdgecloudError,
        FetchError,
        ModelError,
        ModelMismatchError,
        NoPlanError,
        ProtocolError,
        RejectionLogError,
        ServerError,
        TokenizerMismatchError,
    )
    from edgecloud.graph_bundle import GraphBundle
    from edgecloud.inference import InferenceMetrics, InferenceReply
    from edgecloud.quality import CloudShare, Risk
    from edgecloud.rejections import RejectionLog
    from edgecloud.sampling import SamplingSettings
    from edgecloud.session import Session
    from edgecloud.types import (
        CloudBack,
        CloudLost,
        Metrics,
        ModeChanged,
        ModeSpan,
        Reply,
        Retract,
        RiskAlarm,
        Service,
        TokenEvent,
        Usage,
    )

_HOMES = {
    "AsyncClient": "aio",
    "Bundle": "bundle",
    "BundleCorruptError": "errors",
    "BundleError": "errors",
    "BundleKindError": "errors",
    "BundleNotFoundError": "errors",
    "BundleVersionError": "errors",
    "Client": "client",
    "CloudAuthError": "errors",
    "CloudBack": "types",
    "CloudError": "errors",
    "CloudLost": "types",
    "CloudOverloadedError": "errors",
    "CloudRefusedError": "errors",
    "CloudShare": "quality",
    "CloudUnavailableError": "errors",
    "ConfigError": "errors",
    "ContextLengthError": "errors",
    "DeadlineExceededError": "errors",
    "EdgecloudError": "errors",
    "FetchError": "errors",
    "InferenceMetrics": "inference",
    "InferenceReply": "inference",
    "GraphBundle": "graph_bundle",
    "Metrics": "types",
    "ModeChanged": "types",
    "ModeSpan": "types",
    "ModelError": "errors",
    "ModelMismatchError": "errors",
    "NoPlanError": "errors",
    "ProtocolError": "errors",
    "RejectionLog": "rejections",
    "RejectionLogError": "errors",
    "Reply": "types",
    "Retract": "types",
    "Risk": "quality",
    "RiskAlarm": "types",
    "SamplingSettings": "sampling",
    "ServerError": "errors",
    "Service": "types",
    "Session": "session",
    "TLS": "edge.remote",
    "Timeout": "edge.retry",
    "TokenEvent": "types",
    "TokenizerMismatchError": "errors",
    "Usage": "types",
}

__all__ = [
    "TLS",
    "AsyncClient",
    "Bundle",
    "BundleCorruptError",
    "BundleError",
    "BundleKindError",
    "BundleNotFoundError",
    "BundleVersionError",
    "Client",
    "CloudAuthError",
    "CloudBack",
    "CloudError",
    "CloudLost",
    "CloudOverloadedError",
    "CloudRefusedError",
    "CloudShare",
    "CloudUnavailableError",
    "ConfigError",
    "ContextLengthError",
    "DeadlineExceededError",
    "EdgecloudError",
    "FetchError",
    "GraphBundle",
    "InferenceMetrics",
    "InferenceReply",
    "Metrics",
    "ModeChanged",
    "ModeSpan",
    "ModelError",
    "ModelMismatchError",
    "NoPlanError",
    "ProtocolError",
    "RejectionLog",
    "RejectionLogError",
    "Reply",
    "Retract",
    "Risk",
    "RiskAlarm",
    "SamplingSettings",
    "ServerError",
    "Service",
    "Session",
    "Timeout",
    "TokenEvent",
    "TokenizerMismatchError",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("edgecloud")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
