"""`import edgecloud`: seconds in a fresh interpreter, and whether anything heavy comes with it.

Median over fresh interpreters of the whole process, less that of an interpreter that imports nothing, in turns.
    python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import harness

HEAVY = ["torch", "transformers", "onnxruntime"]


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    statements = {
        "nothing": "pass",
        "edgecloud": "import edgecloud",
        "edgecloud.Client": "import edgecloud; edgecloud.Client",  # what a first use loads, for information
    }
    runs: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(options.repetitions + 1):
        for name, code in statements.items():
            runs[name].append(seconds(code))
    medians = {name: statistics.median(values[1:]) for name, values in runs.items()}  # the first fills the file cache
    check = f"import edgecloud, sys; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-P", "-c", check], check=True, capture_output=True, text=True).stdout.split()
    harness.report(
        options.json_out,
        [
            ("import edgecloud, s", medians["edgecloud"] - medians["nothing"], "<=", 0.25),
            ("heavy packages loaded", len(loaded), "<=", 0),
        ],
        {
            "loaded": loaded,
            "median_s": {name: round(value, 4) for name, value in medians.items()},
            "raw_s": {name: [round(value, 4) for value in values] for name, values in runs.items()},
        },
    )


if __name__ == "__main__":
    main()
