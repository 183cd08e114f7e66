"""The parts of a run's memory that virtual tokens take beside their rows."""

from __future__ import annotations

from fitune.config import PrefixConfig
from fitune.plan.job import Job
from fitune.plan.part import READY, Part, Phase
from fitune.plan.saves import virtual_bytes


def virtual_rows(job: Job) -> Part:
    """What the engine writes over rows of virtual tokens, and the gradient it finds there."""
    size = virtual_bytes(job.shape, job.arch.layers, job.dtype_bytes, isinstance(job.method, PrefixConfig))
    elements = size // (job.dtype_bytes + 4)
    return Part("virtual tokens", size, f"{elements:,} elements x ({job.dtype_bytes} + 4) B", READY)


def encoded_rows(job: Job) -> Part:
    """What PEFT's encoder makes of its parameters, in fp32, until its gradient has come back."""
    elements = virtual_bytes(job.shape, job.arch.layers, 0, isinstance(job.method, PrefixConfig)) // 4
    phases: tuple[Phase, ...] = ("capture", "forward", "head", "backward")
    return Part("virtual tokens, encoded", 4 * elements, f"{elements:,} elements x 4 B", phases)
