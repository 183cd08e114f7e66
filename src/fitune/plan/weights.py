"""Parts of a run's memory that hold the model's frozen weights, see `parts.py`."""

from __future__ import annotations

from fitune.plan.job import Job
from fitune.plan.part import Part

QUANT_BLOCK, QUANT_NESTED = 64, 256  # elements per absmax, and absmax per second-level absmax, of nf4 and fp4
QUANT_TABLES = 4 * 16 + 4 * 256 + 4  # two code books and an offset


def quantized_bytes(quantization: str, outs: int, ins: int, double_quant: bool = True) -> int:
    """Bytes of one (outs, ins) weight in quantized storage, with scales (4-bit: in 8 bits, or in fp32) and tables."""
    elements = outs * ins
    if quantization in ("int8", "fp8"):
        return elements + 4 * outs
    blocks = -(-elements // QUANT_BLOCK)
    scales = blocks + 4 * -(-blocks // QUANT_NESTED) + QUANT_TABLES if double_quant else 4 * blocks + 4 * 16
    return -(-elements // 2) + scales


def outer_weights(job: Job) -> Part:
    """What is outside the blocks, without an embedding in the host's memory."""
    inside = sum(linear.outs * linear.ins for linear in job.arch.linears) * job.arch.layers
    rest = job.arch.total - inside - job.hosted
    name = "norms, head" if job.hosted else "embedding, norms, head"
    return Part(name, rest * job.dtype_bytes, f"{rest:,} parameters x {job.dtype_bytes} B")


def on_its_way(job: Job) -> Part:
    """The embedding before it moves into the host's memory, or after it a block's weights a second time.

    On a GPU the engine lays them side by side, but for those in 4 bits.
    """
    embedding = job.hosted * job.dtype_bytes
    moves = job.engine and not job.hardware.on_cpu and job.quantization in ("none", "int8", "fp8")
    block = max(_block_sizes(job)) if moves else 0
    formula = f"embedding, {job.hosted:,} parameters x {job.dtype_bytes} B" if embedding > block else "largest block"
    return Part("moved while loading", max(embedding, block), formula, ("loading",))


def _block_sizes(job: Job) -> list[int]:
    """Bytes of each block's weights, see `block_weights`."""
    size = job.dtype_bytes
    shapes = [job.arch.block_shape(columns).groups.values() for columns in job.columns]
    if job.quantization == "none":
        return [size * sum((outs + r) * (ins + r) for outs, ins, r in groups) for groups in shapes]
    one = _quantized_block(job) + (4 * sum(ins for _, ins, _ in shapes[0]) if job.shape.fp8 else 0)
    return [one + size * sum(r * (outs + ins) for outs, ins, r in groups) for groups in shapes]


def _quantized_block(job: Job) -> int:
    arch = job.arch
    return sum(quantized_bytes(job.quantization, linear.outs, linear.ins, arch.double_quant) for linear in arch.linears)


def block_weights(job: Job) -> Part:
    """Frozen weights, with the model's dtype copies of the adapters in them or, if quantized, beside them.

    A product in fp8 needs a scale for every row: ones for each input of a group, whose own scales are folded elsewhere.
    """
    name, layers, size, total = "block weights", job.arch.layers, job.dtype_bytes, sum(_block_sizes(job))
    if job.quantization == "none":
        return Part(name, total, f"{layers} blocks x sum of (outs + R) (ins + R) over groups x {size} B")
    one = _quantized_block(job)
    formula = f"{layers} blocks x {one:,} B as {job.quantization} with scales; R (outs + ins) x {size} B"
    return Part(name, total, formula)
