"""Flower's seam between server and devices, for devices that are simulated in this process. Flower's own simulation needs Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class LoopbackGrid(Grid):
    """Hands every message to the device's ClientApp, one device after another, and counts what would have travelled."""

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
        sent: list[str] = []
        for number, message in enumerate(messages, len(self._replies)):
            name = str(number)
            self.num_bytes_down += num_bytes(message)
            reply = self._app(message, self._contexts[message.metadata.dst_node_id])
            self.num_bytes_up += num_bytes(reply)
            self._replies[name] = reply
            sent.append(name)
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
