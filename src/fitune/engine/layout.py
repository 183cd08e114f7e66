"""How the rows of a batch lie on the device: real tokens one after another, and the integers that say what each is.

Which integers there are is declared in plan/saves.py (`integers`). A document is any run of tokens that see each other;
padding up to the static size is one more document behind all others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fitune.data.batches import IGNORE, Batch
from fitune.model.prefix_lm import find_places
from fitune.plan.chatglm import Blank

cuda: Any = torch.cuda  # only partly typed
Rows = dict[str, torch.Tensor]
NO_TOKEN = -1


def flatten(batch: Batch, blank: Blank | None = None, virtual: int = 0) -> tuple[Rows, int]:
    """The real tokens of a padded or packed batch one after another, on the host.

    Args:
        blank: the ids that tell where a document's prefix ends; None: documents have none.
        virtual: rows in front of each document that are no tokens of the vocabulary; they belong to its prefix.

    Returns:
        `ids`, `positions`, `start`, `end` (T): token ids, positions, first token of the token's document and the one
        past its last; `index`, `targets` (N): positions whose next token is supervised, and that token. With `blank`
        also `positions2` and `until`, the token past the document's prefix. With `virtual` also `first` (D), the first
        row of each document; the virtual rows have id 0. And T.
    """
    given = batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT
    real = ... if batch.attention_mask_BT is None else batch.attention_mask_BT.numpy() != 0
    # NumPy, not PyTorch, some of whose operators wake all threads for a handful of numbers (repeat_interleave) and on a
    # busy host wait for each of them: 48 ms instead of 0.3 were measured, while the GPU stood idle.
    ids, labels, positions = (x.numpy()[real].reshape(-1) for x in given)
    starts = np.flatnonzero(positions == 0)
    lengths = np.diff(starts, append=ids.size) + virtual
    starts += virtual * np.arange(starts.size)
    tokens = int(lengths.sum())
    start = np.repeat(starts, lengths)
    if virtual:
        positions = np.arange(tokens) - start
        real = positions >= virtual
        ids, labels = _spread(ids, real, NO_TOKEN), _spread(labels, real, IGNORE)
    index = np.flatnonzero(labels[1:] != IGNORE)
    rows = {
        "ids": np.maximum(ids, 0) if virtual else ids,
        "positions": positions,
        "start": start,
        "end": np.repeat(starts + lengths, lengths),
        "index": index,
        "targets": labels[index + 1],
    }
    if blank is not None:
        places = find_places(torch.from_numpy(ids)[None], blank, None, torch.from_numpy(positions)[None])
        rows["positions"], rows["positions2"] = places.rows_B2S[0].numpy()
        document = np.repeat(np.arange(starts.size), lengths)
        prefixes = np.bincount(document[places.context_BS[0].numpy()], minlength=starts.size)
        rows["until"] = np.repeat(starts + prefixes, lengths)
    if virtual:
        rows["first"] = starts
    return {name: torch.from_numpy(array) for name, array in rows.items()}, tokens


def _spread(values: Any, places: Any, other: int) -> Any:
    """The values where `places` is true, `other` elsewhere."""
    out = np.full(places.size, other, dtype=values.dtype)
    out[places] = values
    return out


class Integers:
    """The integers of a micro-step on the device, and page-locked copies of them on the host.

    There are a few copies in turn, so that the host never waits for the device.

    Args:
        names: rows, see `plan.saves.integers`.
        documents: those of them that attention reads, one after another in `names`.
        capacity: tokens.
        chunk: rows of one head chunk; index and targets are padded to whole chunks.
    """

    def __init__(
        self, names: tuple[str, ...], documents: tuple[str, ...], capacity: int, chunk: int, device: torch.device
    ) -> None:
        self._cuda, self._chunk, self._names = device.type == "cuda", chunk, names
        self._first = names.index(documents[0])
        padded = -(-capacity // chunk) * chunk
        shape = len(names), max(capacity, padded)
        self.inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        self.documents = torch.zeros(len(documents), capacity, dtype=torch.int32, device=device)
        self._slots = [torch.zeros(shape, dtype=torch.int64, pin_memory=self._cuda) for _ in range(4)]
        self._arrays = [slot.numpy() for slot in self._slots]  # the same memory
        self._sent: list[Any] = [None] * len(self._slots)
        self._next = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        """One row on the device."""
        return self.inputs[self._names.index(name)]

    def positions(self, axes: int, tokens: int) -> torch.Tensor:
        """(axes, T) positions on the device."""
        first = self._names.index("positions")
        return self.inputs[first : first + axes, :tokens]

    def narrow(self, tokens: int) -> None:
        """Make the int32 copies that attention reads."""
        count = len(self.documents)
        self.documents[:, :tokens].copy_(self.inputs[self._first : self._first + count, :tokens])

    def send(self, rows: Rows, tokens: int, size: int) -> torch.Tensor:
        """Pad and copy: padding tokens form one last document; padding positions of the head are the spare row.

        Returns:
            The token ids (size,) on the host.
        """
        slot, self._next = self._next, (self._next + 1) % len(self._slots)
        if self._sent[slot] is not None:
            self._sent[slot].synchronize()
        count = rows["index"].numel()
        padded = -(-count // self._chunk) * self._chunk if self._cuda else count
        padding = {"start": tokens, "end": size, "until": tokens, "index": size, "targets": IGNORE, "first": -1}
        for name, staged in zip(self._names, self._arrays[slot], strict=True):
            real = rows[name].numpy()
            staged[: real.size] = real
            staged[real.size : padded if name in ("index", "targets") else size] = padding.get(name, 0)
        self.inputs.copy_(self._slots[slot], non_blocking=self._cuda)
        if self._cuda:
            self._sent[slot] = cuda.Event()
            self._sent[slot].record()
        return self._slots[slot][self._names.index("ids"), :size]
