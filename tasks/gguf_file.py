"""A model as one GGUF file, made by llama.cpp's own converter and read back.

One decision: no conversion of ours. Each architecture has its own, and llama.cpp keeps them. The converter is found,
run as a program of its own, and what it wrote is compared with the model: tensors, vocabulary, chat template, BOS.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import InputError, Problem, did_you_mean
from tasks.jsonlines import read_object
from tasks.launch import ProgramFailed, last_lines, run_command
from tasks.template_files import folder_template
from tasks.tensor_files import Tensor, read_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader

BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
"""Types of the weights → bytes of a number."""
DEFAULT_TYPE = "f16"
OPTION = "--gguf"
PLACE = "LLAMATUNER_LLAMA_CPP"
SCRIPT = "convert_hf_to_gguf.py"
COMMANDS = (SCRIPT, "convert-hf-to-gguf", "llama-convert-hf-to-gguf")  # as packages of llama.cpp call it
NEEDS = ("torch", "transformers", "sentencepiece")  # what the script imports, beside `gguf`
INSTALL = f"Get llama.cpp (git clone https://github.com/ggml-org/llama.cpp) and set {PLACE} to its folder."
SOURCE = ".gguf-source"
TOKENIZER_CONFIG = "tokenizer_config.json"
MADE = ("rope_freqs", "rope_factors_long", "rope_factors_short")  # the converter computes these from the config


@dataclass(frozen=True)
class GgufFile:
    """What a file was found to hold."""

    path: Path
    tensors: int
    adds_bos: bool
    """Whether a BOS is put in front of a text by whoever reads it."""


def parse_type(text: str) -> str:
    """A type of weights by its name, in any case.

    Raises:
        InputError: another word.
    """
    if text.lower() not in BYTES:
        cure = did_you_mean(text.lower(), list(BYTES))
        if text.lower().startswith(("q", "iq")):
            cure = f"Known: {', '.join(BYTES)}. llama.cpp's llama-quantize makes {text} of a file of type f16."
        raise InputError(Problem("--gguf-type", f"{text!r} is no type that the converter writes", cure))
    return text.lower()


def find_converter(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """How llama.cpp's converter is started: the beginning of its command line.

    Args:
        environment: `LLAMATUNER_LLAMA_CPP` names a checkout of llama.cpp, or the converter itself; without it the
            converter is looked for on `PATH`.

    Raises:
        InputError: it is not there, or lacks what it needs.
    """
    place = environment.get(PLACE)
    if not place:
        found = (shutil.which(name, path=environment.get("PATH")) for name in COMMANDS)
        command = next((path for path in found if path), None)
        if command is None:
            raise InputError(Problem(OPTION, f"llama.cpp's converter {SCRIPT} is not on this machine", INSTALL))
        return (command,)
    path = Path(place).expanduser().absolute()
    path = path / SCRIPT if path.is_dir() else path
    if not path.is_file():
        raise InputError(Problem(f"{PLACE}={place}", f"there is no {SCRIPT}", INSTALL))
    if path.suffix != ".py":
        return (str(path),)
    lacking = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if lacking:
        rule = f"the converter needs {' and '.join(lacking)}"
        raise InputError(Problem(OPTION, rule, "Install it: pip install 'llamatuner[gguf]'"))
    return (sys.executable, str(path))


def needed_bytes(folder: Path, kind: str) -> int:
    """About how large the file of a model gets."""
    return int(sum(math.prod(tensor.shape) for tensor in read_tensors(folder)) * BYTES[kind])


def make_gguf(folder: Path, name: str, kind: str, converter: Sequence[str]) -> GgufFile:
    """Make the GGUF file of a model folder, in the folder, and compare it with the model.

    Args:
        folder: weights as safetensors, config, tokenizer; gets `NAME-TYPE.gguf`.
        name: what the model is called in the file.
        kind: of `BYTES`.
        converter: from `find_converter`.

    Raises:
        ProgramFailed: the converter failed, with its last lines; or what it wrote is not the model.
        OSError: the disk.
    """
    target = folder / f"{name}-{kind.upper()}.gguf"
    bos = trained_bos(folder)
    source = _linked(folder, bos)
    log = folder / f"{SOURCE}.log"
    command = [*converter, str(source), "--outfile", str(target), "--outtype", kind, "--model-name", name]
    try:
        run_command(command, log)
        if not target.is_file():
            rule = f"{Path(converter[-1]).name} wrote no {target.name}; its last lines:\n{last_lines(log)}"
            raise ProgramFailed("unexpected", rule)
        found = read_back(target, folder, kind)
    finally:
        shutil.rmtree(source)
        log.unlink(missing_ok=True)
    if found.adds_bos != (bos is not None):
        does = "has a BOS put in front" if found.adds_bos else "has no BOS put in front"
        raise ProgramFailed("unexpected", f"{target.name} {does}, the model's tokenizer does otherwise")
    return found


def trained_bos(folder: Path) -> str | None:
    """The BOS that a model's tokenizer puts in front by itself."""
    from tasks.tokens import added_bos, load_tokenizer

    found = added_bos(load_tokenizer(folder), folder)
    return found[0] if found else None


