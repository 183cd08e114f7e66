"""A run folder as the training loop writes it, made up from a seed; for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

VERSE = [
    ("请以“秋夜”为题写一首五言绝句。", "床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。"),
    ("题目：登楼\n体裁：五言绝句", "白日依山尽，\n黄河入海流。\n欲穷千里目，\n更上一层楼。"),
    ("题目：早发\n体裁：七言绝句", "朝辞白帝彩云间，\n千里江陵一日还。\n两岸猿声啼不住，\n轻舟已过万重山。"),
]
BEFORE = [
    "秋夜是一个美丽的季节，秋天的夜晚有很多星星，我们可以看到月亮，月亮很圆很亮……",
    "登楼登楼登楼登楼，楼上有人楼下有人，有人有人有人",
    "",
]
AFTER = [
    "秋风入夜清，\n月照小窗明。\n独坐闻虫语，\n谁家捣练声。",
    "独上高楼望，\n长江万里秋。\n白云随雁去，\n明月共谁愁。",
    "晓色初开水上烟，\n孤帆一片过江天。\n回头不见来时路，\n唯有青山在眼前。",
]
CONFIG = """model:
  path: embedded
  dtype: fp32
method:
  name: lora
  r: 8
  alpha: 16.0
  target_modules: attention
data:
  train: [poems.jsonl]   # 训练数据
  eval: 0.05
train:
  epochs: 3.0
  learning_rate: 0.0002
  schedule: cosine
  warmup_steps: 20
"""


def metrics(num_steps: int, seed: int = 0) -> list[dict[str, object]]:
    """Rows of metrics.jsonl: a falling, noisy loss, an evaluation every tenth of the run, two skipped steps."""
    draw = random.Random(seed)
    rows: list[dict[str, object]] = []
    best = math.inf

    def evaluate(step: int) -> None:
        nonlocal best
        share = step / num_steps
        loss = 2.05 + 2.1 * math.exp(-5 * share) + 0.25 * max(0.0, share - 0.7) + draw.gauss(0, 0.01)
        improved = step > 0 and loss < best
        best = min(best, loss) if step else best
        rows.append(
            {"kind": "eval", "step": step, "loss": loss, "supervised_tokens": 9120, "seconds": 1.2, "best": improved}
        )

    evaluate(0)
    for step in range(1, num_steps + 1):
        share = step / num_steps
        facts: dict[str, object] = {"step": step, "epoch": round(3 * share, 4)}
        if num_steps > 50 and step in (num_steps // 3, num_steps // 2):
            names = [f"poems.jsonl:{draw.randrange(2000)}" for _ in range(9)]
            rows.append({"kind": "skipped", **facts, "reason": "non-finite gradient", "rows": names})
            continue
        tokens = 1600 + draw.randrange(500)
        rows.append(
            {
                "kind": "train",
                **facts,
                "loss": 2.0 + 2.2 * math.exp(-5 * share) + draw.gauss(0, 0.16),
                "grad_norm": 0.5 + 2 * math.exp(-8 * share) + abs(draw.gauss(0, 0.1)) + 4 * (draw.random() < 0.01),
                "learning_rate": 2e-4 * min(1, 10 * share) * 0.5 * (1 + math.cos(math.pi * share)),
                "tokens": tokens,
                "supervised_tokens": int(tokens * 0.44),
                "padded_tokens": int(tokens * 1.18),
                "seconds": round(0.4 + abs(draw.gauss(0, 0.03)) + (step == 1), 4),
                "memory_bytes": 1_820_000_000,
            }
        )
        if step % max(1, num_steps // 12) == 0 or step == num_steps:
            evaluate(step)
    rows.append({"kind": "note", "step": num_steps, "text": f"checkpoint of step {num_steps} saved"})
    return rows


def result(num_steps: int) -> dict[str, object]:
    """result.json of a finished run."""
    return {
        "status": "done", "step": num_steps, "total_steps": num_steps, "best_step": num_steps, "first_eval_loss": 4.15,
        "best_eval_loss": 2.08, "seconds": 0.46 * num_steps, "trainable_parameters": 344_064,
        "total_parameters": 51_380_224, "peak_memory_bytes": 1_838_000_000, "device": "NVIDIA H100 80GB HBM3",
        "data": {
            "train_rows": 19_140, "eval_rows": 1_007, "rejected_rows": 3, "longest_tokens": 412, "truncated": False,
            "template": "tutorial", "supervised_share": 0.4402, "files": {"poems.jsonl": 20_150}, "sources": ["a", "b"],
        },
        "tables": [
            {
                "title": "Form of 200 generated poems",
                "columns": ["check", "before", "after", "reference"],
                "rows": [
                    ["four lines 四句", 0.035, 0.985, 1.0], ["equal length 字数整齐", 0.01, 0.97, 1.0],
                    ["rhyme 押韵", 0.04, 0.715, 0.96], ["characters 字数", 12_204, 4_812, 4_790],
                ],
            }
        ],
        "versions": {"python": "3.12.4", "fitune": "0.1.0", "torch": "2.13.0", "peft": "0.21.1"},
    }  # fmt: skip


def make_run(folder: Path, num_steps: int = 400) -> Path:
    """Write every file of a finished run into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in metrics(num_steps))
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    samples = [
        {"source": f"poems.jsonl:{i}", "prompt": prompt, "reference": reference, "before": before, "after": after}
        for i, ((prompt, reference), before, after) in enumerate(zip(VERSE, BEFORE, AFTER, strict=True))
    ]
    (folder / "samples.json").write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result(num_steps)), encoding="utf-8")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return folder
