"""Every part of a run's memory as one function of a `Job`; what the engine's buffers hold is declared in saves.py.

A term of the sum is added or corrected here, in `TERMS`. Sizes are bytes, exact where the engine allocates by the
declaration; the self-check's activations are those of transformers and PEFT and an estimate.

Phases follow the run: `capture` is a micro-step whose size the engine meets for the first time, which then becomes CUDA
graphs; the others are those of every step.
"""

from __future__ import annotations

from collections.abc import Callable

from fitune.config import LoraConfig, new_tokens
from fitune.plan.hardware import MIB, NUM_WORKSPACES
from fitune.plan.job import Job
from fitune.plan.part import AGAIN, READY, STEP, Part
from fitune.plan.saves import (
    GROUPS,
    block_saves,
    checked_tokens,
    documents,
    head_bytes,
    head_rows,
    integers,
    saved_bytes,
    shared_buffers,
    shared_bytes,
)
from fitune.plan.virtual import encoded_rows, virtual_rows
from fitune.plan.weights import block_weights, on_its_way, outer_weights

STAGING_SLOTS = 4  # copies of a micro-step's integers that the host keeps
SENT_SLOTS = 2  # rows of a hosted embedding on their way to the device
REFRESH_BYTES = 44  # per adapter matrix, in the table of what is copied at the start of a micro-step
QUANT_SLICE_BYTES = 6 * 4 * 2**22  # weights on their way into 4 bits: six fp32 slices
ADAM8_BLOCK, ADAM8_FROM = 256, 4096  # bitsandbytes keeps smaller tensors' states in fp32


def _adapters(job: Job) -> Part:
    count = job.stored("beside")
    return Part("adapters", 4 * count, f"{count:,} parameters x 4 B")


def _starts(job: Job) -> Part:
    """What PiSSA and OLoRA took out of the weights."""
    count = job.stored("beside") if isinstance(job.method, LoraConfig) and job.method.init != "default" else 0
    return Part("adapters as they began", 4 * count, f"{count:,} parameters x 4 B")


def _copies(job: Job) -> Part:
    """Whole modules; PEFT puts the rows of new tokens into a copy of the head for each product."""
    count = job.stored("copy") + (job.arch.vocab * job.arch.hidden if new_tokens(job.method) else 0)
    return Part("modules trained whole", count * job.dtype_bytes, f"{count:,} parameters x {job.dtype_bytes} B")


def _masters(job: Job) -> Part:
    needed = job.num_mastered
    return Part("master weights", needed * job.master_bytes, f"{needed:,} parameters x {job.master_bytes} B", STEP)


def _gradients(job: Job) -> Part:
    one = 4 if job.own_gradients else job.master_bytes
    return Part("gradients", one * job.num_trained, f"{job.num_trained:,} trained parameters x {one} B", READY)


def _master_gradients(job: Job) -> Part:
    """The engine adds to fp32 gradients; they are handed to masters of another dtype before the step."""
    needed = job.num_trained if job.own_gradients and job.master_bytes != 4 else 0
    formula = f"{needed:,} parameters x {job.master_bytes} B"
    return Part("gradients of masters", needed * job.master_bytes, formula, ("optimizer step",))


def _captured_gradients(job: Job) -> Part:
    """Graphs are captured with real data in the buffers; gradients of earlier micro-steps are set aside meanwhile."""
    needed = job.num_trained if job.own_gradients and not job.hardware.on_cpu else 0
    return Part(
        "gradients set aside", 4 * needed, f"{needed:,} parameters x 4 B, while graphs are captured", ("capture",)
    )


def _optimizer(job: Job) -> Part:
    """Made by the first optimizer step: after the first capture, but before that of another size."""
    phases = AGAIN if job.step.alike else STEP
    if job.optimizer == "adamw":
        one = 2 * job.master_bytes
        formula = f"{job.num_trained:,} trained parameters x {one} B"
        return Part("optimizer states", one * job.num_trained, formula, phases)
    total = sum(_adam8_bytes(tensors.elements) * tensors.copies for tensors in job.trained)
    return Part("optimizer states", total, f"2 B + 8 B per {ADAM8_BLOCK}; 8 B below {ADAM8_FROM:,} elements", phases)


