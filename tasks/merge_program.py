"""The program that merges a LoRA adapter into its base weights.

One decision: the merged files are read back and measured before they count. The sum is made in float32 and rounded
once to the dtype the base was saved in; how far rounding moves the logits, and how far the adapter does, is written.

Run as `python -m tasks.merge_program SPEC.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.program import Events, ProgramError, Spec, main
from tasks.tensor_files import FLOATS, commonest_dtype, read_headers

if TYPE_CHECKING:
    import torch

PROBE_SEED = 20
PROBE_SHAPE = (4, 32)  # sequences, tokens
# Largest allowed logit difference, as a share of the largest logit. Rounding a merged weight keeps 8 bits of it in
# bfloat16, 11 in float16. Measured on random Llamas of 2, 8 and 30 layers, small and large adapters: float32 up to
# 4e-6, bfloat16 0.006 to 0.017, float16 0.0007 to 0.0024, whatever the size of the adapter (effects of 0.04 to 0.65).
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
FLOAT32_FLOOR = 1e-4  # absolute, for float32: where logits are small, summation order is what is left


def work(spec: Spec, events: Events) -> None:
    """Merge, save, read back, measure.

    Raises:
        ProgramError: `bad_setting` when the adapter belongs to another base, or the saved model's logits are too far
            from those of base + adapter.
    """
    events.note("loading libraries")
    import torch

    from tasks.train.loading import load_base
    from tasks.train.lora import check_base
    from tasks.train.output import copy_tokenizer, save_model, write_json

    base, adapter, output = Path(spec.inputs["base"]), Path(spec.inputs["adapter"]), Path(spec.output)
    changes = check_base(str(adapter), spec.settings["base_digest"], events.note)
    dtype = saved_dtype(base)
    events.note(f"merging in float32, saving in {dtype}")
    score = scores(adapter)
    model = load_base(str(base), torch.float32, score, changes).eval()
    probe = probe_tokens(model.get_input_embeddings().num_embeddings)
    before = _logits(model, probe)
    merged, wanted = _merge(model, adapter, probe)
    output.mkdir(parents=True, exist_ok=True)
    save_model(merged.to(getattr(torch, dtype)), output, base)
    copy_tokenizer(adapter, output) or copy_tokenizer(base, output)
    del model, merged
    found = _logits(load_base(str(output), torch.float32, score).eval(), probe)
    effect, difference = (float((wanted - other).abs().max()) for other in (before, found))
    numbers = {"max_logit_difference": difference, "max_logit_effect": effect, "dtype": dtype}
    if effect == 0.0:
        numbers["no_effect"] = True
        events.note("adapter has no effect: base and base + adapter have equal logits")
    elif difference > effect / 2:
        events.note(
            f"rounding to {dtype} moves the logits by {difference:.3g}, the adapter by {effect:.3g}: "
            "much of what was learnt is lost in the merged weights; use base + adapter, or a float32 base",
        )
    allowed = tolerance(dtype, float(wanted.abs().max()))
    if not difference <= allowed:
        raise ProgramError(
            "bad_setting",
            f"the merged model's logits differ from base + adapter by {difference:.3g}, {dtype} allows {allowed:.3g}. "
            "Use base + adapter without merging, or a base saved in float32.",
        )
    write_json(output / "merge.json", numbers)


def scores(adapter: Path) -> bool:
    """Whether an adapter belongs to a reward model."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return bool(config.get("task_type") == "SEQ_CLS")


def tolerance(dtype: str, scale: float) -> float:
    """The largest allowed logit difference for logits of at most `scale`."""
    allowed = TOLERANCE[dtype] * scale
    return max(allowed, FLOAT32_FLOOR) if dtype == "float32" else allowed


def saved_dtype(folder: Path) -> str:
    """The dtype most of the weights in a model folder are saved in: `float32`, `bfloat16` or `float16`.

    Read from the files: `dtype` in config.json is what somebody once meant to load.

    Raises:
        ProgramError: `bad_setting` for other dtypes, such as those of quantised weights.
    """
    found = commonest_dtype(read_headers(folder)) or "no safetensors file"
    if found not in FLOATS:
        raise ProgramError(
            "bad_setting",
            f"the base holds {found}; an adapter is merged into F32, BF16 or F16 weights. "
            "Merge into the base as it was before it was quantised.",
        )
    return FLOATS[found]


def probe_tokens(vocabulary: int) -> torch.Tensor:
    """Fixed token sequences, (4, 32) int64."""
    import numpy
    import torch

    return torch.from_numpy(numpy.random.default_rng(PROBE_SEED).integers(0, vocabulary, PROBE_SHAPE))


def _merge(model: Any, adapter: Path, probe: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The model with the adapter added to its weights, float32, and the logits it had with the adapter beside them."""
    from tasks.train.adapters import load_adapter

    wrapped = load_adapter(model, str(adapter)).eval()
    wanted = _logits(wrapped, probe)
    return wrapped.merge_and_unload(safe_merge=True), wanted


def _logits(model: Any, probe: torch.Tensor) -> torch.Tensor:
    """Logits of the probe, float32, (4, 32, vocabulary), or the scores of a reward model, (4, 1)."""
    import torch

    with torch.no_grad():
        return model(input_ids=probe, use_cache=False).logits.float()


if __name__ == "__main__":
    main(work)
