"""Does fp16 converge like fp32, with padded micro-batches of 2 and pad = eos? Writes docs/results/fp16.md.

    python scripts/measure_fp16.py            # on a GPU; on CPU fp16 is about 14 times slower

The tutorial's readers saw fp16 runs diverge: Adam's epsilon of 1e-8 is 0 in fp16, and a pad token equal to eos hid the
end of every answer. Here the base computes in fp16, masters and Adam are fp32, the loss is scaled.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import fitune
from fitune.config import load

ROOT = Path(__file__).parent.parent


def base_with_pad_as_eos(folder: Path) -> Path:
    """A copy of the embedded model whose tokenizer pads with its end-of-sequence token."""
    copy = shutil.copytree(fitune.embedded_path(), folder / "base")
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"pad_token": "<eos>"}), encoding="utf-8")
    return copy


def measure(base: Path, dtype: str, run: Path) -> dict[str, float | int | str]:
    """Train the demo in one dtype; what came out."""
    overrides = [
        f"model.path={base}",
        f"model.dtype={dtype}",
        "train.epochs=3",
        "train.micro_batch_rows=2",
        "train.eval_every_steps=36",
        "train.save_every_steps=72",
        f"output.dir={run}",
        f"data.train={ROOT / 'examples/demo/train.jsonl'}",
        f"data.eval={ROOT / 'examples/demo/heldout.jsonl'}",
    ]
    fitune.train(load(ROOT / "examples" / "demo.yaml", overrides), quiet=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [row["loss"] for row in rows if row["kind"] == "train"]
    evals = [row["loss"] for row in rows if row["kind"] == "eval"]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return {
        "dtype": dtype,
        "steps": len(train),
        "train": sum(train[-10:]) / 10,
        "final": evals[-1],
        "best": min(evals),
        "skipped": sum(row["kind"] == "skipped" for row in rows),
        "scale": result["scale"],
        "device": result["device"],
        "versions": json.dumps(result["versions"]),
    }


def main() -> None:
    """Measure, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "fp16.md")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "fp16", "bf16"], help="the first is the reference")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = base_with_pad_as_eos(Path(folder))
        results = [measure(base, dtype, Path(folder) / dtype) for dtype in options.dtypes]
    reference = results[0]
    lines = [
        "# fp16 against fp32",
        "",
        f"`python scripts/measure_fp16.py` on {reference['device']}, {reference['versions']}. The demo's rows, padded",
        f"micro-batches of 2 rows, pad token = eos token, {reference['steps']} steps.",
        "",
        "| base dtype | mean train loss, last 10 steps | final held-out loss | against fp32 | best held-out loss | "
        "steps not applied | loss scale at the end |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        off = float(row["final"]) / float(reference["final"]) - 1
        lines.append(
            f"| {row['dtype']} | {row['train']:.4f} | {row['final']:.4f} | {off:+.3%} | {row['best']:.4f} | "
            f"{row['skipped']} | {row['scale']:g} |"
        )
    text = "\n".join(lines) + "\n"
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
