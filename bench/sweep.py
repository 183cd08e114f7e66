"""fitune alone. `bench sweep`: over row lengths and micro-batch sizes; `bench fit`: the longest row in a memory cap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.children import Gpu, Runner
from bench.work import WORKS

LENGTHS = (256, 1024, 4096, 16384)
MICRO_TOKENS = (16384, 131072)
FIT: dict[str, Any] = {"rows": 1, "r": 32, "targets": "linear", "quantization": "nf4", "checkpointing": True}
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
                change = {"rows": micro // length, "tokens": length, "checkpointing": True, "warmup": 2, "steps": 3}
                arguments = {"key": key, "models": str(models.absolute()), "device": "cuda", "change": change}
                runner.run("ours", arguments, labels)


def fit(runner: Runner, caps: Sequence[float], models: Path) -> None:
    """The longest row of Llama-3.1-8B in nf4 with LoRA r=32 on every linear layer, for each cap [GB]."""
    runner.make_model("llama-3.1-8b", models)
    for cap in caps:
        labels = {"kind": "fit", "cap_gb": cap}

        def probe(tokens: int, cap: float = cap) -> int | None:
            idle = Gpu().used_bytes() or 0
            arguments = {"tokens": tokens, "cap_bytes": int(cap * 1e9), "idle_bytes": idle}
            arguments |= {"models": str(models.absolute())}
            row = runner.run("ours_fit", arguments, {"kind": "fit-probe", "cap_gb": cap, "tokens": tokens})
            return row["used_bytes"] if row["status"] == "ok" and row["fits"] else None

        tokens, refused = longest(probe, int(cap * 1e9), runner.time_is_up)
        status = "ok" if refused - tokens <= max(GRAIN, tokens // 50) else "not finished: time is up"
        runner.record({**labels, "status": status, "tokens": tokens, "refused_tokens": refused})


def longest(probe: Callable[[int], int | None], cap_bytes: int, stop: Callable[[], bool]) -> tuple[int, int]:
    """Search the longest row that fits; memory grows about linearly, so two probes nearly give it.

    Args:
        probe: tokens -> bytes used, None if it does not fit.
        stop: True ends the search early.
    Returns:
        The longest length known to fit (0: none), and the shortest known not to (`LIMIT + GRAIN`: none), within 2 % or
        one grain of each other unless stopped.
    """
    fits, refused = 0, LIMIT + GRAIN
    used: dict[int, int] = {}
    while refused - fits > max(GRAIN, fits // 50) and not stop():
        tokens = _guess(used, cap_bytes, fits, refused)
        found = probe(tokens)
        if found is None:
            refused = tokens
        else:
            fits = tokens
            used[tokens] = found
    return fits, refused


def _guess(used: dict[int, int], cap_bytes: int, fits: int, refused: int) -> int:
    """A multiple of `GRAIN` strictly between `fits` and `refused`."""
    middle = (fits + refused) // 2
    if len(used) < 2:
        tokens = min(middle, 8 * GRAIN if not used else 4 * fits)
    else:
        (near, near_bytes), (far, far_bytes) = sorted(used.items())[-2:]
        slope = max(1.0, (far_bytes - near_bytes) / (far - near))
        tokens = int(far + (cap_bytes - far_bytes) / slope)
        if tokens >= refused:  # something else than the line's memory refused
            tokens = middle
        elif tokens <= fits:  # the line is used up: show that a little more does not fit
            tokens = fits + max(GRAIN, fits // 50)
    tokens = tokens // GRAIN * GRAIN
    return max(fits + GRAIN, min(tokens, refused - GRAIN))


def probe_task(tokens: int, cap_bytes: int, idle_bytes: int, models: str) -> dict[str, Any]:
    """Try one length in a child: PyTorch's allocator is held to the cap less the context; all that is used counts.

    Args:
        idle_bytes: in use on the device before this process began.
    """
    import torch

    from bench import ours

    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context_bytes = max(0, total - free - idle_bytes)
    change = {**FIT, "tokens": tokens, "warmup": 1, "steps": 2}
    budget = {"memory": {"budget": (cap_bytes - context_bytes) / 1e9}}
    try:
        found = ours.step("8b-nf4", models, "cuda", change, budget)
    except torch.OutOfMemoryError:
        return {"fits": False, "context_bytes": context_bytes}
    used = found["device_sampled_bytes"] - idle_bytes
    return {**found, "fits": used <= cap_bytes, "used_bytes": used, "context_bytes": context_bytes}
