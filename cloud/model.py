"""The target: a stock Hugging Face causal LM, run on packed tokens through the paged cache."""

from __future__ import annotations

import json
import logging
import math
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from edgecloud.cloud.attention import PAGED_ATTENTION, PagedBatch, register, tensor_ids
from edgecloud.cloud.boundary import LARGEST
from edgecloud.cloud.layers import fuse
from edgecloud.cloud.projections import pack, padded_rows
from edgecloud.cloud.stages import Stages
from edgecloud.cloud.tail_trial import why_not_entered
from edgecloud.cloud.trial import Trial
from edgecloud.cloud.weights import check_safetensors
from edgecloud.errors import ConfigError, ModelError
from edgecloud.fingerprint import read_json
from edgecloud.kernels.backend import backend_for

logger = logging.getLogger(__name__)

EXACT = ("auto", "bitwise", "tolerance")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Root mean square of what the paged path's logits differ by from the stock one's, relative to their spread, that is rounding.
PROBE_TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


class TargetModel:
    """Loads a folder and turns packed batches into logits.

    `exact` is "bitwise" when the logits after a token are the same bits whatever shares its pass, whatever the chunks and the
    pages; "tolerance" when they are so but for rounding. "auto" asks for bits, except in float32, where
    single rows would cost 15 % more. `tail_cuts` are the layers, from 1 on, that rows of a pass may enter at: all, or none where
    the architecture does not let them.

    Raises:
        ModelError: no such folder, broken files, or an architecture that the paged path cannot run exactly.
        ConfigError: a device or dtype that cannot be used here; or `exact` is "bitwise", and it is not.
    """

    def __init__(self, folder: Path, dtype: str = "auto", device: str = "cpu", exact: str = "auto") -> None:
        if exact not in EXACT:
            raise ConfigError(f"exact is {exact!r}; it takes {', '.join(EXACT)}")
        self.folder = folder
        self.device = _device(device)
        self._model = _load(folder, _dtype(folder, dtype), self.device)
        self.dtype = next(self._model.parameters()).dtype
        config = self._model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.width: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.max_context_tokens = _window(config)
        self.num_parameters: int = self._model.num_parameters()
        wanted = exact == "bitwise" or (exact == "auto" and self.dtype != torch.float32)
        self._rows_are_independent = pack(self._model, independent_rows=wanted)
        self.exact = "tolerance"
        self._stages = Stages(_decoder_layers(self._model, self.num_layers), self._num_padded)
        self.tail_cuts: tuple[int, ...] = ()
        try:
            self.bytes_per_token = self._probe()
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:  # it would not even run
            raise ModelError(f"{folder}: {config.model_type} is not supported as a target: {error}") from error
        if exact == "bitwise" and self.exact != "bitwise":
            raise ConfigError(
                f"exact is bitwise, which {config.model_type} in {str(self.dtype).removeprefix('torch.')} on {device} is not here; "
                f"give tolerance"
            )

    def forward(self, batch: PagedBatch) -> Tensor:
        """One pass over the weights.  -> [choices, vocab] of the model's dtype"""
        with torch.inference_mode(), self._stages.entered(batch) if batch.entries else nullcontext():
            logits: Tensor = self._model(
                input_ids=self._padded(batch.input_ids),
                position_ids=self._padded(batch.position_ids),
                use_cache=False,
                logits_to_keep=self._padded(batch.logits_rows),
                paged_batch=batch,
            ).logits[0]
        return logits[: len(batch.logits_rows)]

    def _padded(self, rows: Tensor) -> Tensor:
        """Zeros behind the last, up to a number of rows that products are compiled for; attention and cache never see them."""
        num_rows = rows.shape[-1]
        extra = self._num_padded(num_rows) - num_rows
        return F.pad(rows, (0, extra)) if extra else rows

    def _num_padded(self, num_rows: int) -> int:
        return padded_rows(num_rows) if self.device.type == "cpu" else num_rows

    def _probe(self) -> int:
        """Run a few tokens both ways and compare; returns the cache's bytes per token.

        An architecture whose state is not keys and values per position (recurrent layers, shared or cross-layer caches)
        differs here, and is refused rather than served wrongly.
        """
        trial = Trial(self.forward, self.vocab_size, self.device)
        paged = trial.logits((16, 8))
        if trial.pool.num_layers != self.num_layers:  # logits may be alike all the same, while a short context says little
            raise ModelError(
                f"{self.folder}: {trial.pool.num_layers} of {self.num_layers} layers keep their state as keys and values; "
                f"this architecture ({self._model.config.model_type}) is not supported as a target"
            )
        self._model.set_attn_implementation("sdpa" if self._model._supports_sdpa else "eager")
        try:
            with torch.inference_mode():
                stock = self._model(input_ids=tensor_ids(trial.ids, self.device)[None], use_cache=False).logits[0]
        finally:
            self._model.set_attn_implementation(PAGED_ATTENTION)
        spread = stock.float().std().item()
        difference = _distance(paged, stock)
        most = PROBE_TOLERANCE[self.dtype] * max(spread, 1e-3)
        if not math.isfinite(spread) or not difference <= most:
            raise ModelError(
                f"{self.folder}: logits of the paged path differ from the stock model's by {difference:.3g} "
                f"(spread {spread:.3g}); this architecture ({self._model.config.model_type}) is not supported as a target"
            )
        self.num_fused_layers = fuse(self._model, trial.pool.forms, lambda: trial.spread(self.max_context_tokens))
        self.exact = "bitwise" if self._rows_are_independent and trial.is_invariant(paged) else "tolerance"

        def is_right(logits: Tensor) -> bool:
            expected = paged[: len(logits)]
            return torch.equal(logits, expected) if self.exact == "bitwise" else _distance(logits, expected) <= most

        if why := why_not_entered(self.forward, self._stages, trial.ids, is_right, LARGEST[self.dtype], self.device):
            logger.warning("%s: no tails here, for %s", self.folder.name, why)
        else:
            self.tail_cuts = tuple(range(1, self.num_layers))
        return trial.pool.bytes_per_slot


