"""What quantization costs on CPU: errors, time, and what merging changes. Writes docs/results/quantization.md.

    python scripts/measure_quantization.py              # a quarter of an hour on two cores; --steps 8 for a quick look

The embedded model and the demo's 120 held-out rows; products of one linear layer of 2048 x 2048.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import fitune
from fitune.config import build, load
from fitune.data.prepare import prepare
from fitune.data.tokenizer import Tokenizer
from fitune.model.load import load_base
from fitune.model.quantize import QuantLinear, use_int8
from fitune.training.merge_report import Comparison, export_and_measure

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
PRECISIONS = (
    ("fp32", "none", "weight_only", 6.0),
    ("int8, weight only", "int8", "weight_only", 6.0),
    ("LLM.int8(), threshold 6", "int8", "llm_int8", 6.0),
    ("int8 on both sides, no outliers taken out", "int8", "llm_int8", 0.0),
    ("fp8", "fp8", "weight_only", 6.0),
    ("nf4", "nf4", "weight_only", 6.0),
    ("fp4", "fp4", "weight_only", 6.0),
)


def losses() -> list[str]:
    """The untrained model in each precision, against fp32."""
    data = {"train": str(ROOT / "examples/demo/heldout.jsonl"), "max_length": 128}
    config = build({"model": {"path": "embedded"}, "data": data, "train": {"micro_batch_rows": 16}})
    rows = prepare(config.data, Tokenizer.load(fitune.embedded_path())).train
    comparison = Comparison(rows, config, 0)

    def opened(quantization: str, compute: str, threshold: float) -> torch.nn.Module:
        model = load_base(fitune.embedded_path(), "fp32", CPU, quantization).model
        use_int8(model, compute, threshold)
        return model

    lines = ["| blocks in | loss | KL from fp32 [nats] | other first choice |", "|---|---|---|---|"]
    for what, *how in PRECISIONS:
        found = comparison.add(what, lambda device, how=how: opened(*how))
        lines.append(f"| {what} | {found.loss:.4f} | {found.kl:.5f} | {found.changed:.2%} |")
    return lines


def milliseconds(work: Callable[[], object]) -> float:
    """The best of several times; CPU time, which other programs on the machine disturb least."""
    work()
    taken = []
    for _ in range(9):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return 1e3 * min(taken)


def products() -> list[str]:
    """One linear layer; a few columns of the inputs hold outliers."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lines = ["| dtype | tokens | unquantized | int8, weight only | LLM.int8() | nf4 |", "|---|---|---|---|---|---|"]
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.randn(2048, 2048) * 0.02).to(dtype)
        layers = [QuantLinear(weight, None, name) for name in ("int8", "int8", "nf4")]
        use_int8(layers[1], "llm_int8", 6.0)
        for tokens in (256, 1):
            x = torch.randn(tokens, 2048).to(dtype)
            x[:, :8] *= 20
            works = [lambda: F.linear(x, weight), *(lambda layer=layer: layer(x) for layer in layers)]  # noqa: B023
            cells = " | ".join(f"{milliseconds(work):.1f}" for work in works)
            lines.append(f"| {str(dtype).removeprefix('torch.')} | {tokens} | {cells} |")
    return lines


def merging(steps: int, folder: Path) -> list[str]:
    """The demo on quantized bases, merged and measured."""
    lines = ["| base | model | loss | KL [nats] | other first choice |", "|---|---|---|---|---|"]
    for quantization in ("int8", "nf4", "fp4"):
        overrides = [
            f"model.quantization={quantization}",
            f"train.max_steps={steps}",
            f"output.dir={folder / quantization}",
            f"data.train={ROOT / 'examples/demo/train.jsonl'}",
            f"data.eval={ROOT / 'examples/demo/heldout.jsonl'}",
        ]
        run = fitune.train(load(ROOT / "examples/demo.yaml", overrides), quiet=True).run
        report = export_and_measure(run, folder / f"{quantization}-merged", dtype="bf16")
        for model in report.models:
            cells = f"{model.loss:.4f} | {model.kl:.5f} | {model.changed:.2%}"
            lines.append(f"| {quantization} | {model.what} | {cells} |")
    return lines


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=66, help="of training before merging")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "results" / "quantization.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sections = [
            ("The embedded model, untrained, on 120 held-out rows", losses()),
            (f"The demo after {options.steps} steps, merged in bf16", merging(options.steps, Path(folder))),
            ("Milliseconds of one product, 2048 x 2048, one thread, best of nine", products()),
        ]
    release = torch.__version__.partition("+")[0]
    where = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, torch {release}"
    made = f"Made by `python scripts/measure_quantization.py --steps {options.steps}` on {where}."
    text = "\n\n".join([f"## {title}\n\n" + "\n".join(lines) for title, lines in sections])
    options.to.write_text(f"# Quantization on CPU\n\n{made}\n\n{text}\n", encoding="utf-8")
    print(options.to.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
