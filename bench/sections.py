"""The tables of real rows, sweeps, curves and CPU steps."""

from __future__ import annotations

from collections.abc import Sequence

from bench.goals import ROWS_GOALS
from bench.markdown import GB, Record, failure, newest, ratio, table
from bench.sweep import LIMIT


def rows_section(records: Sequence[Record]) -> str:
    """Real tokens per second of each stack's own trainer."""
    found = newest(records, "stack", "layout", "rows")
    lines = []
    for (stack, layout, rows), record in found.items():
        name = [stack, layout, str(rows)]
        if record["status"] != "ok":
            lines.append([*name, failure(record), *["-"] * 7])
            continue
        others = [r for (s, _, n), r in found.items() if s != "ours" and n == rows and r["status"] == "ok"]
        against = ["", "", ""]
        if stack == "ours":
            goal = ROWS_GOALS[rows]
            speed = ratio(record, others, "real_tokens_per_second", max)
            against = [speed, ratio(record, others, "allocated_bytes"), f">= {goal.tokens_per_second:,}, {goal.gb} GB"]
        lines.append(
            [
                *name,
                f"{record['real_tokens_per_second']:,}",
                f"{record['step_ms']:.1f}",
                f"{record['real_tokens_per_step']:,} / {record['slots_per_step']:,}",
                f"{record['allocated_bytes'] / GB:.2f}",
                f"{record['startup_seconds']:.1f}",
                *against,
            ]
        )
    head = ["stack", "layout", "rows per update", "real tokens/s", "ms per update", "real tokens / slots per update"]
    head += ["peak GB", "start-up s", "speed / best other", "peak / best other", "goal"]
    return "## Real rows\n\n" + table(head, lines)


def rows_path_section(records: Sequence[Record]) -> str:
    """Real rows through `fitune train` on both paths."""
    updates = records[-1]["updates"]
    found = newest([record for record in records if record["updates"] == updates], "path")
    lines = []
    for (path,), record in found.items():
        if record["status"] != "ok":
            lines.append([path, failure(record), *["-"] * 4])
            continue
        losses, plain = record["losses"], found.get(("plain",), {"status": "absent"})
        apart = ["-", "-"] if path == "plain" or plain["status"] != "ok" else _apart(losses, plain["losses"])
        speed = [f"{record['real_tokens_per_second']:,}", f"{record['allocated_bytes'] / GB:.2f}"]
        lines.append([path, f"{losses[0]:.4f} -> {losses[-1]:.4f}", *apart, *speed])
    head = ["path", "loss, first -> last", "largest deviation from plain", "mean deviation", "real tokens/s", "peak GB"]
    return f"## Real rows through `fitune train`, {updates} updates of 32, both paths\n\n" + table(head, lines)


def profile_section(records: Sequence[Record]) -> str:
    """What the GPU's time of one step is spent on."""
    lines = []
    for (row,), record in newest(records, "row").items():
        if record["status"] != "ok":
            lines.append([f"`{row}`", failure(record), "-", "-"])
            continue
        parts = ", ".join(f"{name} {ms:.1f}" for name, ms in record["parts"].items())
        lines.append([f"`{row}`", f"{record['span_ms']:.1f}", f"{record['gpu_ms']:.1f}", parts])
    head = ["work", "first to last kernel, ms", "sum of kernels, ms", "parts, ms"]
    return "## Kernels of one step (under the profiler)\n\n" + table(head, lines)


def sweep_section(records: Sequence[Record]) -> str:
    """fitune over lengths and micro-batch sizes."""
    lines = []
    for (row, micro, tokens), record in newest(records, "row", "micro_tokens", "tokens").items():
        name = [f"`{row}`", f"{micro:,}", f"{tokens:,}"]
        if record["status"] != "ok":
            lines.append([*name, failure(record), *["-"] * 5])
            continue
        rate = record["useful_flop"] / record["step_ms"] / 1e9
        memory = [f"{record[key] / GB:.2f}" for key in ("allocated_bytes", "reserved_bytes")]
        times = [f"{record['step_ms']:.1f}", f"{record['tokens_per_second']:,}", f"{rate:.0f}"]
        lines.append([*name, *times, *memory, record["path"]])
    head = ["work", "tokens per micro step", "tokens per row", "ms", "tokens/s", "useful TFLOP/s"]
    return "## Lengths\n\n" + table([*head, "allocated GB", "reserved GB", "path"], lines)


