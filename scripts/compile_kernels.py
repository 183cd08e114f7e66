"""Compile the kernels of the engine's step for GPUs that need not be here, and write what each takes of them.

    PYTHONPATH=. python scripts/compile_kernels.py [--gpus 75,86,120] [--works 0,3] [--out docs/results/kernels.md]

One block of each model, at the model's own sizes, runs on CPU with every launch of a Triton kernel replaced by its
compilation for that GPU, so that kernels, types and constants are those of a run; what comes out is not looked at. It
says that a kernel compiles and fits, not that it computes the right thing, for which the tests need a GPU or the
interpreter. Registers, stack and static shared memory are what the assembler reports, dynamic shared memory Triton.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

TOKENS = 64  # a multiple of 16, as micro-steps are
PROCESSORS = (8, 1000)  # so few that programs queue up, and so many that some share a head: both happen


class Generation(NamedTuple):
    """GPUs of one compute capability. Sizes are NVIDIA's, per block and per multiprocessor."""

    names: str
    shared_bytes: int
    threads: int


GENERATIONS = {
    75: Generation("T4, RTX 20", 64 * 1024, 1024),
    80: Generation("A100", 163 * 1024, 2048),
    86: Generation("A10, RTX 30", 99 * 1024, 1536),
    89: Generation("L4, RTX 40", 99 * 1024, 1536),
    90: Generation("H100, H200", 227 * 1024, 2048),
    120: Generation("RTX 50", 99 * 1024, 1536),
}
REGISTERS = 65536  # of a multiprocessor


class Work(NamedTuple):
    """What is trained: a row of `bench.models.SHAPES`, how it is stored, the method."""

    model: str
    quantization: str = "none"
    method: str = "lora"
    level: Literal["elementwise", "full"] = "full"
    dtype: str = "16 bits"  # or fp32


WORKS = (
    Work("llama-3.2-1b", level="elementwise"),
    Work("llama-3.2-1b", dtype="fp32"),
    Work("llama-3.1-8b"),
    Work("llama-3.1-8b", "int8"),
    Work("llama-3.1-8b", "nf4"),
    Work("llama-3.1-8b", "fp8"),
    Work("qwen2.5-1.5b", method="bitfit"),
    Work("qwen3-1.7b", method="prefix"),
    Work("bloom-1b4"),
    Work("chatglm3-6b", method="ia3"),
    Work("chatglm3-6b"),
    Work("chatglm-6b", method="prompt"),
    Work("chatglm-6b"),
)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one GPU; bytes of shared memory are per program, of stack per thread."""

    name: str
    registers: int
    shared: int
    stack: int
    warps: int

    def problem(self, generation: Generation) -> str | None:
        """Why it cannot be launched there; None: it can."""
        if self.shared > generation.shared_bytes:
            return f"{self.name} takes {self.shared:,} bytes of shared memory of {generation.shared_bytes:,}"
        if self.registers * 32 * self.warps > REGISTERS:
            return f"{self.name} takes {self.registers} registers of {32 * self.warps} threads"
        return None


class _Target:
    """In place of Triton's driver: a GPU that only says what it is."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def _compiling(capability: int, kernels: list[Any]) -> Iterator[None]:
    """Inside, every launch of a Triton kernel compiles it and adds it to `kernels`; kernels run for tensors on CPU."""
    import torch
    from triton.runtime import driver, jit

    import fitune.kernels
    from fitune.kernels import fp8

    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not known for known in kernels):
            kernels.append(kernel)
        return kernel

    driver.set_active(_Target(capability))
    with ExitStack() as stack:
        stack.enter_context(patch.object(jit.JITFunction, "run", compile_only))
        stack.enter_context(
            patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10))
        )
        stack.enter_context(patch.object(fp8, "has_units", lambda device: capability >= 89))
        stack.enter_context(patch.object(fp8, "is_native", lambda *shape: False))  # no product of fp8 codes on CPU
        for info in pkgutil.iter_modules(fitune.kernels.__path__):
            module = importlib.import_module(f"fitune.kernels.{info.name}")
            if hasattr(module, "use_triton"):
                stack.enter_context(patch.object(module, "use_triton", lambda x: True))
        yield


def compile_work(work: Work, capability: int) -> list[Compiled]:
    """Every kernel of one micro-step, forward, loss and backward; a process can do this for one capability only."""
    from fitune.data.batches import pack
    from fitune.data.prepare import Row
    from fitune.engine.path import EnginePath
    from fitune.kernels import attention_triton

    rows = [Row(array("i", range(3, 3 + TOKENS)), bytes([0]) + bytes([1]) * (TOKENS - 1), "row")]
    model, model_type = _model(work, capability)
    kernels: list[Any] = []
    for processors in PROCESSORS:
        with (
            _compiling(capability, kernels),
            patch.object(attention_triton, "_processors", lambda device, n=processors: n),
        ):
            engine = EnginePath(model, model_type, work.level, 2 * TOKENS, 2 * TOKENS)
            engine.loss(pack(rows))
            engine.loss_and_grad(pack(rows), 1.0)
    return [_resources(kernel) for kernel in kernels]


