"""Every knob of fitune but those of the methods (methods.py): one frozen pydantic model per stage of a run.

Command-line help, YAML keys, the JSON schema and docs/configuration.md are generated from these fields; nothing
else states a default. `None` means "chosen when the run is resolved" and the description says how; the resolved
configuration is what a run saves. No torch here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fitune.config.fields import MANY, Number, Section, Switch, Whole, check_files, check_path, no_boolean
from fitune.config.methods import METHODS, LoraConfig, MethodConfig


class ModelConfig(Section):
    """Which base model, and how its weights are stored."""

    path: str = Field(
        min_length=1,
        description="Base model: a local folder, a Hugging Face hub id, or `embedded` (the small model inside fitune).",
    )
    dtype: Literal["fp32", "fp16", "bf16"] | None = Field(
        None,
        description="Storage and compute dtype of the base weights. None: bf16 on a GPU that has it, else fp16 on a "
        "GPU, fp32 on CPU.",
    )
    quantization: Literal["none", "int8", "nf4", "fp4", "fp8"] = Field(
        "none",
        description="How the frozen linear layers of the blocks are stored: `none` (in dtype; what bitsandbytes "
        "quantized stays so), `int8`, `nf4` or `fp4` (4 bits), expanded for each product; `fp8`, multiplied as it is "
        "on GPUs that can. Not for method full.",
    )
    int8_compute: Literal["weight_only", "llm_int8"] = Field(
        "weight_only",
        description="How int8 weights multiply: `weight_only` (expanded to dtype) or `llm_int8` (inputs in 8 bits too, "
        "outlier columns in dtype, as in LLM.int8(); on the plain path).",
    )
    int8_threshold: Number = Field(
        6.0,
        ge=0,
        le=65504,
        description="Magnitude from which a column of the inputs is an outlier of `llm_int8`; 0: no column is.",
    )

    _path = field_validator("path")(check_path)


class DataConfig(Section):
    """Where rows come from and how they become token ids."""

    train: tuple[str, ...] = Field((), description="Training files: .json, .jsonl, either also .gz.")
    eval: tuple[str, ...] | float | None = Field(
        None,
        description="Held-out rows: files, or a fraction of the training rows between 0 and 0.5 taken out by a hash of "
        "each row. None: no evaluation.",
    )
    format: Literal["auto", "alpaca", "messages", "text"] = Field(
        "auto", description="Row format; `auto` recognises it by the keys of each file's first row."
    )
    template: str = Field(
        "auto",
        min_length=1,
        description="Conversation layout: `model` (the tokenizer's own chat template), tutorial, alpaca, chatml, "
        "llama3, chatglm3, chatglm2, chatglm; `auto` is `model` if the tokenizer has a template, else that of ChatGLM "
        "for its tokenizers, else `tutorial`.",
    )
    max_length: Whole = Field(
        1024, ge=8, le=10_000_000, description="Longest row, in tokens, end-of-sequence token included."
    )
    loss_on: Literal["answers", "all"] = Field(
        "answers", description="Tokens that count in the loss: the assistant's answers, or the whole text."
    )
    packing: Switch = Field(
        False,
        description="Put several rows one after another into one sequence (each row still attends to itself only) "
        "instead of padding each row.",
    )
    on_bad_rows: Literal["refuse", "quarantine"] = Field(
        "refuse",
        description="`refuse`: any bad row stops the run before the model loads (exit 3). `quarantine`: bad rows go to "
        "rejected.jsonl and are counted.",
    )
    on_long_rows: Literal["refuse", "truncate", "quarantine"] = Field(
        "refuse",
        description="Rows longer than max_length whose answer would be cut: stop the run, cut them (the answer loses "
        "its end), or put them into rejected.jsonl.",
    )

    @field_validator("train", mode="before")
    @classmethod
    def _files(cls, value: object) -> object:
        return check_files(value)

    @field_validator("eval", mode="before")
    @classmethod
    def _files_or_fraction(cls, value: object) -> object:
        if value is None or isinstance(value, int | float):
            return no_boolean(value)
        return check_files(value, " or a fraction such as 0.05")

    @field_validator("eval")
    @classmethod
    def _fraction(cls, value: tuple[str, ...] | float | None) -> tuple[str, ...] | float | None:
        if isinstance(value, float) and not 0 < value <= 0.5:
            raise ValueError("a held-out fraction must be above 0 and at most 0.5; use null for no evaluation")
        return value


def _default_rates() -> str:
    rates = {name: section.default_learning_rate for name, section in METHODS.items()}
    return ", ".join(f"{rate:.0e}".replace("e-0", "e-") + f" for {name}" for name, rate in rates.items())


class TrainConfig(Section):
    """The training loop. A step is one optimizer update; a micro step is one forward and backward."""

    epochs: Number = Field(1.0, gt=0, le=10_000, description="Passes over the training rows; may be fractional.")
    max_steps: Whole | None = Field(
        None, gt=0, le=MANY, description="Stop after this many optimizer steps. None: decided by epochs."
    )
    global_batch_rows: Whole | None = Field(
        None, gt=0, le=MANY, description="Rows per optimizer step. None: 16, unless global_batch_tokens is set."
    )
    global_batch_tokens: Whole | None = Field(
        None,
        gt=0,
        le=MANY,
        description="Tokens per optimizer step: rows are taken until the next one would pass this number.",
    )
    micro_batch_rows: Whole | None = Field(
        None, gt=0, le=MANY, description="Rows per forward pass when padded (never changes an update). None: 4."
    )
    micro_batch_tokens: Whole | None = Field(
        None,
        gt=0,
        le=MANY,
        description="Tokens per forward pass when packed (never changes an update). None: 2 * data.max_length.",
    )
    learning_rate: Number | None = Field(
        None, gt=0, le=1000, description=f"Peak learning rate. None: {_default_rates()}."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Learning rate after warm-up: constant, or falling to 0 at the last step."
    )
    warmup_steps: Whole = Field(
        0, ge=0, le=MANY, description="Steps over which the learning rate rises linearly from 0."
    )
    weight_decay: Number = Field(0.0, ge=0, le=1000, description="Decoupled weight decay of AdamW.")
    max_grad_norm: Number = Field(1.0, ge=0, description="Gradients are scaled to at most this norm; 0 turns it off.")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="`adamw` (PyTorch, fused) or `adamw8bit` (bitsandbytes, 8-bit states)."
    )
    optimizer_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Dtype of the master weights and of Adam's states."
    )
    adam_beta1: Number = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay.")
    adam_beta2: Number = Field(0.999, ge=0, lt=1, description="Adam's second-moment decay.")
    adam_epsilon: Number = Field(1e-8, gt=0, le=1, description="Adam's epsilon.")
    seed: Whole = Field(0, ge=0, lt=2**31, description="Decides sample order, adapter initialisation and dropout.")
    deterministic: Switch = Field(
        False,
        description="Only deterministic GPU kernels: a resumed run is bit-identical. CPU runs always are.",
    )
    path: Literal["auto", "fast", "plain"] = Field(
        "auto",
        description="`auto`: the engine (docs/engine.md) where it can run the model and method, else transformers' own "
        "forward, saying why; `plain`: always transformers; `fast`: the engine, or refuse.",
    )
    activation_checkpointing: Literal["none", "elementwise", "attention", "full", "offload"] | Switch = Field(
        False,
        description="What the backward pass computes again instead of keeping, from most memory to least: `none`, "
        "`elementwise` (norms and activations; the same as false), `attention` (the first half of the MLP besides), "
        "`full` (everything but each block's input; the same as true: about a third more time), `offload` (the same, "
        "with those inputs, and an untied embedding, in host memory).",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train; `auto`: cuda if there is one.")
    save_every_steps: Whole = Field(100, gt=0, le=MANY, description="Commit a checkpoint every so many steps.")
    eval_every_steps: Whole | None = Field(
        None,
        gt=0,
        le=MANY,
        description="Evaluate every so many steps, besides at the start and the end. None: save_every_steps.",
    )
    keep_checkpoints: Whole = Field(
        2, gt=0, le=1_000_000, description="Newest checkpoints kept; the best held-out one stays besides."
    )


class MemoryConfig(Section):
    """What the run may use."""

    budget: Number | None = Field(
        None,
        gt=0,
        le=1e6,
        description="GPU memory the run may take, in GB (1e9 bytes); going past it ends the run with exit 4.",
    )


class OutputConfig(Section):
    """Where results go."""

    dir: str | None = Field(None, min_length=1, description="Run folder. None: runs/<name of the configuration file>.")

    @field_validator("dir")
    @classmethod
    def _dir(cls, value: str | None) -> str | None:
        return None if value is None else check_path(value)


class RunConfig(Section):
    """One run of fitune."""

    model: ModelConfig
    method: MethodConfig = Field(default_factory=lambda: LoraConfig(name="lora"), description="What is trained.")
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
