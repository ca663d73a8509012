"""Two fused operations that plain PyTorch does slowly: Sinkhorn normalisation and the masked attention softmax.

Each has a reference in PyTorch ops, used on the CPU and by tests, and a Triton kernel with a hand-written backward
pass, used on CUDA. Sinkhorn as separate ops is 40 tiny launches per sub-layer; the softmax as ops writes every score
several times.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations: the reference ops do
    triton = None

MASKED = -1e30


def sinkhorn_reference(logits: torch.Tensor, rounds: int, eps: float) -> torch.Tensor:
    """Return the (nearly) doubly stochastic 4x4 matrices of float32 logits (n, 4, 4)."""
    m = logits.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


def softmax_reference(
    window: torch.Tensor,
    rows: torch.Tensor,
    sink: torch.Tensor,
    chosen: torch.Tensor | None,
    *,
    length: int,
    ratio: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over window scores, compressed-row scores and a sink; see ``attention_softmax``."""
    n, heads, width = window.shape
    size = width // 2
    t = torch.arange(n, device=window.device) % length
    key = (t // size * size - size)[:, None] + torch.arange(width, device=window.device)
    seen = (key >= 0) & (key <= t[:, None]) & (key > t[:, None] - size)
    parts = [(window.float() * scale).masked_fill(~seen[:, None], MASKED)]
    if rows.shape[-1]:
        visible = torch.arange(rows.shape[-1], device=rows.device) < ((t + 1) // ratio)[:, None]
        visible = visible if chosen is None else visible & (chosen != 0)
        parts.append((rows.float() * scale).masked_fill(~visible[:, None], MASKED))
    parts.append(sink.float().view(1, heads, 1).expand(n, heads, 1))
    scores = torch.cat(parts, -1)
    p = scores.softmax(-1)
    lse = scores.logsumexp(-1)
    return p[..., :width].to(window.dtype), p[..., width:-1].to(rows.dtype), lse


if triton is not None:

    @triton.jit
    def _sinkhorn_forward(x_ptr, y_ptr, sums_ptr, n, eps, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        r = tl.arange(0, 4)
        cell = at[:, None, None] * 16 + r[None, :, None] * 4 + r[None, None, :]
        inside = (at < n)[:, None, None]
        line = (
            at[:, None] * (8 * ROUNDS) + r[None, :]
        )  # 4 row sums and 4 column sums per round; round 0 has no row sums
        v = tl.load(x_ptr + cell, mask=inside & (cell >= 0), other=0.0)
        v = tl.exp(v - tl.max(v, axis=2, keep_dims=True))
        v = v / tl.sum(v, axis=2, keep_dims=True) + eps
        s = tl.sum(v, axis=1) + eps
        tl.store(sums_ptr + line + 4, s, mask=(at < n)[:, None] & (line >= 0))
        v = v / s[:, None, :]
        for i in range(1, ROUNDS):
            s = tl.sum(v, axis=2) + eps
            tl.store(sums_ptr + line + 8 * i, s, mask=(at < n)[:, None] & (line >= 0))
            v = v / s[:, :, None]
            s = tl.sum(v, axis=1) + eps
            tl.store(sums_ptr + line + 8 * i + 4, s, mask=(at < n)[:, None] & (line >= 0))
            v = v / s[:, None, :]
        tl.store(y_ptr + cell, v, mask=inside & (cell >= 0))

    @triton.jit
    def _sinkhorn_backward(y_ptr, sums_ptr, g_ptr, d_ptr, n, eps, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
        # y = x / s with s = sum(x) + eps gives dx = (g - sum(g * y)) / s, and x = y * s: each step needs only its sums.
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        r = tl.arange(0, 4)
        cell = at[:, None, None] * 16 + r[None, :, None] * 4 + r[None, None, :]
        inside = (at < n)[:, None, None] & (cell >= 0)
        line = at[:, None] * (8 * ROUNDS) + r[None, :]
        ok = (at < n)[:, None] & (line >= 0)
        y = tl.load(y_ptr + cell, mask=inside, other=0.0)
        g = tl.load(g_ptr + cell, mask=inside, other=0.0)
        for j in range(1, ROUNDS):
            i = ROUNDS - j
            s = tl.load(sums_ptr + line + 8 * i + 4, mask=ok, other=1.0)[:, None, :]
            g = (g - tl.sum(g * y, axis=1, keep_dims=True)) / s
            y = y * s
            s = tl.load(sums_ptr + line + 8 * i, mask=ok, other=1.0)[:, :, None]
            g = (g - tl.sum(g * y, axis=2, keep_dims=True)) / s
            y = y * s
        s = tl.load(sums_ptr + line + 4, mask=ok, other=1.0)[:, None, :]
        g = (g - tl.sum(g * y, axis=1, keep_dims=True)) / s
        p = y * s - eps
        tl.store(d_ptr + cell, p * (g - tl.sum(g * p, axis=2, keep_dims=True)), mask=inside)

    @triton.jit
    def _softmax_forward(
        w_ptr, c_ptr, sink_ptr, chosen_ptr, pw_ptr, pc_ptr, lse_ptr, length, n_rows, scale,
        HEADS: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr, SPARSE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        pid = tl.program_id(0)
        token = pid // HEADS
        t = token % length
        line = pid.to(tl.int64)
        j = tl.arange(0, 2 * WINDOW)
        key = t // WINDOW * WINDOW - WINDOW + j
        seen = (key >= 0) & (key <= t) & (key > t - WINDOW)
        w = tl.load(w_ptr + line * (2 * WINDOW) + j).to(tl.float32) * scale
        w = tl.where(seen, w, -1e30)
        sink = tl.load(sink_ptr + pid % HEADS).to(tl.float32)
        top = tl.maximum(tl.max(w, axis=0), sink)
        if RATIO > 0:
            i = tl.arange(0, BLOCK)
            visible = (i < n_rows) & (i < (t + 1) // RATIO)
            if SPARSE:
                flag = tl.load(chosen_ptr + token.to(tl.int64) * n_rows + i, mask=i < n_rows, other=0)
                visible = visible & (flag != 0)
            c = tl.load(c_ptr + line * n_rows + i, mask=i < n_rows, other=0.0).to(tl.float32) * scale
            c = tl.where(visible, c, -1e30)
            top = tl.maximum(top, tl.max(c, axis=0))
            ec = tl.exp(c - top)
            ew = tl.exp(w - top)
            total = tl.sum(ew, axis=0) + tl.sum(ec, axis=0) + tl.exp(sink - top)
            tl.store(pc_ptr + line * n_rows + i, (ec / total).to(pc_ptr.dtype.element_ty), mask=i < n_rows)
        else:
            ew = tl.exp(w - top)
            total = tl.sum(ew, axis=0) + tl.exp(sink - top)
        tl.store(pw_ptr + line * (2 * WINDOW) + j, (ew / total).to(pw_ptr.dtype.element_ty))
        tl.store(lse_ptr + line, top + tl.log(total))

    @triton.jit
    def _softmax_backward(
        pw_ptr, pc_ptr, gw_ptr, gc_ptr, dw_ptr, dc_ptr, dot_ptr, n_rows, scale,
        WINDOW: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        line = tl.program_id(0).to(tl.int64)
        j = tl.arange(0, 2 * WINDOW)
        pw = tl.load(pw_ptr + line * (2 * WINDOW) + j).to(tl.float32)
        gw = tl.load(gw_ptr + line * (2 * WINDOW) + j).to(tl.float32)
        dot = tl.sum(pw * gw, axis=0)
        if RATIO > 0:
            i = tl.arange(0, BLOCK)
            pc = tl.load(pc_ptr + line * n_rows + i, mask=i < n_rows, other=0.0).to(tl.float32)
            gc = tl.load(gc_ptr + line * n_rows + i, mask=i < n_rows, other=0.0).to(tl.float32)
            dot += tl.sum(pc * gc, axis=0)
            tl.store(dc_ptr + line * n_rows + i, (pc * (gc - dot) * scale).to(dc_ptr.dtype.element_ty), mask=i < n_rows)
        tl.store(dw_ptr + line * (2 * WINDOW) + j, (pw * (gw - dot) * scale).to(dw_ptr.dtype.element_ty))
        tl.store(dot_ptr + line, dot)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, rounds: int, eps: float) -> torch.Tensor:
        logits = logits.contiguous()
        n = logits.shape[0]
        y = torch.empty_like(logits)
        sums = torch.empty((n, 2 * rounds, 4), device=logits.device, dtype=torch.float32)
        _sinkhorn_forward[(triton.cdiv(n, 64),)](logits, y, sums, n, eps, ROUNDS=rounds, BLOCK=64)
        ctx.save_for_backward(y, sums)
        ctx.rounds, ctx.eps = rounds, eps
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        y, sums = ctx.saved_tensors
        d = torch.empty_like(y)
        n = y.shape[0]
        _sinkhorn_backward[(triton.cdiv(n, 64),)](y, sums, g.contiguous(), d, n, ctx.eps, ROUNDS=ctx.rounds, BLOCK=64)
        return d, None, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        window: torch.Tensor,
        rows: torch.Tensor,
        sink: torch.Tensor,
        chosen: torch.Tensor | None,
        length: int,
        ratio: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        window, rows = window.contiguous(), rows.contiguous()
        n, heads, width = window.shape
        n_rows = rows.shape[-1]
        ratio = ratio if n_rows else 0
        pw, pc = torch.empty_like(window), torch.empty_like(rows)
        lse = torch.empty((n, heads), device=window.device, dtype=torch.float32)
        block = triton.next_power_of_2(max(n_rows, 16))
        warps = 8 if block > 2048 else 4 if block > 256 else 2
        _softmax_forward[(n * heads,)](
            window, rows, sink, chosen if chosen is not None else sink, pw, pc, lse, length, n_rows, scale,
            HEADS=heads, WINDOW=width // 2, RATIO=ratio, SPARSE=chosen is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(pw, pc, lse, sink)
        ctx.setting = (ratio, scale, block, warps)
        ctx.mark_non_differentiable(lse)
        return pw, pc, lse

    @staticmethod
    def backward(ctx: Any, gw: torch.Tensor, gc: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pw, pc, lse, sink = ctx.saved_tensors
        ratio, scale, block, warps = ctx.setting
        n, heads, width = pw.shape
        dw, dc = torch.empty_like(pw), torch.empty_like(pc)
        dot = torch.empty_like(lse)
        _softmax_backward[(n * heads,)](
            pw, pc, gw.contiguous(), gc.contiguous(), dw, dc, dot, pc.shape[-1], scale,
            WINDOW=width // 2, RATIO=ratio, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        # The sink has no value vector, so its score's gradient is -p_sink * dot.
        d_sink = -(torch.exp(sink.float() - lse) * dot).sum(0).to(sink.dtype)
        return dw, dc, d_sink, None, None, None, None


def sinkhorn(logits: torch.Tensor, rounds: int, eps: float) -> torch.Tensor:
    """Return the Sinkhorn normalisation of float32 logits (n, 4, 4)."""
    if logits.is_cuda and triton is not None:
        return _Sinkhorn.apply(logits, rounds, eps)
    return sinkhorn_reference(logits, rounds, eps)


def attention_softmax(
    window: torch.Tensor,
    rows: torch.Tensor,
    sink: torch.Tensor,
    chosen: torch.Tensor | None,
    *,
    length: int,
    ratio: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn raw scores into attention weights.

    window: (n, heads, 2 * window) scores against its own and the previous block of keys; n = batch * length.
    rows: (n, heads, n_rows) scores against compressed rows; n_rows may be 0. sink: (heads,) learned logits.
    chosen: (n, n_rows) uint8, the rows that the indexer picked, or None for all visible ones.
    Returns weights of both parts in their dtypes, and the float32 log-sum-exp (n, heads), which carries no gradient.
    """
    if window.is_cuda and triton is not None:
        return _Softmax.apply(window, rows, sink, chosen, length, ratio, scale)
    return softmax_reference(window, rows, sink, chosen, length=length, ratio=ratio, scale=scale)
