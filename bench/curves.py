"""`bench curves`: does the fast path train like the plain one? Loss of every update, and gradients against fp32.

Cases: the embedded model on the demo's rows, and the random 1B model on made-up rows that can be learnt. Both paths see
the same batches in the same order from the same adapters.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.children import ROOT, Runner

PRECISIONS = ("none", "int8", "nf4", "fp8")
CASES = ("embedded", "1b")


def run(runner: Runner, cases: Sequence[str], precisions: Sequence[str], models: Path, **options: Any) -> None:
    """Measure; the results are in `runner.results`.

    Args:
        options: `device`, `updates`, `paths` of every run.
    """
    paths = options.pop("paths", ("plain", "fast"))
    for case in cases:
        if case != "embedded":
            runner.make_model("llama-3.2-1b", models)
        grads = runner.out / "gradients" / case
        grads.mkdir(parents=True, exist_ok=True)
        wanted = [("fp32", "none", "plain" if "plain" in paths else paths[0])]
        wanted += [("bf16", precision, path) for precision in precisions for path in paths]
        for dtype, precision, path in wanted:
            labels = {"kind": "curve", "case": case, "dtype": dtype, "quantization": precision, "path": path}
            own = grads / f"{dtype}-{precision}-{path}.safetensors"
            own.unlink(missing_ok=True)  # nothing is compared with what an earlier call left
            if runner.time_is_up():
                runner.record(labels | {"status": "not started: time is up"})
                continue
            arguments = {**options, "case": case, "models": str(models.absolute()), "dtype": dtype}
            arguments |= {"quantization": precision, "path": path}
            arguments |= {"gradients": str(own)}
            arguments |= {"reference": str(grads / f"fp32-none-{wanted[0][2]}.safetensors")}
            arguments |= {"plain": str(grads / f"{dtype}-{precision}-plain.safetensors")}
            if dtype == "fp32":
                arguments["updates"] = 0
            runner.run("curve", arguments, labels)


def curve(case: str, models: str, device: str, updates: int, gradients: str, **how: str) -> dict[str, Any]:
    """Gradients of one batch, then the loss of every update.

    Args:
        gradients: where they are stored, for others to compare with.
        how: dtype, quantization, path (`default`: fitune's choice), and two files of gradients to compare with, made
            by earlier runs: `reference` (fp32) and `plain` (this precision on the plain path).
    """
    import torch
    from safetensors.torch import load_file, save_file

    from bench import ours
    from fitune.data.batches import StepPlan, micro_batches

    config, folder, rows = _case(case, Path(models), device, how, max(1, updates))
    run = ours.assemble(config, folder, rows)
    plan = StepPlan([row.num_tokens for row in rows], config.train)

    def batches(number: int) -> list[Any]:
        chosen = [rows[i] for i in plan.step(number).rows]
        return list(micro_batches(chosen, config.data, config.train, 0))

    adapters = {name: p for name, p in run.optimizer.parameters.items() if "lora_B" in name}
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # B is zero at first, and hides the gradient of A
        for parameter in adapters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
    ours.gradients(run, batches(0))
    masters = run.optimizer.masters.items()
    found = {name: p.grad.detach().float().cpu().clone() for name, p in masters if p.grad is not None}
    save_file(found, gradients)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.zero_()
    losses = [ours.update(run, batches(number), config.train.learning_rate or 0.0)[0] for number in range(updates)]
    errors = {
        f"gradient_error_to_{name}": _errors(found, load_file(how[name]))
        for name in ("reference", "plain")
        if how[name] != gradients and Path(how[name]).is_file()
    }
    return {"path_class": type(run.path).__name__, "note": run.note, "losses": losses, **errors}


def _errors(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """||g - r|| / ||r|| over tensors: the largest, the median, and over all as one vector."""
    if found.keys() != reference.keys():
        raise ValueError(f"gradients of {len(found)} tensors, {len(reference)} to compare with: not the same ones")
    pairs = [(found[name], reference[name]) for name in found]
    each = sorted(float((g - r).norm() / r.norm()) for g, r in pairs)
    whole = sum(float((g - r).square().sum()) for g, r in pairs) / sum(float(r.square().sum()) for _, r in pairs)
    return {"largest": each[-1], "median": each[len(each) // 2], "all": whole**0.5}


def _case(case: str, models: Path, device: str, how: dict[str, str], steps: int) -> tuple[Any, Path, list[Any]]:
    """Configuration, model folder and rows of a case."""
    extra: dict[str, dict[str, Any]] = {"model": {"dtype": how["dtype"]}, "train": {"max_steps": steps}}
    if how["quantization"] != "none":
        extra["model"]["quantization"] = how["quantization"]
    if how["path"] != "default":
        extra["train"]["path"] = how["path"]
    if case == "embedded":
        return demo_case(device, extra)
    from bench.ours import config_of
    from bench.work import WORKS

    folder = models / "llama-3.2-1b"
    rows = made_up_rows(64, 384, {})
    work = replace(WORKS["1b"], rows=4, tokens=512)
    extra["train"] |= {"global_batch_rows": 8, "schedule": "constant", "learning_rate": 5e-4}
    return config_of(work, folder, device, extra), folder, rows


def demo_case(device: str, extra: dict[str, dict[str, Any]]) -> tuple[Any, Path, list[Any]]:
    """examples/demo.yaml with other settings: configuration, model folder, rows."""
    from fitune.config import build
    from fitune.config.load import read_yaml
    from fitune.data.prepare import prepare
    from fitune.data.tokenizer import Tokenizer
    from fitune.model.folder import embedded_path

    tree = read_yaml(ROOT / "examples" / "demo.yaml")
    tree["data"] |= {"train": str(ROOT / "examples" / "demo" / "train.jsonl"), "eval": None}
    tree["train"] |= {"device": device}
    for section, settings in extra.items():
        tree[section] = {**tree.get(section, {}), **settings}
    config = build(tree)
    return config, embedded_path(), list(prepare(config.data, Tokenizer.load(embedded_path())).train)


def made_up_rows(count: int, most_tokens: int, facts: Mapping[str, Any]) -> list[Any]:
    """Rows of 64 to `most_tokens` ids, common ids more often than rare ones, so that there is something to learn.

    Args:
        facts: config.json; ChatGLM-6B needs its two marks between prompt and answer.
    """
    from fitune.data.prepare import Row

    draw = random.Random(2)
    ids, weights = range(1000, 2000), [1 / (rank + 1) for rank in range(1000)]
    marks = [facts["gmask_token_id"], facts["bos_token_id"]] if facts.get("model_type") == "chatglm" else []
    rows = []
    for number in range(count):
        tokens = draw.randrange(64, most_tokens + 1)
        row = draw.choices(ids, weights, k=tokens)
        prompt = row[:1] if not marks else row[:8] + marks
        learn = b"\0" * len(prompt) + b"\1" * (tokens - len(prompt))
        rows.append(Row(array("i", prompt + row[len(prompt) :]), learn, f"made-up:{number}"))
    return rows
