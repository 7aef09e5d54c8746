"""Every published tokenizer: ids, labels, typed control tokens and BOS, as they are elsewhere and token by token.

One decision: a tokenizer is loaded once for all its tests, which stand side by side here: to load one takes seconds.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pytest

from registry.templates import FOLDER, template_text
from tasks.encoding import Encoder
from tasks.preview import ADDED, TYPED, SeenRow, token_pieces
from tasks.program import ProgramError
from tasks.template import ChatTemplate, Rendered
from tasks.template_files import added_tokens
from tasks.tokens import FASTOKENS, NOT_FAST, TOKENIZERS, Text, TextEncoder
from tests.oracle import ORACLE, conversations, golden_rows, need_oracle, tokenizer_folder
from tests.oracle import TOKENIZERS as OF_GOLDEN
from tests.tasks.test_encoding import control_ids
from tests.tasks.test_preview import CHATS
from tests.tasks.test_tokens import cut_up, rows

GOLDEN = sorted(path.stem for path in (ORACLE / "golden").glob("*.jsonl"))
WITH_GOLDEN = {OF_GOLDEN.get(golden, golden) for golden in GOLDEN}
SHIPPED = sorted(path.name.removesuffix(".jinja") for path in FOLDER.rglob("*.jinja"))
PUBLISHED = sorted(path.name for path in (ORACLE / "tokenizers").glob("*") if path.is_dir())
FAST = frozenset(
    {
        "command-r-plus",
        "glm-4",
        "glm-4.5",
        "gpt-oss",
        "gpt2",
        "llama3",
        "llama3.1",
        "minimax-m1",
        "mistral-nemo",
        "mpt",
        "phi-2",
        "qwen2.5",
        "qwen3",
        "qwen3.5",
        "smollm2",
        "starcoder2",
    }
)
# Tokenizers that the models of a template have, for the count of BOS tokens.
TOKENIZER_OF = {
    "baichuan": "baichuan2",
    "chatml": "yi",
    "cohere": "command-r-plus",
    "deepseek": "deepseek-llm",
    "deepseek3": "deepseek-v2",
    "glm4": "glm-4",
    "glm4-0414": "glm-4",
    "glm4.5": "glm-4.5",
    "mistral-v0.1": "mistral-v1",
    "mistral-v0.2": "mistral-v1",
    "mistral-v0.3": "mistral-v3",
    "phi-3-first": "phi-3",
    "phi-3-medium": "phi-3",
    "qwen1.5": "qwen2.5",
    "qwen2": "qwen2.5",
    "qwen3-nothink": "qwen3",
    "qwq": "qwen3",
    "yi-1.5": "yi",
    "zephyr": "mistral-v1",
    **dict.fromkeys(["alpaca", "default", "empty", "solar", "vicuna", "xverse", "yuan"], "llama2"),
}
NASTY = [
    "",
    " ",
    "\n",
    "\t \n  ",
    "hello  ",
    "  hello",
    "a\n\n\n",
    "e\u0301",
    "é",
    "a\u0308\u0323b",
    "\u1112\u1161\u11ab 한국어",
    "🙂👩‍👩‍👧 🇩🇪",
    "1234567890123456789012345",
    "3.14159 2,000",
    "don't I'LL we've",
    "\u00a0nbsp\u2003em",
    "x" * 300,
    " " * 50 + "x",
    "\u200b\ufeff",
    "\U0010ffff\ue000",
    "ﬁ ligature Ⅷ ①",
    "مرحبا",
    "\r\n\r\n",
    "<|",
    "\x00\x01",
]


TALK = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "Four."}]


class Published:
    """A published tokenizer, loaded once, by the library that does for it."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, tokenizer_folder(name)
        self.control = frozenset(
            token["content"] for token in added_tokens(self.folder / "tokenizer.json") if token["special"]
        )

    @cached_property
    def encoder(self) -> TextEncoder:
        return TextEncoder(self.folder, self.control, FASTOKENS if self.name in FAST else TOKENIZERS)


@pytest.fixture(scope="module", params=PUBLISHED or [None])
def published(request: pytest.FixtureRequest) -> Published:
    need_oracle()
    return Published(request.param)


def texts_for(folder: Path) -> list[Text]:
    """Nasty strings, conversations, and added tokens in the middle of things."""
    said = ["\n".join(str(m.get("content") or "") for m in row["messages"]) for row in conversations().values()]
    added = [token["content"] for token in added_tokens(folder / "tokenizer.json")]
    around = [form.format(t) for t in (*added[:6], *added[-6:]) for form in ("{}", "a {} b", "a{}b", " {} ", "\n{}\n")]
    return [Text(text, cut_up(text)) for text in (*NASTY, *said, *around)]


def slowly(encoder: TextEncoder, text: Text) -> tuple[list[int], list[bool]]:
    """Ids and marks of one text in plain Python: a token counts where it begins, in bytes."""
    encoding = encoder.tokenizer.encode(text.text, add_special_tokens=False)
    starts = [len(text.text[:start].encode()) for start, _ in encoding.offsets]
    pairs = list(zip(text.spans[::2], text.spans[1::2], strict=True))
    marks = [any(first <= start < last for first, last in pairs) for start in starts]
    ids = list(encoding.ids)
    if encoder.bos and ids[:1] != [encoder.bos[1]]:
        return [encoder.bos[1], *ids], [False, *marks]
    return ids, marks


