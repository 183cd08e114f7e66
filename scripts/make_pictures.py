"""Draw docs/images/: what GLM does with a blank, one exchange in the three ChatGLM layouts, and who sees whom.

    python scripts/make_pictures.py

Positions and masks come from `fitune.model.prefix_lm`, which ChatGLM-6B runs on, and `fitune.model.masks`; ids are the
golden sequences of tests/data. The SVG is written by hand: no fonts, no scripts, a style for light and one for dark.
Files ending in .zh-CN.svg have Chinese labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch

from fitune.model.masks import causal
from fitune.model.prefix_lm import find_places, prefix_bias
from fitune.plan.chatglm import Blank

IMAGES = Path(__file__).parent.parent / "docs" / "images"
BLANK = Blank(sop=130004, gmask=130001, mask=130000)


class Exchange(NamedTuple):
    """你好 / 你好！ in one layout: ids, how the vocabulary writes them, and the first token that is learnt."""

    ids: list[int]
    texts: list[str]
    learnt: int


def _exchange(ids: str, texts: str, learnt: int) -> Exchange:
    return Exchange([int(token) for token in ids.split()], texts.split(), learnt)


V1 = _exchange("5 74874 130001 130004 5 74874 35 130005", "▁ 你好 [gMASK] sop ▁ 你好 ! eop", 3)
V2 = _exchange(
    "64790 64792 790 30951 517 30910 30939 30996 13 13 54761 31211 39701 13 13 55437 31211 36474 54591 31404 2",
    "[gMASK] sop ▁[ R ound ▁ 1 ] \\n \\n 问 ： 你好 \\n \\n 答 ： ▁你 好 ！ </s>",
    17,
)
V3 = _exchange(
    "64790 64792 64795 30910 13 36474 54591 64796 30910 13 36474 54591 31404 2",
    "[gMASK] sop user ▁ \\n ▁你 好 assistant ▁ \\n ▁你 好 ！ </s>",
    8,
)
# x3 and x4 of six tokens are cut out; the ids of the others do not matter.
SPAN = ([1, 2, BLANK.mask, 5, 6, BLANK.sop, 3, 4], ["x1", "x2", "[MASK]", "x5", "x6", "sop", "x3", "x4"])
SPAN_NEXT = ["x3", "x4", "eop"]

WORDS = {
    "": {
        "text": "a text, x3 and x4 to be cut out",
        "reads": "what the model reads",
        "row1": "position 1: place in the text",
        "row2": "position 2: place in the span",
        "next": "to be predicted",
        "position": "position",
        "learnt": "learnt",
        "given": "given",
        "v1": "ChatGLM-6B",
        "v2": "ChatGLM2-6B",
        "v3": "ChatGLM3-6B",
        "mask1": "ChatGLM-6B: prefix",
        "mask3": "ChatGLM2 and 3: causal",
        "maskp": "ChatGLM-6B: two packed rows",
        "who": "line: who looks; column: at whom",
        "context": "looks ahead, inside the context",
        "back": "looks back, or at itself",
    },
    ".zh-CN": {
        "text": "原文，挖掉 x3 和 x4",
        "reads": "模型读到的序列",
        "row1": "位置 1：在原文中的位置",
        "row2": "位置 2：在片段中的位置",
        "next": "要预测的 token",
        "position": "位置",
        "learnt": "参与学习",
        "given": "已给出",
        "v1": "ChatGLM-6B",
        "v2": "ChatGLM2-6B",
        "v3": "ChatGLM3-6B",
        "mask1": "ChatGLM-6B：前缀掩码",
        "mask3": "ChatGLM2、3：因果掩码",
        "maskp": "ChatGLM-6B：打包的两条数据",
        "who": "行：谁在看；列：看谁",
        "context": "看到后面的 token（只在上文内）",
        "back": "看到自己和前面的 token",
    },
}

# fill and line of each kind of box, light and dark; the first is the paper everything lies on
COLOURS = {
    "paper": ("#ffffff", "#d0d7de", "#0d1117", "#30363d"),
    "plain": ("#f6f8fa", "#d0d7de", "#161b22", "#3d444d"),
    "context": ("#cfe8ff", "#0969da", "#10355f", "#4493f8"),
    "answer": ("#ffe2c7", "#bc4c00", "#5a2605", "#db6d28"),
    "learnt": ("#c8f0d2", "#1a7f37", "#0d3d1c", "#3fb950"),
}
INK, SOFT = ("#1f2328", "#e6edf3"), ("#59636e", "#9198a1")
CELL, TALL = 46, 38


class Picture:
    """Boxes and texts, collected; `svg` puts them on paper of the given size."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A rectangle of a kind of `COLOURS`."""
        self._parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"/>')

    def text(
        self, x: float, y: float, text: object, size: float = 12, anchor: str = "start", soft: bool = False
    ) -> None:
        """One line of text, standing on y."""
        kind = "soft" if soft else "ink"
        self._parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}">'
            f"{escape(str(text))}</text>"
        )

    def svg(self, width: int, height: int) -> str:
        """The file."""
        rules, dark = [], []
        for name, (fill, line, dark_fill, dark_line) in COLOURS.items():
            rules.append(f".{name}{{fill:{fill};stroke:{line}}}")
            dark.append(f".{name}{{fill:{dark_fill};stroke:{dark_line}}}")
        for name, (light, other) in (("ink", INK), ("soft", SOFT)):
            rules.append(f".{name}{{fill:{light}}}")
            dark.append(f".{name}{{fill:{other}}}")
        style = f"{''.join(rules)}@media (prefers-color-scheme:dark){{{''.join(dark)}}}"
        family = "system-ui, 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', 'WenQuanYi Micro Hei', sans-serif"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" font-family="{family}">',
                f"<style>{style}</style>",
                f'<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6"/>',
                *self._parts,
                "</svg>\n",
            ]
        )


