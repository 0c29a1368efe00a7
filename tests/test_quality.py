"""A stated quality against a real service: what is skipped, what says so, and when the risk is no longer believed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pairs import Pair, Server, copy_of, edit_manifest, free_port
from screen import Screen

from edgecloud import CloudShare, Risk, RiskAlarm
from edgecloud.aio import AsyncClient
from edgecloud.bundle import Bundle
from edgecloud.calibration import Calibration, ExitRule, ShareRule
from edgecloud.cli.app import run
from edgecloud.client import Client
from edgecloud.cost import Exited, cascaded
from edgecloud.edge.controller import Controller
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.retry import Timeout
from edgecloud.errors import ConfigError
from edgecloud.sampling import SamplingSettings
from edgecloud.types import CallCost, CloudLost, ServiceLoad, TokenEvent

pytest_plugins = ["pairs"]

PROMPT = "Why is the sky blue?"
NUM_TOKENS = 20
EASY, SOME, NONE = Risk(0.5), Risk(0.05), Risk(0.01)  # everything is skipped, some, next to nothing


def calibrate_by_hand(bundle: Path, some: float, *, stricter: bool = False) -> None:
    """Write thresholds as `edgecloud calibrate` does."""
    opened = Bundle.open(bundle)
    thresholds = {EASY.risk: 0.0, SOME.risk: some, **({NONE.risk: 0.9999} if stricter else {})}
    rules = [
        ExitRule(scope, risk, 0.0, threshold, 100, 0.5, risk / 2, 0.01, None, [])
        for scope in ("token", "before", "after")
        for risk, threshold in thresholds.items()
    ]
    shares = [
        ShareRule(scope, share, 0.0, threshold, 100, 0.1)
        for scope in ("before", "after")
        for share, threshold in ((0.0, 0.0), (1.0, 1.1))
    ]
    prints = opened.draft.fingerprint, opened.target.fingerprint
    calibration = Calibration(opened.pair_id, *prints, "by hand", 0.1, rules, shares)
    edit_manifest(bundle, lambda content: content.update(calibration=calibration.to_dict()))


@pytest.fixture(scope="module")
def calibrated(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose middle threshold lies in the middle of the scores."""
    bundle = copy_of(tiny_pair.bundle, tmp_path_factory.mktemp("calibrated") / "bundle")
    with Client(bundle, num_threads=1) as client:
        reply = client.generate(PROMPT, raw=True, mode="edge", max_new_tokens=NUM_TOKENS)
        tokens, scores = client.tokenizer.encode(PROMPT), []
        for token in reply.token_ids:
            scores.append(client._on_device.drafter.guess(tokens, SamplingSettings())[1])
            tokens.append(token)
    calibrate_by_hand(bundle, sorted(scores)[len(scores) // 2])
    return bundle


@pytest.fixture
def client(calibrated: Path, tiny_server: Server) -> Iterator[Client]:
    with Client(calibrated, tiny_server.address, num_threads=1) as made:
        yield made


def generate(client: Client, **options: Any) -> Any:
    return client.generate(PROMPT, raw=True, max_new_tokens=NUM_TOKENS, **options)


# What is skipped, and says so


def test_exact_skips_nothing(client: Client) -> None:
    cloud = generate(client, mode="cloud")
    for mode in ("cascade", "auto", "speculative"):
        reply = generate(client, mode=mode, quality="exact")
        assert reply.token_ids == cloud.token_ids
        assert (reply.metrics.num_unverified_tokens, reply.unverified_spans) == (0, [])
        assert {span.mode for span in reply.mode_timeline} <= {"cloud", "speculative"}


def test_where_everything_is_skipped_it_is_the_devices_text_and_no_token_is_called_final(client: Client) -> None:
    reply, screen, edge = None, Screen(), generate(client, mode="edge")
    with client.stream(PROMPT, raw=True, max_new_tokens=NUM_TOKENS, mode="cascade", quality=EASY) as stream:
        for event in stream:
            screen.show(event)
        reply = stream.reply
    assert screen.final == reply.token_ids == edge.token_ids
    assert set(screen.statuses) == {"unverified"}
    assert screen.text == reply.text
    assert reply.unverified_spans == [(0, len(reply.token_ids))]
    assert reply.metrics.num_unverified_tokens == len(reply.token_ids)
    assert reply.metrics.target_passes <= 1  # a check of it all, at most


@pytest.mark.parametrize("num_draft_tokens", [1, 4])
def test_events_json_and_metrics_agree_on_what_nobody_verified(client: Client, num_draft_tokens: int) -> None:
    seen = []
    for _ in range(2):
        screen = Screen()
        options: Any = {"mode": "cascade", "quality": SOME, "num_draft_tokens": num_draft_tokens, "seed": 3}
        with client.stream(PROMPT, raw=True, max_new_tokens=NUM_TOKENS, **options) as stream:
            for event in stream:
                screen.show(event)
        content = json.loads(json.dumps(stream.reply.to_dict()))
        unverified = [at for start, end in content["unverified_spans"] for at in range(start, end)]
        assert unverified == [at for at, status in enumerate(screen.statuses) if status == "unverified"]
        assert 0 < len(unverified) == content["metrics"]["num_unverified_tokens"] < NUM_TOKENS
        assert screen.text == content["text"]
        assert not screen.provisional
        assert {span["mode"] for span in content["mode_timeline"]} == {"cascade"}
        seen.append((content["token_ids"], content["metrics"]["num_audited_tokens"]))
    assert seen[0] == seen[1]  # the same text, and the same checks


def test_the_text_of_a_cascade_does_not_depend_on_the_draft_length_or_on_what_is_shown(client: Client) -> None:
    texts = [
        generate(client, mode="cascade", quality=SOME, num_draft_tokens=length, provisional=shown).token_ids
        for length, shown in ((1, True), (3, False), (8, True))
    ]
    assert texts[0] == texts[1] == texts[2]


def test_a_stop_string_ends_a_cascade_at_once(client: Client) -> None:
    whole = generate(client, mode="cascade", quality=EASY)
    stop = next(char for char in whole.text[2:] if char.strip() and char.isascii())
    reply = generate(client, mode="cascade", quality=EASY, stop_strings=[stop])
    assert reply.text == whole.text[: whole.text.index(stop)]
    assert reply.finish_reason == "stop"


def test_offline_is_the_device_alone(client: Client) -> None:
    edge = generate(client, mode="edge")
    for mode in ("auto", "cascade", "edge"):
        reply = generate(client, mode=mode, quality="offline")
        assert (reply.token_ids, reply.metrics.target_passes) == (edge.token_ids, 0)
        assert reply.metrics.num_unverified_tokens == len(reply.token_ids)


@pytest.mark.parametrize("scope", ["before", "after"])
def test_a_share_of_requests_goes_to_the_cloud(client: Client, scope: Any) -> None:
    edge, cloud = generate(client, mode="edge"), generate(client, mode="cloud")
    for mode in ("cascade", "auto"):
        kept = generate(client, mode=mode, quality=CloudShare(0.0, scope))
        assert (kept.token_ids, kept.metrics.target_passes) == (edge.token_ids, 0)
        assert {span.mode for span in kept.mode_timeline} == {"edge"}
        screen = Screen()
        with client.stream(PROMPT, raw=True, max_new_tokens=NUM_TOKENS, mode=mode, quality=CloudShare(1.0, scope)) as stream:
            for event in stream:
                screen.show(event)
        assert screen.final == stream.reply.token_ids == cloud.token_ids
        assert set(screen.statuses) == {"final"}


def test_without_an_answer_a_cascade_goes_on_and_says_so(calibrated: Path) -> None:
    timeout = Timeout(connect_s=0.5, request_s=1.0, retry_s=0.3)
    with Client(calibrated, f"127.0.0.1:{free_port()}", num_threads=1, timeout=timeout) as client:
        events = list(client.stream(PROMPT, raw=True, max_new_tokens=NUM_TOKENS, mode="cascade", quality=SOME))
        assert any(isinstance(event, CloudLost) for event in events)
        assert not [event for event in events if isinstance(event, TokenEvent) and event.status == "final"]
        edge = generate(client, mode="edge")
        assert [t for e in events if isinstance(e, TokenEvent) for t in e.token_ids][:NUM_TOKENS] == edge.token_ids


# What is refused


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"mode": "cascade"}, "takes a quality"),
        ({"quality": "good"}, "quality is 'good'"),
        ({"quality": 0.05}, "quality is 0.05"),
        ({"mode": "cloud", "quality": SOME}, "mode 'cloud' cannot give"),
        ({"mode": "edge", "quality": "exact"}, "mode 'edge' cannot give"),
        ({"mode": "cascade", "quality": Risk(0.2)}, "risk of 0.2 .* not calibrated.*edgecloud calibrate"),
        ({"mode": "cascade", "quality": SOME, "temperature": 0.7}, "temperature 0.7 is not calibrated"),
        ({"quality": SOME, "repetition_penalty": 1.1}, "repetition_penalty is 1.1"),
        ({"quality": CloudShare(0.4)}, "cloud share of 0.4 .* not calibrated"),
    ],
)
def test_what_cannot_be_promised_is_refused(client: Client, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        client.generate(PROMPT, **options)


def test_a_bundle_that_is_not_calibrated_names_the_command(tiny_pair: Pair, tiny_server: Server) -> None:
    with Client(tiny_pair.bundle, tiny_server.address) as client, pytest.raises(ConfigError, match="edgecloud calibrate"):
        client.generate(PROMPT, mode="cascade", quality=SOME)


@pytest.mark.parametrize("quality", [SOME, "exact"])
def test_a_promise_about_the_cloud_needs_one(calibrated: Path, quality: Any) -> None:
    with Client(calibrated) as client, pytest.raises(ConfigError, match="needs a cloud"):
        client.generate(PROMPT, quality=quality)


BAD_QUALITIES: list[tuple[Any, tuple[Any, ...]]] = [
    (Risk, (0.0,)),
    (Risk, (1,)),
    (Risk, (0.1, "word")),
    (CloudShare, (-0.1,)),
    (CloudShare, (0.1, "token")),
]


@pytest.mark.parametrize(("kind", "arguments"), BAD_QUALITIES)
def test_a_quality_checks_itself(kind: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="takes"):
        kind(*arguments)


def test_the_command_line_takes_a_risk_a_share_or_a_word(
    calibrated: Path, tiny_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", str(calibrated), PROMPT, "--cloud", tiny_server.address, "--raw", "--json", "--max-new-tokens", "8"]
    assert run([*asked, "--mode", "cascade", "--risk", "0.5", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["unverified_spans"] == [[0, 8]]
    assert run([*asked, "--cloud-share", "1.0", "--scope", "after", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["unverified_spans"] == []
    for wrong, complaint in (
        (["--risk", "0.5", "--quality", "exact"], "--quality and --risk are given"),
        (["--scope", "after"], "--scope is after"),
        (["--risk", "0.3"], "edgecloud calibrate"),
    ):
        assert run([*asked, *wrong]) != 0
        assert complaint in capsys.readouterr().err


# When the risk is no longer believed


def test_a_draft_that_does_not_keep_its_promise_is_found_out(tiny_pair: Pair, tiny_server: Server, tmp_path: Path) -> None:
    """All is skipped at first, and wrong: the alarm makes the threshold stricter, and the text ends up as the cloud's."""
    bundle = copy_of(tiny_pair.bundle, tmp_path / "bundle")
    calibrate_by_hand(bundle, 0.0, stricter=True)

    async def ask() -> None:
        async with AsyncClient(bundle, tiny_server.address, num_threads=1) as client:
            alarms = []
            for number in range(60):
                prompt = f"{number} {PROMPT}"
                async for event in client.stream(prompt, raw=True, max_new_tokens=NUM_TOKENS, mode="cascade", quality=SOME):
                    alarms += [event] if isinstance(event, RiskAlarm) else []
                if alarms:
                    break
            assert [alarm.threshold for alarm in alarms] == [0.9999]
            assert alarms[0].num_diverged > SOME.risk * alarms[0].num_audited
            exact = await client.generate(PROMPT, raw=True, max_new_tokens=NUM_TOKENS, mode="cloud")
            tightened = await client.generate(PROMPT, raw=True, max_new_tokens=NUM_TOKENS, mode="cascade", quality=SOME)
            assert tightened.token_ids == exact.token_ids
            assert tightened.metrics.num_unverified_tokens == 0

    asyncio.run(ask())


# The controller


def test_the_controller_takes_a_cascade_only_where_a_risk_is_stated() -> None:
    estimates = Estimates.unknown()
    estimates.cloud.tell(ServiceLoad(1, 0, 10, 10, 50.0, 1.0, 0.0))
    estimates.answered(CallCost(elapsed_ms=20.0, uplink_bytes=100), None, 0.0, was_idle=False)
    estimates.device.drafted(2.0)
    without = Controller(estimates)
    assert {arm.plan.mode for arm in without.arms(0.0, 10)} == {"cloud", "speculative"}
    with_risk = Controller(estimates, exited=Exited(0.6, 0.03))
    assert {arm.plan.mode for arm in with_risk.arms(0.0, 10)} == {"cloud", "speculative", "cascade"}
    assert with_risk.plan(0.0, 10).mode == "cascade"
    useless = Controller(estimates, exited=Exited(0.0, 0.0))
    assert useless.plan(0.0, 10).mode == "speculative"


def test_more_sure_guesses_make_a_cascade_cheaper() -> None:
    prices = [cascaded(Exited(share, 0.03), 0.7, 4, 5.0, 20.0, 50.0, 0.0) for share in (0.0, 0.3, 0.5, 0.65)]
    passes = [price.passes_per_token for price in prices]
    assert passes == sorted(passes, reverse=True)
    assert asdict(prices[0])["passes_per_token"] == pytest.approx(1 / sum(0.7**j for j in range(5)))
