"""Build the pretraining corpus of the embedded base model.

Reads the chinese-poetry extracts (MIT, texts in the public domain) and tinyshakespeare and
writes ``train.jsonl.gz`` and ``heldout.jsonl.gz`` with rows ``{"text": ...}``. The result
depends only on the source files. Needs ``pip install opencc-python-reimplemented``.
"""

import argparse
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from text_cleaning import DROPPED_BOOKS, HAN, Dropped, clean_body, clean_title

MAX_CHARS, MAX_ENGLISH = 1000, 1500
MIN_CHAR_COUNT = 5  # verse with a rarer character is dropped: it would have no token
VERSE = {"全唐诗", "宋词", "水墨唐诗", "五代诗词"}
HELDOUT_ONE_IN = 50
END = "。？！"
Piece = tuple[str, str, str]  # source, title, body


def split_long(body: str, limit: int) -> Iterator[str]:
    """Split at line ends, long lines at sentence ends, into pieces of at most ``limit``."""
    part = ""
    for unit in re.findall(f"[^{END}\n]*(?:[{END}…]+[”’）]*\n?|\n|$)", body):
        if part and len(part) + len(unit) > limit:
            yield part.strip("\n")
            part = ""
        part += unit
    if part.strip():
        yield part.strip("\n")


def read_poetry(path: Path, dropped: Counter[tuple[str, str]]) -> Iterator[Piece]:
    """Yield the cleaned pieces of one chinese-poetry extract."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            source, title, text = row["src"], row["title"], row["text"]
            cut = re.match("(.*?)・(.*[，。].*)", title) if source == "元曲" else None
            if cut:  # the source took the first sentences of the aria for a part of its title
                title, text = cut[1], cut[2] + text
            try:
                title = clean_title(title)
                if title in DROPPED_BOOKS:
                    raise Dropped("book without boundaries")
                body = clean_body(text, source)
            except Dropped as reason:
                dropped[source, str(reason)] += 1
                continue
            for part in split_long(body, MAX_CHARS):
                yield source, title, part


def read_english(path: Path) -> Iterator[Piece]:
    """Yield speeches of Shakespeare, joined at blank lines up to ``MAX_ENGLISH`` characters."""
    part = ""
    for block in re.split(r"\n{2,}", path.read_text(encoding="utf-8").strip()):
        if part and len(part) + len(block) + 2 > MAX_ENGLISH:
            yield "tinyshakespeare", "", part
            part = ""
        part += ("\n\n" if part else "") + block
    yield "tinyshakespeare", "", part


def select(pieces: list[Piece], dropped: Counter[tuple[str, str]]) -> dict[str, Piece]:
    """Drop verse with rare characters and repeated bodies; the key is the bare body."""
    counts = Counter(ch for _, title, body in pieces for ch in title + body)
    rare = {ch for ch, n in counts.items() if n < MIN_CHAR_COUNT and re.match(f"[{HAN}]", ch)}
    unique: dict[str, Piece] = {}
    for piece in pieces:
        key = re.sub(r"\W", "", piece[2])
        if piece[0] in VERSE and not rare.isdisjoint(piece[1] + piece[2]):
            dropped[piece[0], "rare character"] += 1
        elif key in unique:
            dropped[piece[0], "duplicate"] += 1
        else:
            unique[key] = piece
    return unique


def split_heldout(unique: dict[str, Piece]) -> tuple[list[Piece], list[Piece]]:
    """Hold out pieces by hash, except those that share half of their clauses with training."""
    clauses = {key: re.findall(f"[{HAN}]{{4,}}", unique[key][2]) for key in unique}
    picked = [key for key in unique if int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % HELDOUT_ONE_IN == 0]
    chosen = set(picked)
    seen = {clause for key in unique if key not in chosen for clause in clauses[key]}
    for key in picked:
        if sum(clause in seen for clause in clauses[key]) >= max(1, len(clauses[key])) / 2:
            chosen.discard(key)
            seen.update(clauses[key])
    train = [piece for key, piece in unique.items() if key not in chosen]
    return train, [unique[key] for key in picked if key in chosen]


def write(path: Path, pieces: list[Piece]) -> None:
    """Write gzip'ed JSON Lines without a time stamp, so that equal input gives equal bytes."""
    rows = ({"text": f"{title}\n{body}" if title else body} for _, title, body in pieces)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(data.encode(), mtime=0))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of the source files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    args = parser.parse_args()
    dropped: Counter[tuple[str, str]] = Counter()
    pieces: list[Piece] = []
    for name in ("tang", "songci", "classics"):
        pieces += read_poetry(args.source / f"chinese_poetry_{name}.jsonl.gz", dropped)
    pieces += read_english(args.source / "tinyshakespeare.txt")
    parts = dict(zip(("train", "heldout"), split_heldout(select(pieces, dropped)), strict=True))
    args.out.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        write(args.out / f"{part}.jsonl.gz", rows)
        print(f"{part}: {len(rows)} pieces, {sum(len(b) for _, _, b in rows)} characters")
        for source in dict.fromkeys(piece[0] for piece in rows):
            sizes = [len(body) for name, _, body in rows if name == source]
            print(f"  {source}: {len(sizes)} pieces, {sum(sizes)} characters")
    for (source, reason), number in sorted(dropped.items(), key=lambda item: -item[1]):
        print(f"dropped {number:6d}  {source}: {reason}")


if __name__ == "__main__":
    main()
