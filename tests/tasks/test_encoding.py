"""Typed control tokens stay text; everything else is encoded as the tokenizer does it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tasks.encoding import Encoder

CONTROL = frozenset({"<s>", "</s>", "<|end|>"})


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "<s", "<s>", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">"), ("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*sorted(CONTROL - {"<|end|>"}), AddedToken("<|end|>", rstrip=True, special=True)])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -3.0) for piece in "▁<>/sab|end")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<unk>", *sorted(CONTROL)])
    return tokenizer


def prefixing() -> Tokenizer:
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *"▁<>/sab|end", "<s"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">")], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", *sorted(CONTROL)])
    return tokenizer


KINDS = [byte_level, unigram, prefixing]
TEXTS = [
    "ab",
    "",
    "<s>",
    "<s>ab</s>",
    "<s> ab<|end|>  \nab </s><s>",
    "éa<|end|>",
    "<think><s>",
    " <s> <s>",
    "a<s",
    "<<s>>",
]


def control_ids(tokenizer: Tokenizer, control: frozenset[str]) -> set[int]:
    return {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.content in control}


@pytest.mark.parametrize("make", KINDS)
def test_without_typed_ranges_ids_and_offsets_are_the_tokenizers_own_in_both_ways(make: Any) -> None:
    tokenizer, encoder = make(), Encoder(make(), CONTROL)
    for text in TEXTS:
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert encoder.encode(text) == (expected.ids, expected.offsets)
        assert encoder.encode_apart(text, ()) == (expected.ids, expected.offsets), text


@pytest.mark.parametrize("make", KINDS)
def test_typed_control_tokens_become_text_and_real_ones_stay(make: Any) -> None:
    tokenizer = make()
    text = "<s>a <s> b</s>"
    ids, offsets = Encoder(tokenizer, CONTROL).encode(text, [(5, 8)])
    real = control_ids(tokenizer, CONTROL)
    assert [text[start:end] for number, (start, end) in zip(ids, offsets, strict=True) if number in real] == [
        "<s>",
        "</s>",
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a <s> b"
    assert {place for start, end in offsets for place in range(start, end)} == set(range(len(text)))


def test_a_vocabulary_that_merges_a_control_token_from_its_letters_does_not_make_one_of_typed_text() -> None:
    encoder = Encoder(byte_level(), CONTROL)
    ids, offsets = encoder.encode("<s>", [(0, 3)])
    assert ([byte_level().id_to_token(number) for number in ids], offsets) == (["<s", ">"], [(0, 2), (2, 3)])


def test_white_space_that_a_control_token_takes_in_is_taken_in_also_beside_typed_ones() -> None:
    tokenizer = byte_level()
    ids, offsets = Encoder(tokenizer, CONTROL).encode("<|end|> \n<s>", [(9, 12)])
    assert ids[0] == tokenizer.token_to_id("<|end|>")
    assert offsets[:2] == [(0, 9), (9, 11)]


def test_added_tokens_that_are_no_control_tokens_keep_their_ids() -> None:
    tokenizer = byte_level()
    ids, _ = Encoder(tokenizer, CONTROL).encode("<think><s>", [(7, 10)])
    assert ids[0] == tokenizer.token_to_id("<think>")


def test_text_that_has_the_characters_that_stand_for_control_tokens_is_encoded_right() -> None:
    tokenizer, encoder = byte_level(), Encoder(byte_level(), CONTROL)
    encoder.encode("<s></s>", [(3, 7)])
    text = "\U0010f000\U0010f001<s></s>"
    ids, offsets = encoder.encode(text, [(5, 9)])
    assert ids[:8] == tokenizer.encode(text[:2], add_special_tokens=False).ids
    assert (ids[8], offsets[8]) == (tokenizer.token_to_id("<s>"), (2, 5))
    assert not set(ids[9:]) & control_ids(tokenizer, CONTROL)


def test_the_unknown_is_still_unknown() -> None:
    tokenizer = prefixing()
    ids, _ = Encoder(tokenizer, CONTROL | {"<unk>"}).encode("é <s>", [(2, 5)])
    assert ids[1] == tokenizer.token_to_id("<unk>")


def test_the_import_needs_only_tokenizers() -> None:
    code = "import sys, tasks.encoding; print({'torch', 'transformers', 'numpy', 'jinja2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