def _model(work: Work, capability: int) -> tuple[Any, str]:
    """One block of a model with the method's parameters, all weights the same number; its type."""
    import torch
    import transformers

    from bench.models import SHAPES
    from fitune.config import build
    from fitune.methods import METHODS
    from fitune.model.chatglm_v1 import ChatGLMForConditionalGeneration, read_config
    from fitune.model.load import Base
    from fitune.model.quantize import quantize_blocks

    dtype = torch.float32 if work.dtype == "fp32" else torch.float16 if capability < 80 else torch.bfloat16
    kind, sizes = SHAPES[work.model]
    if kind == "ChatGLMConfig":
        model: Any = ChatGLMForConditionalGeneration(read_config({"num_layers": 1})).to(dtype)
    else:
        one = {"n_layer" if kind == "BloomConfig" else "num_hidden_layers": 1}
        if work.quantization != "none":  # the head is compiled with the work that is not quantized
            one["vocab_size"], one["bos_token_id"], one["eos_token_id"] = 1024, 0, 1
        config = getattr(transformers, kind)(**sizes | one)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = model.to_empty(device="cpu")
        if hasattr(model, "model"):
            model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is no parameter
    model.requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.fill_(0.01)
    if work.quantization != "none":
        quantize_blocks(model, work.quantization, torch.device("cpu"))
    method: dict[str, Any] = {"name": work.method}
    if work.method == "lora":
        method |= {"r": 16, "target_modules": "linear", "dropout": 0.05}
    if work.method in ("prompt", "prefix"):
        method |= {"init": "random"}
    base = Base(model, Path(), model.config.model_type, model.get_input_embeddings().weight.shape[0], "")
    settings = build({"model": {"path": "none"}, "method": method}).method
    return METHODS[work.method].apply(base, settings), base.model_type


def _resources(kernel: Any) -> Compiled:
    """What the assembler says of a compiled kernel."""
    import triton

    (tool, *_) = Path(triton.__file__).parent.rglob("bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(re.findall(rf"{key}:(\d+)", said)[-1]) for key in ("REG", "STACK", "SHARED", "LOCAL")}
    shared = max(found["SHARED"], kernel.metadata.shared)
    stack = max(found["STACK"], found["LOCAL"])
    return Compiled(kernel.metadata.name, found["REG"], shared, stack, kernel.metadata.num_warps)


def compile_all(capability: int, works: Sequence[Work]) -> list[Compiled]:
    """All works for one GPU."""
    return [kernel for work in works for kernel in compile_work(work, capability)]


def markdown(found: dict[int, list[Compiled]], works: Sequence[Work]) -> str:
    """The page of kernels that all fit: kernels by row, GPUs by column, the most that any variant takes."""
    import torch
    import triton

    gpus = list(found)
    names = sorted({kernel.name.lstrip("_") for kernels in found.values() for kernel in kernels})
    head = ["kernel", *(f"{gpu // 10}.{gpu % 10}: {GENERATIONS[gpu].names}" for gpu in gpus)]
    lines = [[f"`{name}`", *(_cell(found[gpu], name) for gpu in gpus)] for name in names]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *lines])
    shapes = ", ".join(dict.fromkeys(f"`{work.model}`" for work in works))
    versions = f"torch {torch.__version__.partition('+')[0]} and Triton {triton.__version__}"
    return f"""# Kernels on GPUs of each generation

`PYTHONPATH=. python scripts/compile_kernels.py`, on a machine without a GPU: what the kernels of a step take when they
are compiled for each generation, with {versions}. One block of each of {shapes}, at its own sizes; LoRA
with dropout and other methods; 16 bits (fp16 on 7.5, else bf16), fp32, int8, nf4, and fp8 where there are units for it.
In a cell: registers / KB of shared memory of a program / bytes of stack of a thread, the most of all variants.

A program can have 64 KB of shared memory on 7.5, 99 on 8.6, 8.9 and 12.0, 163 on 8.0, 227 on 9.0: all kernels fit.
Stack is memory of the GPU, taken for every thread that it can hold: 100 bytes are 4 MB of a T4, 13 of an RTX 3090.

{table}
"""


def _cell(kernels: Sequence[Compiled], name: str) -> str:
    own = [kernel for kernel in kernels if kernel.name.lstrip("_") == name]
    if not own:
        return "-"
    registers, shared, stack = (max(getattr(k, what) for k in own) for what in ("registers", "shared", "stack"))
    return f"{registers} / {shared / 1024:.0f} / {stack}"


def numbers(text: str) -> list[int]:
    """Of an option: `75,86`."""
    return [int(word) for word in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile and write the page; ends with an error if a kernel does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=numbers, default=list(GENERATIONS), help=f"of {','.join(map(str, GENERATIONS))}")
    parser.add_argument("--works", type=numbers, default=list(range(len(WORKS))), help="indices, for a part of them")
    parser.add_argument("--out", type=Path, help="write the page here; default: print")
    parser.add_argument("--json", action="store_true", help="print what was found, no page")
    options = parser.parse_args(arguments)
    works = [WORKS[index] for index in options.works]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        results = pool.map(compile_all, options.gpus, [works] * len(options.gpus))
        found = dict(zip(options.gpus, results, strict=True))
    problems = [f"{gpu}: {text}" for gpu, ks in found.items() for k in ks if (text := k.problem(GENERATIONS[gpu]))]
    if problems:
        raise SystemExit("\n".join(problems))
    if options.json:
        print(json.dumps({gpu: [vars(kernel) for kernel in kernels] for gpu, kernels in found.items()}))
    elif options.out:
        options.out.write_text(markdown(found, works), encoding="utf-8")
    else:
        print(markdown(found, works))


if __name__ == "__main__":
    main()
