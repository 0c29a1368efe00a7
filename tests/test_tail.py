"""Rows that enter at a layer: choices are the whole model's, in one pass with anybody, and no layer before is computed for them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import TIE, PlainTarget, plain_choice, plain_target
from test_architectures import save_random
from tiny import make_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from edgecloud.cloud.attention import KVPool, PagedBatch, Rows, pack
from edgecloud.cloud.engine import Engine
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.pages import PagePool, PageTable
from edgecloud.cloud.work import Answer, Boundary, Extend, Extended, Invalid, Overloaded, Refused
from edgecloud.kernels import codec
from edgecloud.rpc.codec import context_hash, row_keys, row_keys_hash
from edgecloud.sampling import SamplingSettings

VOCAB_SIZE, WIDTH, NUM_LAYERS = 40, 32, 4
CUTS = range(1, NUM_LAYERS)
GREEDY = SamplingSettings()
SAMPLED = SamplingSettings(temperature=1.0, top_p=0.9, seed=11)
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen3", {}),  # layers that are no plain functions
    ("mistral", {"sliding_window": 16}),
    ("gemma2", {"sliding_window": 8}),  # scales what it embeds; windowed and full layers in turn
    ("gpt_neox", {}),  # norms with means, parallel blocks
    ("cohere", {}),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """More would only wait for each other over models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The model


def text(length: int, salt: int = 0) -> list[int]:
    return [(7 * i + 13 * salt + 3) % VOCAB_SIZE for i in range(length)]


@pytest.mark.parametrize(("kind", "extra"), KINDS)
def test_every_cut_gives_the_stock_models_logits_in_one_pass_with_ids(kind: str, extra: dict[str, Any], tmp_path: Path) -> None:
    folder = save_random(tmp_path, kind, **{"num_hidden_layers": NUM_LAYERS, **extra})
    target = TargetModel(folder)
    assert target.tail_cuts == tuple(CUTS)
    stock = PlainTarget(folder)
    texts = [text(21, salt) for salt in range(NUM_LAYERS)]
    taken = [torch.from_numpy(stock.hidden(ids)[cut]) for cut, ids in enumerate(texts)]
    pages, pool = PagePool(32, 4), KVPool(128)
    tables = [PageTable(pages) for _ in texts]
    got: list[list[Tensor]] = [[] for _ in texts]
    for start, stop in ((0, 9), (9, 10), (10, 21)):
        parts = []
        for cut, table in enumerate(tables):
            table.reserve(stop)
            hidden = taken[cut][start:stop] if cut else None
            parts.append(Rows(table, start, texts[cut][start:stop] if not cut else [0] * (stop - start), stop - start, cut, hidden))
        for logits, chunk in zip(got, target.forward(pack(parts, pool, target.device)).split(stop - start), strict=True):
            logits.append(chunk)
    for ids, logits in zip(texts, got, strict=True):
        np.testing.assert_allclose(torch.cat(logits).numpy(), stock.logits(ids), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "num_layers": NUM_LAYERS}
    return make_tiny_llama(tmp_path_factory.mktemp("tail") / "m", **sizes, scale=0.6)


@pytest.fixture(scope="module")
def target(folder: Path) -> TargetModel:
    return TargetModel(folder)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def bitwise(request: pytest.FixtureRequest, folder: Path) -> TargetModel:
    return TargetModel(folder, request.param, exact="bitwise")


def logits_of(target: TargetModel, sessions: Sequence[tuple[list[int], Tensor | None, int]]) -> list[Tensor]:
    """Of sessions (ids, rows, layer that they enter at) in one pass, after every token.  -> [tokens, vocab] each"""
    pages = PagePool(200, 1)
    parts = [Rows(PageTable(pages), 0, ids, len(ids), layer, rows) for ids, rows, layer in sessions]
    for part in parts:
        part.table.reserve(len(part.ids))
    logits = target.forward(pack(parts, KVPool(200), target.device))
    return list(logits.split([len(ids) for ids, _, _ in sessions]))


