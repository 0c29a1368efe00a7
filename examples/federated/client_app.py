"""A device's part of a federated round, as a Flower ClientApp: adapter in, adapter out. Its log stays where it is.

The model is trained by `edgecloud adapter train`, a process with an environment of its own. What travels is B of the adapter, its
change clipped by Flower's mod before it leaves.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from safetensors import safe_open
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

app = ClientApp(mods=[fixedclipping_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train what the server sent on this device's log."""
    device = context.node_config  # edgecloud, draft, begin, log
    received = message.content.array_records["arrays"]
    with tempfile.TemporaryDirectory(prefix="federated-") as scratch:
        given, trained = Path(scratch) / "given.safetensors", Path(scratch) / "trained.safetensors"
        tensors, metadata = read(Path(str(device["begin"])))
        save_file({**tensors, **{name: array.numpy() for name, array in received.items()}}, given, metadata)
        config = message.content.config_records["config"]
        command = [*shlex.split(str(device["edgecloud"])), "adapter", "train", str(device["draft"]), str(given),
                   "--log", str(device["log"]), "-o", str(trained), "--seed", str(config["server-round"]),
                   "--epochs", str(config["epochs"]), "--learning-rate", str(config["learning-rate"])]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        learned, _ = read(trained)
    # Every device counts the same: how much it has logged is nobody's business.
    content = RecordDict({"arrays": as_record(learned), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)


def read(file: Path) -> tuple[Tensors, dict[str, str]]:
    """All tensors of an adapter, and what its file says of it."""
    with safe_open(file, framework="numpy") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118  # no mapping


def as_record(tensors: Tensors) -> ArrayRecord:
    """B of an adapter, the part that is trained."""
    return ArrayRecord({name: Array(tensor) for name, tensor in sorted(tensors.items()) if "lora_B" in name})
