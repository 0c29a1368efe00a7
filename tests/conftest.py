"""What every test may take for granted: no network, no judgement by the clock, the same examples in CI every time."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# A test that needs the hub is wrong. Subprocesses inherit this.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Where there is no GPU, Triton's interpreter runs the kernels for CUDA. It looks here when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# deadline=None and too_slow: a busy machine is no bug.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers for the whole suite; none for some tests by name, which are over before two workers have imported torch."""
    chosen = config.args != config.getini("testpaths") or config.option.keyword or config.option.markexpr
    return 0 if chosen else min(2, len(os.sched_getaffinity(0)))
