"""Dropout whose mask is computed, not stored: the same element gets the same answer wherever and whenever it is asked.

Element (token, column) of stream s is dropped if its 32 random bits are below p * 2^32. The bits are word `column % 4`
of Philox-4x32-7 with the counter (token, column // 4, s, 0) and the seed as key. Nothing of a mask is kept: the
backward pass asks again. Seed and threshold stand in device memory, so a captured graph runs with whatever was set
before.

Source: Parallel random numbers: as easy as 1, 2, 3 (Salmon et al., SC 2011), which finds 7 rounds enough for all of
BigCrush. Differs: no.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fitune.kernels.launch import require, use_triton

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF


class Dropout:
    """Probability and seed of all masks of a model.

    Args:
        probability: with which an element is dropped, 0 <= p < 1; it acts as a multiple of 2^-32.
        device: where masks are used.
    Raises:
        ValueError: a probability outside of that.
    Memory: 20 bytes on the device.
    """

    def __init__(self, probability: float, device: torch.device) -> None:
        if not 0 <= probability < 1:
            raise ValueError(f"dropout probability is {probability}; needed: at least 0 and below 1")
        self._threshold = min(round(probability * 2**32), LOW)
        self.state_2 = torch.zeros(2, dtype=torch.int64, device=device)  # seed, threshold
        self.scale_1 = torch.ones(1, device=device)

    def draw(self, seed: int) -> None:
        """Drop from now on, by this seed (any 64 bits as a signed number)."""
        self.state_2[0].fill_(seed)
        self.state_2[1].fill_(self._threshold)
        self.scale_1.fill_(2**32 / (2**32 - self._threshold))

    def off(self) -> None:
        """Drop nothing from now on, as in evaluation: every mask is one, and so is the scale."""
        self.state_2.zero_()
        self.scale_1.fill_(1.0)


class Mask(NamedTuple):
    """One mask: streams of one `Dropout` are independent. 0 <= stream < 2^31."""

    dropout: Dropout
    stream: int


def drop(x_TK: torch.Tensor, mask: Mask, out_TK: torch.Tensor) -> None:
    """Write x / (1 - p) where the mask keeps, 0 elsewhere; rounded once.

    Args:
        x_TK: (T, K or more).
        out_TK: (T, K) written; its width is K. May be x itself.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA; on CPU about 10 bytes per element for the mask and an fp32 copy of x.
    Source: Dropout, JMLR 15 (2014). Differs: scaled in training instead of in evaluation.
    """
    rows, width = out_TK.shape
    require("x_TK", x_TK, rows, width)
    require("out_TK", out_TK, rows, width)
    if use_triton(out_TK):
        from fitune.kernels import dropout_triton

        dropout_triton.drop(x_TK, mask, out_TK)
    else:
        drop_reference(x_TK, mask, out_TK)


def drop_reference(x_TK: torch.Tensor, mask: Mask, out_TK: torch.Tensor) -> None:
    """Plain PyTorch `drop`."""
    out_TK.copy_(_dropped(x_TK[:, : out_TK.shape[1]], mask))


def drop_add(x_TK: torch.Tensor, mask: Mask, into_TK: torch.Tensor) -> None:
    """Add x / (1 - p) where the mask keeps; the sum is made in fp32 and rounded once.

    Args:
        x_TK: (T, K or more) a gradient of `drop`'s output.
        into_TK: (T, K) added to; its width is K.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: as `drop`.
    """
    rows, width = into_TK.shape
    require("x_TK", x_TK, rows, width)
    require("into_TK", into_TK, rows, width)
    if use_triton(into_TK):
        from fitune.kernels import dropout_triton

        dropout_triton.drop_add(x_TK, mask, into_TK)
    else:
        drop_add_reference(x_TK, mask, into_TK)


def drop_add_reference(x_TK: torch.Tensor, mask: Mask, into_TK: torch.Tensor) -> None:
    """Plain PyTorch `drop_add`."""
    into_TK.copy_(into_TK.float() + _dropped(x_TK[:, : into_TK.shape[1]], mask))


def _dropped(x_TK: torch.Tensor, mask: Mask) -> torch.Tensor:
    """fp32, new."""
    kept_TK = keeps(mask, *x_TK.shape)
    return torch.where(kept_TK, x_TK.float() * mask.dropout.scale_1, 0.0)


def keeps(mask: Mask, rows: int, columns: int) -> torch.Tensor:
    """The mask (rows, columns) as bool, in plain PyTorch on its device: False where an element is dropped."""
    state_2 = mask.dropout.state_2
    words = random_words(state_2[0], mask.stream, rows, columns)
    return words >= state_2[1]


def random_words(seed: torch.Tensor, stream: int, rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) int64 holding 32 random bits each, from 0 to 2^32 - 1.

    int64 holds all products: 32 by 32 bits wrap into the sign bit, which taking the upper half masks off again.
    """
    token_T1 = torch.arange(rows, device=seed.device)[:, None]
    quad_1Q = torch.arange(-(-columns // 4), device=seed.device)[None]
    a, b = token_T1, quad_1Q
    c, d = torch.full_like(token_T1, stream), torch.zeros_like(token_T1)
    key_a, key_b = seed & LOW, (seed >> 32) & LOW
    for _ in range(ROUNDS):
        of_a, of_c = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b = (of_c >> 32) & LOW ^ b ^ key_a, of_c & LOW
        c, d = (of_a >> 32) & LOW ^ d ^ key_b, of_a & LOW
        key_a, key_b = (key_a + KEY_STEPS[0]) & LOW, (key_b + KEY_STEPS[1]) & LOW
    shape = rows, quad_1Q.shape[1]
    words_TQ4 = torch.stack([word.expand(shape) for word in (a, b, c, d)], dim=2)
    return words_TQ4.view(rows, -1)[:, :columns]
