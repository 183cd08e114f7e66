"""Bytes of a run by part, and the phase in which their sum is largest: the closed form, without torch or weights.

    plan = plan_memory(read_arch(config_json), config, Lengths(train, eval))
    plan.peak_bytes, plan.phases["backward"]

It describes the engine (docs/engine.md). A run on the plain path needs more than this counts, and the plan says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from fitune.config import RunConfig
from fitune.plan.arch import ArchSpec
from fitune.plan.checks import check_run, plain_reason
from fitune.plan.hardware import CPU, HOPPER, Hardware
from fitune.plan.job import Columns, Job, block_columns
from fitune.plan.lengths import Lengths, micro_step
from fitune.plan.part import PHASES, Part, Phase
from fitune.plan.parts import host_bytes, parts
from fitune.plan.saves import Level, level_of

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


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
        """The phase with most bytes, the last of equal ones."""
        return max(reversed(PHASES), key=lambda phase: self.phases[phase])

    @property
    def peak_bytes(self) -> int:
        """What PyTorch's allocator hands out at most."""
        return self.phases[self.peak_phase]

    @property
    def device_bytes(self) -> int:
        """The same with `context_bytes`: what the device loses to the run."""
        return self.peak_bytes + self.context_bytes

    @property
    def context_bytes(self) -> int:
        """What the device holds outside the allocator: the CUDA context, and the page table of `host_bytes`."""
        return self.job.hardware.outside_bytes(self.host_bytes)

    @property
    def host_bytes(self) -> int:
        """Page-locked host memory: inputs of blocks at level `offload`, staging of the micro-steps' integers."""
        return host_bytes(self.job)

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
        ConfigError: the method does not fit the architecture, rows may be longer than the model's positions, or
            train.path=fast cannot be had.
    """
    check_run(config, arch, arch.positions)
    reason = plain_reason(arch, config)
    on_cpu = config.train.device == "cpu"
    job = Job(
        arch=arch,
        method=config.method,
        dtype_bytes=DTYPE_BYTES[config.model.dtype or ("fp32" if on_cpu else "bf16")],
        quantization=config.model.quantization,
        level=planned_level(config, engine=reason is None),
        step=micro_step(config, lengths),
        max_length=config.data.max_length,
        optimizer=config.train.optimizer,
        master_bytes=DTYPE_BYTES[config.train.optimizer_dtype],
        hardware=CPU if on_cpu else hardware,
        engine=reason is None,
    )
    return MemoryPlan(job, parts(job), reason)


def planned_level(config: RunConfig, engine: bool) -> Level:
    """What a block keeps; the plain path keeps at least this: it recomputes whole blocks or nothing."""
    level = level_of(config.train.activation_checkpointing)
    if engine:
        return level
    return "full" if level in ("attention", "full", "offload") else "elementwise"


def lora_columns(arch: ArchSpec, config: RunConfig) -> Columns:
    """Adapter columns R of each group of `saves.GROUPS`: the most that any block has."""
    qkv, o, up, down = (max(found) for found in zip(*block_columns(arch, config.method), strict=True))
    return qkv, o, up, down
