"""Run every benchmark, one after another, and write benchmarks/results: `make bench`.

boundary_damage, cloud_passes and lookup need questions and run only with --prompts (Spec-Bench's question.jsonl). --quick: few
repetitions, a smoke test.
    python benchmarks/run_all.py --prompts spec_bench_dev.jsonl
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import harness

SCRIPTS = {  # with what --quick adds
    "import_time": ["--repetitions", "3"],
    "round_overhead": ["--rounds", "30"],
    "device_rss": [],
    "device_decode": ["--repetitions", "2"],
    "cloud_decode": ["--starts", "1", "--repetitions", "2"],
    "engine": ["--repetitions", "1"],
    "front_end": ["--rounds", "10"],
    "graph_sweep": ["--seconds", "1"],
    "classifier_exits": ["--draws", "20"],
    "boundary_damage": ["--per-category", "1", "--cuts", "10"],
    "cloud_passes": ["--per-category", "1", "--max-minutes", "1"],
    "lookup": ["--per-category", "1", "--max-new-tokens", "40"],
}
NEED_PROMPTS = {"boundary_damage", "cloud_passes", "lookup"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: the demo's, fetched and partitioned if need be")
    parser.add_argument("--prompts", type=Path, help="for boundary_damage, cloud_passes and lookup")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the JSON files")
    options = parser.parse_args()
    bundle = harness.find_bundle(options.bundle)
    failed = []
    for name, quick in SCRIPTS.items():
        if name in NEED_PROMPTS and options.prompts is None:
            harness.progress(f"{name}: left out, it needs --prompts")
            continue
        script = Path(__file__).with_name(f"{name}.py")
        command = [sys.executable, str(script), "--bundle", str(bundle), "--json-out", str(options.out / f"{name}.json")]
        command += ["--prompts", str(options.prompts)] if name in NEED_PROMPTS else []
        command += quick if options.quick else []
        harness.progress(f"{name} ...")
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        harness.progress(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
