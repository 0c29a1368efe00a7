"""A session of mode `split`: the service knows its tokens only by the rows that the device's front makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecloud.edge.front_rows import Row
from edgecloud.edge.remote import Cloud, ServiceSession
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.tokens import common_prefix
from edgecloud.types import CallCost, Verdict

ENVELOPE_BYTES = 4096  # of a message, for all but its rows


class TailSession(ServiceSession):
    """Has drafts verified by the target's last layers. Prompt ids never leave the device; draft ids do.

    Args:
        cloud: the service.
        cut: layers that the device has run.
        codec_name: how rows are encoded.
        max_message_bytes: the service's limit; longer contexts go up in parts.
    """

    def __init__(self, cloud: Cloud, cut: int, codec_name: str, max_message_bytes: int) -> None:
        super().__init__(cloud)
        self._cut = cut
        self._codec = codec_name
        self._max_rows_bytes = max(1, max_message_bytes - ENVELOPE_BYTES)

    def tail_request(
        self, tokens: list[int], draft_ids: list[int], rows: Sequence[Row], sampling: pb.Sampling, num_assumed: int | None = None
    ) -> tuple[pb.TailRequest, int]:
        """A request as of what the service is known to have, or is assumed to have by then.

        Args:
            tokens: the context.
            draft_ids: what is to be verified.
            rows: of all of these.
            sampling: how tokens are chosen.
            num_assumed: the service has chosen the last of so many tokens, and has the rows before it.

        -> the request, and the number of rows that the service will have; fewer than `rows` are the first part of a context
        too long for one message, without the draft.
        """
        self._opened = True
        if num_assumed is None:  # at least one row goes along
            start, assumed = min(common_prefix(self._server_tokens, tokens), len(tokens) - 1), None
        else:
            start, assumed = num_assumed - 1, tokens[num_assumed - 1]
        most = max(1, self._max_rows_bytes // len(rows[0].data))
        whole = len(rows) - start <= most
        stop = len(rows) if whole else min(start + most, len(tokens))
        request = pb.TailRequest(
            session_id=self._session_id,
            context_start=start,
            rows=b"".join(row.data for row in rows[start:stop]),
            draft_ids=draft_ids if whole else (),
            sampling=sampling,
            context_hash=codec.row_keys_hash([row.key for row in rows[:start]]),
            cut=self._cut,
            codec=self._codec,
            pair_hash=self._cloud.pair_hash,
            assumed_id=assumed,
        )
        return request, stop

    def tail_future(self, request: pb.TailRequest) -> Any:
        """Send it."""
        return self._cloud.stub.Tail.future(request, timeout=self.attempt_s(), metadata=self._cloud.metadata)

    def judged(self, tokens: list[int], draft_ids: list[int], reply: pb.VerifyReply, cost: CallCost) -> Verdict:
        """A reply as a verdict. The next token's row is still to be made. Raises ProtocolError: it makes no sense."""
        self.check(draft_ids, reply)
        self.settled([*tokens, *draft_ids[: reply.num_accepted]], reply)
        return Verdict(reply.num_accepted, reply.next_token_id, cost)
