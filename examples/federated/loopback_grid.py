"""Flower's seam between server and devices, for devices that are simulated in this process. Flower's own simulation needs Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class LoopbackGrid(Grid):
    """Hands every message to the device's ClientApp, all devices at once, and counts what would have travelled."""

    def __init__(self, app: ClientApp, devices: Sequence[dict[str, str]]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 0, 0, 0  # a SuperLink would give them out
        self._app = app
        self._contexts = {
            number: Context(run_id=0, node_id=number, node_config=dict(device), state=RecordDict(), run_config={})
            for number, device in enumerate(devices, 1)
        }
        self._run = Run.create_empty(0)
        self._replies: dict[str, Message] = {}
        self.num_bytes_down = 0
        self.num_bytes_up = 0

    def set_run(self, run: Run) -> None:
        """There is one run only."""
        self._run = run

    @property
    def run(self) -> Run:
        """It."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message for a device."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The devices, from 1."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run each device's app."""
        asked = list(messages)
        with ThreadPoolExecutor(len(self._contexts)) as pool:  # a device waits for a process of its own
            replies = list(pool.map(lambda message: self._app(message, self._contexts[message.metadata.dst_node_id]), asked))
        self.num_bytes_down += sum(map(num_bytes, asked))
        self.num_bytes_up += sum(map(num_bytes, replies))
        sent = [str(number) for number in range(len(self._replies), len(self._replies) + len(replies))]
        self._replies.update(zip(sent, replies, strict=True))
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """What they answered."""
        return [self._replies[name] for name in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Both."""
        return self.pull_messages(self.push_messages(messages))


def num_bytes(message: Message) -> int:
    """Of the tensors in it."""
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