def fit_section(records: Sequence[Record]) -> str:
    """The longest rows inside memory caps."""
    names = ("planned_tokens", "tokens", "refused_tokens")
    lines = [
        [f"{cap:g}"]
        + [f"{record[name]:,}" if 0 < record.get(name, 0) <= LIMIT else "-" for name in names]  # else: never tried
        + [record["status"]]
        for (cap,), record in newest(records, "cap_gb").items()
    ]
    title = (
        "## Longest row: Llama-3.1-8B, nf4, LoRA r=32 on every linear layer, one row, level `offload`, 8-bit AdamW\n\n"
    )
    columns = ["cap GB, context included", "planned", "longest that trains", "shortest that does not", "search"]
    return title + table(columns, lines)


def curve_section(records: Sequence[Record]) -> str:
    """Losses of the paths against each other, gradients against fp32."""
    found = newest(records, "case", "dtype", "quantization", "path")
    lines = []
    for (case, dtype, quantization, path), record in found.items():
        name = [case, dtype if quantization == "none" else quantization, path]
        if record["status"] != "ok":
            lines.append([*name, failure(record), *["-"] * 5])
            continue
        plain = found.get((case, dtype, quantization, "plain"), {"status": "absent"})
        errors = [_errors(record, f"gradient_error_to_{other}") for other in ("reference", "plain")]
        same = path == "plain" or plain["status"] != "ok" or not record["losses"]
        apart = ["-", "-"] if same else _apart(record["losses"], plain["losses"])
        ends = f"{record['losses'][0]:.4f} -> {record['losses'][-1]:.4f}" if record["losses"] else "-"
        lines.append([*name, record["path_class"], ends, *apart, *errors])
    head = [
        "case",
        "precision",
        "path",
        "class",
        "loss, first -> last",
        "largest deviation from plain",
        "mean deviation",
    ]
    head += ["gradient error to fp32 plain: median, largest", "to plain of this precision: median, largest"]
    return "## Fast against plain\n\n" + table(head, lines)


def family_section(records: Sequence[Record]) -> str:
    """Whether each family learns, in few updates."""
    lines = []
    for name, record in newest(records, "family", "method", "precision").items():
        if record["status"] != "ok":
            lines.append([*name, failure(record), *["-"] * 3])
            continue
        losses = record["losses"]
        third = max(1, len(losses) // 3)
        ends = [sum(part) / len(part) for part in (losses[:third], losses[-third:])]
        fall = f"{ends[0]:.3f} -> {ends[1]:.3f}"
        peak = f"{record['allocated_bytes'] / GB:.2f}"
        lines.append([*name, record["path"], fall, "yes" if ends[1] < ends[0] else "**no**", peak])
    head = ["model", "method", "precision", "path", "mean loss, first third -> last third", "falls", "peak GB"]
    return "## Families learn\n\n" + table(head, lines)


def _apart(losses: Sequence[float], plain: Sequence[float]) -> list[str]:
    differences = [abs(a - b) for a, b in zip(losses, plain, strict=True)]
    return [f"{max(differences):.2e}", f"{sum(differences) / len(differences):.2e}"]


def _errors(record: Record, name: str) -> str:
    errors = record.get(name)
    return f"{errors['median']:.2e}, {errors['largest']:.2e}" if errors else "-"


def cpu_section(records: Sequence[Record]) -> str:
    """Both paths in turns."""
    record = records[-1]
    if record["status"] != "ok":
        return f"## Demo steps on CPU\n\n{failure(record)}"
    cells = [
        f"{name} ({kind}): {ms:.1f} ms"
        for name, kind, ms in zip(record["paths"], record["classes"], record["median_ms"], strict=True)
    ]
    return (
        "## Demo steps on CPU\n\n"
        f"{'; '.join(cells)}; median of paired ratios {record['ratio']:.3f}; largest difference of the losses "
        f"{record['largest_loss_difference']:.1e}."
    )
