"""Count and plan every configuration of examples/tutorial: the tables of docs/tutorial.md and docs/tutorial.zh-CN.md.

    python scripts/make_docs.py        # writes them, with the other generated pages

No model folder and no network: of each model's config.json the keys that decide its sizes stand here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fitune.config import RunConfig, load
from fitune.plan.arch import ArchSpec, read_arch
from fitune.plan.memory import plan_memory
from fitune.plan.params import count
from fitune.plan.saves import level_of

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "tutorial"


def _shapes() -> dict[str, dict[str, Any]]:
    """Hub id -> the keys of config.json that decide sizes; the tests have them, too."""
    sys.path.insert(0, str(ROOT / "tests"))
    from plan import shapes

    return {
        "Langboat/bloom-1b4-zh": shapes.BLOOM_1B4,
        "meta-llama/Llama-3.2-1B": shapes.LLAMA_1B,
        "meta-llama/Llama-2-7b-hf": shapes.LLAMA_7B,
        "meta-llama/Llama-2-13b-hf": shapes.LLAMA_13B,
        "THUDM/chatglm3-6b-base": shapes.CHATGLM3,
    }


SHAPES = _shapes()
# Column of the memory table -> settings over a file.
PRECISIONS = {
    "fp32": ("model.dtype=fp32", "model.quantization=none"),
    "bf16": ("model.dtype=bf16", "model.quantization=none"),
    "int8": ("model.dtype=bf16", "model.quantization=int8"),
    "nf4": ("model.dtype=bf16", "model.quantization=nf4"),
    "nf4, `full`": ("model.dtype=bf16", "model.quantization=nf4", "train.activation_checkpointing=full"),
}
# Page -> column names of both tables.
WORDS = {
    "tutorial.md": (("configuration", "trained", "all", "share"), ("configuration", "micro-step, level")),
    "tutorial.zh-CN.md": (("配置", "可训练参数", "参数总数", "占比"), ("配置", "微步与重计算档位")),
}
MARKS = {name: (f"<!-- {name}: made by `make docs` -->", f"<!-- end of {name} -->") for name in ("params", "memory")}


def names() -> list[str]:
    """All configurations."""
    return sorted(file.stem for file in EXAMPLES.glob("*.yaml"))


def read(name: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, ArchSpec]:
    """A configuration and the architecture of its model."""
    config = load(EXAMPLES / f"{name}.yaml", overrides)
    return config, read_arch(SHAPES[config.model.path])


def params_table(columns: Sequence[str]) -> list[str]:
    """What `fitune params` prints for each configuration."""
    lines = [_row(columns), _row(["---"] * len(columns))]
    for name in names():
        config, arch = read(name)
        counted = count(arch, config.method)
        percent = f"{counted.percent:.4f} %"
        lines.append(_row([_link(name), f"{counted.trainable:,}", f"{counted.total:,}", percent]))
    return lines


def memory_table(columns: Sequence[str]) -> list[str]:
    """Planned peaks [GB] of full-length rows, without the CUDA context; the precision of the file itself in bold."""
    lines = [_row([*columns, *PRECISIONS]), _row(["---"] * (len(columns) + len(PRECISIONS)))]
    for name in names():
        config, _ = read(name)
        level = level_of(config.train.activation_checkpointing)
        step = f"{config.train.micro_batch_rows} x {config.data.max_length:,}, `{level}`"
        own = config.model.dtype or "bf16" if config.model.quantization == "none" else config.model.quantization
        peaks = {precision: _peak(name, settings) for precision, settings in PRECISIONS.items()}
        peaks[own] = f"**{peaks[own]}**"
        lines.append(_row([_link(name), step, *peaks.values()]))
    return lines


def _peak(name: str, settings: Sequence[str]) -> str:
    config, arch = read(name, settings)
    plan = plan_memory(arch, config, "no data")
    return f"{'' if plan.plain_reason is None else '≥ '}{plan.peak_bytes / 1e9:.2f}"


def _link(name: str) -> str:
    return f"[{name}](../examples/tutorial/{name}.yaml)"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tutorial_page(page: str, text: str) -> str:
    """A page of the tutorial with both tables made anew."""
    for (begin, end), make, columns in zip(MARKS.values(), (params_table, memory_table), WORDS[page], strict=True):
        before, rest = text.split(begin)
        text = "\n".join([f"{before}{begin}\n", *make(columns), f"\n{end}{rest.split(end)[1]}"])
    return text
