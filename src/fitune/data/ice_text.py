"""The tokenizer of ChatGLM-6B, the first version: SentencePiece, and what the published code does around it.

`ice_text.model` is a unigram model. SentencePiece finds its best path with 32-bit sums, so rounding decides between
orders of equal pieces (`_____` + `_`, or the other way round), and its rules rewrite sequences of characters. The
tokenizers library sums in 64 bits: of 50,000 texts it gave nine other ids. Ids must be those the model was trained on,
so this tokenizer alone needs the sentencepiece library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers

from fitune.errors import ConfigError, MissingDependencyError
from fitune.plan.chatglm import Blank

FILE = "ice_text.model"
OPENING = ("[gMASK]", "<sop>")  # what a text without a context begins with
MAX_BLANKS = 80  # longest run of spaces that is one token

_BLANK = ("<sop>", "[gMASK]", "[MASK]")
_NEEDED = (*_BLANK, "<eop>", "<n>", "<|tab|>", f"<|blank_{MAX_BLANKS}|>")
# The model writes the half-width character, its normalization knows no other.
_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
UNSETTLED = tuple(_FULL_WIDTH)  # what is at the end of a text, while it is written, may still get wider
_BESIDE_CHINESE = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


class Ids(NamedTuple):
    """An encoded text, as the tokenizers library hands it out."""

    ids: list[int]


class IceText:
    """What `Tokenizer` asks of its backend, answered by SentencePiece.

    Special tokens never come out of text, and every text is encoded by itself, with a space in front of it.

    Attributes:
        blank: the ids that mark a blank to fill in.

    Args:
        model_file: ice_text.model.
        num_image_tokens: ids in front of the vocabulary; 20,000 in the first revisions of the model, 0 later.
        name: the file, for messages.
    Raises:
        ConfigError: the file is damaged or another SentencePiece model.
        MissingDependencyError: sentencepiece is not installed.
    """

    encode_special_tokens = True  # there is no other way
    pre_tokenizer = None
    blank: Blank

    def __init__(self, model_file: bytes, num_image_tokens: int, name: str) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            install = "pip install 'sentencepiece>=0.2,<0.3'"
            raise MissingDependencyError(f"{name}: reading it needs sentencepiece: {install}") from error
        self._model: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model_file)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{name}: is damaged, or no SentencePiece model; download it again") from error
        self._shift = num_image_tokens
        pieces = list(range(self._model.GetPieceSize()))
        texts = self._model.IdToPiece(pieces)
        self._texts = dict(enumerate(texts, num_image_tokens))
        self._vocab = {text: i for i, text in self._texts.items()}
        missing = [token for token in _NEEDED if token not in self._vocab]
        if missing:
            raise ConfigError(
                f"{name}: has no {', '.join(missing)}; fitune reads the file of the current ChatGLM-6B release, of "
                "2,706,249 bytes"
            )
        self.blank = Blank(*(self._vocab[token] for token in _BLANK))
        flags = zip(pieces, self._model.IsControl(pieces), self._model.IsUnknown(pieces), strict=True)
        self._special = {i + num_image_tokens: texts[i] for i, control, unknown in flags if control or unknown}

    def encode(self, text: str, add_special_tokens: bool = True) -> Ids:
        """Ids of a text; with special tokens as one without a context, which the model is to continue."""
        opening = [self._vocab[token] for token in OPENING] if add_special_tokens else []
        return Ids([*opening, *self._encode([text])[0]])

    def encode_batch_fast(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[Ids]:
        """Ids of many texts, none of them special."""
        assert not add_special_tokens
        return [Ids(ids) for ids in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self._model.Encode([_marked(text) for text in texts])
        return [[i + self._shift for i in ids] for ids in found] if self._shift else found

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; ids that stand for no piece (of images, or unused rows of the embedding) are left out.

        Normalization made `，：！` half-width; beside Chinese characters they are full-width again.
        """
        texts: list[str] = []
        segment: list[int] = []
        for i in ids:
            if i in self._special:
                if not skip_special_tokens:
                    texts += [self._decode(segment), self._special[i]]
                    segment = []
            elif i in self._texts:
                segment.append(i - self._shift)
        return "".join([*texts, self._decode(segment)])

    def _decode(self, pieces: list[int]) -> str:
        text = _unmarked(self._model.Decode(pieces)) if pieces else ""
        return _BESIDE_CHINESE.sub(lambda match: _FULL_WIDTH[match[0]], text)

    def get_added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """The special tokens by id."""
        return {i: tokenizers.AddedToken(text, special=True, normalized=False) for i, text in self._special.items()}

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """The highest id plus one."""
        return self._shift + len(self._vocab)

    def get_vocab(self, with_added_tokens: bool = True) -> Mapping[str, int]:
        """Pieces by their spelling, special ones among them."""
        return self._vocab

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece."""
        return self._vocab.get(token)

    def id_to_token(self, id: int) -> str | None:
        """How the vocabulary writes an id."""
        return self._texts.get(id)


def _marked(text: str) -> str:
    """White space that SentencePiece would take away, as pieces of its own."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    return re.sub(f" {{2,{MAX_BLANKS}}}", lambda run: f"<|blank_{len(run[0])}|>", text)


def _unmarked(text: str) -> str:
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    return re.sub(r"<\|blank_([2-9]|[1-7]\d|80)\|>", lambda mark: " " * int(mark[1]), text)
