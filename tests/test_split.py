"""Mode `split`: the text is that of the split target (front, codec, tail), whatever is drafted, refused, forgotten or too long."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flying import Uncounted, Unhurried
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Loopback, loopback
from pairs import Pair, Plain, Server, copy_of, edit_manifest, plain_choice, plain_target, serving
from tiny import make_tiny_llama

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.cloud.model import TargetModel
from edgecloud.edge.collaborate import collaborate
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.front import FrontModel
from edgecloud.edge.front_courier import FrontCourier
from edgecloud.edge.front_drafter import FrontDrafter
from edgecloud.edge.front_rows import FrontRows
from edgecloud.edge.pilot import Pilot
from edgecloud.edge.plan import Fixed, Plan
from edgecloud.edge.remote import Cloud
from edgecloud.edge.replicas import RemoteSession, Replicas
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.errors import ConfigError, ModelMismatchError
from edgecloud.kernels.codec import decode, encode
from edgecloud.kernels.entries import all_entries
from edgecloud.protocols import Drafter
from edgecloud.sampling import SamplingSettings
from edgecloud.types import Round
from edgecloud.way import check_tail

pytest_plugins = ["pairs"]

NUM_LAYERS, VOCAB_SIZE = 4, 40
CUTS = range(1, NUM_LAYERS)


class TorchFront:
    """The first layers of the stock model, a whole forward each time: no cache to be wrong."""

    width = 32
    max_tokens = 512

    def __init__(self, folder: Path, cut: int) -> None:
        self._model = plain_target(folder)._model
        self._cut = cut
        self._tokens: list[int] = []
        self.num_computed = 0

    def extend(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        self._tokens += token_ids
        self.num_computed += len(token_ids)
        return self.rows(self._tokens)[-len(token_ids) :]

    def crop_to(self, length: int) -> None:
        del self._tokens[length:]

    def rows(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """[tokens, width]"""
        with torch.inference_mode():
            hidden: npt.NDArray[np.float32] = (
                self._model.model(input_ids=torch.tensor([list(tokens)]), output_hidden_states=True)
                .hidden_states[self._cut][0]
                .numpy()
            )
        return hidden


class SplitTarget:
    """What mode `split` decodes by, plainly: the stock model, whose layer `cut` is given rows that went through the codec.

    The rows are the stock model's own, or a front's, token by token.
    """

    def __init__(self, folder: Path, cut: int, codec: str, front: FrontModel | None = None) -> None:
        self._model = plain_target(folder)._model
        self._cut, self._codec, self._front = cut, codec, front

    def decode(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: SamplingSettings, stop_token_ids: Collection[int] = ()
    ) -> Plain:
        tokens, margins = list(prompt), []
        for _ in range(max_new_tokens):
            token, margin = plain_choice(self._logits(tokens), tokens, sampling)
            tokens.append(token)
            margins.append(margin)
            if token in stop_token_ids:
                break
        return Plain(tokens[len(prompt) :], margins)

    def _logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        def through_codec(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            rows = given[0][0].numpy() if self._front is None else self._one_by_one(self._front, tokens)
            sent = decode(encode(rows, self._codec), self._codec, rows.shape[1])
            return torch.from_numpy(sent)[None], *given[1:]

        handle = self._model.model.layers[self._cut].register_forward_pre_hook(through_codec)
        try:
            with torch.inference_mode():
                logits: npt.NDArray[np.float32] = self._model(torch.tensor([list(tokens)])).logits[0, -1].numpy()
        finally:
            handle.remove()
        return logits

    def _one_by_one(self, front: FrontModel, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        front.crop_to(0)
        return np.concatenate([front.extend([token]) for token in tokens])


@dataclass
class GuessingDrafter:
    """Knows the answer, and is wrong at some positions."""

    answer: list[int]
    num_prompt: int
    wrong: frozenset[int]

    def draft(self, tokens: Sequence[int], num_draft_tokens: int, sampling: SamplingSettings, stop_token_ids: Any) -> list[int]:
        at = len(tokens) - self.num_prompt
        right = self.answer[at] if at < len(self.answer) else 0
        return [(right + 1) % VOCAB_SIZE if at in self.wrong else right]


@dataclass(frozen=True)
class Served:
    """A service, and the folder of its target."""

    service: Loopback
    folder: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("split") / "model"
    make_tiny_llama(folder, vocab_size=VOCAB_SIZE, hidden_size=32, num_layers=NUM_LAYERS)
    with loopback(TargetModel(folder), cache_bytes=1 << 20) as service:
        yield Served(service, folder)


@dataclass
class Flight:
    """One generation in mode `split` over real gRPC, with whatever happens to the service's memory in between."""

    served: Served
    cut: int
    codec: str
    max_message_bytes: int = 1 << 20
    estimates: Estimates = field(default_factory=Estimates.unknown)

    @cached_property
    def front(self) -> TorchFront:
        return TorchFront(self.served.folder, self.cut)

    @cached_property
    def rows(self) -> FrontRows:
        return FrontRows(self.front, self.cut, self.codec)

    def run(
        self,
        prompt: Sequence[int],
        drafter: Drafter,
        sampling: SamplingSettings,
        plan: Plan,
        max_new_tokens: int,
        forget_after: frozenset[int] = frozenset(),
    ) -> list[Round]:
        retry = Retry(Timeout(), None, "the service")
        limits: Any = {"max_new_tokens": max_new_tokens, "stop_token_ids": (), "met": 8, "on_loss": "wait"}
        pilot = Pilot(prompt, Fixed(plan), retry, Unhurried(), Uncounted(), **limits)
        with self._session() as session:
            courier = partial(FrontCourier, front=self.rows, max_message_bytes=self.max_message_bytes)
            rounds: list[Round] = []
            for step in collaborate(pilot, drafter, session, sampling, (), self.estimates, lambda: 8, courier):
                if isinstance(step, Round):
                    rounds.append(step)
                    if len(rounds) in forget_after:
                        session.release()
            return rounds

    @contextmanager
    def _session(self) -> Iterator[RemoteSession]:
        cloud = Cloud(self.served.service.address, None, Timeout())
        session = RemoteSession(Replicas([cloud]))
        try:
            yield session
        finally:
            session.release()
            cloud.close()


