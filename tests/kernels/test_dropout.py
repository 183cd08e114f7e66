"""Masks of dropout: the published generator, its statistics, and the Triton bodies under the interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fitune.kernels import dropout as module
from fitune.kernels.dropout import Dropout, Mask, drop, drop_add, keeps, random_words

CPU = torch.device("cpu")
CODE = Path(__file__).parent / "interpreted_dropout.py"
COMMAND = [sys.executable, "-m", "pytest", str(CODE), "-n", "0", "-p", "no:cacheprovider", "-p", "no:benchmark"]


def make(seed=0, stream=0, probability=0.3):
    dropout = Dropout(probability, CPU)
    dropout.draw(seed)
    return Mask(dropout, stream)


def philox(counter, key, rounds):
    """One call with Python's integers."""
    a, b, c, d = counter
    for _ in range(rounds):
        of_a, of_c = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (of_c >> 32) ^ b ^ key[0], of_c % 2**32, (of_a >> 32) ^ d ^ key[1], of_a % 2**32
        key = ((key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32)
    return [a, b, c, d]


def test_it_is_philox():
    # The ten-round vectors that come with the paper's library (kat_vectors) prove the Python above.
    assert philox((0, 0, 0, 0), (0, 0), 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones, ones), 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    for seed in (0, 2**63 - 1, -1, 987654321987654321):
        words = random_words(torch.tensor(seed), 2**31 - 1, 3, 10)
        assert words.shape == (3, 10)
        for token in range(3):
            key = (seed & ones, (seed >> 32) & ones)
            calls = [philox((token, quad, 2**31 - 1, 0), key, module.ROUNDS) for quad in range(3)]
            assert words[token].tolist() == [word for call in calls for word in call][:10]


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.9])
def test_as_many_are_dropped_as_asked(probability):
    kept = keeps(make(3, 1, probability), 1000, 1003).double()
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(1 - kept.mean().item() - probability) < 4 * deviation
    by_column, by_row = kept.mean(0), kept.mean(1)
    assert by_column.std().item() == pytest.approx((probability * (1 - probability) / 1000) ** 0.5, rel=0.1)
    assert by_row.std().item() == pytest.approx((probability * (1 - probability) / 1003) ** 0.5, rel=0.1)


def test_neighbours_streams_and_seeds_are_independent():
    base = keeps(make(1, 4), 1000, 1000).double() - 0.7
    others = [keeps(make(*pair), 1000, 1000).double() - 0.7 for pair in [(2, 4), (1 + 2**32, 4), (1, 5), (1, 0)]]
    pairs = [(base, other) for other in others]
    pairs += [(base[1:], base[:-1]), (base[8:], base[:-8])]
    pairs += [(base[:, step:], base[:, :-step]) for step in (1, 2, 3, 4, 5, 8, 512)]
    for one, two in pairs:
        correlation = (one * two).mean().item() / (0.3 * 0.7)
        assert abs(correlation) < 4.5 / one.numel() ** 0.5


def test_a_part_of_the_tokens_or_columns_gets_the_same_mask():
    """Padding of a static size changes nothing."""
    mask = make(5)
    assert torch.equal(keeps(mask, 64, 30)[:7, :13], keeps(mask, 7, 13))


def test_values():
    x = torch.randn(20, 33)
    mask, out = make(9, probability=0.25), torch.empty(20, 33)
    drop(x, mask, out)
    expected = torch.where(keeps(mask, 20, 33), x / 0.75, 0.0)
    torch.testing.assert_close(out, expected)
    assert 0 < (out == 0).sum() < out.numel()
    into = torch.randn(20, 33)
    before = into.clone()
    drop_add(x, mask, into)
    torch.testing.assert_close(into, before + expected)
    mask.dropout.off()
    drop(x, mask, out)
    assert torch.equal(out, x)
    mask.dropout.draw(9)
    drop(x, mask, out)
    torch.testing.assert_close(out, expected)


def test_probability_zero_keeps_bits():
    x, out = torch.randn(9, 8), torch.empty(9, 8)
    drop(x, make(1, probability=0.0), out)
    assert torch.equal(out, x)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"probability is 1.0; needed: at least 0 and below 1"):
        Dropout(1.0, CPU)
    with pytest.raises(ValueError, match="x_TK"):
        drop(torch.zeros(3, 4), make(), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="into_TK"):
        drop_add(torch.zeros(4, 4), make(), torch.zeros(4, 4).t())


def test_under_the_interpreter():
    """In a process of its own: the interpreter must be switched on before anything imports triton."""
    pytest.importorskip("triton")
    done = subprocess.run(
        COMMAND, cwd=CODE.parents[2], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert not re.search(r"skipped|xfailed", done.stdout)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    done = subprocess.run(COMMAND, cwd=CODE.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