def _adam8_bytes(elements: int) -> int:
    return 8 * elements if elements < ADAM8_FROM else 2 * elements + 8 * -(-elements // ADAM8_BLOCK)


def _scratch(job: Job) -> Part:
    """Where quantized weights are expanded or transposed: one for all groups; a layer at a time on the plain path."""
    name, size = "dequantization scratch", job.dtype_bytes
    if job.quantization == "none":
        return Part(name, 0, "")
    if not job.engine:
        size = 1 if job.quantization == "fp8" else size
        return Part(name, _largest_layer(job) * size, f"largest layer outs x ins x {size} B", ("forward", "backward"))
    if job.shape.fp8:
        largest = max(outs * ins for outs, ins, _ in job.shape.groups.values())
        return Part(name, largest, "largest group outs x ins x 1 B, transposed codes", READY)
    largest = max(((outs + r) * (ins + r) for _, outs, ins, r in job.groups(whole=False)), default=0)
    return Part(name, largest * size, f"largest group (outs + R) (ins + R) x {size} B", READY)


def _largest_layer(job: Job) -> int:
    numbers = range(job.arch.layers)
    quantized = [one for one in job.arch.linears if not all(job.is_whole(number, one) for number in numbers)]
    return max((linear.outs * linear.ins for linear in quantized), default=0)


def _refresh_table(job: Job) -> Part:
    count = 2 * sum(len(blocks) for _, blocks in job.adapted) if job.engine and not job.hardware.on_cpu else 0
    return Part("table of adapter copies", REFRESH_BYTES * count, f"{count:,} matrices x {REFRESH_BYTES} B", READY)


def _saved(job: Job) -> Part:
    size = saved_bytes(job.shape, job.level, job.capacity, job.kept_blocks, job.dtype_bytes)
    kept = [saved for saved in block_saves(job.shape, job.level) if not saved.host]
    row = sum(saved.bytes_per_token(job.dtype_bytes) for saved in kept)
    formula = f"{job.kept_blocks} blocks x {job.capacity:,} tokens x {row:,} B at level {job.level}"
    return Part("saved activations", size, formula, STEP)


def _working_set(job: Job) -> Part:
    if not job.engine:
        return Part("working set", 0, "")
    row = sum(saved.bytes_per_token(job.dtype_bytes) for saved in shared_buffers(job.shape, job.level))
    size = shared_bytes(job.shape, job.level, job.capacity, job.dtype_bytes)
    return Part("working set", size, f"{job.capacity:,} tokens x {row:,} B, shared by all blocks", STEP)


def _head(job: Job) -> Part:
    vocab, size = job.arch.vocab, job.dtype_bytes
    if not job.engine:
        formula = f"{job.capacity:,} positions x {vocab:,} x {size} B, at least"
        return Part("logits", job.capacity * vocab * size, formula, ("head", "backward"))
    rows = head_rows(vocab, size)
    formula = f"{rows:,} rows x ({vocab:,} logits + 3 x {job.arch.hidden:,}) x {size} B"
    return Part("head chunk", head_bytes(job.shape, vocab, size), formula, READY)


def _rotary_tables(job: Job) -> Part:
    width = job.arch.rotary // 2 if job.engine else 0
    positions = job.max_length + job.shape.virtual
    formula = f"2 x {positions:,} positions x {width} x {job.dtype_bytes} B"
    return Part("rotary tables", 2 * positions * width * job.dtype_bytes, formula, READY)


def _rows(job: Job) -> Part:
    if not job.engine:
        return Part("ids, labels, positions", 32 * job.capacity, f"{job.capacity:,} tokens x 32 B", STEP)
    wide, narrow = len(integers(job.shape)), len(documents(job.shape))
    formula = f"{_padded(job, job.capacity):,} x {wide} x 8 B, {job.capacity:,} x {narrow} x 4 B"
    return Part("ids, labels, positions", _rows_bytes(job, job.capacity), formula, STEP)


def _rows_bytes(job: Job, tokens: int) -> int:
    """Integers of a micro-step of the engine; those of the head are padded to whole chunks."""
    return 8 * len(integers(job.shape)) * _padded(job, tokens) + 4 * len(documents(job.shape)) * tokens


def _padded(job: Job, tokens: int) -> int:
    chunk = head_rows(job.arch.vocab, job.dtype_bytes)
    return -(-tokens // chunk) * chunk


def host_bytes(job: Job) -> int:
    """Page-locked host memory of the engine; none without a GPU or on the plain path.

    PyTorch's pinned allocator rounds each block up to a power of two, and those of the self-check stay with it: they
    serve the steps only if those need blocks of the same size.
    """
    if not job.engine or job.hardware.on_cpu:
        return 0
    most: dict[int, int] = {}
    for at in (job.checked, job.capacity):
        blocks = [(STAGING_SLOTS, 8 * len(integers(job.shape)) * _padded(job, at))]
        blocks.append((job.kept_blocks, saved_bytes(job.shape, job.level, at, 1, job.dtype_bytes, host=True)))
        blocks.append((SENT_SLOTS if job.hosted else 0, job.arch.hidden * at * job.dtype_bytes))
        blocks.append((1, job.hosted * job.dtype_bytes))
        found: dict[int, int] = {}
        for count, size in blocks:
            rounded = 1 << (size - 1).bit_length() if size else 0
            found[rounded] = found.get(rounded, 0) + count  # a size of 0 adds nothing
        most |= {size: max(count, most.get(size, 0)) for size, count in found.items()}
    return sum(size * count for size, count in most.items())


def _workspaces(job: Job) -> Part:
    one, count = job.hardware.workspace_bytes, NUM_WORKSPACES["engine" if job.engine else "plain"]
    return Part("cuBLAS workspaces", count * one, f"{count} x {one / MIB:g} MiB on {job.hardware.name}", READY)


def _quantizing(job: Job) -> Part:
    """Weights are quantized slice by slice; on CPU the ones to come are still there in full."""
    if job.quantization == "none" or job.arch.quantized:
        return Part("weights being quantized", 0, "")
    full = job.dtype_bytes * job.arch.layers * sum(linear.outs * linear.ins for linear in job.arch.linears)
    size, formula = QUANT_SLICE_BYTES, "6 slices x 16 MiB"
    if job.hardware.on_cpu:
        size, formula = size + full, f"{formula} and the blocks in {job.dtype_bytes} B, at most"
    return Part("weights being quantized", size, formula, ("loading",))


def _loading_copy(job: Job) -> Part:
    """A group is put together from the weights as they were read; only fp8 does so with quantized ones, R apart.

    Not counted on a GPU: afterwards the whole block moves, see `weights.on_its_way`.
    """
    counts = {group: sum(linear.group == group for linear in job.arch.linears) for group in GROUPS}
    fp8 = job.shape.fp8
    size = 1 if fp8 else job.dtype_bytes
    sizes = [
        outs * ins if fp8 else (outs + r) * (ins + r)
        for group, outs, ins, r in (job.groups(whole=not fp8) if job.engine and job.hardware.on_cpu else ())
        if counts[group] > 1 or (r and not fp8)
    ]
    formula = f"largest group {'outs x ins' if fp8 else '(outs + R) (ins + R)'} x {size} B"
    return Part("group being put together", max(sizes, default=0) * size, formula, ("loading",))


def _check_buffers(job: Job) -> Part:
    """The engine's buffers, made for no more than the self-check until that is done."""
    if not job.engine:
        return Part("self-check: engine", 0, "")
    tokens = job.checked
    size = saved_bytes(job.shape, job.level, tokens, job.kept_blocks, job.dtype_bytes)
    size += shared_bytes(job.shape, job.level, tokens, job.dtype_bytes) + _rows_bytes(job, tokens)
    formula = f"saved activations, working set and integers of {tokens} tokens"
    return Part("self-check: engine", size, formula, ("self-check",))


def _check_copies(job: Job) -> Part:
    """What stays for the whole self-check: a copy of B or of factors; the inputs of all blocks, then their gradients.

    Also, with ALiBi, the bias of all scores, which the plain path hands to every block.
    """
    if not job.engine:
        return Part("self-check: copies", 0, "")
    rank = job.method.r if isinstance(job.method, LoraConfig) else 0
    what, copied = "B", rank * sum(linear.outs * len(blocks) for linear, blocks in job.adapted)
    if job.shape.scaled:
        what, copied = "factors", job.num_trained
    tokens, arch = _checked(job), job.arch
    size = 4 * copied + 2 * arch.layers * tokens * arch.hidden * job.dtype_bytes
    bias = 0 if arch.rotary else arch.heads * tokens * tokens * job.dtype_bytes
    formula = f"{copied:,} of {what} x 4 B; {arch.layers} x 2 x {tokens} tokens x {arch.hidden:,} x {job.dtype_bytes} B"
    formula += f"; {arch.heads} x {tokens}² x {job.dtype_bytes} B" if bias else ""
    return Part("self-check: copies", size + bias, formula, ("self-check",))


def _check_plain(job: Job) -> Part:
    """The largest of the self-check's moments: the plain path's loss, the engine's capture, a block under autograd."""
    name = "self-check: largest moment"
    if not job.engine:
        return Part(name, 0, "")
    tokens, vocab, size = _checked(job), job.arch.vocab, job.dtype_bytes
    needed = job.num_trained if job.own_gradients and not job.hardware.on_cpu else 0
    # Logits in their dtype, in fp32, and their logarithms; no gradient.
    moments = [
        (tokens * vocab * (size + 8), f"{tokens} tokens x {vocab:,} logits x {size + 8} B"),
        (4 * needed, f"{needed:,} gradients x 4 B set aside"),
        (_check_block(job), f"a block of {tokens} tokens under autograd"),
    ]
    return Part(name, *max(moments), ("self-check",))


def _checked(job: Job) -> int:
    """Tokens of the self-check, virtual ones included."""
    return checked_tokens(job.arch.vocab, job.step.first, job.shape.virtual) + job.shape.virtual


def _check_block(job: Job) -> int:
    """One block on the plain path, at its largest in the backward of the MLP or at its end.

    Both times two sets of gradients of the block before are there, one of each path. In the MLP: what autograd keeps of
    the block, some matrices as wide as the MLP, one expanded weight. At the end: the block's gradients and their copy.
    """
    tokens, method = _checked(job), job.method
    wide = {"bloom": 6, "chatglm": 2}.get(job.arch.family, 3)  # BLOOM's gelu is spelled out in PyTorch
    if isinstance(method, LoraConfig):
        wide = 4  # an adapter hands its input's gradient back in fp32
        trained = max(
            sum(method.r * (linear.ins + linear.outs) for linear, blocks in job.adapted if number in blocks)
            for number in range(job.arch.layers)
        )
    elif job.own_gradients:
        trained = sum(tensors.elements for tensors in job.trained if tensors.copies == job.arch.layers)
    else:
        trained = 0  # encoders do not run under autograd then
    expanded = 0 if job.quantization == "none" else 1 if job.quantization == "fp8" else job.dtype_bytes
    inside = tokens * (plain_bytes_per_token(job) + wide * job.shape.intermediate * job.dtype_bytes)
    return 8 * trained + max(8 * trained, inside + _largest_layer(job) * expanded)


def plain_bytes_per_token(job: Job) -> int:
    """What autograd keeps of one token in one block of the plain path; measured in bf16 on CPU.

    PEFT makes an fp32 copy of the input for every adapter on a 16-bit base. In fp32 this is an upper bound.
    """
    shape, method = job.shape, job.method
    keys = shape.kv_heads * shape.head_dim
    if shape.gated:
        tables = 2 * job.arch.rotary if job.arch.family == "glm" else 0  # GLM spreads them anew in each block
        kept = (6 * shape.hidden + 3 * shape.intermediate + 2 * keys + tables) * job.dtype_bytes + 4 * shape.heads + 8
    else:  # layer norms keep the mean as well; rotated queries and keys stand beside the projection's
        turned = 2 * shape.hidden if job.arch.rotary else 0
        kept = (6 * shape.hidden + turned + shape.intermediate) * job.dtype_bytes + 4 * shape.heads + 16
    if shape.qk_norm:
        kept += 4 * (shape.attention + keys + shape.heads + shape.kv_heads)
    rank = method.r if isinstance(method, LoraConfig) else 0
    if shape.scaled:  # outputs before they were multiplied, at most for all projections of a group
        kept += shape.qkv * job.dtype_bytes + 4 * shape.intermediate
    return kept + sum(4 * (linear.ins + rank) for linear, _ in job.adapted)


TERMS: tuple[Callable[[Job], Part], ...] = (
    outer_weights,
    on_its_way,
    block_weights,
    _adapters,
    _starts,
    _copies,
    _masters,
    _gradients,
    _master_gradients,
    _captured_gradients,
    _optimizer,
    _scratch,
    _refresh_table,
    _saved,
    _working_set,
    _head,
    _rotary_tables,
    virtual_rows,
    encoded_rows,
    _rows,
    _workspaces,
    _quantizing,
    _loading_copy,
    _check_buffers,
    _check_copies,
    _check_plain,
)


def parts(job: Job) -> tuple[Part, ...]:
    """Every part that takes bytes."""
    return tuple(part for part in (term(job) for term in TERMS) if part.bytes)
