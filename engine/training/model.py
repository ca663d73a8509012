"""dsv4-nano as a training model: the DeepSeek V4 Flash architecture over whole sequences, without a cache.

Parameter names are those of DeepSeek's checkpoints, except that the experts of a layer lie in two stacked tensors
(the shared expert last). Tokens are flattened to one axis (n = batch * length); lengths are multiples of 128. Weights
are float32 and are cast to the activations' dtype at use, so a bfloat16 pass computes with exactly what is exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from geometry import Geometry
from kernels import attention_softmax, sinkhorn
from rounding import stored_index, stored_row
from torch import Tensor, nn


@dataclass(slots=True)
class Mode:
    """How a pass computes: a training phase turns these on one after the other."""

    dtype: torch.dtype = torch.float32
    sparse: bool = True  # attend only to the rows that the indexer picks
    rounding: bool = False  # round stored rows as the engine does
    index_loss_stride: int = 0  # every how many queries the indexer's loss looks at; 0: no such loss


def _collapse(weights: Tensor, h: Tensor) -> Tensor:
    """Mix the streams (n, 4, d) into one input (n, d)."""
    out = weights[:, 0:1] * h[:, 0].float()
    for i in range(1, h.shape[1]):
        out = out + weights[:, i : i + 1] * h[:, i].float()
    return out.to(h.dtype)


def _expand(post: Tensor, comb: Tensor, y: Tensor, h: Tensor) -> Tensor:
    """Write a sub-layer's output back to the streams: row of comb = source stream, column = destination."""
    streams = []
    for d in range(h.shape[1]):
        out = post[:, d : d + 1] * y.float()
        for s in range(h.shape[1]):
            out = out + comb[:, s, d : d + 1] * h[:, s].float()
        streams.append(out)
    return torch.stack(streams, 1).to(h.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs of the last dims of x (n, heads, d) by the angles (n, pairs)."""
    rope_dim = cos.shape[-1] * 2
    a, b = x[..., -rope_dim::2].float(), x[..., 1 - rope_dim :: 2].float()
    c, s = cos[:, None], sin[:, None]
    turned = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    return torch.cat((x[..., :-rope_dim], turned.to(x.dtype)), -1)


def _activate(gate_up: Tensor, weights: Tensor, clamp: float) -> Tensor:
    """SwiGLU with clamps; the routing weight is applied before the down projection."""
    half = gate_up.shape[-1] // 2
    gate = gate_up[..., :half].float().clamp(max=clamp)
    up = gate_up[..., half:].float().clamp(-clamp, clamp)
    return (F.silu(gate) * up * weights[..., None]).to(gate_up.dtype)


def _mix(m: Tensor, scale: Tensor, base: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Split mHC's 24 numbers into pre weights, post weights and the logits of the stream mixing."""
    pre = torch.sigmoid(m[:, :4] * scale[0] + base[:4]) + eps
    post = 2 * torch.sigmoid(m[:, 4:8] * scale[1] + base[4:8])
    return pre, post, (m[:, 8:] * scale[2] + base[8:]).unflatten(-1, (4, 4))


class Fused:
    """The pointwise functions, swapped for compiled ones on CUDA by ``compile_pointwise``."""

    collapse: Callable[..., Tensor] = staticmethod(_collapse)
    expand: Callable[..., Tensor] = staticmethod(_expand)
    rotate: Callable[..., Tensor] = staticmethod(_rotate)
    activate: Callable[..., Tensor] = staticmethod(_activate)
    mix: Callable[..., Any] = staticmethod(_mix)


def compile_pointwise(on: bool = True) -> None:
    """Compile the pointwise functions (one short compilation each; whole layers would take minutes), or undo that."""
    for name, function in dict(
        collapse=_collapse, expand=_expand, rotate=_rotate, activate=_activate, mix=_mix
    ).items():
        setattr(Fused, name, staticmethod(torch.compile(function, dynamic=False) if on else function))


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """Scale the last axis to unit root mean square, without a weight."""
    return F.rms_norm(x, (x.shape[-1],), None, eps)


class Norm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Matrix(nn.Module):
    """A linear map without bias, weight (out, in), cast to the input's dtype."""

    def __init__(self, n_in: int, n_out: int, std: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * (0.6 / math.sqrt(n_in) if std is None else std))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to the last axis."""
        return F.linear(x, self.weight.to(x.dtype))


def rope_frequencies(g: Geometry, *, compressed: bool) -> Tensor:
    """Return the angle per position of each pair; compressed layers use the long base with YaRN."""
    exponent = torch.arange(0, g.rope_dim, 2).double() / g.rope_dim
    if not compressed:
        return (g.rope_theta**-exponent).float()
    plain = g.compress_theta**-exponent

    def border(turns: float) -> float:
        return g.rope_dim * math.log(g.yarn_original / (turns * 2 * math.pi)) / (2 * math.log(g.compress_theta))

    low = max(math.floor(border(g.yarn_beta_fast)), 0)
    high = min(math.ceil(border(g.yarn_beta_slow)), g.rope_dim - 1)
    ramp = ((torch.arange(g.rope_dim // 2).double() - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (plain * (1 - ramp) + plain / g.yarn_factor * ramp).float()


class Compressor(nn.Module):
    """Pools each group of ``ratio`` tokens into one row; ratio 4 also looks at the group before."""

    def __init__(self, g: Geometry, width: int, ratio: int) -> None:
        super().__init__()
        self.width, self.ratio, self.overlap = width, ratio, ratio == 4
        halves = 2 if self.overlap else 1
        self.wkv = Matrix(g.hidden, halves * width)
        self.wgate = Matrix(g.hidden, halves * width)
        self.ape = nn.Parameter(torch.zeros(ratio, halves * width))
        self.norm = Norm(width, g.eps)

    def forward(self, x: Tensor, frequencies: Tensor) -> Tensor:
        """Return the rows (batch, n_rows, width) of x (batch, length, hidden), rotated, not rounded."""
        batch, length, _ = x.shape
        n_rows, d = length // self.ratio, self.width
        kv = self.wkv(x[:, : n_rows * self.ratio]).view(batch, n_rows, self.ratio, -1)
        gate = self.wgate(x[:, : n_rows * self.ratio]).view(batch, n_rows, self.ratio, -1).float() + self.ape
        if self.overlap:
            before = F.pad(kv[:, :-1, :, :d], (0, 0, 0, 0, 1, 0))
            before_gate = F.pad(gate[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=-1e30)
            kv = torch.cat((before, kv[..., d:]), 2)
            gate = torch.cat((before_gate, gate[..., d:]), 2)
        row = self.norm((kv.float() * gate.softmax(2)).sum(2).to(x.dtype))
        angle = (torch.arange(n_rows, device=x.device) * self.ratio).float()[:, None] * frequencies
        cos, sin = angle.cos().repeat(batch, 1), angle.sin().repeat(batch, 1)
        return _rotate(row.reshape(batch * n_rows, 1, d), cos, sin).view(batch, n_rows, d)


class Indexer(nn.Module):
    """Scores compressed rows for each query; the best ``index_topk`` take part in attention."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.g = g
        self.wq_b = Matrix(g.q_lora, g.index_heads * g.index_dim)
        self.weights_proj = Matrix(g.hidden, g.index_heads)
        self.compressor = Compressor(g, g.index_dim, 4)

    def scores(self, x: Tensor, latent: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, rounding: bool) -> Tensor:
        """Return float32 scores (batch, n_queries, n_rows) of the given queries against all index rows."""
        g = self.g
        batch, n, _ = x.shape
        q = self.wq_b(latent).view(batch * n, g.index_heads, g.index_dim)
        q = _rotate(q, cos.repeat(batch, 1), sin.repeat(batch, 1))
        q = stored_index(q) if rounding else q
        weights = self.weights_proj(x).float() * (g.index_dim * g.index_heads) ** -0.5
        dots = (q.reshape(batch, n * g.index_heads, g.index_dim) @ keys.transpose(1, 2)).view(
            batch, n, g.index_heads, -1
        )
        return (weights.to(dots.dtype)[:, :, None] @ F.relu(dots)).squeeze(2).float()


class Attention(nn.Module):
    """Window attention plus, by layer: nothing, rows of ratio 4 that the indexer picks, or all rows of ratio 128."""

    def __init__(self, g: Geometry, layer: int) -> None:
        super().__init__()
        self.g, self.ratio = g, g.ratios[layer]
        self.wq_a = Matrix(g.hidden, g.q_lora)
        self.q_norm = Norm(g.q_lora, g.eps)
        self.wq_b = Matrix(g.q_lora, g.heads * g.head_dim)
        self.wkv = Matrix(g.hidden, g.head_dim)
        self.kv_norm = Norm(g.head_dim, g.eps)
        self.attn_sink = nn.Parameter(torch.zeros(g.heads))
        self.wo_a = Matrix(g.heads * g.head_dim // g.o_groups, g.o_groups * g.o_lora)
        self.wo_b = Matrix(g.o_groups * g.o_lora, g.hidden, std=0.15 / math.sqrt(g.o_groups * g.o_lora))
        if self.ratio:
            self.compressor = Compressor(g, g.head_dim, self.ratio)
        if self.ratio == 4:
            self.indexer = Indexer(g)
        self.register_buffer("frequencies", rope_frequencies(g, compressed=self.ratio > 0), persistent=False)

    def _choose(self, x: Tensor, latent: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, rounding: bool) -> Tensor:
        """Return (batch * length, n_rows) uint8 flags of the rows with the highest index scores; no gradient."""
        batch, length, _ = x.shape
        n_rows = keys.shape[1]
        flags = torch.zeros((batch, length, n_rows), dtype=torch.uint8, device=x.device)
        visible = (torch.arange(length, device=x.device) + 1) // 4
        step = 1024  # bounds the memory of the per-head scores at long lengths
        for a in range(0, length, step):
            part = slice(a, a + step)
            scores = self.indexer.scores(x[:, part], latent[:, part], keys, cos[part], sin[part], rounding)
            hidden = torch.arange(n_rows, device=x.device) >= visible[part, None]
            best = scores.masked_fill(hidden, -math.inf).topk(self.g.index_topk, -1).indices
            flags[:, part].scatter_(-1, best, 1)
        return flags.view(batch * length, n_rows)

    def _index_loss(
        self,
        x: Tensor,
        latent: Tensor,
        keys: Tensor,
        q: Tensor,
        rows: Tensor,
        lse: Tensor,
        cos: Tensor,
        sin: Tensor,
        mode: Mode,
    ) -> Tensor:
        """KL divergence from the attention mass on compressed rows to the indexer's softmax, on a subset of queries."""
        g = self.g
        batch, length, _ = x.shape
        at = torch.arange(mode.index_loss_stride - 1, length, mode.index_loss_stride, device=x.device)
        n_rows = rows.shape[1]
        visible = torch.arange(n_rows, device=x.device) < ((at + 1) // 4)[:, None]
        with torch.no_grad():
            some = q.view(batch, length, g.heads, -1)[:, at].reshape(batch, -1, g.head_dim)
            dots = (some @ rows.transpose(1, 2)).view(batch, len(at), g.heads, n_rows).float() * g.head_dim**-0.5
            mass = (
                torch.exp(dots - lse.view(batch, length, g.heads)[:, at, :, None])
                .masked_fill(~visible[:, None], 0)
                .sum(2)
            )
            total = mass.sum(-1, keepdim=True)
            target = mass / total.clamp_min(1e-6)
            counts = (total[..., 0] > 1e-3).float()
        scores = self.indexer.scores(x[:, at], latent[:, at], keys, cos[at], sin[at], mode.rounding)
        log_p = scores.masked_fill(~visible, -1e9).log_softmax(-1)
        kl = (target * (target.clamp_min(1e-9).log() - log_p)).sum(-1)
        return (kl * counts).sum() / counts.sum().clamp_min(1)

    def forward(self, x: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """Return the sub-layer's output (batch, length, hidden) and the indexer's loss (0 where there is none)."""
        g = self.g
        batch, length, _ = x.shape
        n, blocks = batch * length, length // g.window
        angle = torch.arange(length, device=x.device).float()[:, None] * self.frequencies
        cos, sin = angle.cos(), angle.sin()
        cos_n, sin_n = cos.repeat(batch, 1), sin.repeat(batch, 1)
        latent = self.q_norm(self.wq_a(x))
        q = unit_rms(self.wq_b(latent).view(n, g.heads, g.head_dim), g.eps)
        q = Fused.rotate(q, cos_n, sin_n)
        kv = Fused.rotate(self.kv_norm(self.wkv(x)).view(n, 1, g.head_dim), cos_n, sin_n)
        kv = stored_row(kv, g.plain_dim) if mode.rounding else kv
        own = kv.view(batch, blocks, g.window, g.head_dim)
        keys = torch.cat((F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0)), own), 2).flatten(0, 1)
        near = (q.view(batch * blocks, g.window * g.heads, g.head_dim) @ keys.transpose(1, 2)).view(n, g.heads, -1)
        rows, chosen, index_keys = x.new_zeros((batch, 0, g.head_dim)), None, None
        if self.ratio:
            rows = self.compressor(x, self.frequencies)
            rows = stored_row(rows, g.plain_dim) if mode.rounding else rows
        if self.ratio == 4:
            picks = mode.sparse and rows.shape[1] > g.index_topk
            # The language model's loss has no gradient for the indexer, and the indexer's must not reach the rest.
            frozen_x, frozen_latent = x.detach(), latent.detach()
            if picks or mode.index_loss_stride:
                index_keys = self.indexer.compressor(frozen_x, self.frequencies)
                index_keys = stored_index(index_keys) if mode.rounding else index_keys
            if picks:
                with torch.no_grad():
                    chosen = self._choose(frozen_x, frozen_latent, index_keys, cos, sin, mode.rounding)
        far = (q.view(batch, length * g.heads, g.head_dim) @ rows.transpose(1, 2)).view(n, g.heads, -1)
        p_near, p_far, lse = attention_softmax(
            near, far, self.attn_sink, chosen, length=length, ratio=self.ratio or 1, scale=g.head_dim**-0.5
        )
        loss = x.new_zeros((), dtype=torch.float32)
        if self.ratio == 4 and mode.index_loss_stride:
            loss = self._index_loss(frozen_x, frozen_latent, index_keys, q.detach(), rows.detach(), lse, cos, sin, mode)
        o = (p_near.view(batch * blocks, g.window * g.heads, -1) @ keys).view(n, g.heads, g.head_dim)
        if self.ratio:
            o = o + (p_far.view(batch, length * g.heads, -1) @ rows).view(n, g.heads, g.head_dim)
        o = Fused.rotate(o, cos_n, -sin_n).view(n, g.o_groups, -1).transpose(0, 1)
        low = torch.bmm(o, self.wo_a.weight.to(o.dtype).view(g.o_groups, g.o_lora, -1).transpose(1, 2))
        return self.wo_b(low.transpose(0, 1).reshape(batch, length, -1)), loss


class Gate(nn.Module):
    """Routes tokens: by a fixed table of token ids in the first layers, by score plus a balancing bias after."""

    def __init__(self, g: Geometry, layer: int) -> None:
        super().__init__()
        self.g, self.hashed = g, layer < g.hash_layers
        self.weight = nn.Parameter(torch.randn(g.experts, g.hidden) * 0.02)
        if self.hashed:
            order = torch.rand(g.vocab, g.experts, generator=torch.Generator().manual_seed(7 + layer)).argsort(-1)
            self.register_buffer("tid2eid", order[:, : g.experts_used].int().contiguous())
        else:
            self.register_buffer("bias", torch.zeros(g.experts))
        self.load = torch.zeros(g.experts)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return float32 weights (n, experts), zero where an expert is not used."""
        g = self.g
        scores = F.softplus(F.linear(x.float(), self.weight)).sqrt()
        used = self.tid2eid[tokens].long() if self.hashed else (scores + self.bias).topk(g.experts_used, -1).indices
        weights = scores.gather(1, used)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(2.0**-14) * g.route_scale
        if not self.hashed:
            with torch.no_grad():
                ones = torch.ones_like(used, dtype=torch.float32)
                counts = torch.zeros(g.experts, device=x.device).scatter_add_(0, used.flatten(), ones.flatten())
                self.load = counts / used.numel()
        return torch.zeros_like(scores).scatter(1, used, weights)


class Experts(nn.Module):
    """All experts of a layer, computed densely: at this size that beats gathering. The shared expert comes last."""

    def __init__(self, g: Geometry, layer: int) -> None:
        super().__init__()
        self.g = g
        self.gate = Gate(g, layer)
        n = g.experts + 1
        self.w13 = nn.Parameter(torch.randn(n, 2 * g.expert_width, g.hidden) * 0.6 / math.sqrt(g.hidden))
        self.w2 = nn.Parameter(torch.randn(n, g.hidden, g.expert_width) * 0.15 / math.sqrt(g.expert_width))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return routed plus shared output for x (n, hidden)."""
        weights = self.gate(x, tokens)
        weights = torch.cat((weights, torch.ones_like(weights[:, :1])), 1)
        gate_up = F.linear(x, self.w13.to(x.dtype).flatten(0, 1)).view(x.shape[0], -1, 2 * self.g.expert_width)
        middle = Fused.activate(gate_up, weights, self.g.clamp).flatten(1)
        return middle @ self.w2.to(x.dtype).transpose(1, 2).flatten(0, 1)


class Layer(nn.Module):
    """Attention and experts, each read from and written to the four residual streams."""

    def __init__(self, g: Geometry, layer: int) -> None:
        super().__init__()
        self.g = g
        self.attn_norm, self.ffn_norm = Norm(g.hidden, g.eps), Norm(g.hidden, g.eps)
        self.attn, self.ffn = Attention(g, layer), Experts(g, layer)
        for i, name in enumerate(("attn", "ffn")):
            # Start near a plain residual network: streams keep to themselves, sub-layers mostly read different ones.
            base = torch.zeros(24)
            base[:4] = -1.5
            base[(2 * layer + i) % 4] = 1.0
            base[8:] = 2.0 * torch.eye(4).flatten()
            self.register_parameter(f"hc_{name}_fn", nn.Parameter(torch.randn(24, 4 * g.hidden) * 0.02))
            self.register_parameter(f"hc_{name}_base", nn.Parameter(base))
            self.register_parameter(f"hc_{name}_scale", nn.Parameter(torch.full((3,), 0.5)))

    def _read(self, name: str, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g = self.g
        flat = unit_rms(h.flatten(1).float(), g.eps)
        m = F.linear(flat, getattr(self, f"hc_{name}_fn"))
        pre, post, logits = Fused.mix(m, getattr(self, f"hc_{name}_scale"), getattr(self, f"hc_{name}_base"), g.eps)
        return post, sinkhorn(logits, g.sinkhorn_rounds, g.eps), Fused.collapse(pre, h)

    def forward(self, h: Tensor, tokens: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """Advance the streams h (n, 4, hidden); tokens (batch, length)."""
        batch, length = tokens.shape
        post, comb, x = self._read("attn", h)
        y, loss = self.attn(self.attn_norm(x).view(batch, length, -1), mode)
        h = Fused.expand(post, comb, y.flatten(0, 1), h)
        post, comb, x = self._read("ffn", h)
        y = self.ffn(self.ffn_norm(x), tokens.flatten())
        return Fused.expand(post, comb, y, h), loss


class Nano(nn.Module):
    """The whole model."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.g = g
        self.embed = nn.Embedding(g.vocab, g.hidden)
        nn.init.normal_(self.embed.weight, std=0.05)
        self.layers = nn.ModuleList(Layer(g, i) for i in range(len(g.ratios)))
        self.norm = Norm(g.hidden, g.eps)
        self.head = Matrix(g.hidden, g.vocab, std=0.02)
        self.hc_head_fn = nn.Parameter(torch.randn(4, 4 * g.hidden) * 0.02)
        self.hc_head_base = nn.Parameter(torch.zeros(4))
        self.hc_head_scale = nn.Parameter(torch.full((1,), 0.5))

    def hidden(self, tokens: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """Return the normed last hidden states (batch, length, hidden) and the sum of the indexers' losses."""
        x = self.embed(tokens).to(mode.dtype).flatten(0, 1)
        h = x[:, None].expand(-1, 4, -1).contiguous()
        loss = x.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            h, part = layer(h, tokens, mode)
            loss = loss + part
        m = F.linear(unit_rms(h.flatten(1).float(), self.g.eps), self.hc_head_fn)
        weights = torch.sigmoid(m * self.hc_head_scale + self.hc_head_base) + self.g.eps
        return self.norm(_collapse(weights, h)).view(*tokens.shape, -1), loss

    def forward(self, tokens: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """Return logits (batch, length, vocab) in the pass's dtype and the sum of the indexers' losses."""
        x, loss = self.hidden(tokens, mode)
        return self.head(x), loss
