"""The plan and the parameter count as text for people and as JSON for programs."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator

from fitune.config import RunConfig
from fitune.plan.arch import ArchSpec
from fitune.plan.budget import GB, fits, needed_bytes
from fitune.plan.memory import MemoryPlan
from fitune.plan.params import Count, count


def params_text(arch: ArchSpec, config: RunConfig) -> str:
    """What is trained, of how much."""
    counted = count(arch, config.method)
    return "\n".join([_model(arch, config), _method(counted, config)])


def params_json(arch: ArchSpec, config: RunConfig) -> str:
    """The same as one JSON object."""
    return json.dumps(_params(arch, config), ensure_ascii=False)


def plan_text(plan: MemoryPlan, config: RunConfig, width: int | None = None) -> str:
    """The plan as a table, without colours.

    Args:
        width: columns; None: those of the terminal.
    """
    # Half a tenth of a second that `fitune params` need not pay.
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("part", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    table.add_column("at peak", no_wrap=True)
    table.add_column("how it is counted")
    for part in plan.parts:
        at_peak = "yes" if plan.peak_phase in part.phases else ""
        table.add_row(part.name, f"{part.bytes / 1e6:,.1f}", at_peak, part.formula)
    stream = io.StringIO()
    columns = width or max(80, shutil.get_terminal_size((120, 24)).columns)
    Console(file=stream, width=columns, color_system=None, highlight=False, markup=False).print(table)
    rows = "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
    arch, counted = plan.job.arch, count(plan.job.arch, config.method)
    above = [_model(arch, config), _method(counted, config), f"step     {plan.job.step.how}"]
    return "\n".join([*above, "", rows, "", *_verdict(plan, config)])


def plan_json(plan: MemoryPlan, config: RunConfig) -> str:
    """The plan as one JSON object; all sizes in bytes."""
    job = plan.job
    tree = _params(job.arch, config) | {
        "step": {"real_tokens": job.step.real, "planned_tokens": job.capacity, "how": job.step.how},
        "dtype_bytes": job.dtype_bytes,
        "level": job.level,
        "lora_columns": list(job.shape.lora),
        "parts": [
            {"name": part.name, "bytes": part.bytes, "phases": list(part.phases), "formula": part.formula}
            for part in plan.parts
        ],
        "phases": plan.phases,
        "peak_phase": plan.peak_phase,
        "peak_bytes": plan.peak_bytes,
        "context_bytes": plan.context_bytes,
        "device_bytes": plan.device_bytes,
        "needed_bytes": needed_bytes(plan),
        "host_bytes": plan.host_bytes,
        "lower_bound": plan.plain_reason is not None,
        "fits": fits(plan, config),
        "notes": list(_notes(plan, config)),
    }
    return json.dumps(tree, ensure_ascii=False, indent=2)


def _params(arch: ArchSpec, config: RunConfig) -> dict[str, object]:
    counted = count(arch, config.method)
    return {
        "model": config.model.path,
        "model_type": arch.model_type,
        "method": config.method.name,
        "base_parameters": arch.total,
        "trainable_parameters": counted.trainable,
        "total_parameters": counted.total,
        "trainable_percent": counted.percent,
    }


def _model(arch: ArchSpec, config: RunConfig) -> str:
    return (
        f"model    {config.model.path}: {arch.model_type}, {arch.layers} blocks of width {arch.hidden:,}, vocabulary "
        f"{arch.vocab:,}, {arch.total:,} parameters"
    )


def _method(counted: Count, config: RunConfig) -> str:
    return (
        f"method   {config.method.name} trains {counted.trainable:,} of {counted.total:,} parameters "
        f"({counted.percent:.4f} %)"
    )


def _verdict(plan: MemoryPlan, config: RunConfig) -> Iterator[str]:
    least = "at least " if plan.plain_reason else ""
    peak = f"{plan.peak_bytes / GB:.3f} GB in the phase `{plan.peak_phase}`"
    yield f"peak     {least}{peak}{_with_context(plan)}"
    if plan.host_bytes:
        yield f"host     {plan.host_bytes / GB:.3f} GB of page-locked memory"
    answer = fits(plan, config)
    if config.memory.budget is not None and answer is not False:
        yield f"budget   {config.memory.budget:g} GB: {'fits' if answer else 'not decided'}"
    for note in _notes(plan, config):
        yield f"note: {note}"


def _with_context(plan: MemoryPlan) -> str:
    if not plan.context_bytes:
        return ""
    context, needed = plan.device_bytes / GB, needed_bytes(plan) / GB
    return f"; {context:.3f} GB with the CUDA context, {needed:.3f} with what the allocator cannot use"


def _notes(plan: MemoryPlan, config: RunConfig) -> Iterator[str]:
    job = plan.job
    if plan.plain_reason:
        yield (
            f"plain path ({plan.plain_reason}): it keeps more activations than are counted here; weights, gradients "
            "and optimizer states are exact"
        )
    if job.arch.patterns:
        yield (
            f"llm_int8_skip_modules names layers by a pattern ({job.arch.patterns[0]:.60}), and these count as "
            "quantized; with the weight files in the folder they are counted as they are"
        )
    if config.model.dtype is None:
        assumed = "fp32 on CPU" if config.train.device == "cpu" else "bf16, as on a GPU that has it"
        yield f"model.dtype is not set: planned as {assumed}"
    if not job.hardware.measured:
        yield f"CUDA context and cuBLAS workspaces are planned as on {job.hardware.name}, which takes the most known"
    if config.memory.budget is not None and config.train.device == "cpu":
        yield "memory.budget has no effect on CPU"
