"""Bytes of a run by part, and the phase in which their sum is largest: the closed form, without torch or weights.

    plan = plan_memory(read_arch(config_json), config, Lengths(train, eval))
    plan.peak_bytes, plan.phases["backward"]

It describes the engine (docs/engine.md). `saves.py` is the declaration of what a block keeps; each other part is one
function of `Job` below. A run on the plain path needs more than this counts, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fitune.config import LoraConfig, MethodConfig, RunConfig
from fitune.errors import ConfigError
from fitune.plan.arch import ArchSpec
from fitune.plan.hardware import CPU, HOPPER, MIB, NUM_WORKSPACES, Hardware
from fitune.plan.lengths import Lengths, MicroStep, micro_step
from fitune.plan.params import Tensors, adapted, trainable
from fitune.plan.saves import GROUPS, LEVELS, BlockShape, Level, block_saves, saved_bytes

Phase = Literal["loading", "self-check", "forward", "head", "backward", "optimizer step"]
STEP: tuple[Phase, ...] = ("forward", "head", "backward", "optimizer step")
READY: tuple[Phase, ...] = ("self-check", *STEP)
PHASES: tuple[Phase, ...] = ("loading", *READY)

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
ENGINE_FAMILIES = ("glm", "llama", "mistral", "qwen2", "qwen3")
COLUMN_MULTIPLE = 16  # adapter columns per group: what GEMMs want of a row's stride
HEAD_BYTES, HEAD_ROWS, HEAD_MULTIPLE = 64 * MIB, (128, 4096), 64
CHECK_TOKENS = 256
QUANT_BLOCK, QUANT_NESTED = 64, 256  # elements per absmax, and absmax per second-level absmax, of nf4 and fp4
QUANT_TABLES = 4 * 16 + 4 * 256 + 4  # two code books and an offset
ADAM8_BLOCK, ADAM8_FROM = 256, 4096  # bitsandbytes keeps smaller tensors' states in fp32


@dataclass(frozen=True)
class Part:
    """Bytes of one thing, the formula they come from, and when they are taken."""

    name: str
    bytes: int
    formula: str
    phases: tuple[Phase, ...] = PHASES


@dataclass(frozen=True)
class Job:
    """What of a run decides its bytes.

    Attributes:
        dtype_bytes: of the base weights and of activations.
        quantization: none, int8, fp8, nf4 or fp4.
        level: what a block keeps (`saves.LEVELS`).
        lora: adapter columns of each group of `saves.GROUPS`.
        step: the largest micro-step.
        engine: False on the plain path.
    """

    arch: ArchSpec
    method: MethodConfig
    dtype_bytes: int
    quantization: str
    level: Level
    lora: tuple[int, int, int, int]
    step: MicroStep
    max_length: int
    optimizer: str
    master_bytes: int
    hardware: Hardware
    engine: bool = True

    @property
    def shape(self) -> BlockShape:
        """One block with its adapter columns."""
        return self.arch.block_shape(self.lora)

    @property
    def tokens(self) -> int:
        """Tokens a micro-step's buffers are made for."""
        return self.step.tokens if self.engine else self.step.padded

    @property
    def trained(self) -> tuple[Tensors, ...]:
        """Trainable tensors."""
        return trainable(self.arch, self.method)

    @property
    def num_trained(self) -> int:
        """Trainable parameters."""
        return sum(tensors.elements * tensors.copies for tensors in self.trained)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part.

    Attributes:
        job: what was planned.
        parts: those that are not empty.
        plain_reason: why the run takes the plain path, whose activations this does not count in full; None: it
            takes the engine.
    """

    job: Job
    parts: tuple[Part, ...]
    plain_reason: str | None

    @property
    def phases(self) -> dict[Phase, int]:
        """Bytes taken in each phase."""
        return {phase: sum(part.bytes for part in self.parts if phase in part.phases) for phase in PHASES}

    @property
    def peak_phase(self) -> Phase:
        """The phase with most bytes."""
        return max(PHASES, key=lambda phase: self.phases[phase])

    @property
    def peak_bytes(self) -> int:
        """What PyTorch's allocator hands out at most."""
        return self.phases[self.peak_phase]

    @property
    def device_bytes(self) -> int:
        """The same with the CUDA context: what the device loses to the run."""
        return self.peak_bytes + self.job.hardware.context_bytes

    @property
    def largest(self) -> Part:
        """The largest part of the peak."""
        return max((part for part in self.parts if self.peak_phase in part.phases), key=lambda part: part.bytes)


