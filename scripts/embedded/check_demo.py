"""Check the demo's rows: forms exact, forms balanced, no line twice, no line in the pretraining corpus.

python scripts/embedded/check_demo.py --corpus build/embedded
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

DEMO = Path(__file__).parent.parent.parent / "examples" / "demo"
FORMS = {"五言绝句": [5] * 4, "七言绝句": [7] * 4, "五言律诗": [5] * 8, "五言对联": [5] * 2, "七言对联": [7] * 2}
BREAK = re.compile(r"[，。！？；：、\s]+")


def lines_of(text: str) -> list[str]:
    """Verse lines, split at punctuation."""
    return [line for line in BREAK.split(text) if line]


def main() -> int:
    """Print what was counted; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder of prepare_corpus.py's output; without it only the forms")
    options = parser.parse_args()
    problems: list[str] = []
    seen: Counter[str] = Counter()
    prompts: Counter[str] = Counter()
    for name in ("train", "heldout"):
        rows = [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        forms: Counter[str] = Counter()
        for row in rows:
            form = next(form for form in FORMS if row["instruction"].endswith(form))
            forms["对联" if form.endswith("对联") else form] += 1
            lines = lines_of(row["output"])
            if [len(line) for line in lines] != FORMS[form]:
                problems.append(f"{name}: {row}")
            seen.update(lines)
            prompts[row["instruction"]] += 1
        print(f"{name}: {len(rows)} rows, {dict(forms)}")
        if len(set(forms.values())) != 1:
            problems.append(f"{name}: forms are not balanced")
    problems += [f"twice: {line}" for line, count in (seen + prompts).items() if count > 1]
    if options.corpus:
        corpus: set[str] = set()
        for file in ("train.jsonl.gz", "heldout.jsonl.gz"):
            with gzip.open(options.corpus / file, "rt", encoding="utf-8") as texts:
                for text in texts:
                    corpus.update(lines_of(json.loads(text)["text"]))
        print(f"{len(seen)} verse lines against {len(corpus)} of the corpus")
        problems += [f"in the corpus: {line}" for line in seen if line in corpus]
    print("\n".join(problems) or "nothing wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
