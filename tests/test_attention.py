"""Paged attention: torch against the NumPy reference and stock SDPA; the target on the paged path against the stock model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from packed import TOLERANCE, Case, cases, runs_of
from tiny import make_tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from edgecloud.cloud.attention import KVPool, pack
from edgecloud.cloud.batcher import Job, Share
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.pages import PagePool, PageTable
from edgecloud.cloud.sessions import Session
from edgecloud.cloud.work import Extend
from edgecloud.errors import ConfigError, ModelError
from edgecloud.kernels import attention_torch
from edgecloud.kernels.attention import Segment
from edgecloud.sampling import SamplingSettings


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """More would only wait for each other over models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@given(cases(), st.one_of(st.none(), st.integers(1, 45)), st.one_of(st.none(), st.sampled_from([0.5, 5.0, 50.0])))
def test_torch_equals_the_reference(case: Case, sliding_window: int | None, softcap: float | None) -> None:
    expected, got = case.run(sliding_window=sliding_window, softcap=softcap)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("length", [7, 8, 9])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_window_of_eight_begins_to_matter_at_the_ninth_token(length: int, num_rows: int) -> None:
    rng = np.random.default_rng(length)
    query, keys, values = (rng.standard_normal(shape, np.float32) for shape in ((num_rows, 2, 4), (1, 12, 4), (1, 12, 4)))
    case = Case(query, keys, values, [Segment(0, num_rows, length, ((1, 1 + length),))], 0.5)
    expected, got = case.run(sliding_window=8)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert np.array_equal(expected, case.run()[0]) == (length <= 8)


@given(cases())
def test_both_equal_stock_sdpa_of_each_sequence_alone(case: Case) -> None:
    for outputs in case.run():
        for segment in case.segments:
            slots = [slot for first, last in segment.runs for slot in range(first, last)]
            group = case.query.shape[1] // case.keys.shape[0]
            q = torch.from_numpy(case.query[segment.start : segment.stop]).transpose(0, 1)
            k, v = (torch.from_numpy(a[:, slots]).repeat_interleave(group, dim=0) for a in (case.keys, case.values))
            mask = torch.ones(segment.length, segment.length).tril().bool()[-segment.num_rows :]
            stock = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=case.scaling)[0]
            got = outputs[segment.start : segment.stop]
            np.testing.assert_allclose(got, stock.transpose(0, 1).numpy(), rtol=TOLERANCE, atol=TOLERANCE)


@given(cases(), st.integers(1, 30), st.booleans())
def test_a_sequence_gets_the_same_in_company_as_alone(case: Case, sliding_window: int, windowed: bool) -> None:
    options = {"sliding_window": sliding_window if windowed else None}
    _, together = case.run(**options)
    for segment in case.segments:
        rows = slice(segment.start, segment.stop)
        own = Segment(0, segment.num_rows, segment.length, segment.runs)
        _, alone = Case(case.query[rows], case.keys, case.values, [own], case.scaling).run(**options)
        np.testing.assert_array_equal(together[rows], alone)


@given(cases(), st.data())
def test_slots_of_others_and_of_the_future_do_not_matter(case: Case, data: st.DataObject) -> None:
    """Whatever lies in slots that a row may not see: another session's tokens, dropped ones, memory never written."""
    segment = data.draw(st.sampled_from(case.segments))
    slots = [slot for first, last in segment.runs for slot in range(first, last)]
    row = data.draw(st.integers(0, segment.num_rows - 1))
    seen = slots[: segment.length - segment.num_rows + row + 1]
    unseen = np.setdiff1d(np.arange(case.keys.shape[1]), seen)
    _, before = case.run()
    case.keys[:, unseen], case.values[:, unseen] = 1e3, -1e3
    _, after = case.run()
    np.testing.assert_allclose(after[segment.start + row], before[segment.start + row], rtol=TOLERANCE, atol=TOLERANCE)


@given(cases(), st.one_of(st.none(), st.integers(1, 30)))
def test_the_pool_is_only_read(case: Case, sliding_window: int | None) -> None:
    before = case.keys.copy(), case.values.copy()
    case.run(sliding_window=sliding_window)
    np.testing.assert_array_equal(case.keys, before[0])
    np.testing.assert_array_equal(case.values, before[1])


