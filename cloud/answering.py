"""The target's answers to many prompts, through the engine: dozens of sessions share each pass over the weights."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from edgecloud.answers import Answer, Question
from edgecloud.cloud.engine import Engine
from edgecloud.cloud.work import Answer as EngineAnswer
from edgecloud.cloud.work import Extend, Extended
from edgecloud.errors import CloudError
from edgecloud.sampling import SamplingSettings

logger = logging.getLogger(__name__)

AT_ONCE = 48  # sessions: passes of so many rows come near the most tokens a second that a CPU makes
TOP_P = 0.95  # of what is sampled
MAX_ASKED_TOKENS = 120  # that the target asks itself with; longer questions are dropped


@dataclass(slots=True)
class _Exchange:
    question: Question
    asks: bool  # the target is making up the question
    prompt_ids: list[int]
    heard: list[EngineAnswer] = field(default_factory=list)


class Answerer:
    """Drives an engine of its own.

    Args:
        engine: nobody else uses it.
        stop_token_ids: ends of an answer.
        max_new_tokens: its longest.
        at_once: sessions at a time.
    """

    def __init__(self, engine: Engine, stop_token_ids: Collection[int], max_new_tokens: int, at_once: int = AT_ONCE) -> None:
        self._engine = engine
        self._stops = frozenset(stop_token_ids)
        self._max_new_tokens = max_new_tokens
        self._at_once = at_once
        self._num_sent = 0

    def answers(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """In the order in which they are finished. A question that the target made up without an end is dropped.

        Raises:
            CloudError: the engine refuses or fails.
        """
        waiting = iter(questions)
        under_way: dict[bytes, _Exchange] = {}
        while True:
            while len(under_way) < self._at_once and (question := next(waiting, None)) is not None:
                exchange = _Exchange(question, question.closing_ids is not None, question.prompt_ids)
                under_way[self._start(exchange)] = exchange
            if not under_way:
                return
            self._engine.step()
            for session_id, exchange in list(under_way.items()):
                if not exchange.heard or not _is_last(exchange.heard[-1]):
                    continue
                del under_way[session_id]
                self._engine.release(session_id)
                ids = [answer.next_token_id for answer in exchange.heard if isinstance(answer, Extended)]
                question = exchange.question
                if not exchange.asks:
                    yield Answer(question.key, exchange.prompt_ids, ids, question.temperature)
                elif question.closing_ids is not None and ids[-1] in self._stops and len(ids) > 1:
                    prompt = exchange.prompt_ids + ids + question.closing_ids
                    follow_up = _Exchange(question, False, prompt)
                    under_way[self._start(follow_up)] = follow_up

    def _start(self, exchange: _Exchange) -> bytes:
        question = exchange.question
        temperature = 1.0 if exchange.asks else question.temperature
        sampling = SamplingSettings(temperature=temperature, top_p=TOP_P if temperature else 1.0, seed=question.seed)
        most = MAX_ASKED_TOKENS if exchange.asks else self._max_new_tokens
        self._num_sent += 1
        session_id = self._num_sent.to_bytes(16, "big")
        request = Extend(session_id, 0, tuple(exchange.prompt_ids), 0, sampling, (), most, self._stops)
        self._engine.submit(self._num_sent, request, exchange.heard.append)
        return session_id


def _is_last(answer: EngineAnswer) -> bool:
    if not isinstance(answer, Extended):
        raise CloudError(f"the target cannot answer: {answer}")
    return answer.last
