"""Does a run fit memory.budget, and what to change first if it does not."""

from __future__ import annotations

from collections.abc import Iterator

from fitune.config import RunConfig, build
from fitune.errors import ConfigError, PlanError
from fitune.plan.arch import ArchSpec
from fitune.plan.checks import check_run
from fitune.plan.hardware import MIB
from fitune.plan.lengths import Lengths
from fitune.plan.memory import MemoryPlan, plan_memory
from fitune.plan.saves import LEVELS, level_of
from fitune.plan.weights import SHARED_SEGMENT, shared_segments

GB = 1e9
SEGMENT = 2 * MIB  # PyTorch's allocator takes one for each tensor from 10 MiB on, rounded up to so much


def needed_bytes(plan: MemoryPlan) -> int:
    """What a budget must hold: the CUDA context, the peak, and what the allocator reserves beyond it."""
    if plan.job.hardware.on_cpu:
        return plan.peak_bytes
    return plan.device_bytes + unused_bytes(plan.job.arch.layers) + shared_segments(plan.job)


def unused_bytes(blocks: int) -> int:
    """Reserved, but in no tensor, at most: the ends of segments (`engine.segments`). Of 4-bit weights there are more.

    One for each block's weights, six for embedding, head, buffers and what is small, and one that is shared. Measured:
    docs/memory.md. Near its cap the allocator gives whole segments back before it fails.
    """
    return SEGMENT * (blocks + 6) + SHARED_SEGMENT


def fits(plan: MemoryPlan, config: RunConfig) -> bool | None:
    """Whether the plan stays within memory.budget; None without a budget, on CPU, or if only a lower bound does."""
    if config.memory.budget is None or config.train.device == "cpu":
        return None
    if needed_bytes(plan) > config.memory.budget * GB:
        return False
    return None if plan.plain_reason else True


def check_budget(plan: MemoryPlan, config: RunConfig, lengths: Lengths | str) -> None:
    """Refuse a run that cannot fit.

    Args:
        plan: of `config` and `lengths`.

    Raises:
        PlanError: with the largest part and the first change that would make it fit.
    """
    if fits(plan, config) is not False:
        return
    budget = config.memory.budget or 0
    least = "at least " if plan.plain_reason else ""
    rest = needed_bytes(plan) - plan.peak_bytes
    largest = plan.largest
    raise PlanError(
        f"memory.budget is {budget:g} GB, but this run takes {least}{_gb(needed_bytes(plan))} "
        f"({_gb(plan.peak_bytes)} in the phase `{plan.peak_phase}`, {_gb(rest)} for the CUDA context and what the "
        f"allocator cannot use). The largest part is `{largest.name}` with {_gb(largest.bytes)}. "
        f"{_advice(plan, config, lengths)}"
    )


def _advice(plan: MemoryPlan, config: RunConfig, lengths: Lengths | str) -> str:
    """The first setting that suffices alone; else as many as it takes; else the least there can be."""
    budget = (config.memory.budget or 0) * GB

    def needed(changed: RunConfig) -> int:
        return needed_bytes(plan_memory(plan.job.arch, changed, lengths, plan.job.hardware))

    for keys in _levers(config):
        for key, value in keys:
            changed = _changed(config, plan.job.arch, key, value)
            if changed is not None and needed(changed) <= budget:
                return f"{key}={_shown(value)} brings it to {_gb(needed(changed))}"
    together: list[str] = []
    current, least = config, (needed_bytes(plan), "")
    for keys in _levers(config):
        usable = [(key, value, new) for key, value in keys if (new := _changed(current, plan.job.arch, key, value))]
        if not usable:
            continue
        key, value, current = usable[-1]
        together.append(f"{key}={_shown(value)}")
        taken = needed(current)
        if taken <= budget:
            return f"No single setting is enough; {' '.join(together)} brings it to {_gb(taken)}"
        least = min(least, (taken, " ".join(together)))  # quantizing a tiny model takes more, not less
    how = f"; with {least[1]} it still takes {_gb(least[0])}" if least[1] else ""
    return f"No setting of this release makes it fit{how}. Raise memory.budget or take a smaller model"


def _levers(config: RunConfig) -> Iterator[list[tuple[str, object]]]:
    """What costs least first: smaller micro-steps, more recomputation, smaller weights; mild values first."""
    packed = config.data.packing
    key = "micro_batch_tokens" if packed else "micro_batch_rows"
    now = getattr(config.train, key) or (2 * config.data.max_length if packed else 4)
    smallest = config.data.max_length if packed else 1
    smaller: list[tuple[str, object]] = []
    while now > smallest:
        now = max(now // 2, smallest)
        smaller.append((f"train.{key}", now))
    yield smaller
    stronger = LEVELS[LEVELS.index(level_of(config.train.activation_checkpointing)) + 1 :]
    yield [("train.activation_checkpointing", value) for value in stronger]
    if config.model.quantization == "none":
        yield [("model.quantization", value) for value in ("int8", "nf4")]


def _changed(config: RunConfig, arch: ArchSpec, key: str, value: object) -> RunConfig | None:
    """The configuration with one more setting; None where the two cannot go together."""
    section, name = key.split(".")
    tree = config.model_dump()
    tree[section][name] = value
    try:
        changed = build(tree)
        check_run(changed, arch, arch.positions)
    except ConfigError:
        return None
    return changed


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.2f} GB"
