"""The device's tokenizer is transformers' own, without transformers; and templates are kept on a leash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import Pair
from tiny import CHAT_TEMPLATE, make_tiny_llama
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from edgecloud.edge.tokenizer import ChatTokenizer
from edgecloud.errors import BundleCorruptError, ConfigError

pytest_plugins = ["pairs"]

CONVERSATIONS = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "héllo 🦊 你好\n\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b <|im_end|> "},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ],
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.timeout(1200))])
def both(request: pytest.FixtureRequest, tiny: Path) -> tuple[ChatTokenizer, Any]:
    """Ours and transformers', of the same folder."""
    pair: Pair | None = None if request.param == "tiny" else request.getfixturevalue("smol_pair")
    folder = pair.target if pair else tiny
    theirs = AutoTokenizer.from_pretrained(folder)
    special = {name: str(token) for name, token in theirs.special_tokens_map.items() if isinstance(token, str)}
    return ChatTokenizer(folder / "tokenizer.json", folder / "chat_template.jinja", special), theirs


def made(tiny: Path, tmp_path: Path, template: str) -> ChatTokenizer:
    (tmp_path / "template.jinja").write_text(template)
    return ChatTokenizer(tiny / "tokenizer.json", tmp_path / "template.jinja", {"bos_token": "<|im_start|>"})


# The same as transformers


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["plain", "system", "turns"])
def test_a_conversation_is_encoded_as_by_transformers(both: tuple[ChatTokenizer, Any], messages: list[dict[str, str]]) -> None:
    ours, theirs = both
    assert ours.render(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.encode_chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.render(messages, add_generation_prompt=False) == theirs.apply_chat_template(messages, tokenize=False)


@settings(max_examples=60)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_text_is_encoded_as_by_transformers(both: tuple[ChatTokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.encode_rendered(text) == theirs(text, add_special_tokens=False).input_ids


@settings(max_examples=60)
@given(data=st.data())
def test_ids_are_decoded_as_by_transformers(both: tuple[ChatTokenizer, Any], data: st.DataObject) -> None:
    ours, theirs = both
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
    whole = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.decode(ids) == whole
    stream = ours.stream()
    text = "".join(stream.push(token) for token in ids)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}  # a character that never became complete


def test_the_size_counts_the_added_tokens(both: tuple[ChatTokenizer, Any]) -> None:
    ours, theirs = both
    assert ours.vocab_size == len(theirs)


def test_a_beginning_of_text_is_added_to_raw_text_and_not_to_a_rendered_chat(tiny: Path, tmp_path: Path) -> None:
    backend = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = ChatTokenizer(tmp_path / "tokenizer.json", tiny / "chat_template.jinja", {})
    bare = tokenizer.encode_rendered("hi")
    assert len(bare) == 2
    assert tokenizer.encode("hi") == [1, *bare]
    assert tokenizer.encode_chat(CONVERSATIONS[0]) == tokenizer.encode_rendered(tokenizer.render(CONVERSATIONS[0]))
    assert ChatTokenizer(tmp_path / "tokenizer.json", None, {}).encode_chat([{"role": "user", "content": "hi"}]) == [1, *bare]


# Templates


def test_a_bundle_without_a_template_gives_the_contents(tiny: Path) -> None:
    tokenizer = ChatTokenizer(tiny / "tokenizer.json", None, {})
    assert tokenizer.render(CONVERSATIONS[1]) == "Be brief.héllo 🦊 你好\n\n"
    assert tokenizer.encode_chat(CONVERSATIONS[0]) == tokenizer.encode("Why is the sky blue?")


def test_a_template_has_what_hugging_face_promises_it(tiny: Path, tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index0 > 0 %}{% break %}{% endif %}\n"
        "    {% set x = m | tojson %}\n{{ x }}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    tokenizer = made(tiny, tmp_path, template)
    assert tokenizer.render([{"role": "ü", "content": "<b>"}]) == '<|im_start|>{"role": "ü", "content": "<b>"}4'


def test_what_the_template_itself_refuses_is_passed_on(tiny: Path, tmp_path: Path) -> None:
    tokenizer = made(tiny, tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="roles must alternate"):
        tokenizer.encode_chat(CONVERSATIONS[0])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ ''['__class__'].__base__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ messages[0].missing.attribute }}",
        "{{ '%d' | format('x') }}",
        "{{ int('x') }}",
        "{% include 'other' %}",
        "{% import '/etc/passwd' as x %}",
    ],
)
def test_a_template_that_reaches_out_or_breaks_is_refused_typed(tiny: Path, tmp_path: Path, template: str) -> None:
    tokenizer = made(tiny, tmp_path, template)
    with pytest.raises(ConfigError, match="chat template refuses"):
        tokenizer.encode_chat(CONVERSATIONS[0])


def test_a_template_cannot_change_the_callers_messages(tiny: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}]
    tokenizer = made(tiny, tmp_path, "{% set m = messages[0] %}{{ m.content }}")
    assert tokenizer.render(messages) == "a"
    assert messages == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("content", [b"{% if %}", b"{{ unclosed", b"\xff\xfe\x00", b"{% nosuchtag %}"])
def test_a_broken_template_file_is_named(tiny: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "template.jinja"
    path.write_bytes(content)
    with pytest.raises(BundleCorruptError, match=r"template\.jinja is no chat template"):
        ChatTokenizer(tiny / "tokenizer.json", path, {})


def test_missing_and_broken_files_are_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleCorruptError, match="none"):
        ChatTokenizer(tiny / "tokenizer.json", tmp_path / "none.jinja", {})
    for content in ("", "{}", '{"model": 3}', "not json"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(BundleCorruptError, match=r"tokenizer\.json is no tokenizer"):
            ChatTokenizer(tmp_path / "tokenizer.json", None, {})
    with pytest.raises(BundleCorruptError, match="nowhere"):
        ChatTokenizer(tmp_path / "nowhere.json", None, {})


def test_the_tiny_template_is_chatml(tiny: Path, tmp_path: Path) -> None:
    rendered = made(tiny, tmp_path, CHAT_TEMPLATE).render(CONVERSATIONS[0])
    assert rendered == "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_text_that_is_no_unicode_is_refused(tiny: Path, text: str) -> None:
    tokenizer = ChatTokenizer(tiny / "tokenizer.json", None, {})
    for encode in (tokenizer.encode, tokenizer.encode_rendered):
        with pytest.raises(ConfigError, match="no valid Unicode"):
            encode(text)
