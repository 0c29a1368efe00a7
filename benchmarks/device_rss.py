"""Peak resident memory of a device process: a real Client on the int4 draft, the service elsewhere.

Each mode and prompt in a fresh process; the figure is the kernel's own high-water mark (VmHWM), in MB of 10^6 bytes.
    python benchmarks/device_rss.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import harness

from edgecloud.client import Client

NUM_TOKENS = 128


def peak_rss_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def device(bundle: str, cloud: str) -> None:
    """A device's whole life, as the worker."""

    def answer(mode: str, prompt: str) -> dict[str, Any]:
        before = peak_rss_bytes()
        with Client(bundle, cloud, num_threads=1) as client:
            reply = client.generate(prompt, mode=mode, max_new_tokens=NUM_TOKENS)
        usage = {"prompt_tokens": reply.usage.prompt_tokens, "completion_tokens": reply.usage.completion_tokens}
        return {"mode": mode, **usage, "imported_bytes": before, "peak_bytes": peak_rss_bytes()}

    harness.answer_requests(answer)


def main() -> None:
    if "--worker" in sys.argv:
        return device(*sys.argv[-2:])
    options = harness.arguments(__doc__, __file__).parse_args()
    bundle = harness.find_bundle(options.bundle)
    cloud_cpu, device_cpu = harness.cores()
    runs = []
    with harness.serving(bundle, cloud_cpu) as address:
        for length, prompt in (("short", harness.PROMPT), ("long", harness.PROMPT * 50)):
            for mode in ("edge", "speculative", "cloud"):
                with harness.Worker([str(bundle), address], device_cpu) as worker:
                    runs.append({"prompt": length, **worker.ask(mode=mode, prompt=prompt)})
    figures = [
        (f"peak RSS, MB, {run['mode']}, {run['prompt_tokens']}-token prompt", run["peak_bytes"] / 1e6, "<=", 350.0) for run in runs
    ]
    harness.report(options.json_out, figures, {"pinning": {"cloud_cpu": cloud_cpu, "device_cpu": device_cpu}, "runs": runs})
    return None


if __name__ == "__main__":
    main()