def taken_by(target: TargetModel, ids: list[int]) -> list[Tensor]:
    """What each layer takes of these ids."""
    with target._stages.recorded() as taken:
        logits_of(target, [(ids, None, 0)])
    return [hidden[0, : len(ids)].float() for hidden in taken]


texts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=24)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, NUM_LAYERS - 1), texts), min_size=1, max_size=6))
def test_a_row_has_the_same_bits_wherever_it_enters_and_whoever_shares_its_pass(
    bitwise: TargetModel, sessions: list[tuple[int, list[int]]]
) -> None:
    assert (bitwise.exact, bitwise.tail_cuts) == ("bitwise", tuple(CUTS))
    sessions = sorted(sessions)
    together = logits_of(bitwise, [(ids, taken_by(bitwise, ids)[cut] if cut else None, cut) for cut, ids in sessions])
    for (_, ids), logits in zip(sessions, together, strict=True):
        assert torch.equal(logits, logits_of(bitwise, [(ids, None, 0)])[0])


@pytest.mark.parametrize("cut", CUTS)
def test_layers_before_the_cut_are_not_computed_and_others_are_as_they_were(target: TargetModel, cut: int) -> None:
    layers = target._stages._layers
    before = [vars(layer)["forward"] for layer in layers]
    pages, pool = PagePool(20, 1), KVPool(20)
    table = PageTable(pages)
    table.reserve(5)
    target.forward(pack([Rows(table, 0, [0] * 5, 1, cut, torch.zeros(5, WIDTH))], pool, target.device))
    assert set(pool._layers) == set(range(cut, NUM_LAYERS))
    assert [vars(layer)["forward"] for layer in layers] == before
    with pytest.raises(RuntimeError):
        target.forward(pack([Rows(table, 0, [0] * 5, 1, cut, torch.zeros(5, WIDTH + 1))], pool, target.device))
    assert [vars(layer)["forward"] for layer in layers] == before


def test_a_model_that_calls_its_layers_in_another_way_is_served_without_tails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert TargetModel(save_random(tmp_path / "m", "gpt2")).tail_cuts == ()
    assert "m: no tails here, for TypeError" in caplog.text


