"""Text -> ids and back, with special tokens kept apart from text.

`encode` never makes a special token out of text: `<|im_end|>` in a row of data stays eight harmless tokens. Special
tokens come from templates only, through `split`. Try it: `Tokenizer.load(Path("model")).encode("hello")`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers

from fitune.data.ice_text import UNSETTLED, IceText
from fitune.data.tokenizer_files import TokenizerFiles
from fitune.errors import ConfigError

# Tokens with which models end a turn or a text; those that exist as special tokens stop generation.
END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|return|>",
    "</s>",
    "<eos>",
)
# GLM ends its turn by beginning the next one; only a tokenizer with [gMASK] means it that way. After one of its turns
# may come another one of its own (a thought, then a call): that ends the first, but not the answer.
GLM_END_TOKENS = ("<|user|>", "<|observation|>")
GLM_NEXT_TOKEN = "<|assistant|>"


class Tokenizer:
    """A model folder's tokenizer.

    Attributes:
        folder: where it was loaded from.
        new_tokens: texts that are tokens here and not in the folder (method.new_tokens).
        vocab_size: ids, added tokens included; the highest id plus one.
        bos_id, eos_id, pad_id, unk_id: None when the tokenizer has none.
        stop_ids: ids that end an answer: eos, those of generation_config.json, and END_TOKENS.
        next_id: the id with which the model itself goes on to another turn of its own, or None.
        special_tokens: text -> id of every special token.
        named_tokens: bos_token, eos_token, ... -> text, as chat templates get them.
        prefix_ids: what the tokenizer itself puts before every text, such as Llama's bos.
        blank: the ids that mark a blank to fill in, for ChatGLM-6B, whose rows all need one; else None.
        opening_ids: what stands before every piece of a text that is cut in rows.
        unsettled: endings of a decoded text that may change once more ids follow.
        chat_template: the model's own, or None.
        note: what of the folder is not used, for people, or None.
        hash: sha256 over the files read.
    """

    def __init__(self, files: TokenizerFiles, new_tokens: Sequence[str] = ()) -> None:
        self.folder: Path = files.folder
        self.new_tokens = tuple(new_tokens)
        self.note = files.note
        self.hash = files.hash()
        self.chat_template = files.chat_template()
        self._backend = files.backend()
        self._continuation = _without_first_space(self._backend)
        for backend in (self._backend, self._continuation):
            backend.encode_special_tokens = True
        decoder = self._backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in decoder.items() if token.special}
        self.vocab_size = max([self._backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in decoder)])
        self.named_tokens = files.named_tokens()
        self._name_from_configs(files)
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            self._id(self.named_tokens.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        )
        self.stop_ids = self._find_stop_ids(files)
        self.next_id = self.special_tokens.get(GLM_NEXT_TOKEN) if "[gMASK]" in self.special_tokens else None
        self.prefix_ids = self._find_prefix(files)
        self.blank = self._backend.blank if isinstance(self._backend, IceText) else None
        self.opening_ids = self.prefix_ids if self.blank else ()
        self.unsettled = ("\ufffd", *UNSETTLED) if self.blank else ("\ufffd",)
        self._special = _split_pattern(token for token in decoder.values() if token.special)

    @classmethod
    def load(cls, folder: Path, new_tokens: Sequence[str] = ()) -> Tokenizer:
        """Load the tokenizer of a model folder.

        Args:
            new_tokens: texts that become tokens of their own.

        Raises:
            ConfigError: there is none, its files do not belong together, or a new token is none.
        """
        return cls(TokenizerFiles.read(Path(folder)).with_tokens(new_tokens), new_tokens)

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        """Ids of plain text, no bos or eos; special tokens in it are encoded as the text they look like.

        Args:
            at_start: False for a piece that follows another one, where some tokenizers add no space in front.
        """
        return self.encode_batch([text], at_start=at_start)[0]

    def encode_batch(self, texts: Sequence[str], *, at_start: bool = True) -> list[list[int]]:
        """`encode` of many texts at once, several times as fast."""
        backend = self._backend if at_start else self._continuation
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; special tokens are left out unless asked for."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_id(self, text: str) -> int | None:
        """Id of a whole token, or None if there is no such token."""
        return self._id(text)

    def spell(self, token: int) -> str:
        """How the vocabulary writes one id; byte-level ones as text, if they are whole characters."""
        if "ByteLevel(" in str(self._backend.pre_tokenizer):
            text = self._backend.decode([token], skip_special_tokens=False)
            if "\ufffd" not in text:
                return text
        return self._backend.id_to_token(token) or ""

    def check_rows(self, rows: int) -> None:
        """Refuse a model with fewer embedding rows than there are ids; new tokens get their rows in training.

        Raises:
            ConfigError: it has fewer.
        """
        if self.vocab_size - len(self.new_tokens) > rows:
            raise ConfigError(
                f"{self.folder}: the tokenizer has {self.vocab_size} entries, the model only {rows} embedding rows; "
                "tokenizer and model do not belong together"
            )

    def save(self, target: Path) -> None:
        """Write this tokenizer's files into another model folder.

        Raises:
            OSError: the disk refused.
        """
        TokenizerFiles.read(self.folder).with_tokens(self.new_tokens).save(target)

    def split(self, text: str) -> list[str | int]:
        """Cut a rendered template into plain texts and the ids of its special tokens; for trusted text only."""
        if self._special is None:
            return [text] if text else []
        parts: list[str | int] = []
        position = 0
        for match in self._special.finditer(text):
            if match.start() > position:
                parts.append(text[position : match.start()])
            parts.append(self.special_tokens[match[1]])
            position = match.end()
        if position < len(text):
            parts.append(text[position:])
        return parts

    def special_in(self, text: str) -> set[str]:
        """The special tokens that `split` would find in a text."""
        return set() if self._special is None else {match[1] for match in self._special.finditer(text)}

    def hide_special(self, text: str, characters: Mapping[str, str]) -> str:
        """Put a character of the caller's choice in the place of each special token in a text."""
        if self._special is None:
            return text
        return self._special.sub(lambda match: match[0].replace(match[1], characters[match[1]]), text)

    def byte_ids(self) -> frozenset[int]:
        """Ids that stand for one byte of a character which the vocabulary does not know as a whole."""
        vocab = self._backend.get_vocab(with_added_tokens=False)
        if "ByteLevel(" in str(self._backend.pre_tokenizer):
            # Byte-level vocabularies write the bytes from 0x80 on as these characters.
            high = {*range(0xA1, 0x100), *range(290, 324)}
            return frozenset(i for text, i in vocab.items() if len(text) == 1 and ord(text) in high)
        return frozenset(i for text, i in vocab.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", text))

    def _id(self, text: str | None) -> int | None:
        return None if text is None else self._backend.token_to_id(text)

    def _name_from_configs(self, files: TokenizerFiles) -> None:
        """Take bos and eos from the model's configuration where the tokenizer's files do not name them."""
        for file in ("config.json", "generation_config.json"):
            for name in ("bos", "eos", "pad"):
                ids = _ids(files.json(file).get(f"{name}_token_id"))
                text = self._backend.id_to_token(ids[0]) if ids else None
                if text in self.special_tokens:
                    self.named_tokens.setdefault(f"{name}_token", text)

    def _find_stop_ids(self, files: TokenizerFiles) -> tuple[int, ...]:
        known = [self.eos_id, *_ids(files.json("generation_config.json").get("eos_token_id"))]
        if self.named_tokens.get("eos_token") != "<eop>":  # ChatGLM-6B: </s> is for texts, answers end with <eop>
            known += [self.special_tokens.get(text) for text in END_TOKENS]
        if "[gMASK]" in self.special_tokens:
            known += [self.special_tokens.get(text) for text in GLM_END_TOKENS]
        return tuple(dict.fromkeys(i for i in known if i is not None))

    def _find_prefix(self, files: TokenizerFiles) -> tuple[int, ...]:
        plain = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a", add_special_tokens=True).ids
        starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        prefix = tuple(whole[: starts[0]]) if starts else ()
        adds_bos = files.json("tokenizer_config.json").get("add_bos_token")
        if adds_bos is True and not prefix and self.bos_id is not None:
            return (self.bos_id,)
        if adds_bos is False and prefix == (self.bos_id,):
            return ()
        return prefix


def _ids(value: object) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _split_pattern(tokens: Iterable[tokenizers.AddedToken]) -> re.Pattern[str] | None:
    """A pattern that finds special tokens, with the spaces around them that a token takes in (lstrip, rstrip)."""
    tokens = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    if not tokens:
        return None
    every = "|".join(re.escape(token.content) for token in tokens)
    takes_left = "|".join(re.escape(token.content) for token in tokens if token.lstrip)
    before = rf"(?:\s+(?={takes_left}))?" if takes_left else ""
    after = "".join(rf"(?:(?<={re.escape(token.content)})\s+)?" for token in tokens if token.rstrip)
    return re.compile(f"{before}({every}){after}")


def _without_first_space(backend: tokenizers.Tokenizer | IceText) -> tokenizers.Tokenizer | IceText:
    """The tokenizer for text that does not begin a sequence; the same object unless its pre-tokenizer cares."""
    if isinstance(backend, IceText) or "prepend_scheme=first" not in str(backend.pre_tokenizer):
        return backend
    description = json.loads(backend.to_str())
    outer = description["pre_tokenizer"]
    for step in [outer, *outer.get("pretokenizers", [])]:
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return tokenizers.Tokenizer.from_str(json.dumps(description))