def ids_of(rounds: Sequence[Round]) -> list[int]:
    return [token for round_ in rounds for token in round_.token_ids]


prompts = st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=1, max_size=12)
samplings = st.sampled_from(
    [SamplingSettings(), SamplingSettings(temperature=1.0, seed=3), SamplingSettings(temperature=0.8, top_p=0.9)]
)
wrong_positions = st.frozensets(st.integers(0, 15), max_size=8)


@settings(max_examples=25)
@given(
    st.sampled_from(CUTS), st.sampled_from(["float32", "int8", "int4"]), prompts, samplings, wrong_positions,
    st.integers(0, 4), st.integers(1, 3), st.frozensets(st.integers(1, 8), max_size=2),
)  # fmt: skip
def test_the_text_is_the_split_targets(
    served: Served, cut: int, codec: str, prompt: list[int], sampling: SamplingSettings, wrong: frozenset[int],
    num_draft_tokens: int, max_in_flight: int, forget_after: frozenset[int],
) -> None:  # fmt: skip
    expected = SplitTarget(served.folder, cut, codec).decode(prompt, 12, sampling)
    drafter = GuessingDrafter(expected.token_ids, len(prompt), wrong)
    plan = Plan("split", num_draft_tokens, max_in_flight)
    rounds = Flight(served, cut, codec).run(prompt, drafter, sampling, plan, 12, forget_after)
    assert expected.agrees_with(ids_of(rounds))
    assert {round_.mode for round_ in rounds if round_.token_ids} == {"split"}


def test_a_context_too_long_for_a_message_goes_up_in_parts_and_all_of_it_is_counted(served: Served) -> None:
    prompt = [3 + i % 30 for i in range(200)]
    expected = SplitTarget(served.folder, 2, "int8").decode(prompt, 6, SamplingSettings())
    drafter = GuessingDrafter(expected.token_ids, len(prompt), frozenset({2}))
    flight = Flight(served, 2, "int8", max_message_bytes=4096 + 1000)
    rounds = flight.run(prompt, drafter, SamplingSettings(), Plan("split", 3), 6)
    assert expected.agrees_with(ids_of(rounds))
    assert rounds[0].cost.uplink_bytes > 200 * 32
    assert rounds[0].cost.target_passes > 1.5


