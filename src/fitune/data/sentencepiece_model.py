"""A SentencePiece BPE model (`tokenizer.model`) as the text of a tokenizer.json, without the sentencepiece library.

The file is a protocol buffer of which five fields matter, so it is read here: less code than a dependency needs around
it, no parser in C++ behind a downloaded file, and scores and types of pieces, which SentencePiece's BPE goes by. The
result gives the same ids on any text; the tests compare both on tens of thousands.

What the two call things: a *piece* is an entry of the vocabulary; `▁` (U+2581) stands for a space.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fitune.errors import ConfigError

# Types of pieces.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
_BPE = 2
MAX_BYTES = 50_000_000
MAX_PIECE_CHARACTERS = 256  # every split of a piece is looked up; SentencePiece's own limit is 16


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the file."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a model file says.

    Attributes:
        pieces: the vocabulary.
        unsupported: why `tokenizer_json` would not give the same ids, or None.
    """

    pieces: tuple[Piece, ...]
    unsupported: str | None


def read_model(content: bytes, name: str) -> SentencePieceModel:
    """Read the bytes of a `.model` file.

    Args:
        name: the file, for messages.

    Raises:
        ConfigError: it is damaged, or no SentencePiece model.
    """
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES:,} bytes")
        fields = list(_fields(content))
        pieces = tuple(_piece(_bytes(value)) for number, value in fields if number == 1)
        trainer, normalizer = (_last(fields, number) for number in (2, 3))
        if not pieces or len({piece.text for piece in pieces}) < len(pieces):
            raise ValueError("it has no pieces, or one twice")
    except (ValueError, IndexError, struct.error) as error:
        raise ConfigError(f"{name}: is damaged, or no SentencePiece model ({error}); download it again") from error
    return SentencePieceModel(pieces, _unsupported(pieces, trainer, normalizer))


_Fields = Mapping[int, int | bytes]


def _last(fields: Sequence[tuple[int, int | bytes]], wanted: int) -> _Fields:
    """The last embedded message of a number, as fields; empty if there is none."""
    return dict(_fields(_bytes(dict(fields).get(wanted, b""))))


def _unsupported(pieces: Sequence[Piece], trainer: _Fields, normalizer: _Fields) -> str | None:
    """Numbers and defaults of fields are those of sentencepiece_model.proto."""
    if trainer.get(3, 1) != _BPE:
        return "it is no BPE model"
    if not trainer.get(35, 0):
        return "it has no byte fallback"
    if normalizer.get(2, b""):
        return "it rewrites characters"
    if not normalizer.get(3, 1) or normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24, 0):
        return "it treats spaces in another way than Llama 2 and ChatGLM do"
    if {piece.kind for piece in pieces} - {NORMAL, UNKNOWN, CONTROL, BYTE}:
        return "it has user-defined or unused pieces"
    if sum(piece.kind == UNKNOWN for piece in pieces) != 1 or sum(piece.kind == BYTE for piece in pieces) != 256:
        return "it has not one unknown piece and 256 bytes"
    if max(len(piece.text) for piece in pieces) > MAX_PIECE_CHARACTERS:
        return f"it has pieces of more than {MAX_PIECE_CHARACTERS} characters"
    return None


def tokenizer_json(model: SentencePieceModel, special: Mapping[str, int], first: Sequence[str] = ()) -> bytes:
    """The tokenizer as a tokenizer.json, the same bytes whatever versions of libraries are installed.

    Args:
        special: special tokens behind the vocabulary, with their ids; its unknown and control pieces always are.
        first: special tokens that stand before every text.
    """
    assert model.unsupported is None, model.unsupported
    vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
    own = {piece.text: vocab[piece.text] for piece in model.pieces if piece.kind in (UNKNOWN, CONTROL)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for text, i in (own | dict(special)).items()],
        # Applied to each text between special tokens: SentencePiece's dummy space per call.
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _before_text(first, special) if first else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(piece.text for piece in model.pieces if piece.kind == UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(model.pieces),
        },
    }
    return json.dumps(tree, ensure_ascii=False).encode()


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """All pairs of pieces that make up a piece; SentencePiece merges the pair whose result has the best score."""
    ids = {piece.text: i for i, piece in enumerate(pieces) if piece.kind == NORMAL}
    found = []
    for text, result in ids.items():
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                found.append((-pieces[result].score, left, right))
    return [(pieces[left].text, pieces[right].text) for _, left, right in sorted(found)]


def _before_text(first: Sequence[str], special: Mapping[str, int]) -> dict[str, Any]:
    tokens = [{"SpecialToken": {"id": text, "type_id": 0}} for text in first]
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*tokens, sequence],
        "pair": [*tokens, sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {text: {"id": text, "ids": [special[text]], "tokens": [text]} for text in first},
    }


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    kind = fields.get(3, NORMAL)
    if not isinstance(kind, int):
        raise ValueError("the type of a piece is no number")
    return Piece(_bytes(fields.get(1, b"")).decode("utf-8"), score, kind)


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a text should be")
    return value


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol buffer message: an integer, or the bytes of anything else.

    Raises:
        ValueError, IndexError: it is none, or cut short.
    """
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == 0:
            number, at = _varint(content, at)
            yield key >> 3, number
            continue
        if kind == 2:
            size, at = _varint(content, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(content):
            raise ValueError("cut short")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number without end")