class Allocations(TorchDispatchMode):
    """Notes the largest tensor that any operation makes anew: not a view of what it was given."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given_storages = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given_storages:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(3, 3, 64), (2, 4, 128), (4, 1, 64), (1, 8, 80), (2, 2, 32)])
def test_a_row_attends_with_the_same_bits_alone_and_among_others(
    kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Whatever the rows beside it, the segments of the pass, and the pages: one run of slots, or scattered ones."""
    length, page_size = 1300, 16
    generator = torch.Generator().manual_seed(head_dim + group)
    query = 2 * torch.randn(length, kv_heads * group, head_dim, generator=generator)
    keys, values = torch.zeros(2, kv_heads, 2 * length + 2000, head_dim)
    keys[:, :length], values[:, :length] = torch.randn(2, kv_heads, length, head_dim, generator=generator)
    pages = length + page_size * torch.randperm(-(-length // page_size), generator=generator)
    scattered = (pages[:, None] + torch.arange(page_size)).flatten()[:length]
    for pool in (keys, values):
        pool[:, scattered] = pool[:, :length].clone()
    layouts = [list(range(length)), scattered.tolist()]
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(dtype)

    def attend(rows: list[int], segments: list[Segment]) -> torch.Tensor:
        return attention_torch.ragged_paged_attention(query[rows], keys, values, segments, head_dim**-0.5)

    rng = np.random.default_rng(group)
    for _ in range(20):
        rows: list[int] = []
        segments = []
        for _ in range(rng.integers(1, 4)):
            count = int(rng.choice([1, 1, 2, 3, 5, 9, 16, 33, 100, 129, 300]))
            start = int(rng.integers(0, length - count))
            runs = runs_of(layouts[rng.integers(2)][: start + count])
            segments.append(Segment(len(rows), len(rows) + count, start + count, runs))
            rows += range(start, start + count)
        together = attend(rows, segments)
        for row in {0, len(rows) // 2, len(rows) - 1, *(segment.stop - 1 for segment in segments)}:
            alone = [Segment(0, 1, rows[row] + 1, ((0, rows[row] + 1),))]
            assert torch.equal(together[row], attend([rows[row]], alone)[0])


def largest_allocation(num_rows: int, page_runs: tuple[tuple[int, int], ...]) -> int:
    attention_torch.causal_bias(4, torch.float32, torch.device("cpu"))  # made once in a process
    keys, values = torch.randn(2, 4096, 64), torch.randn(2, 4096, 64)
    length = sum(last - first for first, last in page_runs)
    with Allocations() as allocations:
        segment = Segment(0, num_rows, length, page_runs)
        attention_torch.ragged_paged_attention(torch.randn(num_rows, 8, 64), keys, values, [segment], 0.125)
    return allocations.largest


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize(
    "page_runs", [((0, 512),), ((0, 1500),), ((1024, 1536), (0, 256))], ids=["a tile", "three tiles", "runs of whole tiles"]
)
def test_no_context_is_copied_to_be_read(num_rows: int, page_runs: tuple[tuple[int, int], ...]) -> None:
    one_heads_tile = attention_torch.TILE * 64 * 4  # bytes of its keys
    assert 0 < largest_allocation(num_rows, page_runs) < one_heads_tile / 4


def test_where_runs_meet_inside_a_tile_that_tile_alone_is_put_together() -> None:
    tile = 2 * attention_torch.TILE * 64 * 4  # both heads
    assert largest_allocation(1, ((1024, 1824), (0, 800))) == tile


def test_the_pool_is_allocated_once_and_written_in_place() -> None:
    pool = KVPool(32)
    first = pool.write(0, torch.tensor([3, 4]), torch.ones(2, 2, 4), torch.ones(2, 2, 4))
    pointers = [t.data_ptr() for t in first]
    second = pool.write(0, torch.tensor([9]), torch.full((2, 1, 4), 7.0), torch.full((2, 1, 4), 8.0))
    assert [t.data_ptr() for t in second] == pointers
    assert second[0][:, [3, 4, 9]].tolist() == [[[1.0] * 4] * 2 + [[7.0] * 4]] * 2
    assert second[1][:, 9].tolist() == [[8.0] * 4] * 2
    assert pool.bytes_per_slot == 2 * (2 * 4) * 4


# The target: a stock model, run on packed tokens


class Stock:
    """The same folder as transformers runs it: no cache, one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """After every token.  -> [tokens, vocab]"""
        with torch.inference_mode():
            logits: torch.Tensor = self._model(torch.tensor([tokens]), use_cache=False).logits[0]
        return logits


@dataclass
class Sequences:
    """Sessions on one pool, without an engine: tests decide what is extended, cropped and evicted when."""

    target: TargetModel
    num_pages: int
    page_size: int
    sessions: list[Session] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = PagePool(self.num_pages, self.page_size)
        self.kv = KVPool(self.num_pages * self.page_size)

    def open(self) -> Session:
        self.sessions.append(Session(bytes([len(self.sessions)]) * 16, PageTable(self.pool)))
        return self.sessions[-1]

    def run(self, sessions: list[Session]) -> list[torch.Tensor]:
        """One pass over all tokens that are not cached.  -> logits of each session's new rows"""
        shares = []
        for session in sessions:
            start, stop = session.table.length, len(session.tokens)
            session.table.reserve(stop)
            request = Extend(session.session_id, 0, tuple(session.tokens), 0, SamplingSettings())
            shares.append(Share(Job(request, lambda _: None, lambda: False, 0.0, session), start, stop, start))
        logits = self.target.forward(pack([share.rows for share in shares], self.kv, self.target.device))
        for share in shares:
            share.job.open_session.table.length = share.stop
        return list(logits.split([share.stop - share.start for share in shares]))


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max().item() < 1e-4 * max(1.0, expected.abs().max().item())


@dataclass(frozen=True)
class Target:
    paged: TargetModel
    stock: Stock


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = make_tiny_llama(tmp_path_factory.mktemp("llama") / "m", num_heads=4, num_kv_heads=2, hidden_size=32, vocab_size=64)
    return Target(TargetModel(folder), Stock(folder))


tokens_of = st.lists(st.integers(0, 63), min_size=1, max_size=20)


@settings(max_examples=30)
@given(st.integers(1, 16), st.data())
def test_the_paged_path_equals_the_stock_model_whatever_happened_before(llama: Target, page_size: int, data: st.DataObject) -> None:
    """Packed requests of unlike lengths, extended, cropped, evicted and rebuilt in any order."""
    sequences = Sequences(llama.paged, -(-260 // page_size), page_size)
    for _ in range(data.draw(st.integers(1, 3))):
        sequences.open()
    for _ in range(data.draw(st.integers(1, 4))):
        batch = []
        for session in sequences.sessions:
            action = data.draw(st.sampled_from(["extend", "crop", "evict", "rest"]))
            if action == "crop":
                length = data.draw(st.integers(0, len(session.tokens)))
                session.table.crop_to(length)
                del session.tokens[length:]
            elif action == "evict":
                session.table.release()
            if action != "rest":
                session.tokens += data.draw(tokens_of)
                batch.append(session)
        starts = [session.table.length for session in batch]
        if not batch:
            continue
        for session, start, logits in zip(batch, starts, sequences.run(batch), strict=True):
            assert_close(logits, llama.stock.logits(session.tokens)[start:])


@settings(max_examples=20)
@given(st.integers(1, 16), tokens_of, tokens_of, st.lists(st.integers(1, 8), max_size=6))
def test_a_prompt_in_chunks_equals_the_prompt_at_once(
    llama: Target, page_size: int, prompt: list[int], rest: list[int], chunks: list[int]
) -> None:
    tokens = prompt + rest
    sequences = Sequences(llama.paged, -(-120 // page_size), page_size)
    session, other = sequences.open(), sequences.open()
    got = []
    for chunk in [*chunks, len(tokens)]:
        part = tokens[len(session.tokens) :][:chunk]
        if part:
            session.tokens += part
            other.tokens.append(part[0])  # takes pages in between, so that the context falls into several runs
            got.append(sequences.run([session, other])[0])
    assert_close(torch.cat(got), llama.stock.logits(tokens))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def bitwise(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    folder = make_tiny_llama(
        tmp_path_factory.mktemp("bitwise") / "m",
        num_heads=6, num_kv_heads=2, hidden_size=768, vocab_size=512, max_position_embeddings=2048, scale=0.05,
    )  # fmt: skip
    target = TargetModel(folder, request.param, exact="bitwise")
    assert target.exact == "bitwise"
    return target


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])  # an example takes too long to be made smaller
@given(st.integers(0, 2**32 - 1), st.data())
def test_a_tokens_logits_are_the_same_bits_in_any_company_and_chunk(bitwise: TargetModel, seed: int, data: st.DataObject) -> None:
    """Over contexts of several tiles, whose pages lie scattered because the sessions grow in turns."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 512, data.draw(st.sampled_from([3, 70, 300, 700, 1100]))).tolist() for _ in range(3)]
    alone = []
    for tokens in texts:
        sequences = Sequences(bitwise, 100, 16)
        session = sequences.open()
        session.tokens = tokens
        alone.append(sequences.run([session])[0])
    together = Sequences(bitwise, 210, 16)
    sessions = [together.open() for _ in texts]
    while growing := [i for i, tokens in enumerate(texts) if len(sessions[i].tokens) < len(tokens)]:
        batch = data.draw(st.lists(st.sampled_from(growing), min_size=1, unique=True))
        starts = [len(sessions[i].tokens) for i in batch]
        for i in batch:
            count = data.draw(st.sampled_from([1, 1, 2, 5, 9, 31, 128, 200]))
            sessions[i].tokens += texts[i][len(sessions[i].tokens) :][:count]
        for i, start, logits in zip(batch, starts, together.run([sessions[i] for i in batch]), strict=True):
            assert torch.equal(logits, alone[i][start : start + len(logits)])


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PretrainedConfig], Path]:
    def make(config: PretrainedConfig) -> Path:
        folder = tmp_path_factory.mktemp(config.model_type) / "model"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


def test_an_architecture_that_the_paged_path_cannot_even_run_is_refused(folder_of: Callable[[PretrainedConfig], Path]) -> None:
    """MPT does not call the registered attention and breaks in the middle of its own."""
    folder = folder_of(transformers.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4))
    with pytest.raises(ModelError, match="mpt is not supported as a target") as caught:
        TargetModel(folder)
    assert str(folder) in str(caught.value)


def test_what_cannot_be_exact_to_the_bit_says_so(folder_of: Callable[[PretrainedConfig], Path]) -> None:
    """Scores under a sliding window are written out, by products whose shape follows the context."""
    folder = folder_of(transformers.MistralConfig(**SIZES, sliding_window=8))
    assert TargetModel(folder, "bfloat16").exact == "tolerance"
    with pytest.raises(ConfigError, match="exact is bitwise, which mistral in bfloat16 on cpu is not here; give tolerance"):
        TargetModel(folder, "bfloat16", exact="bitwise")
    with pytest.raises(ConfigError, match="exact is 'bits'; it takes auto, bitwise, tolerance"):
        TargetModel(folder, exact="bits")


def test_float32_is_exact_to_the_bit_where_it_was_asked_for(folder_of: Callable[[PretrainedConfig], Path]) -> None:
    folder = folder_of(transformers.LlamaConfig(**SIZES))
    assert [TargetModel(folder, exact=exact).exact for exact in ("auto", "bitwise", "tolerance")] == [
        "tolerance",
        "bitwise",
        "tolerance",
    ]
    assert TargetModel(folder, "bfloat16").exact == "bitwise"


def test_the_window_ends_where_rope_would_change_for_tokens_that_are_cached(
    folder_of: Callable[[PretrainedConfig], Path],
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 40,
        "factor": 3.2,
    }
    target = TargetModel(folder_of(transformers.LlamaConfig(**SIZES, rope_parameters=rope)))
    assert target.max_context_tokens == 40