class Seen(NamedTuple):
    """For the ids of one row: the two position rows (1, 2, S), and who sees whom (S, S)."""

    rows: list[list[int]]
    visible: list[list[bool]]


def prefix(ids: Sequence[int], positions: Sequence[int] | None = None) -> Seen:
    """What ChatGLM-6B makes of a row; `positions` that restart separate documents."""
    ids_BS = torch.tensor([ids])
    places = find_places(ids_BS, BLANK, None, None if positions is None else torch.tensor([positions]))
    bias = prefix_bias(places, len(ids), torch.zeros(1))
    assert bias is not None
    return Seen(places.rows_B2S[0].tolist(), (bias[0, 0] == 0).tolist())


def tokens(
    picture: Picture, at: tuple[float, float], ids: Sequence[object], texts: Sequence[str], kinds: Sequence[str]
) -> None:
    """A line of cells: the text, the id below it."""
    x, y = at
    for number, (token, text, kind) in enumerate(zip(ids, texts, kinds, strict=True)):
        left = x + number * CELL
        picture.box(left, y, CELL - 3, TALL, kind)
        middle = left + (CELL - 3) / 2
        picture.text(middle, y + 16, text, 8.5 if len(text) > 7 else 10 if len(text) > 5 else 12, "middle")
        picture.text(middle, y + 31, token, 9.5, "middle", soft=True)


def numbers(picture: Picture, at: tuple[float, float], name: str, values: Sequence[object]) -> None:
    """A line of numbers under cells, its name in front of them."""
    x, y = at
    picture.text(x - 10, y, name, 11, "end", soft=True)
    for number, value in enumerate(values):
        picture.text(x + number * CELL + (CELL - 3) / 2, y, value, 12, "middle")


def grid(picture: Picture, at: tuple[float, float], visible: Sequence[Sequence[bool]], size: float) -> None:
    """Who sees whom: what stands ahead of the one who looks in one colour, the rest in another."""
    x, y = at
    for i, line in enumerate(visible):
        for j, seen in enumerate(line):
            kind = ("context" if j > i else "answer") if seen else "plain"
            picture.box(x + j * size, y + i * size, size - 1, size - 1, kind)


