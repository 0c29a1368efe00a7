"""A graph that device and cloud run together: which cut each run took, and what it cost.

    edgecloud fetch ppocr-det
    edgecloud partition PATH_IT_PRINTS --inputs sample.npz -o build/ocr --max-loss 0.02
    edgecloud serve build/ocr &
    python examples/cut_graph.py build/ocr sample.npz --cloud 127.0.0.1:7070

sample.npz holds an array for every input: numpy.savez("sample.npz", x=pixels). Without --cloud the device computes it all.
"""

from __future__ import annotations

import argparse

import numpy as np

import edgecloud


def main() -> None:
    """Run the graph a few times, then show its outputs."""
    parser = argparse.ArgumentParser(description="Run a cut graph.")
    parser.add_argument("bundle")
    parser.add_argument("inputs", help="an .npz with an array for every input")
    parser.add_argument("--cloud", help="HOST:PORT of `edgecloud serve`")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    inputs = dict(np.load(options.inputs))
    with edgecloud.Client(options.bundle, cloud=options.cloud) as client:
        for _ in range(options.repeat):
            reply = client.run(inputs)
            metrics = reply.metrics
            print(f"{reply.cut}: {metrics.total_ms:.0f} ms, device {metrics.edge_ms:.0f}, cloud {metrics.cloud_ms:.0f}, ", end="")
            print(f"{metrics.uplink_bytes} bytes up" + (f"; {reply.fell_back}" if reply.fell_back else ""))
    for name, array in reply.items():
        print(f"{name}: {array.dtype} {list(array.shape)}")


if __name__ == "__main__":
    main()
