"""What the requests that extend a session have in common, whichever method they came by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edgecloud.cloud.work import Boundary
from edgecloud.errors import ConfigError
from edgecloud.kernels.codec import row_bytes
from edgecloud.rpc import edgecloud_pb2 as pb

Request = pb.VerifyRequest | pb.TailRequest | pb.DecodeRequest


class Asked(NamedTuple):
    """As it is in the message, which may hold a million ids: nothing is copied yet."""

    context_ids: Sequence[int] = ()
    draft_ids: Sequence[int] = ()
    stop_ids: Sequence[int] = ()
    max_new_tokens: int = 1
    boundary: Boundary | None = None
    assumed_id: int | None = None

    @property
    def num_new_context(self) -> int:
        """Tokens of the context that came with it."""
        return len(self.context_ids) if self.boundary is None else self.boundary.num_rows - len(self.draft_ids)


def asked(request: Request, tail_cuts: Sequence[int], width: int) -> Asked:
    """`tail_cuts`: the layers that a tail may enter at; `width`: of its rows.

    Raises:
        ConfigError: a tail that this service does not take, or whose rows are not as many bytes as they should be. What is in them
            the engine looks at.
    """
    match request:
        case pb.VerifyRequest():
            return Asked(request.context_ids, request.draft_ids)
        case pb.DecodeRequest():
            return Asked(request.context_ids, (), request.stop_token_ids, request.max_new_tokens)
    if not tail_cuts:
        raise ConfigError("this service takes no tails: its model cannot be entered at a layer; use Verify or Decode")
    if request.cut not in tail_cuts:
        raise ConfigError(f"cut is {request.cut}; this service takes {tail_cuts[0]} to {tail_cuts[-1]}")
    if request.sampling.repetition_penalty not in (0.0, 1.0):
        raise ConfigError("repetition_penalty takes the prompt's ids, which a tail does not bring; leave it out")
    num_bytes, draft_ids = row_bytes(request.codec, width), request.draft_ids
    boundary = Boundary(request.cut, request.codec, num_bytes, request.rows)
    if len(request.rows) % num_bytes:
        raise ConfigError(f"rows has {len(request.rows)} bytes; a row in {request.codec} has {num_bytes}")
    if boundary.num_rows < len(draft_ids):
        raise ConfigError(f"the draft has {len(draft_ids)} tokens, but only {boundary.num_rows} rows came; send one for each")
    assumed_id = request.assumed_id if request.HasField("assumed_id") else None
    if assumed_id is not None and not request.context_start:
        raise ConfigError("assumed_id is given, but before context_start 0 nothing was chosen; leave it out")
    return Asked((), draft_ids, boundary=boundary, assumed_id=assumed_id)