def spans(words: dict[str, str]) -> str:
    """A blank inside a text: what is read, both position rows, who sees whom."""
    picture, left = Picture(), 190
    ids, texts = SPAN
    seen, start = prefix(ids), texts.index("sop")
    picture.text(left - 10, 43, words["text"], 11, "end", soft=True)
    for number in range(6):
        picture.box(left + number * CELL, 20, CELL - 3, TALL, "learnt" if number in (2, 3) else "plain")
        picture.text(left + number * CELL + (CELL - 3) / 2, 43, f"x{number + 1}", 12, "middle")
    picture.text(left - 10, 108, words["reads"], 11, "end", soft=True)
    for number, text in enumerate(texts):
        picture.box(left + number * CELL, 85, CELL - 3, TALL, "context" if number < start else "answer")
        picture.text(left + number * CELL + (CELL - 3) / 2, 108, text, 10 if len(text) > 5 else 12, "middle")
    numbers(picture, (left, 145), words["row1"], seen.rows[0])
    numbers(picture, (left, 168), words["row2"], seen.rows[1])
    numbers(picture, (left, 191), words["next"], [""] * start + SPAN_NEXT)
    side = left + len(ids) * CELL + 40
    size = 19
    for number, text in enumerate(texts):
        picture.text(side - 6, 34 + number * size, text, 9.5, "end", soft=True)
    grid(picture, (side, 20), seen.visible, size)
    legend(picture, words, (side, 190), ("context", "answer"))
    return picture.svg(side + len(ids) * size + 50, 230)


def legend(picture: Picture, words: dict[str, str], at: tuple[float, float], kinds: Sequence[str]) -> None:
    """What the colours mean."""
    x, y = at
    names = {"context": "context", "answer": "back", "learnt": "learnt", "plain": "given"}
    for number, kind in enumerate(kinds):
        picture.box(x, y + number * 18, 11, 11, kind)
        picture.text(x + 17, y + number * 18 + 10, words[names[kind]], 11)


def layouts(words: dict[str, str]) -> str:
    """One exchange in the three layouts: ids, what is learnt, positions."""
    picture, left, y = Picture(), 112.0, 18.0
    width = 14
    for name, (ids, texts, learnt) in (("v1", V1), ("v2", V2), ("v3", V3)):
        # A token is learnt where it is predicted: in version 1 gMASK's own place already gives sop.
        kinds = ["learnt" if number >= learnt else "plain" for number in range(len(ids))]
        rows = prefix(ids).rows if name == "v1" else [list(range(len(ids)))]
        picture.text(14, y + 22, words[name], 13)
        for begin in range(0, len(ids), width):
            part = slice(begin, begin + width)
            tokens(picture, (left, y), ids[part], texts[part], kinds[part])
            labels = ["1", "2"] if name == "v1" else [""]
            for number, (label, row) in enumerate(zip(labels, rows, strict=True)):
                numbers(picture, (left, y + TALL + 17 + 18 * number), f"{words['position']} {label}".strip(), row[part])
            y += TALL + 17 + 18 * len(rows) + 8
        y += 8
    legend(picture, words, (left, y), ("plain", "learnt"))
    return picture.svg(int(left + width * CELL + 14), int(y + 44))


def masks(words: dict[str, str]) -> str:
    """Who sees whom: version 1, versions 2 and 3, and two rows of version 1 in one sequence."""
    picture, size, top = Picture(), 15, 52
    length = len(V1[0])
    three = causal(len(V3[0]), len(V3[0]), torch.device("cpu"))[0].tolist()
    packed = prefix([*V1[0], *V1[0]], [*range(length), *range(length)]).visible
    x = 80.0
    for name, visible, texts in (
        ("mask1", prefix(V1[0]).visible, V1[1]),
        ("mask3", three, V3[1]),
        ("maskp", packed, V1[1] * 2),
    ):
        picture.text(x, 26, words[name], 13)
        for number, text in enumerate(texts):
            picture.text(x - 6, top + 11 + number * size, text, 9.5, "end", soft=True)
        grid(picture, (x, top), visible, size)
        x += max(len(visible) * size, 150) + 82
    bottom = top + len(packed) * size
    legend(picture, words, (80, bottom - 60), ("context", "answer"))
    picture.text(80, bottom - 6, words["who"], 11, soft=True)
    return picture.svg(int(x - 82 + 20), bottom + 16)


PICTURES = {"glm-spans": spans, "chatglm-rows": layouts, "chatglm-masks": masks}


def draw() -> dict[str, str]:
    """File name -> SVG."""
    return {f"{name}{ending}.svg": make(words) for name, make in PICTURES.items() for ending, words in WORDS.items()}


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    for name, svg in draw().items():
        (IMAGES / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
