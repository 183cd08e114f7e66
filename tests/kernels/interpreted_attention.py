"""The attention kernels under Triton's interpreter; `test_attention.py` runs this file in a process that has it on.

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_attention.py -n 0
"""

import pytest
import torch

from attention_cases import LENGTHS, TOLERANCE, Case, assert_near, naive, run_triton
from fitune.kernels.attention_triton import Tile

# fp16 for 16 bits: the interpreter multiplies the bits of bf16 as if they were integers
CAUSAL = [
    (4, 2, 16, torch.float32, "", False),
    (4, 2, 24, torch.float32, "alibi", False),
    (2, 1, 32, torch.float16, "", True),
    (2, 2, 32, torch.float16, "alibi fused", True),
]
PREFIX = [(2, 2, 24, torch.float32, "prefix fused", False), (2, 1, 32, torch.float16, "prefix", True)]
CUTS = [(LENGTHS, (16, 16)), (LENGTHS, (32, 16)), (LENGTHS, (16, 32)), ([70], (32, 16)), ([16, 16, 1, 33], (16, 32))]
PREFIX_CUTS = [([45, 1, 13, 11], (16, 16)), ([30, 40], (16, 32)), ([60, 6, 2], (32, 16)), ([66], (16, 32))]


@pytest.mark.parametrize(
    ("lengths", "blocks", "heads", "kv_heads", "width", "dtype", "kind", "tma"),
    [
        (*cut, *case)
        for cuts, cases in ((CUTS, CAUSAL), (PREFIX_CUTS, PREFIX))
        for number, cut in enumerate(cuts)
        for case in cases[number % 2 :: 2]  # each case on every second cut: the interpreter takes a second a case
    ],
)
def test_the_kernels_are_a_softmax(lengths, blocks, heads, kv_heads, width, dtype, kind, tma):
    case = Case(lengths, heads, kv_heads, width, dtype, kind)
    tile = Tile(*blocks, 4, 2, tma)
    got = run_triton(case, tile, tile, tile)
    assert_near(got, naive(case.qkv, case.scoring, case.dout_Thd), TOLERANCE[dtype])
    assert case.drows_Tn[:, -8:].isnan().all()


@pytest.mark.parametrize(
    ("lengths", "heads", "room", "parts"),
    [
        ([30, 1, 14], (4, 1), 4, 4),
        ([30, 1, 14], (4, 1), 3, 2),  # memory for three parts: four heads are cut into two
        ([30, 1, 14], (6, 2), 9, 1),  # two heads of three blocks: five programs would not start at once
        ([20, 3], (6, 2), 9, 3),
        ([30, 40], (2, 1), 9, 2),
    ],
)
@pytest.mark.parametrize(("width", "kind"), [(16, ""), (24, "alibi"), (16, "prefix")])
def test_several_programs_share_a_key_value_head(lengths, heads, room, parts, width, kind):
    case = Case(lengths, *heads, width, torch.float32, kind)
    tile = Tile(16, 16, 4, 2)
    spare = torch.full((room * 2 * sum(lengths) * heads[1] * width,), float("nan"))
    got = run_triton(case, tile, tile, tile, spare)
    assert_near(got, naive(case.qkv, case.scoring, case.dout_Thd), TOLERANCE[torch.float32])
    written = spare.isfinite().sum() / (2 * sum(lengths) * heads[1] * width)
    assert written == (parts if parts > 1 else 0)
    assert case.drows_Tn[:, -8:].isnan().all()
