"""What only a GPU shows: bit-identical resume with deterministic kernels, 8-bit Adam, budgets, precisions."""

import gc
import json
import shutil

import pytest
import torch

from fitune.config import build
from fitune.errors import OutOfMemoryError
from fitune.training import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLOCK = {"seconds", "memory_bytes"}


@pytest.fixture
def gpu_tree(tree):
    tree["train"] |= {"device": "cuda", "max_steps": 12, "deterministic": True}
    return tree


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("path", ["fast", "plain"])
def test_a_resumed_run_is_bit_identical(gpu_tree, tmp_path, dtype, packing, path):
    gpu_tree["model"]["dtype"] = dtype
    gpu_tree["train"]["path"] = path
    gpu_tree["method"]["dropout"] = 0.1 if path == "plain" else 0.0
    if packing:
        gpu_tree["data"]["packing"] = True
        gpu_tree["train"]["micro_batch_rows"] = None
    run.train(build(gpu_tree), quiet=True)
    whole, half = tmp_path / "run", tmp_path / "half"
    shutil.copytree(whole, half)
    for step in (half / "checkpoints").iterdir():
        if step.name > "step_000010":
            shutil.rmtree(step)
    run.resume(half, quiet=True)
    assert metrics(half) == metrics(whole)
    file = "adapter/adapter_model.safetensors"
    assert (half / file).read_bytes() == (whole / file).read_bytes()


def test_gpu_follows_cpu(gpu_tree, tmp_path):
    run.train(build(gpu_tree), quiet=True)
    gpu_tree["train"]["device"] = "cpu"
    gpu_tree["output"]["dir"] = str(tmp_path / "cpu")
    run.train(build(gpu_tree), quiet=True)
    losses = [[row["loss"] for row in metrics(tmp_path / name) if row["kind"] == "train"] for name in ("run", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_8_bit_adam_trains_and_resumes(gpu_tree, tmp_path):
    pytest.importorskip("bitsandbytes")
    gpu_tree["method"] = {"name": "lora", "r": 64, "target_modules": "linear"}  # tensors above 4,096 elements
    gpu_tree["train"] |= {"optimizer": "adamw8bit"}
    run.train(build(gpu_tree), quiet=True)
    whole = [row for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert whole[-1]["loss"] < whole[0]["loss"]
    half = shutil.copytree(tmp_path / "run", tmp_path / "half")
    for step in (half / "checkpoints").iterdir():
        if step.name > "step_000010":
            shutil.rmtree(step)
    run.resume(half, quiet=True)
    assert metrics(half) == metrics(tmp_path / "run")


def test_a_budget_is_kept(gpu_tree):
    gpu_tree["memory"] = {"budget": 0.0005}
    gpu_tree["train"]["deterministic"] = False
    gc.collect()
    torch.cuda.empty_cache()  # memory cached by earlier tests would be used without asking the budget
    with pytest.raises(OutOfMemoryError, match="raise memory.budget"):
        run.train(build(gpu_tree), quiet=True)
    del gpu_tree["memory"]
    run.train(build(gpu_tree), quiet=True)
