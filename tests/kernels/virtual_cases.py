"""Cases of `virtual`: rows at the head of documents, whole or as heads inside wider rows."""

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FIRST = [3, -1, 20, 9, -1, 40]  # documents in any order, places without one between
SHAPES = [(4, 1, 24), (3, 2, 8), (1, 5, 16), (5, 3, 7), (2, 1, 200)]
LAYOUTS = ["alone", "beside", "fused"]


def make(shape, layout, dtype, device="cpu"):
    """A table (P, g, d), first_D, and a (T, g, d) view of random rows with everything around it."""
    generator = torch.Generator().manual_seed(0)
    _, heads, width = shape
    table = torch.randn(shape, generator=generator).to(dtype).to(device)
    first = torch.tensor(FIRST, device=device)
    columns = {"alone": heads * width, "beside": 2 * heads * width + 6, "fused": 3 * heads * width}[layout]
    whole = torch.randn(50, columns, generator=generator).to(dtype).to(device)
    if layout == "fused":
        return table, first, whole.view(50, heads, 3, width)[:, :, 1], whole
    at = 0 if layout == "alone" else heads * width + 3
    return table, first, whole[:, at : at + heads * width].view(50, heads, width), whole


def check_place(place, case):
    table, first, rows, whole = case
    before, expected = whole.clone(), rows.clone()
    for start in FIRST:
        for token in range(len(table) if start >= 0 else 0):
            expected[start + token] = table[token]
    place(table, first, rows)
    assert torch.equal(rows, expected)
    rows.copy_(torch.zeros_like(rows))
    assert (whole != 0).sum() == before.count_nonzero() - _size(before, rows)


def check_take(take, case):
    table, first, rows, _ = case
    expected, left = torch.zeros(table.shape, dtype=torch.float64), rows.clone()
    for start in FIRST:
        for token in range(len(table) if start >= 0 else 0):
            expected[token] += rows[start + token].double().cpu()
            left[start + token] = 0
    into = torch.full(table.shape, torch.nan, dtype=torch.float32, device=rows.device)
    take(rows, first, into)
    torch.testing.assert_close(into.double().cpu(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(rows, left)


def _size(whole, rows):
    """Elements of the view, all of them random and so not zero."""
    assert whole.count_nonzero() == whole.numel()
    return rows.numel()
