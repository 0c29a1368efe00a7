"""vLLM's CPU build, answering engine.py's requests. Runs in a virtual environment of its own: `engine.py --vllm-python PATH`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time

model, cpu = sys.argv[1:]
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": cpu,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

with contextlib.redirect_stdout(sys.stderr):
    import vllm

    llm = vllm.LLM(model=model, dtype="bfloat16", max_model_len=1024, max_num_seqs=32, disable_log_stats=True)

for line in sys.stdin:
    request = json.loads(line)
    settings = vllm.SamplingParams(max_tokens=request["num_tokens"], temperature=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    with contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        llm.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds}), flush=True)