def remembering(forward: Any) -> Any:
    """Later layers look back at what the first one took, as some architectures do."""
    first: list[Tensor] = []

    def look_back(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.self_attn.layer_idx == 0:
            first[:] = [hidden_states.clone()]
        out: Tensor = forward(self, hidden_states, **kwargs)
        return out if self.self_attn.layer_idx == 0 else out + 0.5 * first[0][:, : out.shape[1]]

    return look_back


def squaring(forward: Any) -> Any:
    """Large values come back larger."""

    def square(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = forward(self, hidden_states, **kwargs)
        return torch.where(out.abs() > 1e5, out * out.abs(), out)

    return square


@pytest.mark.parametrize(("otherwise", "words"), [(remembering, "logits are others where rows enter"), (squaring, "overflow")])
def test_a_layer_that_rows_cannot_enter_at_is_found_by_trial(
    otherwise: Any, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", otherwise(modeling_llama.LlamaDecoderLayer.forward))
    assert TargetModel(folder).tail_cuts == ()
    assert words in caplog.text


# The engine


class Front:
    """A device that runs the first layers: what it sends for which tokens, and what the target then chooses."""

    def __init__(self, folder: Path, cut: int, name: str = "float32") -> None:
        self.plain, self.cut, self.codec = plain_target(folder), cut, name
        self.row_bytes = codec.row_bytes(name, WIDTH)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._row = cache(lambda tokens: self.plain.hidden(tokens)[cut][-1])
        self._choice = cache(lambda tokens, sampling: plain_choice(self.logits(tokens), tokens, sampling))

    def rows(self, tokens: Sequence[int]) -> bytes:
        """Each as if nothing came behind it: a row is a function of the tokens up to its own."""
        each = [self._row(tuple(tokens[: i + 1])) for i in range(len(tokens))]
        return codec.encode(np.array(each, np.float32).reshape(-1, WIDTH), self.codec).tobytes()

    def keys(self, tokens: Sequence[int]) -> list[int]:
        return row_keys(self.rows(tokens), self.row_bytes, self.cut, self.codec)

    def extend(self, session_id: bytes, tokens: Sequence[int], start: int = 0, draft: Sequence[int] = (), **options: Any) -> Extend:
        """A request that sends the rows from `start` on."""
        rows = self.rows([*tokens, *draft])[start * self.row_bytes :]
        boundary = Boundary(self.cut, self.codec, self.row_bytes, rows)
        hashed = row_keys_hash(self.keys(tokens[:start]))
        options = {"sampling": GREEDY, **options}
        return Extend(session_id, start, (), hashed, draft_ids=tuple(draft), boundary=boundary, **options)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Of the split target after the last token: the stock model, whose layer `cut` takes the decoded rows."""
        data = np.frombuffer(self.rows(tokens), np.uint8).reshape(-1, self.row_bytes)
        rows = torch.from_numpy(codec.decode(data, self.codec, WIDTH))[None]
        layer = self._model.model.layers[self.cut]
        hook = layer.register_forward_pre_hook(lambda _, given: (rows, *given[1:]))
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = self._model(torch.tensor([list(tokens)])).logits[0, -1].numpy()
        hook.remove()
        return logits

    def continuation(self, tokens: Sequence[int], length: int, sampling: SamplingSettings = GREEDY) -> list[int]:
        """What the split target says next, token by token."""
        told: list[int] = []
        for _ in range(length):
            token, margin = self._choice((*tokens, *told), sampling)
            assert margin > TIE, "no example: the target's own choice hangs by a hair"
            told.append(token)
        return told


front_of = cache(Front)


class Driver:
    """An engine, and what was computed in its passes."""

    def __init__(self, target: TargetModel, room_tokens: int = 128, **options: Any) -> None:
        cache_bytes = room_tokens * target.bytes_per_token
        self.engine = Engine(target, **{"page_size": 4, "fewest_shared": 0, **options}, cache_bytes=cache_bytes)
        self.num_rows: list[int] = []  # of each pass
        forward = target.forward
        self._target, self._forward = target, forward

    def answer(self, *requests: Extend) -> list[Answer]:
        """All in the same passes.  -> the last answer of each"""
        answers: list[list[Answer]] = [[] for _ in requests]

        def watched(batch: PagedBatch) -> Tensor:
            self.num_rows.append(len(batch.slots))
            return self._forward(batch)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(self._target, "forward", watched)
            for number, request in enumerate(requests):
                self.engine.submit(number, request, answers[number].append)
            while self.engine.has_work:
                self.engine.step()
        return [each[-1] for each in answers]

    def verdict(self, request: Extend) -> tuple[int, int, int]:
        [answer] = self.answer(request)
        assert isinstance(answer, Extended), answer
        return answer.num_accepted, answer.next_token_id, answer.cached_length


PROMPT = text(11)


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("cut", CUTS)
def test_verdicts_are_the_split_targets_under_every_accept_pattern(target: TargetModel, folder: Path, cut: int, name: str) -> None:
    """And after each, what was rejected is forgotten: the next draft is judged as it should be."""
    front, driver = front_of(folder, cut, name), Driver(target, room_tokens=400)
    right = front.continuation(PROMPT, 6)
    if name == "float32":
        assert front.plain.decode(PROMPT, 6).agrees_with(right)
    for pattern in product([True, False], repeat=3):
        session_id = os.urandom(16)
        draft = [token if good else (token + 1) % VOCAB_SIZE for token, good in zip(right, pattern, strict=False)]
        accepted = ([*pattern, False]).index(False)
        assert driver.verdict(front.extend(session_id, PROMPT, draft=draft)) == (accepted, right[accepted], 11 + accepted)
        tokens, known = [*PROMPT, *right[: accepted + 1]], 11 + accepted
        rest = right[accepted + 1 : accepted + 3]
        for _ in range(2):  # the same call twice
            told = driver.verdict(front.extend(session_id, tokens, known, draft=rest))
            assert told == (len(rest), front.continuation(tokens, 3)[len(rest)], known + 1 + len(rest))


def test_a_tail_is_sampled_with_the_noise_of_its_place(target: TargetModel, folder: Path) -> None:
    front, driver, session_id = front_of(folder, 2), Driver(target), os.urandom(16)
    plain = front.plain.decode(PROMPT, 8, SAMPLED)
    assert min(plain.margins) > TIE
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + 7:
        ahead = plain.token_ids[len(tokens) - len(PROMPT) :][:2]
        known = 0 if tokens == PROMPT else len(tokens) - 1
        accepted, token, _ = driver.verdict(front.extend(session_id, tokens, known, draft=ahead[:1], sampling=SAMPLED))
        assert (accepted, token) == (1, ahead[1])
        tokens += [*ahead[:1], token]


def test_ids_and_tails_of_several_cuts_share_a_pass(target: TargetModel, folder: Path) -> None:
    driver = Driver(target, room_tokens=400)
    tails = [front_of(folder, cut, name) for cut in (3, 1, 2) for name in ("float32", "int8")]
    prompts = [text(5 + i, i) for i in range(len(tails))]
    ids = Extend(os.urandom(16), 0, tuple(PROMPT), 0, GREEDY)
    requests = [front.extend(os.urandom(16), prompt) for front, prompt in zip(tails, prompts, strict=True)]
    *told, of_ids = driver.answer(*requests, ids)
    assert len(driver.num_rows) == 1
    expected = [front.continuation(prompt, 1)[0] for front, prompt in zip(tails, prompts, strict=True)]
    assert [answer.next_token_id for answer in told if isinstance(answer, Extended)] == expected
    assert isinstance(of_ids, Extended)
    assert of_ids.next_token_id == tails[0].plain.decode(PROMPT, 1).token_ids[0]


def test_an_evicted_session_is_rebuilt_from_the_rows_it_was_told(target: TargetModel, folder: Path) -> None:
    front, driver, session_id = front_of(folder, 2), Driver(target, room_tokens=20), os.urandom(16)
    right = front.continuation(PROMPT, 3)
    driver.verdict(front.extend(session_id, PROMPT))
    driver.answer(Extend(os.urandom(16), 0, tuple(text(18, 1)), 0, GREEDY))  # needs every page
    assert driver.verdict(front.extend(session_id, [*PROMPT, right[0]], 11, right[1:2])) == (1, right[2], 13)
    assert driver.num_rows == [11, 18, 13]


def test_what_another_tail_of_the_same_cut_and_codec_has_read_is_not_read_again(target: TargetModel, folder: Path) -> None:
    front, driver = front_of(folder, 2), Driver(target)
    for other, num_rows in ((front, 11), (front, 3), (front_of(folder, 1), 11), (front_of(folder, 2, "float16"), 11)):
        told = driver.verdict(other.extend(os.urandom(16), PROMPT))
        assert told[1:] == (other.continuation(PROMPT, 1)[0], 11)
        assert driver.num_rows[-1] == num_rows
    driver.answer(Extend(os.urandom(16), 0, tuple(PROMPT), 0, GREEDY))
    assert driver.num_rows[-1] == 11


def test_the_same_bytes_at_another_cut_are_other_rows(target: TargetModel, folder: Path) -> None:
    driver, rows = Driver(target), front_of(folder, 1).rows(PROMPT)
    told = []
    for cut in (1, 2, 1):
        boundary = Boundary(cut, "float32", 4 * WIDTH, rows)
        told.append(driver.verdict(Extend(os.urandom(16), 0, (), 0, SamplingSettings(1.0, seed=1), boundary=boundary)))
    assert driver.num_rows == [11, 11, 3]
    assert told[0] == told[2]


def test_a_session_begins_anew_when_it_is_told_otherwise(target: TargetModel, folder: Path) -> None:
    driver, session_id = Driver(target), os.urandom(16)
    fronts = [front_of(folder, 2), front_of(folder, 1), front_of(folder, 1, "int8")]
    whole = Extend(session_id, 0, tuple(PROMPT), 0, GREEDY)
    first = driver.verdict(whole)
    for front in fronts:
        longer = [*PROMPT, front.continuation(PROMPT, 1)[0]]
        assert driver.answer(front.extend(session_id, longer, 11)) == [Refused(0)]
        assert driver.verdict(front.extend(session_id, PROMPT)) == (0, longer[-1], 11)
        assert driver.verdict(front.extend(session_id, longer, 11))[2] == 12
        late = Extend(session_id, 5, tuple(PROMPT[5:]), context_hash(PROMPT[:5]), GREEDY)
        assert driver.answer(late) == [Refused(0)]
    assert driver.verdict(whole) == first
    assert not driver.engine._sessions.get(session_id).rows  # type: ignore[union-attr]


def test_rows_of_another_past_are_refused(target: TargetModel, folder: Path) -> None:
    front, driver, session_id = front_of(folder, 1), Driver(target), os.urandom(16)
    driver.verdict(front.extend(session_id, PROMPT))
    assert driver.answer(front.extend(session_id, [*PROMPT[:-1], 1, 2], 11)) == [Refused(0)]
    assert driver.answer(front.extend(session_id, [*PROMPT, 1, 2], 12)) == [Refused(11)]
    assert driver.answer(front.extend(os.urandom(16), PROMPT, 3)) == [Refused(0)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**25])
def test_rows_that_are_no_residual_stream_are_refused_and_change_nothing(target: TargetModel, folder: Path, value: float) -> None:
    front, driver, session_id = front_of(folder, 1), Driver(target), os.urandom(16)
    right = front.continuation(PROMPT, 2)
    driver.verdict(front.extend(session_id, PROMPT))
    rows = np.zeros((3, WIDTH), "<f4")
    rows[1, 7] = value
    hashed = row_keys_hash(front.keys(PROMPT))
    broken = Extend(session_id, 11, (), hashed, GREEDY, boundary=Boundary(1, "float32", front.row_bytes, rows.tobytes()))
    [answer] = driver.answer(broken)
    assert isinstance(answer, Invalid)
    assert "row 1 holds a value that is not finite or is beyond 1.67772e+07" in answer.reason
    assert driver.verdict(front.extend(session_id, [*PROMPT, right[0]], 11)) == (0, right[1], 12)


def test_rows_as_large_as_may_be_leave_nothing_behind_that_harms_others(target: TargetModel, folder: Path) -> None:
    front, driver = front_of(folder, 1), Driver(target, room_tokens=24)
    rows = np.where(np.random.default_rng(0).random((20, WIDTH)) < 0.5, -(2.0**24), 2.0**24).astype("<f4")
    for cut in CUTS:
        session_id = os.urandom(16)
        loud = Boundary(cut, "float32", front.row_bytes, rows.tobytes())
        [answer] = driver.answer(Extend(session_id, 0, (), 0, GREEDY, boundary=loud))
        assert isinstance(answer, Extended)
        driver.engine.release(session_id)
        quiet = Extend(os.urandom(16), 0, tuple(PROMPT), 0, GREEDY)
        assert driver.verdict(quiet)[1] == front.plain.decode(PROMPT, 1).token_ids[0]


def test_rows_of_idle_sessions_make_room_and_those_of_busy_ones_do_not(target: TargetModel, folder: Path) -> None:
    front, driver = front_of(folder, 1), Driver(target, room_tokens=64, max_rows=4)
    sessions = driver.engine._sessions
    sessions._max_row_bytes = 30 * front.row_bytes
    ids = [os.urandom(16) for _ in range(3)]
    for session_id in ids:
        driver.verdict(front.extend(session_id, PROMPT))
    assert [sessions.get(session_id) is not None for session_id in ids] == [False, True, True]
    answers = driver.answer(*(front.extend(session_id, PROMPT) for session_id in ids))
    assert [type(answer) for answer in answers] == [Extended, Extended, Overloaded]
    assert driver.verdict(front.extend(ids[2], PROMPT))[2] == 11
    driver.engine.release(ids[2])
    assert sum(len(session.rows) for session in sessions._sessions.values()) <= 11 * front.row_bytes
