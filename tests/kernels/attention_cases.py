"""Inputs of attention, the same in fp64, and how near is near."""

import torch

from fitune.kernels.attention import QKV, Documents, Scoring, Workspace, attention, attention_backward

LENGTHS = [13, 1, 40, 1, 1, 14]  # T = 70
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def documents_of(lengths, device="cpu", prefix=False):
    """With `prefix` about the first two thirds of every document, of some none and of some all."""
    start, end, until = [], [], []
    for number, length in enumerate(lengths):
        begin = len(start)
        start += [begin] * length
        end += [begin + length] * length
        until += [begin + (length * 2 // 3, length, 0)[number % 3]] * length
    rows = (start, end, until) if prefix else (start, end)
    return Documents(*(torch.tensor(x, dtype=torch.int32, device=device) for x in rows))


def naive(qkv, scoring, dout_Thd):
    """out, lse, dq, dk, dv in fp64, by autograd through a dense softmax."""
    tokens, heads, _ = qkv.q_Thd.shape
    group = heads // qkv.k_Tgd.shape[1]
    q, k, v = (x.detach().double().requires_grad_() for x in (qkv.q_Thd, qkv.k_Tgd, qkv.v_Tgd))
    scores_hTT = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) * scoring.scale
    index = torch.arange(tokens, device=q.device)
    if scoring.slopes_h is not None:
        scores_hTT = scores_hTT + scoring.slopes_h.double()[:, None, None] * (index - index[:, None])
    documents = scoring.documents
    past = index <= index[:, None]
    past = past if documents.until_T is None else past | (index < documents.until_T[:, None])
    seen = past & (index >= documents.start_T[:, None]) & (index < documents.end_T[:, None])
    scores_hTT = scores_hTT.masked_fill(~seen, float("-inf"))
    out = torch.einsum("hij,jhd->ihd", scores_hTT.softmax(-1), v.repeat_interleave(group, 1))
    grads = torch.autograd.grad(out, (q, k, v), dout_Thd.double())
    return out.detach(), scores_hTT.logsumexp(-1).detach(), *grads


class Case:
    """Inputs as views into one row buffer, outputs in buffers full of NaN, so that whatever is not written shows.

    `kind` holds any of: alibi, prefix, fused (rows are [q | k | v] of one head after another).
    """

    def __init__(self, lengths, heads, kv_heads, width, dtype, kind="", device="cpu"):
        torch.manual_seed(0)
        alibi, prefix = "alibi" in kind, "prefix" in kind
        tokens, n = sum(lengths), (heads + 2 * kv_heads) * width

        def views(rows_Tn):
            return QKV.of_heads(rows_Tn, heads) if "fused" in kind else QKV.of_rows(rows_Tn, heads, kv_heads)

        self.rows_Tn = torch.randn(tokens, n + 8, device=device).to(dtype)
        self.qkv = views(self.rows_Tn[:, :n])
        slopes_h = torch.tensor([2.0 ** -(i + 1) for i in range(heads)], device=device) if alibi else None
        self.scoring = Scoring(documents_of(lengths, device, prefix), 1.3 / width**0.5, slopes_h)
        rows = torch.randn(tokens, heads * width + 8, device=device).to(dtype)
        self.dout_Thd = rows[:, 8:].unflatten(1, (heads, width))
        self.drows_Tn = torch.full_like(self.rows_Tn, float("nan"))
        self.dqkv = views(self.drows_Tn[:, :n])
        self.out_Thd = torch.full_like(rows, float("nan"))[:, 8:].unflatten(1, (heads, width))
        self.lse_hT = torch.full((heads, tokens), float("nan"), device=device)
        self.delta_hT = torch.full_like(self.lse_hT, float("nan"))

    def run(self, forward=attention, backward=attention_backward, spare=None):
        forward(self.qkv, self.scoring, self.out_Thd, self.lse_hT)
        out = self.out_Thd.clone()
        workspace = Workspace(self.delta_hT, spare)
        backward(self.qkv, self.scoring, self.dout_Thd, self.out_Thd, self.lse_hT, self.dqkv, workspace)
        return out, self.lse_hT, self.dqkv.q_Thd, self.dqkv.k_Tgd, self.dqkv.v_Tgd


def assert_near(got, want, tolerance):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        error = (x.double() - y).abs().max() / y.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"  # NaN fails too


def run_triton(case, forward=None, dq=None, dkv=None, spare=None):
    """The Triton bodies with chosen tiles; with `spare` several programs may share a key/value head."""
    from fitune.kernels.attention_triton import attention_triton, keys_backward_triton, queries_backward_triton

    def backward(qkv, scoring, dout_Thd, out_Thd, lse_hT, dqkv, workspace):
        queries_backward_triton(qkv, scoring, (dout_Thd, out_Thd, lse_hT), dqkv, workspace.delta_hT, dq)
        keys_backward_triton(qkv, scoring, (dout_Thd, lse_hT), dqkv, workspace, dkv)

    return case.run(lambda *inputs: attention_triton(*inputs, forward), backward, spare)
