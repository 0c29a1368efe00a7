"""One question, answered by device and cloud together.

    edgecloud fetch smollm2-135m
    edgecloud partition smollm2-135m -o build/smol
    edgecloud serve build/smol &
    python examples/quick_start.py build/smol --cloud 127.0.0.1:7070

Without --cloud the device answers alone, and its tokens stay unverified.
"""

from __future__ import annotations

import argparse

import edgecloud


def main() -> None:
    """Ask, show the text as it comes, then what it took."""
    parser = argparse.ArgumentParser(description="Ask one question.")
    parser.add_argument("bundle")
    parser.add_argument("question", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--cloud", help="HOST:PORT of `edgecloud serve`")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    with (
        edgecloud.Client(options.bundle, cloud=options.cloud) as client,
        client.stream(options.question, max_new_tokens=options.max_new_tokens, provisional=False) as stream,
    ):
        for event in stream:
            if isinstance(event, edgecloud.TokenEvent):
                print(event.text, end="", flush=True)
    metrics = stream.reply.metrics
    print(
        f"\n\nmode {stream.reply.mode_timeline[-1].mode}: {metrics.ttft_ms:.0f} ms to the first token, "
        f"{metrics.tpot_ms:.0f} ms a token, {metrics.target_passes_per_token:.2f} cloud passes a token, "
        f"{metrics.num_unverified_tokens} tokens unverified"
    )


if __name__ == "__main__":
    main()
