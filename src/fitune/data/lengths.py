"""Lengths of a run's rows for the plan: read and encoded as for training, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fitune.config import DataConfig
from fitune.data.prepare import prepare
from fitune.data.tokenizer import Tokenizer
from fitune.plan.lengths import Lengths


def row_lengths(data: DataConfig, folder: Path, new_tokens: Sequence[str] = ()) -> Lengths | str:
    """Tokens of every row that would be trained or evaluated on, or why they cannot be known.

    Args:
        folder: the model's; a tokenizer.json or a tokenizer.model is needed (one that is no BPE takes transformers).
        new_tokens: method.new_tokens.

    Raises:
        DataError: rows that training would refuse.
        ConfigError: the tokenizer is damaged, or the template cannot be used with it.
    """
    if not data.train:
        return "data.train is not set"
    files = (*data.train, *(data.eval if isinstance(data.eval, tuple) else ()))
    absent = next((file for file in files if not Path(file).is_file()), None)
    if absent is not None:
        return f"{absent} is not there"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return f"{folder} has no tokenizer"
    dataset = prepare(data, Tokenizer.load(folder, new_tokens))
    return Lengths(tuple(r.num_tokens for r in dataset.train), tuple(r.num_tokens for r in dataset.eval))
