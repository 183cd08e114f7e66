"""Cases of `refresh` and `rows`: copies, which have to be exact."""

import torch

from fitune.kernels.refresh import Copy, Refresh

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def copies(dtype, device="cpu"):
    """Adapters of two groups into wider matrices, as the engine lays them out."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for rows, columns, scale in ((8, 24, 1.0), (40, 8, 2.0), (16, 5000, 0.5), (3, 7, 1.0)):
        source = torch.randn(rows, columns, generator=generator).to(device)
        wide = torch.full((rows + 3, columns + 9), torch.nan, dtype=dtype, device=device)
        made.append((Copy(source, wide[2 : 2 + rows, 4 : 4 + columns], scale), wide))
    return made


def check_copies(made, tolerance=0.0):
    for copy, wide in made:
        expected = (copy.source * copy.scale).to(wide.dtype)
        torch.testing.assert_close(copy.to, expected, rtol=tolerance, atol=0)
        copy.to.fill_(torch.nan)
        assert wide.isnan().all(), "written outside"


def rows(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 24, generator=generator).to(dtype).to(device)
    out = torch.zeros(9, 40, dtype=dtype, device=device)
    return x, torch.tensor([7, 0, 3, 8, 8], device=device), out[:, 3:]


def check_rows(x, index, out):
    for m, to in enumerate(index.tolist()[:3]):
        assert torch.equal(out[to, :24], x[m])
    assert torch.equal(out[8, :24], x[3]) or torch.equal(out[8, :24], x[4])
    assert not out[[1, 2, 4, 5, 6]].any()
    assert not out[:, 24:].any()


__all__ = ["DTYPES", "Refresh", "check_copies", "check_rows", "copies", "rows"]
