"""Rounds of Flower over the logs of several devices: FedAvg over adapters, each device's change clipped, noise added if asked for.

python -m venv flower && flower/bin/pip install edgecloud[federated]
edgecloud adapter begin DRAFT -o begin.safetensors
flower/bin/python examples/federated/run.py DRAFT begin.safetensors --log phone/log --log tablet/log -o averaged.safetensors
edgecloud adapter merge DRAFT averaged.safetensors -o DRAFT2
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from client_app import app, as_record, read
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg
from loopback_grid import LoopbackGrid
from safetensors.numpy import save_file


def main() -> None:
    """Run the rounds, and write the averaged adapter."""
    options = parse()
    devices = [
        {"edgecloud": options.edgecloud, "draft": str(options.draft), "begin": str(options.begin), "log": str(log)}
        for log in options.log
    ]
    grid = LoopbackGrid(app, devices)
    average = FedAvg(fraction_evaluate=0.0, min_train_nodes=len(devices), min_available_nodes=len(devices))
    strategy = DifferentialPrivacyClientSideFixedClipping(average, options.noise, options.clip, len(devices))
    tensors, metadata = read(options.begin)
    config = ConfigRecord({"epochs": options.epochs, "learning-rate": options.learning_rate})
    result = strategy.start(grid, as_record(tensors), options.rounds, train_config=config)
    averaged = {name: array.numpy() for name, array in result.arrays.items()}
    save_file({**tensors, **averaged}, options.output, metadata)
    num_devices = len(devices)
    print(
        json.dumps(
            {
                "rounds": options.rounds,
                "devices": num_devices,
                "bytes_up_per_device_and_round": grid.num_bytes_up // num_devices // options.rounds,
                "bytes_down_per_device_and_round": grid.num_bytes_down // num_devices // options.rounds,
                "norm_of_b": math.sqrt(sum(float((tensor**2).sum()) for tensor in averaged.values())),
            }
        )
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft", type=Path, help="the draft that all devices have")
    parser.add_argument("begin", type=Path, help="what `edgecloud adapter begin` wrote")
    parser.add_argument("--log", type=Path, action="append", required=True, help="a device's log; once for each device")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the averaged adapter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1, help="of a device in a round")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--clip", type=float, default=1.0, help="longest change (L2) that a device sends")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="standard deviation of the noise on the sum, in clips; no budget is computed"
    )
    parser.add_argument("--edgecloud", default="edgecloud", help="how to start edgecloud, in its own environment")
    return parser.parse_args()


if __name__ == "__main__":
    main()