def plan_memory(arch: ArchSpec, config: RunConfig, lengths: Lengths | str, hardware: Hardware = HOPPER) -> MemoryPlan:
    """Bytes of a run by part.

    Args:
        config: resolved. A dtype that is not set is planned as bf16 on a GPU and fp32 on CPU.
        lengths: tokens of the rows, or why they are not known (then every row is as long as it may be).
        hardware: constants of the GPU (`hardware.find_gpu`), by default those of the GPU that takes most.

    Raises:
        ConfigError: the method does not fit the architecture, or rows may be longer than the model's positions.
    """
    if arch.positions is not None and config.data.max_length > arch.positions:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but this model has {arch.positions} positions; "
            f"set data.max_length={arch.positions} or less"
        )
    reason = plain_reason(arch, config)
    on_cpu = config.train.device == "cpu"
    job = Job(
        arch=arch,
        method=config.method,
        dtype_bytes=DTYPE_BYTES[config.model.dtype or ("fp32" if on_cpu else "bf16")],
        quantization=config.model.quantization,
        level=level(config),
        lora=lora_columns(arch, config) if reason is None else (0, 0, 0, 0),
        step=micro_step(config, lengths),
        max_length=config.data.max_length,
        optimizer=config.train.optimizer,
        master_bytes=DTYPE_BYTES[config.train.optimizer_dtype],
        hardware=CPU if on_cpu else hardware,
        engine=reason is None,
    )
    return MemoryPlan(job, parts(job), reason)


def parts(job: Job) -> tuple[Part, ...]:
    """Every part that takes bytes."""
    return tuple(part for part in (term(job) for term in TERMS) if part.bytes)


def level(config: RunConfig) -> Level:
    """The recompute level that `train.activation_checkpointing` asks for: a switch, or the name of a level."""
    wanted: object = config.train.activation_checkpointing
    for name in LEVELS:
        if wanted == name:
            return name
    return "full" if wanted else "elementwise"


def plain_reason(arch: ArchSpec, config: RunConfig) -> str | None:
    """Why a run cannot take the engine; None if it can."""
    if arch.family not in ENGINE_FAMILIES:
        return f"the engine has no block for {arch.family}"
    if not isinstance(config.method, LoraConfig):
        return f"the engine trains adapters, not method.name={config.method.name}"
    return "the engine has no adapter dropout" if config.method.dropout else None


