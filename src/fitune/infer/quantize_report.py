"""Look at a model through the eyes of each 8- and 4-bit format (`fitune quantize-report MODEL`).

A few rows of text run through the model as transformers computes it, while the weights of its blocks are read from
their files one at a time: a hook in front of each linear layer reads its weight, measures what every format does to it
and to its product with these very inputs, and lets it go again. What is in memory is the embedding and one layer.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitune.config import build
from fitune.data.prepare import prepare
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError
from fitune.model.folder import ModelFolder, inspect_folder, resolve_folder
from fitune.model.load import DTYPES, check_report, class_and_options, load_base, open_weights, reading
from fitune.model.quantize import block_linears
from fitune.model.rounding import Rounding, measure_layer, total
from fitune.model.standins import load_around
from fitune.model.weights import WeightFiles, names_in_model

MAX_ROWS, MAX_LENGTH = 4, 128
SHOWN_LAYERS = 60
# What every model has seen in some form: prose, Chinese prose with verse, code, a question with an answer.
TEXTS = (
    "The river rises in the hills north of the town, runs past two mills and a stone bridge, and reaches the sea after "
    "sixty miles. In spring, when the snow melts, it carries timber; in late summer children cross it on foot. The "
    "mills closed in 1911, but their wheels still turn, and on Sundays visitors may watch them for three shillings.",
    "春天来了，冰雪融化，河水从山里流出来，经过两座磨坊和一座石桥，最后流进大海。孩子们在岸边放风筝，老人坐在柳树下聊天。"
    "古人写过许多关于春天的诗，比如“春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。”这首诗只有二十个字，却写出了一个早晨。",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n    return sum(values) / len(values)"
    "\n\n\nfor name, marks in {'Ada': [90, 85], 'Grace': [88, 97], 'Alan': [92, 79]}.items():\n"
    "    print(f'{name}: {mean(marks):.1f}')\n# Ada: 87.5\n# Grace: 92.5\n# Alan: 85.5\n",
    "Q: What is the boiling point of water at sea level, and why does it fall with height?\nA: 100 degrees Celsius. At "
    "greater height the air presses less on the surface, so bubbles of steam form at a lower temperature: about 93 "
    "degrees at 2,000 metres and 71 degrees on the top of Mount Everest, which is 8,849 metres high.",
)


@dataclass(frozen=True)
class QuantizeReport:
    """What was measured.

    Attributes:
        model: as the user named it.
        dtype: in which the model computed.
        threshold: from which an input is an outlier.
        rows, tokens: of the text; 0: there was no tokenizer, and only weights were measured.
        layers: in the order of the blocks.
        kinds: sums by the last part of the layers' names, then of all.
    """

    model: str
    dtype: str
    threshold: float
    rows: int
    tokens: int
    layers: tuple[Rounding, ...]
    kinds: tuple[Rounding, ...]

    @property
    def all(self) -> Rounding:
        """Sums of all layers."""
        return self.kinds[-1]

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        head = {"model": self.model, "dtype": self.dtype, "threshold": self.threshold, "rows": self.rows}
        parts = {"layers": [one.to_json() for one in self.layers], "kinds": [one.to_json() for one in self.kinds]}
        return {**head, "tokens": self.tokens, **parts}


def quantize_report(
    model: str, files: tuple[str, ...] = (), threshold: float = 6.0, dtype: str | None = None
) -> QuantizeReport:
    """Measure every format on every linear layer of a model's blocks.

    Args:
        model: `embedded`, a folder or a hub id; 16- or 32-bit weights.
        files: rows whose first `MAX_ROWS` run through the model; none: `TEXTS`.
        threshold: magnitude from which an input is an outlier of LLM.int8().
        dtype: in which the model computes; None: as config.json says, or fp32.

    Raises:
        ConfigError: the folder cannot be read or is quantized already, or an argument is not allowed.
        DataError: bad rows.
    Memory: embedding and head, one linear layer in its dtype and about five times in fp32, activations of `MAX_ROWS`
        rows; all weights if they have other names than those of the model.
    """
    if not 0 <= threshold <= 65504:
        raise ConfigError(f"--threshold is {threshold:g}; allowed: 0 to 65504")
    folder = resolve_folder(model, name="model")
    raw = inspect_folder(folder)
    if raw.quantization != "none":
        raise ConfigError(f"{folder} holds weights in {raw.quantization}; the report needs the 16- or 32-bit model")
    ids_BT = _rows(folder, files)
    chosen = dtype or _dtype_of(raw)
    network, sources, weights = _open(folder, raw, chosen)
    embedded: int = network.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # a transformers model
    if ids_BT is not None and int(ids_BT.max()) >= embedded:
        raise ConfigError(
            f"{folder}: the tokenizer gives id {int(ids_BT.max())}, but the model has only {embedded} embedding rows; "
            "tokenizer and model do not belong together"
        )
    layers = _walk(network, sources, weights, ids_BT, threshold)
    kinds: dict[str, list[Rounding]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append(layer)
    sums = [total(kind, parts) for kind, parts in kinds.items()] + [total("all", layers)]
    rows, tokens = (0, 0) if ids_BT is None else (len(ids_BT), ids_BT.numel())
    return QuantizeReport(model, chosen, threshold, rows, tokens, tuple(layers), tuple(sums))


def _dtype_of(raw: ModelFolder) -> str:
    wanted = str(raw.config.get("dtype", raw.config.get("torch_dtype"))).removeprefix("torch.")
    return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{wanted}"), "fp32")


def _rows(folder: Path, files: tuple[str, ...]) -> torch.Tensor | None:
    """(B, T) ids of a few rows, cut to the shortest; None: no tokenizer."""
    try:
        tokenizer = Tokenizer.load(folder)
    except ConfigError:
        if files:
            raise
        return None
    rows = [[*tokenizer.prefix_ids, *tokenizer.encode(text)] for text in TEXTS]
    if files:
        data = {"train": list(files), "max_length": MAX_LENGTH, "on_long_rows": "truncate"}
        read = prepare(build({"model": {"path": str(folder)}, "data": data}).data, tokenizer).train
        rows = [list(row.input_ids) for row in sorted(read, key=lambda row: -row.num_tokens)]
    rows = rows[:MAX_ROWS]
    length = min(MAX_LENGTH, *(len(row) for row in rows))
    return torch.tensor([row[:length] for row in rows])


def _open(folder: Path, raw: ModelFolder, dtype: str) -> tuple[nn.Module, dict[str, str], WeightFiles | None]:
    """The model, and for each weight that is a stand-in its name in the files, to be read one by one."""
    model_class, options = class_and_options(folder, raw, dtype)
    with torch.device("meta"):
        outline = model_class(options["config"])
    linears = {f"{name}.weight" for name in block_linears(outline)}
    if not linears:
        raise ConfigError(f"{folder}: the blocks of a {model_class.__name__} have no linear layers of the usual kind")
    weights = open_weights(folder, raw)
    names = names_in_model(outline, weights.shapes)
    if names is None:
        return load_base(folder, dtype, torch.device("cpu")).model, {}, None
    absent = {source: weights.shapes[source] for source, name in names.items() if name in linears}
    with reading(folder):
        model, report, found = load_around(model_class, options, weights, absent, ())
    check_report(folder, model, report)
    return model.eval().requires_grad_(False), found, weights


def _walk(
    model: nn.Module,
    sources: dict[str, str],
    weights: WeightFiles | None,
    ids_BT: torch.Tensor | None,
    threshold: float,
) -> list[Rounding]:
    layers = {name: model.get_submodule(name) for name in block_linears(model)}
    found: dict[str, Rounding] = {}

    def read(name: str) -> torch.Tensor:
        linear: Any = layers[name]
        source = sources.get(f"{name}.weight")
        return linear.weight if source is None or weights is None else weights.read(source).to(linear.weight.dtype)

    def before(name: str, module: Any, arguments: tuple[Any, ...]) -> None:
        weight_NK = read(name)
        found[name] = measure_layer(name, weight_NK, arguments[0].flatten(0, -2), threshold)
        stand_in, module.weight = module.weight, nn.Parameter(weight_NK, requires_grad=False)
        held[name] = stand_in

    def after(name: str, module: Any, _: Any, __: Any) -> None:
        module.weight = held.pop(name)

    held: dict[str, nn.Parameter] = {}
    if ids_BT is None:
        return [measure_layer(name, read(name), None, threshold) for name in layers]
    hooks = []
    for name, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(lambda module, x, name=name: before(name, module, x)))
        hooks.append(layer.register_forward_hook(lambda module, x, y, name=name: after(name, module, x, y)))
    with torch.no_grad():
        model(input_ids=ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    # A layer that the forward did not pass, such as an expert that no token chose, has no products.
    return [found.get(name) or measure_layer(name, read(name), None, threshold) for name in layers]


def text(report: QuantizeReport, width: int | None = None) -> str:
    """The report as a table, without colours.

    Args:
        width: columns; None: those of the terminal.
    """
    # A tenth of a second that --json need not pay.
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    products = ("xW: int8", "absmax", "LLM.int8()", "nf4", "fp8", "outliers", "their share") if report.tokens else ()
    for column in ("W: int8", "nf4", "fp8", *products):
        table.add_column(column, justify="right", no_wrap=True)
    layers, left_out = _shown(report)
    for one in layers:
        table.add_row(*_cells(one, report))
    table.add_section()
    for one in report.kinds:
        table.add_row(*_cells(one, report))
    stream = io.StringIO()
    columns = width or max(80, shutil.get_terminal_size((120, 24)).columns)
    Console(file=stream, width=columns, color_system=None, highlight=False, markup=False).print(table)
    rows = [line.rstrip() for line in stream.getvalue().splitlines()]
    sizes = ", ".join(f"{key} {size / 1e6:,.2f} MB" for key, size in report.all.size_bytes.items())
    return "\n".join([*_head(report), "", *rows, "", *left_out, f"size: {sizes}"])


def _shown(report: QuantizeReport) -> tuple[Sequence[Rounding], list[str]]:
    """The layers to print, and what to say of the others."""
    layers = report.layers
    if len(layers) <= SHOWN_LAYERS:
        return layers, []
    by_error = sorted(layers, key=lambda one: one.output_ratio("nf4") or one.weight_ratio("nf4"))
    worst = {one.name for one in by_error[-SHOWN_LAYERS:]}
    note = f"{len(layers) - SHOWN_LAYERS} layers with smaller errors in nf4 are in --json and --to DIR"
    return [one for one in layers if one.name in worst], [note]


def _head(report: QuantizeReport) -> list[str]:
    count = f"{len(report.layers)} linear layers, {report.all.weights:,} weights"
    lines = [
        f"{report.model}: {count}, read in {report.dtype}",
        "The idea, on a row of five numbers: [0.1, -0.3, 0.25, 0.15, -0.05] times 127 / 0.3, rounded, is",
        "[42, -127, 106, 64, -21], and comes back as [0.099, -0.3, 0.250, 0.151, -0.050].",
        "W: relative error of the weights.",
    ]
    if not report.tokens:
        return [*lines, "No tokenizer in this folder: products with real inputs were not measured."]
    return [
        *lines,
        f"xW: relative error of the products with the inputs of {report.rows} rows, {report.tokens} tokens.",
        f"absmax: inputs in 8 bits too; LLM.int8(): but for columns with an outlier (|x| >= {report.threshold:g});",
        "their share: what part of absmax's squared error goes when they are taken out.",
    ]


def _cells(one: Rounding, report: QuantizeReport) -> list[str]:
    cells = [short(one.name), *(f"{one.weight_ratio(key):.2%}" for key in ("int8", "nf4", "fp8"))]
    if not report.tokens:
        return cells
    ratios = [one.output_ratio(key) for key in ("int8", "absmax", "LLM.int8()", "nf4", "fp8")]
    share = one.outlier_share
    cells += ["-" if ratio is None else f"{ratio:.2%}" for ratio in ratios]
    return [*cells, f"{one.outliers:,} of {one.columns:,}", "-" if share is None else f"{share:.0%}"]


def short(name: str) -> str:
    """A layer's name from the number of its block on."""
    match = re.search(r"\d+\.", name)
    return name[match.start() :] if match else name