def _linked(folder: Path, bos: str | None) -> Path:
    """The folder once more, as links; its tokenizer's config says about the BOS what the tokenizer does.

    Without that word in the file, readers of GGUF guess by the kind of vocabulary, and not all of them alike.
    """
    source = folder / SOURCE
    source.mkdir()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != TOKENIZER_CONFIG:
            (source / path.name).symlink_to(path)
    config = read_object(folder / TOKENIZER_CONFIG) | {"add_bos_token": bos is not None}
    (source / TOKENIZER_CONFIG).write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return source


def read_back(path: Path, folder: Path, kind: str) -> GgufFile:
    """Compare a GGUF file with the model folder it was made of.

    Raises:
        ProgramFailed: everything that differs.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        wrong = list(_differences(reader, folder, kind))
    except (ValueError, KeyError, IndexError, OverflowError) as error:  # what the reader raises for half a file
        raise ProgramFailed("unexpected", f"{path.name} cannot be read: {error}") from error
    if wrong:
        raise ProgramFailed("unexpected", f"{path.name} is not the model: {'; '.join(wrong)}")
    return GgufFile(path, len(reader.tensors), bool(_field(reader, "tokenizer.ggml.add_bos_token")))


def _field(reader: GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def _differences(reader: GGUFReader, folder: Path, kind: str) -> Iterator[str]:
    yield from _tensor_differences(reader, folder)
    if kind == "f16":
        yield from _infinite(reader)
    tokens = _field(reader, "tokenizer.ggml.tokens") or []
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    named = (
        {id: text for text, id in vocabulary.items()}
        if isinstance(vocabulary, dict)
        else dict(enumerate(text for text, _ in vocabulary))
    )
    other = [id for id, text in named.items() if id >= len(tokens) or tokens[id] != text]
    if other:
        yield f"{len(other)} of {len(named)} tokens are others, the first is {named[min(other)]!r}"
    try:
        _, template = folder_template(folder, read_object(folder / TOKENIZER_CONFIG))
    except InputError:  # a model without one
        template = None
    if _field(reader, "tokenizer.chat_template") != template:
        yield "its chat template is not the model's"
    if _field(reader, "tokenizer.ggml.add_bos_token") is None:
        yield "it does not say whether a text begins with a BOS"


def _tensor_differences(reader: GGUFReader, folder: Path) -> Iterator[str]:
    """Tensors that are missing or have another shape, by the names that the `gguf` package knows."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = _field(reader, "general.architecture")
    written = {t.name: [int(n) for n in reversed(t.shape)] for t in reader.tensors}
    known = next((number for number, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    blocks = _field(reader, f"{architecture}.block_count")
    names = get_tensor_name_map(known, blocks) if known is not None and blocks else None
    tokens = len(_field(reader, "tokenizer.ggml.tokens") or [])
    tied = read_object(folder / "config.json").get("tie_word_embeddings")
    found: set[str] = set()
    all_known = names is not None
    for tensor in read_tensors(folder):
        name = names.get_name(tensor.name, (".weight", ".bias")) if names else None
        if name is None:
            all_known = False  # e.g. the experts of a layer, which are written as one tensor
        elif name in written:
            found.add(name)
            if not _same_shape(tensor, written[name], tokens):
                yield f"{name} has the shape {written[name]}, {tensor.name} {list(tensor.shape)}"
        elif not (tied and name == "output.weight"):
            yield f"{tensor.name} is missing"
    more = {name for name in written if name.removesuffix(".weight") not in MADE} - found
    if all_known and more:
        yield f"it has {len(more)} tensors more, such as {min(more)}"


def _same_shape(tensor: Tensor, written: Sequence[int], tokens: int) -> bool:
    """Whether a shape is kept; but for sides of one, and rows of embeddings that no token has."""
    one, other = ([side for side in shape if side != 1] for shape in (tensor.shape, written))
    return one == other or (one[1:] == other[1:] and other[:1] == [tokens] and one[0] > tokens)


def _infinite(reader: GGUFReader) -> Iterator[str]:
    """Tensors with a number that float16 cannot hold: the converter writes infinity for it."""
    import numpy
    from gguf import GGMLQuantizationType

    for tensor in reader.tensors:
        if tensor.tensor_type == GGMLQuantizationType.F16 and not _finite(tensor.data, numpy.isfinite):
            yield f"{tensor.name} holds numbers that float16 cannot hold (use --gguf-type bf16)"


def _finite(data: Any, isfinite: Callable[[Any], Any]) -> bool:
    flat = data.reshape(-1)
    return all(isfinite(flat[at : at + (1 << 20)]).all() for at in range(0, len(flat), 1 << 20))
