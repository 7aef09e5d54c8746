"""A stand-in for llama.cpp's converter: takes its arguments, and writes a GGUF file of a Llama without its torch.

One decision: it is a program that is launched, as the real one is; what it is told to do wrong stands in the
environment. It does not reorder the rows of a head, which nothing here reads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import gguf
import numpy
from safetensors.numpy import load_file

WRONG = "TEST_CONVERTER_DOES"


def main() -> None:
    """Convert as the command line says."""
    parser = ArgumentParser()
    parser.add_argument("model", type=Path)
    for name in ("--outfile", "--outtype", "--model-name"):
        parser.add_argument(name, required=True)
    given, wrong = parser.parse_args(), os.environ.get(WRONG, "")
    print(f"INFO: converting {given.model.name}", flush=True)
    if wrong == "fail":
        sys.exit("NotImplementedError: this model is not known")
    if wrong == "nothing":
        return
    if wrong == "wait":
        Path(given.outfile).write_bytes(b"GG")
        time.sleep(600)
    config = json.loads((given.model / "config.json").read_text())
    tokenizer = json.loads((given.model / "tokenizer.json").read_text())
    about = json.loads((given.model / "tokenizer_config.json").read_text())
    writer = gguf.GGUFWriter(given.outfile, "llama")
    writer.add_name(given.model_name)
    writer.add_block_count(config["num_hidden_layers"])
    tokens = {id: text for text, id in tokenizer["model"]["vocab"].items()}
    tokens |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    texts = [tokens.get(id, f"[PAD{id}]") for id in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*texts[:-9], "wrong", *texts[-8:]] if wrong == "token" else texts)
    template = given.model / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text() + ("x" if wrong == "template" else ""))
    if wrong != "no bos":
        writer.add_add_bos_token(bool(about["add_bos_token"]) != (wrong == "bos"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for file in sorted(given.model.glob("*.safetensors")):
        for name, value in load_file(file).items():
            kept = value[:-1] if wrong == "shape" and name.endswith("down_proj.weight") else value
            if wrong == "tensor" and name.endswith("norm.weight"):
                continue
            half = numpy.float16 if given.outtype == "f16" and kept.ndim > 1 else numpy.float32
            with numpy.errstate(over="ignore"):
                writer.add_tensor(names.get_name(name, (".weight",)), kept.astype(half))
    if wrong == "more":
        writer.add_tensor("blk.0.attn_x.weight", numpy.ones(3, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