def eos_token_ids(folder: Path) -> list[int]:
    """The ids that end a generation, from generation_config.json, else config.json."""
    try:
        eos = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        eos = read_json(folder / "config.json").get("eos_token_id")
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of the differences."""
    return (a.float() - b.float()).square().mean().sqrt().item()


def _decoder_layers(model: PreTrainedModel, num_layers: int) -> list[nn.Module]:
    """In order; none where they are not one list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
    return list(lists[0]) if len(lists) == 1 else []


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch raises either, by the kind of device
        raise ConfigError(f"device is {name!r}, which torch cannot use here: {error}") from error
    backend_for(device.type)  # says at once what it lacks
    return device


def _dtype(folder: Path, name: str) -> torch.dtype:
    if name == "auto":
        config = read_json(folder / "config.json")
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; it takes auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _window(config: PretrainedConfig) -> int:
    """Longest context in which a position's keys and mask do not depend on how the context goes on.

    Past a length that the probe does not reach, LongRoPE takes other frequencies and chunked attention another mask.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    per_layer = [rope, *(parameters for parameters in rope.values() if isinstance(parameters, dict))]
    limits = [getattr(config, "max_position_embeddings", None), getattr(config, "attention_chunk_size", None)]
    limits += [r.get("original_max_position_embeddings") for r in per_layer if r.get("rope_type") == "longrope"]
    return min((limit for limit in limits if limit), default=2**31 - 1)


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    register()
    check_safetensors(folder)
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=PAGED_ATTENTION,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ModelError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{folder} lacks weights, the first is {missing[0]!r} of {len(missing)}; fetch or copy it again")
    model = model.eval().to(device)
    assert isinstance(model, PreTrainedModel)
    return model