def test_every_token_goes_through_the_front_once(served: Served) -> None:
    prompt = [5, 6, 7, 8]
    expected = SplitTarget(served.folder, 1, "int8").decode(prompt, 12, SamplingSettings())
    flight = Flight(served, 1, "int8")
    flight.run(prompt, GuessingDrafter(expected.token_ids, len(prompt), frozenset()), SamplingSettings(), Plan("split", 3, 1), 12)
    assert flight.front.num_computed <= len(prompt) + 12


def test_a_wrong_guess_of_the_bonus_token_costs_no_pass(served: Served) -> None:
    prompt = [9, 10, 11]
    expected = SplitTarget(served.folder, 2, "float32").decode(prompt, 16, SamplingSettings())
    drafter = GuessingDrafter(expected.token_ids, len(prompt), frozenset(range(3, 16, 3)))
    target = served.service.engine._model
    with patch.object(target, "forward", wraps=target.forward) as forward:
        rounds = Flight(served, 2, "float32").run(prompt, drafter, SamplingSettings(), Plan("split", 2, 3), 16)
    assert expected.agrees_with(ids_of(rounds))
    assert forward.call_count == sum(bool(round_.token_ids) for round_ in rounds)


def test_no_prompt_id_is_on_the_wire(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the service is asked in mode split, no field of it but draft_ids holds ids."""
    from edgecloud.edge.tail import TailSession

    asked: list[Any] = []
    send = TailSession.tail_future
    monkeypatch.setattr(TailSession, "tail_future", lambda self, request: asked.append(request) or send(self, request))
    prompt = [20, 21, 22, 23, 24]
    expected = SplitTarget(served.folder, 2, "int8").decode(prompt, 8, SamplingSettings())
    drafter = GuessingDrafter(expected.token_ids, len(prompt), frozenset({1, 4}))
    Flight(served, 2, "int8").run(prompt, drafter, SamplingSettings(), Plan("split", 3), 8)
    assert asked
    guessed = {drafter.draft(prompt + expected.token_ids[:i], 1, SamplingSettings(), ())[0] for i in range(9)}
    for request in asked:
        assert set(request.draft_ids) <= guessed
        assert {field.name for field, _ in request.ListFields()} <= {
            "session_id", "context_start", "rows", "draft_ids", "sampling", "context_hash", "cut", "codec", "assumed_id",
        }  # fmt: skip


class ShakyHead:
    """An exit head of random weights: as good as a guess, and sometimes right."""

    entries = all_entries(VOCAB_SIZE)

    def __init__(self, seed: int) -> None:
        self._weights = np.random.default_rng(seed).normal(size=(32, VOCAB_SIZE)).astype(np.float32)

    def logits(self, row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = row @ self._weights
        return logits


@settings(max_examples=15)
@given(
    st.sampled_from(CUTS), st.sampled_from(["float32", "int8"]), prompts, samplings, st.integers(1, 4), st.integers(1, 3),
    st.frozensets(st.integers(1, 8), max_size=2), st.integers(0, 9),
)  # fmt: skip
def test_the_text_is_the_same_when_the_front_drafts(
    served: Served, cut: int, codec: str, prompt: list[int], sampling: SamplingSettings, num_draft_tokens: int, max_in_flight: int,
    forget_after: frozenset[int], seed: int,
) -> None:  # fmt: skip
    expected = SplitTarget(served.folder, cut, codec).decode(prompt, 12, sampling)
    flight = Flight(served, cut, codec)
    drafter = FrontDrafter(flight.rows, lambda: ShakyHead(seed))  # type: ignore[arg-type,return-value]
    rounds = flight.run(prompt, drafter, sampling, Plan("split", num_draft_tokens, max_in_flight), 12, forget_after)
    assert expected.agrees_with(ids_of(rounds))


# The real thing: a bundle with a quantized front, through processes


@pytest.fixture(scope="module", params=["the draft model", "the exit head"])
def pair(request: pytest.FixtureRequest, tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Whoever drafts."""
    if request.param == "the exit head":
        return tiny_pair
    plain = copy_of(tiny_pair.bundle, tmp_path_factory.mktemp("plain") / "bundle")
    edit_manifest(plain, lambda content: content["front"].update(exit_head=None))
    return Pair(plain, tiny_pair.target)


def split_target_of(pair: Pair) -> SplitTarget:
    bundle = Bundle.open(pair.bundle)
    front = bundle.front
    assert front is not None
    return SplitTarget(pair.target, front.cut, front.codec, FrontModel(bundle.file(front.model), 512, 1))


@pytest.mark.parametrize("num_draft_tokens", [1, 4])
def test_a_bundles_split_is_its_front_codec_and_tail(pair: Pair, tiny_server: Server, num_draft_tokens: int) -> None:
    with Client(pair.bundle, tiny_server.address, num_draft_tokens=num_draft_tokens) as client:
        prompt = client.tokenizer.encode_chat([{"role": "user", "content": "What does a cut cost?"}])
        sampling = SamplingSettings(temperature=1.0, seed=11)
        expected = split_target_of(pair).decode(prompt, 24, sampling, client.bundle.tokenizer.eos_token_ids)
        reply = client.generate("What does a cut cost?", mode="split", max_new_tokens=24, temperature=1.0, seed=11)
    assert expected.agrees_with(reply.token_ids)
    assert {span.mode for span in reply.mode_timeline} == {"split"}
    assert reply.metrics.num_unverified_tokens == 0


def test_a_conversation_goes_on_in_mode_split_and_in_others(pair: Pair, tiny_server: Server) -> None:
    with Client(pair.bundle, tiny_server.address) as client, client.session() as chat:
        for mode in ("split", "cloud", "split"):
            prompt = chat._turn_tokens({"role": "user", "content": "And then?"})
            target = split_target_of(pair) if mode == "split" else pair.plain
            expected = target.decode(prompt, 12, SamplingSettings(), client.bundle.tokenizer.eos_token_ids)
            assert expected.agrees_with(chat.generate("And then?", mode=mode, max_new_tokens=12).token_ids)  # type: ignore[arg-type]


def test_a_server_killed_in_mode_split_changes_nothing(tiny_pair: Pair) -> None:
    sampling = SamplingSettings(temperature=1.0, seed=5)
    with serving(tiny_pair.bundle) as server, Client(tiny_pair.bundle, server.address) as client:
        prompt = client.tokenizer.encode_chat([{"role": "user", "content": "Keep going."}])
        expected = split_target_of(tiny_pair).decode(prompt, 40, sampling, client.bundle.tokenizer.eos_token_ids)
        assert len(expected.token_ids) > 20
        stream = client.stream("Keep going.", mode="split", max_new_tokens=40, temperature=1.0, seed=5)
        next(stream)
        server.kill()
        restart = threading.Thread(target=server.restart)
        restart.start()
        reply = stream.finish()
        restart.join()
        assert expected.agrees_with(reply.token_ids)


def test_with_an_exit_head_no_draft_model_is_loaded(tiny_pair: Pair, tiny_server: Server) -> None:
    with Client(tiny_pair.bundle, tiny_server.address) as client:
        with patch("edgecloud.edge.model.DraftModel", side_effect=AssertionError("the draft model was loaded")):
            reply = client.generate("Hello", mode="split", max_new_tokens=12)
        assert reply.metrics.num_draft_tokens > 0
        assert client.estimates.device.step_ms is None  # of the draft model, which `auto` goes by
        assert client.generate("Hello", mode="edge", max_new_tokens=2).token_ids


def test_what_mode_split_cannot_do_is_said(tiny_pair: Pair, tiny_server: Server, tmp_path: Path) -> None:
    with Client(tiny_pair.bundle, tiny_server.address) as client:
        with pytest.raises(ConfigError, match="repetition_penalty is 1.2; in mode 'split' it takes 1.0"):
            client.generate("Hello", mode="split", repetition_penalty=1.2)
        service = client.describe()
        front = client.bundle.front
        assert front is not None
        with pytest.raises(ModelMismatchError, match="the bundle's front has 1 layers; here can be entered after none"):
            check_tail(front, replace(service, tail_cuts=()), "here")
        with pytest.raises(ModelMismatchError, match="the bundle's front sends int8; here takes float32"):
            check_tail(front, replace(service, boundary_codecs=("float32",)), "here")
    whole = copy_of(tiny_pair.bundle, tmp_path / "whole")
    edit_manifest(whole, lambda content: content.update(front=None, cut_points=[]))
    with (
        Client(whole, tiny_server.address) as client,
        pytest.raises(ConfigError, match="edgecloud partition --cut K"),
    ):
        client.generate("Hello", mode="split")
    with Client(tiny_pair.bundle) as client, pytest.raises(ConfigError, match="mode 'split' needs a cloud"):
        client.generate("Hello", mode="split")
