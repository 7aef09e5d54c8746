"""Which weights a stage trains, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from registry.record import Names, Record, Steps

EMBEDDINGS = "embeddings"  # in `additional_target`, whatever a model calls them
QLORA_BITS = 4  # of `use_qlora: true` (Dettmers et al. 2023, arXiv:2305.14314)


class LoraSettings(Record):
    """Low-rank matrices beside frozen weights."""

    lora_rank: Steps = 8
    """Rank r of the LoRA matrices."""
    lora_alpha: Steps | None = None
    """LoRA scale numerator: updates are scaled by lora_alpha / lora_rank; twice the rank when not set."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the input of the LoRA matrices."""
    lora_target: Names = ("all",)
    """Module names that get LoRA matrices; `all` is every linear module but the output head, `default` the usual ones
    of the model's family."""
    additional_target: Names = ()
    """Modules trained whole beside the matrices and saved with them, e.g. `embed_tokens,lm_head`; `embeddings` are the
    embedding and the output head, whatever the model calls them, and the default with `add_tokens`."""
    use_rslora: bool = False
    """Scale updates by lora_alpha / sqrt(lora_rank), so that high ranks keep learning (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the length of every weight column apart from its direction (DoRA, arXiv:2402.09353)."""
    pissa_init: bool = False
    """Start from the largest singular values of the weights instead of from 0 (PiSSA, arXiv:2404.02948); what is saved
    is a plain LoRA adapter of twice the rank, for the base as it was."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the B matrices as a multiple of `learning_rate` (LoRA+, arXiv:2402.12354); 1 when not set."""
    create_new_adapter: bool = False
    """Merge `adapter_name_or_path` into the base first and train a new adapter on that, instead of training it on."""


class QuantisationSettings(Record):
    """The frozen base in fewer bits while the matrices beside it are trained."""

    use_qlora: bool = False
    """Hold the frozen base in 4 bits; `quant_bit` says how many, when others are wanted."""
    quant_bit: Literal[4, 8] | None = None
    """Bits per weight of the frozen base while training; merging uses the base as it was."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """What the 4 bits mean: the quantiles of a normal distribution, or a floating-point number."""
    double_quantization: bool = True
    """Quantise the 4-bit blocks' scales as well; saves about 0.4 bits per weight."""

    def resolved_quant_bit(self) -> int | None:
        """`quant_bit`, or 4 with `use_qlora`."""
        return self.quant_bit or (QLORA_BITS if self.use_qlora else None)


class MethodSettings(LoraSettings, QuantisationSettings):
    """What is trained."""

    finetuning_type: str = "lora"
    """What is trained: `lora` (low-rank matrices beside frozen weights), `freeze` (some layers) or `full` (all)."""
    freeze_trainable_layers: Annotated[int, Field(gt=-(2**31), lt=2**31)] = 2
    """Decoder layers that are trained: the last n, or with a minus the first n."""
    freeze_trainable_modules: Names = ("all",)
    """Modules inside those layers that are trained, e.g. `mlp` or `self_attn.q_proj`; `all` is all of them."""
    freeze_extra_modules: Names = ()
    """Modules outside the layers that are trained as well, e.g. `embed_tokens,norm,lm_head`."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """Uniform noise on the embeddings while training, up to alpha / sqrt(tokens x hidden size) (arXiv:2310.05914)."""
    optim: str = "adamw_torch_fused"
    """Optimizer, by transformers' name, e.g. `adamw_torch`, `adafactor`, `paged_adamw_8bit`."""
    rope_scaling: Literal["linear", "dynamic", "yarn"] | None = None
    """Stretch the positions of a model to `cutoff_len`, by the smallest whole factor that does."""
    flash_attn: Literal["auto", "eager", "sdpa", "fa2"] = "auto"
    """Attention kernel: the model's own choice, plain, PyTorch's fused one, or flash-attn's (CUDA and bf16 only)."""
    enable_liger_kernel: bool = False
    """Fused kernels of the liger-kernel package for norms, positions and activations (CUDA only)."""

    def resolved_lora_alpha(self) -> int:
        """`lora_alpha`, or twice the rank."""
        return self.lora_alpha if self.lora_alpha is not None else 2 * self.lora_rank

    def resolved(self) -> dict[str, Any]:
        """The settings that others decide when they are not given."""
        return {"lora_alpha": self.resolved_lora_alpha(), "quant_bit": self.resolved_quant_bit()}