def lora_columns(arch: ArchSpec, config: RunConfig) -> tuple[int, int, int, int]:
    """Adapter columns R of each group of `saves.GROUPS`: ranks of its adapted layers, rounded up to 16."""
    if not isinstance(config.method, LoraConfig):
        return (0, 0, 0, 0)
    ranks = dict.fromkeys(GROUPS, 0)
    for linear, _ in adapted(arch, config.method.target_modules):
        ranks[linear.group] += config.method.r
    qkv, o, up, down = (-(-ranks[group] // COLUMN_MULTIPLE) * COLUMN_MULTIPLE for group in GROUPS)
    return qkv, o, up, down


def head_rows(vocab: int) -> int:
    """Rows M of one chunk of logits: about 64 MiB of 16-bit logits, a multiple of 64 between 128 and 4,096."""
    rows = HEAD_BYTES // (2 * vocab) // HEAD_MULTIPLE * HEAD_MULTIPLE
    return min(max(rows, HEAD_ROWS[0]), HEAD_ROWS[1])


def quantized_bytes(quantization: str, outs: int, ins: int) -> int:
    """Bytes of one (outs, ins) weight in quantized storage, scales and tables included."""
    elements = outs * ins
    if quantization in ("int8", "fp8"):
        return elements + 4 * outs
    blocks = -(-elements // QUANT_BLOCK)
    return -(-elements // 2) + blocks + 4 * -(-blocks // QUANT_NESTED) + QUANT_TABLES


def _outer_weights(job: Job) -> Part:
    inside = sum(linear.outs * linear.ins for linear in job.arch.linears) * job.arch.layers
    rest = job.arch.total - inside
    return Part("embedding, norms, head", rest * job.dtype_bytes, f"{rest:,} parameters x {job.dtype_bytes} B")


def _block_weights(job: Job) -> Part:
    name, layers, arch = "block weights", job.arch.layers, job.arch
    if job.quantization != "none":
        one = sum(quantized_bytes(job.quantization, linear.outs, linear.ins) for linear in arch.linears)
        return Part(name, layers * one, f"{layers} blocks x {one:,} B as {job.quantization} with scales")
    one = sum((outs + columns) * (ins + columns) for outs, ins, columns in job.shape.groups.values())
    formula = f"{layers} blocks x sum of (outs + R) (ins + R) over groups x {job.dtype_bytes} B"
    return Part(name, layers * one * job.dtype_bytes, formula)


def _adapters(job: Job) -> Part:
    count = job.num_trained if isinstance(job.method, LoraConfig) else 0
    return Part("adapters", 4 * count, f"{count:,} parameters x 4 B")


def _masters(job: Job) -> Part:
    stored = 4 if isinstance(job.method, LoraConfig) else job.dtype_bytes
    same = stored == job.master_bytes
    formula = f"{job.num_trained:,} trained parameters x {job.master_bytes} B"
    return Part("master weights", 0 if same else job.num_trained * job.master_bytes, formula)


def _gradients(job: Job) -> Part:
    one = 4 if isinstance(job.method, LoraConfig) else job.master_bytes
    return Part("gradients", one * job.num_trained, f"{job.num_trained:,} trained parameters x {one} B", READY)


def _optimizer(job: Job) -> Part:
    if job.optimizer == "adamw":
        one = 2 * job.master_bytes
        formula = f"{job.num_trained:,} trained parameters x {one} B"
        return Part("optimizer states", one * job.num_trained, formula, STEP)
    total = sum(_adam8_bytes(tensors.elements) * tensors.copies for tensors in job.trained)
    return Part("optimizer states", total, f"2 B + 8 B per {ADAM8_BLOCK}; 8 B below {ADAM8_FROM:,} elements", STEP)


def _adam8_bytes(elements: int) -> int:
    return 8 * elements if elements < ADAM8_FROM else 2 * elements + 8 * -(-elements // ADAM8_BLOCK)


def _scratch(job: Job) -> Part:
    largest = max((outs + columns) * (ins + columns) for outs, ins, columns in job.shape.groups.values())
    size = 0 if job.quantization == "none" else largest * job.dtype_bytes
    return Part("dequantization scratch", size, f"largest group (outs + R) (ins + R) x {job.dtype_bytes} B", READY)


def _saved(job: Job) -> Part:
    size = saved_bytes(job.shape, job.level, job.tokens, job.arch.layers, job.dtype_bytes)
    row = sum(saved.bytes_per_token(job.dtype_bytes) for saved in block_saves(job.shape, job.level))
    formula = f"{job.arch.layers} blocks x {job.tokens:,} tokens x {row:,} B at level {job.level}"
    return Part("saved activations", size, formula, STEP)


def _residual(job: Job) -> Part:
    width = job.arch.hidden
    formula = f"{job.tokens:,} tokens x {width:,} x {job.dtype_bytes} B"
    return Part("output of the blocks", job.tokens * width * job.dtype_bytes, formula, STEP)


def _residual_gradient(job: Job) -> Part:
    width = job.arch.hidden + max(job.lora[1], job.lora[3])
    formula = f"{job.tokens:,} tokens x {width:,} x {job.dtype_bytes} B"
    return Part("residual gradient", job.tokens * width * job.dtype_bytes, formula, ("head", "backward"))


def _recomputed(job: Job) -> Part:
    """What one block makes and the level does not keep: needed by its forward, made again in its backward."""
    kept = {saved.name for saved in block_saves(job.shape, job.level)}
    row = sum(s.bytes_per_token(job.dtype_bytes) for s in block_saves(job.shape, "none") if s.name not in kept)
    formula = f"{job.tokens:,} tokens x {row:,} B"
    return Part("working set of a block", job.tokens * row, formula, ("forward", "backward"))


def _block_gradients(job: Job) -> Part:
    """Gradients inside one block's backward: dy, and the larger of dact and (da with dq, dk, dv)."""
    shape = job.shape
    width = shape.hidden + max(shape.intermediate, shape.attention + shape.qkv)
    size = job.tokens * (width * job.dtype_bytes + 4 * shape.heads)
    formula = f"{job.tokens:,} tokens x ({width:,} x {job.dtype_bytes} B + 4 B per head)"
    return Part("gradients inside a block", size, formula, ("backward",))


def _head(job: Job) -> Part:
    vocab, width, size = job.arch.vocab, job.arch.hidden, job.dtype_bytes
    if not job.engine:
        formula = f"all logits: {job.tokens:,} positions x {vocab:,} x {size} B, at least"
        return Part("head", job.tokens * vocab * size, formula, ("head",))
    rows = min(head_rows(vocab), job.tokens)
    formula = f"{rows:,} rows x ({vocab:,} logits + 3 x {width:,}) x {size} B"
    return Part("head chunk", rows * ((vocab + 3 * width) * size + 8), formula, ("head",))


def _rope_tables(job: Job) -> Part:
    formula = f"{job.max_length:,} positions x {job.arch.rotary} x 4 B"
    return Part("rotary tables", 4 * job.max_length * job.arch.rotary, formula)


def _rows(job: Job) -> Part:
    return Part("ids, labels, positions", 32 * job.tokens, f"{job.tokens:,} tokens x 32 B", STEP)


def _workspaces(job: Job) -> Part:
    one = job.hardware.workspace_bytes
    formula = f"{NUM_WORKSPACES} x {one / MIB:g} MiB on {job.hardware.name}"
    return Part("cuBLAS workspaces", NUM_WORKSPACES * one, formula, READY)


def _loading_copy(job: Job) -> Part:
    """A group is put together, or quantized, from the weights as they were read."""
    outs, ins, _ = max(job.shape.groups.values(), key=lambda group: group[0] * group[1])
    needed = job.engine or job.quantization != "none"
    formula = f"largest group {outs:,} x {ins:,} x {job.dtype_bytes} B"
    return Part("group being put together", outs * ins * job.dtype_bytes if needed else 0, formula, ("loading",))


def _self_check(job: Job) -> Part:
    """One row through transformers and PEFT under autograd, before the engine's buffers for activations are made.

    What those keep per token (20 H + 6 I + ... bytes in 16 bit, and 14 per logit) was measured on Llama 3.2 1B.
    """
    if not job.engine:
        return Part("self-check", 0, "")
    shape, tokens = job.shape, min(CHECK_TOKENS, job.max_length)
    width = 10 * shape.hidden + 3 * shape.intermediate + 2 * shape.kv_heads * shape.head_dim + 2 * shape.heads
    kept = tokens * job.arch.layers * width * job.dtype_bytes
    logits = tokens * job.arch.vocab * (job.dtype_bytes + 12)
    formula = f"{tokens} tokens on the plain path; its gradients beside the engine's"
    return Part("self-check", kept + logits + 4 * job.num_trained, formula, ("self-check",))


TERMS: tuple[Callable[[Job], Part], ...] = (
    _outer_weights,
    _block_weights,
    _adapters,
    _masters,
    _gradients,
    _optimizer,
    _scratch,
    _saved,
    _residual,
    _residual_gradient,
    _recomputed,
    _block_gradients,
    _head,
    _rope_tables,
    _rows,
    _workspaces,
    _loading_copy,
    _self_check,
)
