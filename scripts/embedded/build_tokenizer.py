"""Build the tokenizer of the embedded base model from the corpus of ``prepare_corpus.py``.

Every Chinese character is one token and is never merged; Latin words get a few hundred BPE
merges; any other text falls back to UTF-8 bytes, so that every text round-trips exactly.
"""

import argparse
import gzip
import json
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fitune.data.layouts import LAYOUTS

VOCAB_SIZE = 8000
LATIN_MERGES = 550
MIN_ALSO_COUNT = 3
SPECIAL = ["<pad>", "<bos>", "<eos>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ASCII = ["\t", "\n", "\r", *map(chr, range(0x20, 0x7F))]
PUNCTUATION = list("，。？！；：、·…—–～•“”‘’《》〈〉「」『』（）【】〔〕％￥°×÷²π→≤≥")
# Characters of modern text that are neither in level 1 of GB 2312 nor frequent in the corpus.
MODERN = "熵睑锕來並幫確訓涼計鲨喱喵嗯肽鲑锂崽瘾擀噩鼬稣咪苷钴鳕氩酯疱袤瞌茴咔龈煲噼踝邋遢酰呃颚嗒蛎遛"
HAN = re.compile("[\u3007\u3400-\u9fff\U00020000-\U0003ffff]")
# A Latin word takes the space before it along, except after a colon: the token sequence of
# "Assistant: " + answer is then that of the two parts, whatever the answer.
WORD = Regex("((?<!:) )?[A-Za-z]+")


def common_characters() -> list[str]:
    """Return the 3,755 level-1 characters of GB 2312, in the order of the standard."""
    codes = (bytes([row + 0xA0, cell + 0xA0]) for row in range(16, 56) for cell in range(1, 95))
    return [char for char in (code.decode("gb2312", "ignore") for code in codes) if char]


def read_texts(corpus: Path) -> list[str]:
    """Read the training texts."""
    with gzip.open(corpus / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def choose_characters(texts: list[str], also: Path | None, size: int) -> list[str]:
    """Choose ``size`` Chinese characters: the common ones, those of ``also``, the most frequent."""
    frequency = Counter(HAN.findall("".join(texts)))
    chosen = {*common_characters(), *MODERN}
    if also:
        extra = Counter(HAN.findall(also.read_text(encoding="utf-8")))
        chosen |= {char for char, number in extra.items() if number >= MIN_ALSO_COUNT}
    ranked = sorted(frequency, key=lambda char: (-frequency[char], char))
    rest = [char for char in ranked if char not in chosen][: size - len(chosen)]
    return sorted(chosen | set(rest), key=lambda char: (-frequency[char], char))


def latin_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Learn the merges of Latin words from the English texts of the corpus."""
    alphabet = [char for char in ASCII if char.isalpha() or char == " "]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + LATIN_MERGES, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(WORD, "removed", invert=True)
    tokenizer.train_from_iterator((text for text in texts if text.isascii()), trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def build(texts: list[str], also: Path | None) -> Tokenizer:
    """Assemble the tokenizer; the order of the vocabulary is the order of the ids."""
    merges = latin_merges(texts)
    fixed = [*SPECIAL, *BYTES, *ASCII, *PUNCTUATION, *dict.fromkeys(a + b for a, b in merges)]
    tokens = fixed + choose_characters(texts, also, VOCAB_SIZE - len(fixed))
    vocab = {token: number for number, token in enumerate(tokens)}
    if not len(vocab) == len(tokens) == VOCAB_SIZE:
        raise ValueError(f"{len(tokens)} tokens, {len(vocab)} different ones")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(WORD, "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of train.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tokenizer files")
    parser.add_argument("--also", type=Path, help="text file whose repeated characters all get a token")
    args = parser.parse_args()
    texts = read_texts(args.corpus)
    tokenizer = build(texts, args.also)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        **{f"{token[1:-1]}_token": token for token in SPECIAL},
        "chat_template": LAYOUTS["tutorial"].source,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (args.out / "tokenizer_config.json").write_text(text, encoding="utf-8")
    vocab = tokenizer.get_vocab()
    han = {token for token in vocab if HAN.fullmatch(token)}
    latin = sum(len(token) > 1 and token.strip().isalpha() and token.isascii() for token in vocab)
    missing = Counter(char for char in HAN.findall("".join(texts)) if char not in han)
    print(f"{len(vocab)} tokens: {len(SPECIAL)} special, {len(BYTES)} bytes, {len(ASCII)} ASCII, ", end="")
    print(f"{len(PUNCTUATION)} punctuation, {latin} Latin, {len(han)} Chinese characters")
    print(f"Chinese characters of the corpus without a token: {len(missing)} ({missing.total()} times)")
    print(f"tokens: {sum(len(e.ids) for e in tokenizer.encode_batch(texts))} in {len(texts)} texts")


if __name__ == "__main__":
    main()
