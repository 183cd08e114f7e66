"""Parts of a run's memory that hold the model's frozen weights, see `parts.py`."""

from __future__ import annotations

from fitune.plan.arch import Linear
from fitune.plan.hardware import MIB
from fitune.plan.job import Job
from fitune.plan.part import Part

QUANT_BLOCK, QUANT_NESTED = 64, 256  # elements per absmax, and absmax per second-level absmax, of nf4 and fp4
SHARED_SEGMENT = 20 * MIB
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
    moves = job.engine and not job.hardware.on_cpu
    block = max(sum(size for size, moved in groups if moved) for groups in _blocks(job)) if moves else 0
    formula = f"embedding, {job.hosted:,} parameters x {job.dtype_bytes} B" if embedding > block else "largest block"
    return Part("moved while loading", max(embedding, block), formula, ("loading",))


def block_weights(job: Job) -> Part:
    """Frozen weights, with the model's dtype copies of the adapters in them or, if quantized, beside them.

    A product in fp8 needs a scale for every row: ones for each input of a group, whose own scales are folded elsewhere.
    """
    name, layers, size = "block weights", job.arch.layers, job.dtype_bytes
    total = sum(size for groups in _blocks(job) for size, _ in groups)
    if job.quantization == "none":
        return Part(name, total, f"{layers} blocks x sum of (outs + R) (ins + R) over groups x {size} B")
    one = sum(_quantized(job, linear) for linear in job.arch.linears)
    formula = f"{layers} blocks x {one:,} B as {job.quantization} with scales; R (outs + ins) x {size} B"
    if job.arch.whole:
        count = layers * len(job.arch.linears)
        whole = f"{len(job.arch.whole)} layers whole, (outs + R) (ins + R) x {size} B over groups"
        formula = f"{whole}; {count - len(job.arch.whole)} as {job.quantization} with scales, R (outs + ins) x {size} B"
    return Part(name, total, formula)


def _blocks(job: Job) -> list[list[tuple[int, bool]]]:
    """Of each block's groups: bytes of the weights, see `block_weights`, and whether they move, see `on_its_way`."""
    size, ones = job.dtype_bytes, 4 if job.shape.fp8 else 0
    blocks = []
    for number, columns in enumerate(job.columns):
        groups: list[tuple[int, bool]] = []
        for group, (outs, ins, r) in job.arch.block_shape(columns).groups.items():
            linears = [linear for linear in job.arch.linears if linear.group == group]
            whole = [linear for linear in linears if job.is_whole(number, linear)]
            if len(whole) == len(linears):
                groups.append((size * (outs + r) * (ins + r), True))
                continue
            stored = sum(size * one.outs * one.ins if one in whole else _quantized(job, one) for one in linears)
            groups.append((stored + ones * ins + size * r * (outs + ins), job.quantization in ("int8", "fp8")))
        blocks.append(groups)
    return blocks


def shared_segments(job: Job) -> int:
    """What is left, in bytes, of PyTorch's segments of 20 MiB that 4-bit weights lie in.

    A tensor of 1 to 10 MiB goes to where it fits best, else into a new segment: of 8 MiB, as of Llama-2-7B's attention,
    two into each. All else lies in segments of its own, see `budget.unused_bytes`.
    """
    if job.quantization not in ("nf4", "fp4"):
        return 0
    left: list[int] = []
    for number in range(job.arch.layers):
        for linear in job.arch.linears:
            elements = 0 if job.is_whole(number, linear) else linear.outs * linear.ins
            for size in (-(-elements // 2), -(-elements // QUANT_BLOCK) * (1 if job.arch.double_quant else 4)):
                if MIB < size < 10 * MIB:
                    fitting = [room for room in left if room >= size]
                    room = min(fitting, default=SHARED_SEGMENT)
                    if fitting:
                        left.remove(room)
                    left.append(room - size)
    return sum(left)


def _quantized(job: Job, linear: Linear) -> int:
    return quantized_bytes(job.quantization, linear.outs, linear.ins, job.arch.double_quant)
