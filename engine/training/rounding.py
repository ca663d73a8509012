"""The engine's rounding of stored rows, as straight-through fake quantisation.

Values are rounded in the forward pass exactly as the engine stores them; gradients pass as if they were not. Rules:
FP8 (e4m3) of the dims without RoPE in blocks of 64 with a power-of-two scale, then f16 for the whole row; Hadamard
and FP4 (e2m1) in blocks of 32 for index queries and index rows.
"""

from __future__ import annotations

import torch

FP8_MAX = 448.0
FP4_MAX = 6.0
# Magnitudes halfway between neighbours of {0, .5, 1, 1.5, 2, 3, 4, 6}; a tie goes to the neighbour of even index.
FP4_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
FP4_TIES_UP = (0.75, 1.75, 3.5)
FP4_STEPS = ((0.25, 0.5), (0.75, 0.5), (1.25, 0.5), (1.75, 0.5), (2.5, 1.0), (3.5, 1.0), (5.0, 2.0))


def _scale(blocks: torch.Tensor, largest: float, floor: float) -> torch.Tensor:
    """Return the power of two that brings each block's largest magnitude to at most ``largest``."""
    amax = blocks.abs().amax(-1, keepdim=True).clamp_min(floor)
    return torch.exp2(torch.ceil(torch.log2(amax / largest)))


def fp8_blocks(x: torch.Tensor) -> torch.Tensor:
    """Round float32 values to e4m3 in blocks of 64 along the last axis."""
    blocks = x.unflatten(-1, (-1, 64))
    scale = _scale(blocks, FP8_MAX, 1e-4)
    codes = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    return (codes * scale).flatten(-2)


def fp4_blocks(x: torch.Tensor) -> torch.Tensor:
    """Round float32 values to e2m1 in blocks of 32 along the last axis."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = _scale(blocks, FP4_MAX, 7.052966e-38)
    size = (blocks / scale).abs().clamp_max(FP4_MAX)
    rounded = torch.zeros_like(size)
    for border, step in FP4_STEPS:
        passed = size > border if border in FP4_TIES_DOWN else size >= border
        rounded = rounded + step * passed
    return (torch.copysign(rounded, blocks) * scale).flatten(-2)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Apply the orthonormal Walsh-Hadamard transform (natural order) along the last axis."""
    n = x.shape[-1]
    width = 1
    while width < n:
        pairs = x.unflatten(-1, (n // (2 * width), 2, width))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        width *= 2
    return x * n**-0.5


def _straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return x + (rounded - x).detach()


def stored_row(x: torch.Tensor, plain_dim: int) -> torch.Tensor:
    """Round raw or compressed rows as stored; the first ``plain_dim`` values are those without RoPE."""
    with torch.no_grad():
        wide = x.detach().float()
        rounded = torch.cat((fp8_blocks(wide[..., :plain_dim]), wide[..., plain_dim:]), -1).half().to(x.dtype)
    return _straight_through(x, rounded)


def stored_index(x: torch.Tensor) -> torch.Tensor:
    """Transform and round index queries or index rows."""
    turned = hadamard(x.float())
    with torch.no_grad():
        rounded = fp4_blocks(turned.detach())
    return _straight_through(turned, rounded).to(x.dtype)
