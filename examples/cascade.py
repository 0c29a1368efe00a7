"""Answer without the cloud where the device is sure, at a stated risk.

edgecloud calibrate build/smol --prompts prompts.txt --risk 0.05
python examples/cascade.py build/smol --cloud 127.0.0.1:7070 --risk 0.05

What nobody verified is underlined.
"""

from __future__ import annotations

import argparse

import edgecloud

UNDERLINED, PLAIN = "\033[4m", "\033[0m"


def main() -> None:
    """Ask, show the text as it comes, then what was skipped."""
    parser = argparse.ArgumentParser(description="Ask one question at a stated risk.")
    parser.add_argument("bundle")
    parser.add_argument("question", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--cloud", required=True, help="HOST:PORT of `edgecloud serve`")
    parser.add_argument("--risk", type=float, default=0.05, help="one that the bundle is calibrated for")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    quality = edgecloud.Risk(options.risk)
    with (
        edgecloud.Client(options.bundle, cloud=options.cloud) as client,
        client.stream(
            options.question, mode="cascade", quality=quality, max_new_tokens=options.max_new_tokens, provisional=False
        ) as stream,
    ):
        for event in stream:
            match event:
                case edgecloud.TokenEvent(text, _, "final"):
                    print(text, end="", flush=True)
                case edgecloud.TokenEvent(text, _, _):
                    print(f"{UNDERLINED}{text}{PLAIN}", end="", flush=True)
                case edgecloud.RiskAlarm(risk, num_audited, num_diverged):
                    print(f"\n[of {num_audited} checked tokens {num_diverged} differ: a risk of {risk:g} no longer holds]")
    metrics = stream.reply.metrics
    print(
        f"\n\n{metrics.num_unverified_tokens} of {len(stream.reply.token_ids)} tokens unverified, "
        f"{metrics.num_diverged_tokens} of {metrics.num_audited_tokens} checked ones differ, "
        f"{metrics.target_passes_per_token:.2f} cloud passes a token"
    )


if __name__ == "__main__":
    main()