def test_the_fast_library_gives_what_the_reference_gives(published: Published) -> None:
    if published.name not in FAST:
        with pytest.raises(ProgramError, match="not one that fastokens does") as raised:
            TextEncoder(published.folder, frozenset(), FASTOKENS)
        assert raised.value.kind == NOT_FAST
        return
    texts, fast = texts_for(published.folder), published.encoder
    assert fast.agrees(texts)
    found = rows(fast.encode(texts))
    for text, one in zip(texts, found, strict=True):
        assert one == slowly(fast, text), text
    assert rows(fast.encode(texts[::-1])) == found[::-1]  # what it remembers of earlier texts changes nothing
    if fast.bos:
        for text, (ids, _) in zip(texts, found, strict=True):
            assert ids.count(fast.bos[1]) == text.text.count(fast.bos[0]) + (not text.text.startswith(fast.bos[0]))
        assert all(ids[0] == fast.bos[1] for ids, _ in found)


def test_published_tokenizers_encode_as_ever_and_make_no_control_token_of_typed_text(published: Published) -> None:
    encoder = published.encoder.reference
    for golden in (golden for golden in GOLDEN if OF_GOLDEN.get(golden, golden) == published.name):
        for row in golden_rows(golden):
            if row["ok"]:
                ids, offsets = encoder.encode(row["text"])
                assert ids == row["ids"]
                assert encoder.encode_apart(row["text"], ()) == (ids, offsets)
        text = template_text({"chatml-qwen2.5": "chatml"}.get(golden, golden), "template")
        template = ChatTemplate.from_folder(published.folder, text)
        assert template.control_tokens == published.control
        typed = " a ".join(sorted(template.control_tokens)[:40])
        own = [{"role": "user", "content": typed}, {"role": "assistant", "content": f"it is {typed}."}]
        assert typed_become_text(template, encoder, own) >= 2
        for conversation in conversations().values():
            if conversation["id"][:3] in ("c24", "c26", "c27"):  # control text of many families
                typed_become_text(template, encoder, conversation["messages"])


def typed_become_text(template: ChatTemplate, encoder: Encoder, messages: list[dict[str, str]]) -> int:
    """Check a row whose messages type control tokens; how many."""
    row = template.render_training(messages)
    assert isinstance(row, Rendered), row
    forbidden = control_ids(encoder.tokenizer, template.control_tokens)
    ids, offsets = encoder.encode(row.text, row.typed)
    for number, (start, end) in zip(ids, offsets, strict=True):
        inside = any(begin < end and start < stop for begin, stop in row.typed)
        assert not (inside and number in forbidden), row.text[start:end]
    as_published, _ = encoder.encode(row.text)
    texts = [encoder.tokenizer.decode(found, skip_special_tokens=False) for found in (ids, as_published)]
    assert texts[0].replace(" ", "") == texts[1].replace(" ", "")
    return len(row.typed)


def test_pieces_of_published_tokenizers_join_to_the_text(published: Published) -> None:
    encoder, typed = published.encoder, min(published.control)
    for given in CHATS:  # typed ones need a second tokenizer: for those that have it from the test above
        text = typed.join(message["content"] for message in given["messages"])
        start = len(given["messages"][0]["content"].encode())
        spans = [0, len(text.encode())]
        joined = len(given["messages"]) == 2 and published.name in WITH_GOLDEN
        borders = [start, start + len(typed.encode())] if joined else []
        batch = encoder.encode([Text(text, spans, borders)])
        row = SeenRow(
            "f", 0, "p", text=text, typed=borders, input_ids=batch.ids.tolist(), labels=batch.labels().tolist()
        )
        pieces = list(token_pieces(row, encoder))
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.token for piece in pieces if piece.token is not None] == row.input_ids
        assert sum(piece.trained for piece in pieces) == row.trained_tokens
        assert any(piece.kind == TYPED for piece in pieces) == bool(borders)
        assert (pieces[0].kind == ADDED) == (encoder.bos is not None)


def test_exactly_one_bos_stands_at_the_start_whoever_writes_it(published: Published) -> None:
    for name in (name for name in SHIPPED if TOKENIZER_OF.get(name, name) == published.name):
        template = ChatTemplate.from_folder(published.folder, template_text(name, "template"))
        bos, eos = (dict(template.special_tokens).get(f"{kind}_token") for kind in ("bos", "eos"))
        text = template.render(TALK)
        ids = published.encoder.encode([Text(text, [])]).ids.tolist()
        number = published.encoder.tokenizer.token_to_id(bos) if bos else None
        if published.name == "smollm2":  # whose BOS is <|im_start|>, which begins every turn
            assert ids.count(number) == text.count("<|im_start|>") == 3
            continue
        wanted = int(published.encoder.bos is not None or (bos is not None and text.startswith(bos)))
        ends = bos == eos and bos is not None and text.endswith(f"{eos}\n\n")
        assert ids.count(number) == wanted + ends, name
        assert (ids[0] == number) == bool(wanted), name
