"""fitune alone. `bench sweep`: over row lengths and micro-batch sizes; `bench fit`: the longest row in a memory cap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.children import Runner
from bench.work import WORKS

LENGTHS = (256, 1024, 4096, 16384)
MICRO_TOKENS = (16384, 131072)
FIT: dict[str, Any] = {"rows": 1, "r": 32, "targets": "linear", "quantization": "nf4", "checkpointing": True}
FIT_SETTINGS: dict[str, Any] = {"train": {"optimizer": "adamw8bit"}}  # as those do whose lengths are published
GRAIN = 256  # tokens
LIMIT = 131072  # the models' positions


def run(runner: Runner, keys: Sequence[str], micro_tokens: Sequence[int], models: Path) -> None:
    """Every length at every micro-batch size, activations recomputed.

    Args:
        keys: work items that give model, adapters and targets.
    """
    for key in keys:
        runner.make_model(WORKS[key].model, models)
        for micro in micro_tokens:
            for length in LENGTHS:
                labels = {"kind": "sweep", "row": key, "micro_tokens": micro, "tokens": length}
                if runner.time_is_up():
                    runner.record(labels | {"status": "not started: time is up"})
                    continue
                changed = change(micro, length) | {"warmup": 2, "steps": 3}
                arguments = {"key": key, "models": str(models.absolute()), "device": "cuda", "change": changed}
                runner.run("ours", arguments, labels)


def change(micro_tokens: int, tokens: int) -> dict[str, Any]:
    """What a cell of the sweep has other than its work item."""
    return {"rows": micro_tokens // tokens, "tokens": tokens, "checkpointing": True}


def fit(runner: Runner, caps: Sequence[float], models: Path) -> None:
    """The longest row of Llama-3.1-8B in nf4 with LoRA r=32 on every linear layer, 8-bit AdamW, for each cap [GB]."""
    runner.make_model("llama-3.1-8b", models)
    for cap in caps:
        labels = {"kind": "fit", "cap_gb": cap}
        expected = planned(int(cap * 1e9))

        def probe(tokens: int, cap: float = cap) -> int | None:
            arguments = {"tokens": tokens, "cap_bytes": int(cap * 1e9), "models": str(models.absolute())}
            row = runner.run("ours_fit", arguments, {"kind": "fit-probe", "cap_gb": cap, "tokens": tokens})
            if row["status"] != "ok" or not row["trained"]:
                return None
            used = int(row.get("device_used_bytes") or row["device_sampled_bytes"])  # as the driver counts it
            return used if used <= cap * 1e9 else None

        tokens, refused = longest(probe, int(cap * 1e9), runner.time_is_up, expected)
        status = "ok" if refused - tokens <= max(GRAIN, tokens // 50) else "not finished: time is up"
        row = {**labels, "status": status, "tokens": tokens, "refused_tokens": refused, "planned_tokens": expected}
        runner.record(row)


def planned(cap_bytes: int) -> int:
    """The longest row that `fitune plan` says fits into a cap, CUDA context included; a multiple of `GRAIN`."""
    from bench.plan import planned as plan_of  # it needs torch, which most commands here do not
    from fitune.plan.budget import needed_bytes

    def fits(tokens: int) -> bool:
        shape = {key: FIT[key] for key in ("rows", "r", "targets")} | {"tokens": tokens}
        record = {"kind": "step", "row": "8b-nf4", "note": "keeps `offload`"}
        return needed_bytes(plan_of(record, None, shape, FIT_SETTINGS)) <= cap_bytes

    below, above = 0, LIMIT // GRAIN + 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle * GRAIN) else (below, middle)
    return below * GRAIN


def longest(
    probe: Callable[[int], int | None], cap_bytes: int, stop: Callable[[], bool], expected: int = 8 * GRAIN
) -> tuple[int, int]:
    """Search the longest row that fits: what is expected, a little more, then along a line.

    Args:
        probe: tokens -> bytes used, None if it does not fit.
        stop: True ends the search early.
        expected: where to look first.
    Returns:
        The longest length known to fit (0: none), and the shortest known not to (`LIMIT + GRAIN`: none), within 2 % or
        one grain of each other unless stopped.
    """
    fits, refused = 0, LIMIT + GRAIN
    used: dict[int, int] = {}
    while refused - fits > max(GRAIN, fits // 50) and not stop():
        tokens = _guess(used, cap_bytes, (fits, refused), expected)
        found = probe(tokens)
        if found is None:
            refused = tokens
        else:
            fits = tokens
            used[tokens] = found
    return fits, refused


def _guess(used: dict[int, int], cap_bytes: int, between: tuple[int, int], expected: int) -> int:
    """A multiple of `GRAIN` strictly between what fits and what does not."""
    fits, refused = between
    notch = max(GRAIN, max(fits, expected) // 50)
    if not used:  # what is expected, then less in growing steps
        tokens = expected if refused > expected else max(refused - max(notch, 2 * (expected - refused)), refused // 2)
    elif used[fits] > 0.98 * cap_bytes:  # all there is: the allocator keeps what it has, so there is no line any more
        tokens = (fits + refused) // 2 if refused - fits < 8 * notch else fits + notch
    elif len(used) == 1:
        tokens = max(fits + notch, fits * 9 // 8) if used[fits] > 0.9 * cap_bytes else 4 * fits
    else:
        (near, near_bytes), (far, far_bytes) = sorted(used.items())[-2:]
        slope = max(1.0, (far_bytes - near_bytes) / (far - near))
        tokens = max(fits + notch, min(int(far + (cap_bytes - far_bytes) / slope), 2 * fits))
    if used and tokens >= refused:  # something else than the line's memory refused
        tokens = (fits + refused) // 2
    tokens = tokens // GRAIN * GRAIN
    return max(fits + GRAIN, min(tokens, refused - GRAIN))


def probe_task(tokens: int, cap_bytes: int, models: str) -> dict[str, Any]:
    """Try one length in a child with the cap as its memory.budget; nobody else uses the GPU."""
    import torch

    from bench import ours

    change = {**FIT, "tokens": tokens, "warmup": 0, "steps": 1}  # its first micro-step runs twice: once to be captured
    try:
        found = ours.step("8b-nf4", models, "cuda", change, {"memory": {"budget": cap_bytes / 1e9}, **FIT_SETTINGS})
    except torch.OutOfMemoryError:
        return {"trained": False}
    return {**found, "trained": True}
