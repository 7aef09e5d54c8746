"""Arguments of LLaMA-Factory, of the LLamaTuner before this one and of transformers that are no settings here.

One decision: every one of them is told of. What asks for nothing that would be another way here (its own default) is
let through; what changes no result is noted with the reason; anything else is an error that names the nearest thing.
Settings with the same name or another one are in `registry.stage_settings`, values that are written otherwise in
`registry.old_values`; nothing here imports a library to know its arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OldKey:
    """An argument that is no setting here."""

    why: str
    """Why it has no effect, or is refused; continues a sentence."""
    cure: str = ""
    """What to do instead, where it is refused."""
    harmless: tuple[Any, ...] = ()
    """Values that ask for nothing else than what is done anyway."""
    refused: bool = False

    def asks_nothing(self, value: Any) -> bool:
        """Whether a value of it need not be told of; nothing at all never needs to."""
        return value is None or any(value == known and type(value) in _LIKE[type(known)] for known in self.harmless)


_LIKE: dict[type, tuple[type, ...]] = {
    **dict.fromkeys((int, float), (int, float)),
    **{kind: (kind,) for kind in (bool, str, list, dict)},
}


def _idle(why: str, names: str) -> Iterator[tuple[str, OldKey]]:
    yield from ((name, OldKey(why)) for name in names.split())


def _refused(why: str, cure: str, flags: str = "", **harmless: Any) -> Iterator[tuple[str, OldKey]]:
    """Switches, which ask for nothing when they are off, and others with the values that do."""
    yield from ((name, OldKey(why, cure, (False,), True)) for name in flags.split())
    for name, values in harmless.items():
        yield name, OldKey(why, cure, values if isinstance(values, tuple) else (values,), True)


RECIPE = "a recipe says what to train"
SECRET = "a recipe is kept with its run, and whoever reads that would have it"
GENERATION = "answers are written only in stages ppo, grpo and rloo, and when something is measured"

OLD_KEYS: dict[str, OldKey] = dict(
    [
        # kept, found, shown
        *_idle(
            "what is prepared is kept, and found by its content",
            "overwrite_cache tokenized_path data_shared_file_system preprocessing_batch_size",
        ),
        *_idle("rows are never held in memory together", "streaming buffer_size"),
        *_idle(
            "every step writes a folder of its own under LLAMATUNER_HOME; `llamatuner train` also writes the model to"
            " output_dir, and `llamatuner export RECIPE --to FOLDER` writes it anywhere",
            "output_dir overwrite_output_dir save_only_model save_safetensors save_on_each_node",
        ),
        *_idle(
            "checkpoints are there to go on from; the model of the end is always kept",
            "save_strategy enable_jit_checkpoint restore_callback_states_from_checkpoint",
        ),
        *_idle("an interrupted run goes on by the same command", "ignore_data_skip"),
        *_idle("models are kept where Hugging Face keeps them (HF_HOME)", "cache_dir offload_folder"),
        *_idle(
            "loss curve, tokens per second and settings of every run are in MLflow and on Prefect's pages",
            "plot_loss run_name logging_dir logging_strategy logging_first_step logging_nan_inf_filter"
            " include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second"
            " project trackio_space_id trackio_bucket_id trackio_static_space_id log_level log_level_replica"
            " log_on_each_node disable_tqdm skip_memory_metrics debug print_param_status compute_accuracy"
            " use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_logdir",
        ),
        # measured
        *_idle(
            "held-out rows are measured after training in any case, each data set by its own name",
            "do_eval eval_on_each_dataset eval_on_start eval_delay prediction_loss_only eval_accumulation_steps"
            " eval_do_concat_batches eval_use_gather_object batch_eval_metrics include_for_metrics"
            " include_inputs_for_metrics bf16_full_eval",
        ),
        *_idle("results are in MLflow and at the end of the run", "save_dir"),
        *_idle("the questions of a benchmark are those that lm-eval asks", "lang download_mode"),
        # processes and memory
        *_idle(
            "processes are started, and rows given to them, without it",
            "ddp_timeout ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers"
            " ddp_static_graph local_rank ray_scope dataloader_num_workers dataloader_pin_memory"
            " dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context"
            " dataloader_in_order remove_unused_columns length_column_name label_names",
        ),
        *_idle(
            "it changes memory or speed only, and is not needed",
            "low_cpu_mem_usage use_kv_cache use_cache use_reentrant_gc gradient_checkpointing_kwargs"
            " activation_checkpointing_kwargs torch_empty_cache_steps torch_compile torch_compile_backend"
            " torch_compile_mode liger_kernel_config use_v1_kernels quantization_device_map quant_device_map",
        ),
        *_idle("a step that runs out of memory goes on with half the micro-batch", "auto_find_batch_size"),
        *_idle("every run is deterministic", "full_determinism"),
        # models and tokens
        *_idle(
            "code of a model's repository is never run; a model that needs it is refused with the reason",
            "trust_remote_code",
        ),
        *_idle("rows of the embedding are made for add_tokens and add_special_tokens by themselves", "resize_vocab"),
        *_idle("what a reward model is, is read from its folder", "reward_model_type"),
        *_idle("an adapter with pissa_init is always saved as a plain LoRA adapter", "pissa_convert"),
        *_idle(GENERATION, "do_sample num_beams max_length length_penalty repetition_penalty skip_special_tokens"),
        *_idle(GENERATION, "eval_num_beams generation_num_beams generation_max_length predict_with_generate"),
        # belongs to what is refused by its switch
        *_idle(
            "it belongs to use_galore, which is refused",
            "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise",
        ),
        *_idle(
            "it belongs to use_apollo, which is refused",
            "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type"
            " apollo_scale_type apollo_layerwise apollo_scale_front",
        ),
        *_idle(
            "it belongs to use_badam, which is refused",
            "badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio"
            " badam_mask_mode badam_verbose",
        ),
        *_idle("it belongs to a loss that is refused", "asft_alpha eaft_alpha"),
        *_idle("it belongs to use_hyper_parallel, which is refused", "hyper_parallel_args"),
        *_idle("it belongs to fp8, which is refused", "fp8_backend fp8_enable_fsdp_float8_all_gather"),
        *_idle("it belongs to export_quantization_bit, which is refused", "export_quantization_dataset"),
        *_idle(
            "it belongs to export_quantization_bit, which is refused",
            "export_quantization_nsamples export_quantization_maxlen export_quant_dataset export_quant_nsamples"
            " export_quant_maxlen",
        ),
        # secrets
        *_refused(
            SECRET,
            "Set HF_TOKEN or MODELSCOPE_API_TOKEN in the environment.",
            hf_hub_token=(),
            ms_hub_token=(),
            om_hub_token=(),
            hub_token=(),
            push_to_hub_token=(),
        ),
        *_refused(
            SECRET, "Remove it.", swanlab_api_key=(), swanlab_lark_webhook_url=(), swanlab_lark_secret=(), api_key=()
        ),
        # number formats
        *_refused("there is no fp16 training", "Use bf16: true, or neither for float32.", "fp16 fp16_full_eval"),
        *_refused(
            "weights that are trained are held in float32",
            "Use bf16: true, which has frozen weights and arithmetic in bfloat16.",
            "pure_bf16",
        ),
        *_refused("there is no fp8 training", "Use bf16: true.", "fp8"),
        *_refused("float32 is not cut to TF32", "Use bf16: true for speed.", "tf32"),
        *_refused(
            "norms and logits are computed as the model's own code does",
            "Remove it.",
            "upcast_layernorm upcast_lmhead_output",
        ),
        *_refused("models are measured in the dtype that bf16 says", "Use bf16.", infer_dtype="auto"),
        # methods and optimizers
        *_refused(
            "GaLore's settings cannot be said", "Use optim: galore_adamw with finetuning_type: full.", "use_galore"
        ),
        *_refused(
            "APOLLO's settings cannot be said", "Use optim: apollo_adamw with finetuning_type: full.", "use_apollo"
        ),
        *_refused("BAdam is not there", "Use finetuning_type: freeze, or deepspeed: zero3_offload.", "use_badam"),
        *_refused("this optimizer is not there", "Use optim: adamw_torch_fused.", "use_adam_mini use_muon"),
        *_refused("blocks are not added to a model", "Use finetuning_type: freeze.", "use_llama_pro"),
        *_refused("layers are not skipped by tokens", "Remove it.", mixture_of_depths=()),
        *_refused("attention is not shifted", "Use rope_scaling for long texts.", "shift_attn"),
        *_refused(
            "unsloth changes a model's code", "Use enable_liger_kernel: true on CUDA, or remove it.", "use_unsloth"
        ),
        *_refused(
            "Megatron and HyperParallel are not there",
            "Use deepspeed: zero3, or fsdp: true.",
            "use_mca use_hyper_parallel",
        ),
        *_refused(
            "this loss is not there", "Use stage: sft with its own loss.", "use_dft_loss use_asft_loss use_eaft_loss"
        ),
        *_refused("nothing is trained from random weights", "Start from a model.", "train_from_scratch"),
        *_refused(
            "OFT is not there",
            "Use finetuning_type: lora.",
            oft_rank=0,
            oft_block_size=32,
            oft_target="all",
            module_dropout=0.0,
        ),
        *_refused("biases are not trained beside LoRA matrices", "Use none.", lora_bias="none"),
        *_refused("pissa_init takes 16 rounds of the randomised method", "Remove it, or write 16.", pissa_iter=16),
        *_refused("embeddings have the learning rate of the A matrices", "Remove it.", loraplus_lr_embedding=1e-6),
        *_refused("losses of a router are not added", "Remove it.", moe_aux_loss_coef=0.0),
        # quantisation
        *_refused(
            "bitsandbytes alone quantises a base while it is trained on",
            "Remove it.",
            llm_int8_threshold=6.0,
            llm_int8_has_fp16_weight=False,
        ),
        *_refused(
            "other models are held as they were saved",
            "Remove it.",
            ref_model_quantization_bit=(),
            ref_model_quant_bit=(),
            reward_model_quantization_bit=(),
            reward_model_quant_bit=(),
        ),
        *_refused(
            "an adapter beside another model is not loaded",
            "Name the stage that trained it, or its exported folder, as the model itself.",
            ref_model_adapters=(),
            reward_model_adapters=(),
        ),
        # losses and optimizer
        *_refused(
            "the loss has no such part", "Remove it.", pref_bco_weight=0.0, ld_alpha=(), label_smoothing_factor=0.0
        ),
        *_refused("AdamW's own numbers are fixed", "Remove it.", adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8),
        *_refused(
            "optimizers and schedules are as their names say", "Remove it.", optim_args=(), optim_target_modules=()
        ),
        *_refused("optimizers and schedules are as their names say", "Remove it.", lr_scheduler_kwargs=({},)),
        *_refused("padding is never trained on", "Remove it.", ignore_pad_token_for_loss=True),
        *_refused("the loss is a mean over all tokens of a step", "Remove it.", average_tokens_across_devices=True),
        # data
        *_refused(
            "rows are drawn anew in every epoch",
            "Remove it; packing leaves no padding.",
            "disable_shuffling group_by_length",
            train_sampling_strategy="random",
        ),
        *_refused("the last rows of an epoch are trained on too", "Remove it.", "dataloader_drop_last"),
        *_refused("order and initialisation have one seed", "Use seed.", data_seed=()),
        *_refused("tokenizers are always the fast ones", "Remove it.", use_fast_tokenizer=True),
        *_refused("tool calls are written as the template says", "Use a template that has them.", tool_format=()),
        *_refused("reasoning is kept where the template keeps it", "Remove it.", "preserve_thinking"),
        *_refused(
            "new tokens begin as the mean of what the text was",
            "Use add_special_tokens.",
            new_special_tokens_config=(),
            init_special_tokens="noise_init",
        ),
        *_refused("of a loss less is better, of anything else more", "Remove it.", "greater_is_better"),
        *_refused("FSDP divides all that it can", "Use fsdp: true.", fsdp_config=({},)),
        *_refused("adapters are named by their folder", "Use adapter_name_or_path.", adapter_folder=()),
        # texts alone
        *_refused(
            "models of texts alone are trained",
            "Remove it.",
            "freeze_vision_tower freeze_multi_modal_projector freeze_language_model train_mm_proj_only"
            " image_do_pan_and_scan crop_to_patches use_audio_in_video visual_inputs",
            media_dir=(),
            image_dir=(),
            image_max_pixels=(768 * 768, 589824),
            image_min_pixels=32 * 32,
            image_resolution=(),
            video_max_pixels=256 * 256,
            video_min_pixels=16 * 16,
            video_fps=2.0,
            video_maxlen=128,
            audio_sampling_rate=16000,
        ),
        # other commands
        *_refused(
            "models answer here through transformers",
            "Export the model and serve it.",
            infer_backend=("huggingface", "hf"),
        ),
        *_refused(RECIPE, "Models are written by `llamatuner export`, --to there.", export_dir=()),
        *_refused(RECIPE, "Models are written by `llamatuner export`, --max-shard-size there.", export_size=()),
        *_refused(RECIPE, "Models are written by `llamatuner export`, --push-to-hub there.", export_hub_model_id=()),
        *_refused(RECIPE, "Models are written by `llamatuner export`.", "push_to_hub", export_device=()),
        *_refused(RECIPE, "Models are written by `llamatuner export`, as safetensors.", "export_legacy_format"),
        *_refused(
            RECIPE,
            "Use `llamatuner export --push-to-hub OWNER/NAME`.",
            "hub_always_push",
            hub_model_id=(),
            hub_private_repo=(),
            hub_strategy="every_save",
            hub_revision=(),
            push_to_hub_model_id=(),
            push_to_hub_organization=(),
        ),
        *_refused(
            "a model's weights are written as they are",
            "Use a tool for that on the export.",
            export_quantization_bit=(),
            export_quant_bit=(),
        ),
        *_refused(
            "benchmarks are read in lm-eval's form", "Use evaluation: {data_dir: FOLDER}.", task_dir="evaluation"
        ),
        *_refused("a file without `stages` that trains nothing is read otherwise", "Remove it.", do_train=True),
        *_refused("it is asked for in `evaluation`", "Use evaluation: {generate: [DATA]}.", "do_predict"),
        *_refused(
            "it is asked for in `evaluation`",
            "Use evaluation: {benchmarks: [mmlu], num_fewshot: 5}.",
            task=(),
            n_shot=(),
        ),
        *_refused(
            "it has two meanings",
            "Use per_device_train_batch_size, or per_device_eval_batch_size.",
            batch_size=(),
        ),
    ]
)
"""Argument → what becomes of it."""

_NAMES = """
    accelerator_config activation_checkpointing dispatch_batches evaluate_during_training fp16_backend fp16_opt_level
    fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap generation_config half_precision_backend jit_mode_eval
    mp_parameters no_cuda parallelism_config past_index sharded_ddp sortish_sampler split_batches torchdynamo
    tpu_metrics_debug tpu_num_cores use_cpu use_ipex use_legacy_prediction_loop use_mps_device xpu_backend
"""
TRANSFORMERS = frozenset(_NAMES.split())
"""Arguments of transformers' `TrainingArguments`, of version 4 or 5, of which nothing more is known here."""
