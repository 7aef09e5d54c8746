"""The program that adds tokens to a model.

One decision: a new token begins as what its text was before, the mean of its old tokens' rows in the embedding and in
the output head. It is where a reader of the old model would look for it, it is the same in every run, and a token that
is never trained does no harm.

Run as `python -m tasks.vocabulary_program SPEC.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.merge_program import saved_dtype
from tasks.program import Events, ProgramError, Spec, main
from tasks.vocabulary import REPORT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


def work(spec: Spec, events: Events) -> None:
    """Add the tokens, save, and write which id each got.

    Raises:
        ProgramError: `bad_setting` for a token that there is already, or a model without a fast tokenizer.
    """
    base, output, wanted = Path(spec.inputs["base"]), Path(spec.output), _wanted(spec.settings)
    events.note("loading libraries")
    import torch
    from tokenizers import Tokenizer

    from tasks.train.loading import load_base
    from tasks.train.output import copy_tokenizer, save_model, write_json

    if not (base / TOKENIZER).is_file():
        raise ProgramError("bad_setting", f"add_tokens: the model has no {TOKENIZER}, which tokens could be added to.")
    tokenizer = Tokenizer.from_file(str(base / TOKENIZER))
    known = [token for token in wanted if tokenizer.token_to_id(token) is not None]
    if known:
        raise ProgramError("bad_setting", f"add_tokens: {', '.join(known)}: there already. Remove it from the list.")
    pieces = {token: tokenizer.encode(token, add_special_tokens=False).ids for token in wanted}
    ids = add_to(tokenizer, wanted)
    model = load_base(str(base), getattr(torch, saved_dtype(base)))
    vocabulary = max(model.get_input_embeddings().num_embeddings, max(ids.values()) + 1)
    extend(model, vocabulary, {ids[token]: pieces[token] for token in wanted})
    output.mkdir(parents=True, exist_ok=True)
    save_model(model, output, base)
    copy_tokenizer(base, output)
    tokenizer.save(str(output / TOKENIZER))
    _describe(output / CONFIG, ids, wanted)
    write_json(output / REPORT, {"ids": ids, "vocabulary": vocabulary})
    events.note(f"{len(ids)} tokens added; the vocabulary has {vocabulary} now")


def _wanted(settings: Mapping[str, Any]) -> dict[str, bool]:
    """Token → whether it is a control token."""
    return {**dict.fromkeys(settings["add_tokens"], False), **dict.fromkeys(settings["add_special_tokens"], True)}


def add_to(tokenizer: Tokenizer, wanted: Mapping[str, bool]) -> dict[str, int]:
    """Add tokens, taken as they are written, and give the id of each."""
    from tokenizers import AddedToken

    for token, special in wanted.items():
        made = AddedToken(token, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([made])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return {token: vocabulary[token] for token in wanted}


def extend(model: Any, vocabulary: int, pieces: Mapping[int, list[int]]) -> None:
    """Give the embedding and the output head so many rows, and each new token the mean of its old ones'.

    Args:
        model: a causal language model.
        vocabulary: rows; not fewer than there are.
        pieces: id → ids of the tokens that its text was before; none: the mean of all.
    """
    import torch

    before = model.get_input_embeddings().num_embeddings
    if vocabulary > before:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    head = model.get_output_embeddings()
    tensors = {id(t): t for m in (model.get_input_embeddings(), head) if m is not None for t in m.parameters()}
    with torch.no_grad():
        for tensor in tensors.values():  # a tied one once; a head may have a bias
            old = tensor[:before].float()
            for row, ids in pieces.items():
                tensor[row] = (old[ids] if ids else old).mean(dim=0).to(tensor.dtype)


def _describe(path: Path, ids: Mapping[str, int], wanted: Mapping[str, bool]) -> None:
    """Put the tokens into the list that older tokenizer configs have; newer ones leave it to tokenizer.json."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "added_tokens_decoder" in config:
        usual = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for token, number in ids.items():
            config["added_tokens_decoder"][str(number)] = {"content": token, "special": wanted[token]} | usual
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(work)
