"""Print what the demo run learnt: held-out loss and form accuracy, before and after.

    python examples/demo_table.py runs/demo

A greedy answer has the right form if its lines, split at punctuation, are exactly 4 x 5 characters (五言绝句),
4 x 7 (七言绝句), 8 x 5 (五言律诗) or, for a couplet (对联), two of the length named, and the answer ended by itself.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

import fitune
from fitune.infer.generate import Sampling, generate
from fitune.infer.load import Loaded
from fitune.training.report import write_report

HELD_OUT = Path(__file__).parent / "demo" / "heldout.jsonl"
FORMS = {"五言绝句": [5] * 4, "七言绝句": [7] * 4, "五言律诗": [5] * 8, "五言对联": [5] * 2, "七言对联": [7] * 2}


def form_of(prompt: str) -> str:
    """The form named last in a prompt."""
    return next(form for form in FORMS if prompt.endswith(form))


def has_form(answer: str, form: str) -> bool:
    """True if the lines of `answer` have exactly the lengths of `form`."""
    return [len(line) for line in re.split(r"[，。！？；：、\s]+", answer) if line] == FORMS[form]


def accuracy(model: Loaded, prompts: list[str]) -> dict[str, tuple[int, int]]:
    """(right, asked) per form; couplets of both lengths count together."""
    ids = [model.prompt_ids(prompt) for prompt in prompts]
    answers = generate(model.model, ids, model.tokenizer.stop_ids, Sampling(max_new_tokens=80), batch_rows=60)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for prompt, answer in zip(prompts, answers, strict=True):
        form = form_of(prompt)
        right = answer.stopped and has_form(model.tokenizer.decode(answer.ids), form)
        for name in ("对联" if form.endswith("对联") else form, "all"):
            counts[name][0] += right
            counts[name][1] += 1
    return {name: (right, asked) for name, (right, asked) in counts.items()}


def main() -> int:
    """Measure, print, and add the table to the run's report."""
    run = Path(sys.argv[1])
    prompts = [json.loads(line)["instruction"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    before = accuracy(fitune.load("embedded", device="cpu"), prompts)
    after = accuracy(fitune.load(run, device="cpu"), prompts)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    rows = [["held-out loss", f"{result['first_eval_loss']:.3f}", f"{result['best_eval_loss']:.3f}"]]
    for name in ("五言绝句", "七言绝句", "五言律诗", "对联", "all"):
        cells = [f"{right}/{asked} = {right / asked:.0%}" for right, asked in (before[name], after[name])]
        rows.append([f"form accuracy, {name}", *cells])
    table = Table("", "before", "after", title="Before and after LoRA")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    result["tables"] = [{"title": "Form accuracy", "columns": ["", "before", "after"], "rows": rows}]
    (run / "result.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"report: {write_report(run)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
