"""Every error that edgecloud raises on purpose, as one tree.

EdgecloudError
├── ConfigError                  an option, argument or setting has a value that cannot work (also a ValueError)
│   ├── ContextLengthError       the prompt and the answer do not fit the context window
│   └── NoPlanError              no division of labour keeps to the constraints; names the nearest that would
├── BundleError                  a bundle cannot be used
│   ├── BundleNotFoundError      no bundle at that path
│   ├── BundleCorruptError       a file is missing, truncated or changed
│   ├── BundleKindError          it holds a model pair where a cut graph is needed, or the other way round
│   └── BundleVersionError       written by a newer edgecloud
├── ModelError                   a model folder cannot be used
│   └── TokenizerMismatchError   draft and target do not share a tokenizer
├── RejectionLogError            what a device logged to learn from is broken, too little, or of another pair
├── FetchError                   a download failed or arrived broken
├── ServerError                  the verification service cannot start or run
└── CloudError                   the other machine could not answer
    ├── CloudUnavailableError    nothing answers, after bounded retries
    ├── CloudOverloadedError     it answers that it is full; carries retry_after_s
    ├── CloudRefusedError        it refuses the request as invalid
    ├── CloudAuthError           it does not know the token, or got none
    ├── ContextMissingError      it lacks the session's tokens; carries cached_length (handled inside the SDK)
    ├── DeadlineExceededError    the time the caller allowed has passed
    ├── ModelMismatchError       it serves another model pair
    └── ProtocolError            it speaks another protocol version, or broke this one

A message names the value and the mend. An error out of a generation that had begun carries the tokens that were already
final in `.reply`: they stay final.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgecloud.types import Reply


class EdgecloudError(Exception):
    """Base of all errors of this package. `reply` holds what was already final when a generation broke, else None."""

    reply: Reply | None = None


class ConfigError(EdgecloudError, ValueError):
    """An option, argument or setting has a value that cannot work."""


class ContextLengthError(ConfigError):
    """The prompt and the answer do not fit the context window."""


class NoPlanError(ConfigError):
    """No division of labour keeps to the constraints; the message names the nearest values that would do."""


class BundleError(EdgecloudError):
    """A bundle cannot be used."""


class BundleNotFoundError(BundleError):
    """There is no bundle at that path."""


class BundleCorruptError(BundleError):
    """A file of the bundle is missing, truncated or changed."""


class BundleKindError(BundleError):
    """The bundle holds a model pair where a cut ONNX graph is needed, or the other way round."""


class BundleVersionError(BundleError):
    """The bundle was written by a newer edgecloud."""


class ModelError(EdgecloudError):
    """A model folder cannot be used."""


class TokenizerMismatchError(ModelError):
    """Draft and target do not share a tokenizer."""


class RejectionLogError(EdgecloudError):
    """What a device logged to learn from is broken, too little, or of another model pair."""


class FetchError(EdgecloudError):
    """A download failed or arrived broken."""


class ServerError(EdgecloudError):
    """The verification service cannot start or run."""


class CloudError(EdgecloudError):
    """The other machine could not answer."""


class CloudUnavailableError(CloudError):
    """Nothing answers, after bounded retries."""


class CloudOverloadedError(CloudError):
    """The service is full. `retry_after_s` is its hint."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CloudRefusedError(CloudError):
    """The service refuses the request as invalid."""


class CloudAuthError(CloudError):
    """The service does not know the token, or got none."""


class ContextMissingError(CloudError):
    """The service lacks the tokens before `context_start`; `cached_length` is how many it can vouch for."""

    def __init__(self, message: str, cached_length: int) -> None:
        super().__init__(message)
        self.cached_length = cached_length


class DeadlineExceededError(CloudError):
    """The time the caller allowed has passed."""


class ModelMismatchError(CloudError):
    """The service serves another model pair than the bundle was made for."""


class ProtocolError(CloudError):
    """The service speaks another protocol version, or broke this one."""
