"""The optimiser: Muon for the matrices inside the layers, AdamW for everything else.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, which at this size learns clearly faster per step
than AdamW. Learning rates are tensors, so that a captured CUDA graph sees their changes.
"""

from __future__ import annotations

import torch
from model import Nano
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(m: Tensor, rounds: int = 5) -> Tensor:
    """Return matrices (k, r, c) with all singular values pulled towards 1, by Newton-Schulz iteration in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = m.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if tall else x
    x = x / (x.float().square().sum((-2, -1), keepdim=True).sqrt() + 1e-7).bfloat16()
    for _ in range(rounds):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if tall else x


def matrix_view(name: str, model: Nano) -> tuple[int, int] | None:
    """Return the (rows, columns) of the matrices in a parameter that Muon trains, or None for AdamW's."""
    g = model.g
    if not name.startswith("layers.") or ".indexer." in name:
        return None  # the indexer's loss starts late and is tiny: AdamW's scale-free steps suit it
    parameter = model.get_parameter(name)
    if name.endswith("wo_a.weight"):
        return g.o_lora, parameter.shape[1]  # block-diagonal: one matrix per group
    if name.endswith("ffn.w13"):
        return g.expert_width, g.hidden
    if name.endswith("ffn.w2"):
        return g.hidden, g.expert_width
    if name.endswith((".weight",)) and parameter.ndim == 2 and ".gate." not in name:
        return parameter.shape[0], parameter.shape[1]
    return None


class Muon:
    """Momentum, orthogonalised per matrix; matrices of one shape are done in one batch."""

    def __init__(
        self, model: Nano, names: list[str], rate: Tensor, momentum: float = 0.95, decay: float = 0.02
    ) -> None:
        self.rate, self.momentum, self.decay = rate, momentum, decay
        self.groups: dict[tuple[int, int], list[Tensor]] = {}
        for name in names:
            shape = matrix_view(name, model)
            assert shape is not None
            self.groups.setdefault(shape, []).append(model.get_parameter(name))
        self.buffers = {
            shape: torch.zeros((sum(p.numel() for p in ps) // (shape[0] * shape[1]), *shape), device=ps[0].device)
            for shape, ps in self.groups.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Update all matrices from their gradients."""
        for (rows, columns), parameters in self.groups.items():
            gradient = torch.cat([p.grad.reshape(-1, rows, columns) for p in parameters])
            buffer = self.buffers[rows, columns]
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(buffer, self.momentum)).float()
            update = update * (self.rate * max(1.0, rows / columns) ** 0.5)
            start = 0
            for p in parameters:
                n = p.numel() // (rows * columns)
                p.mul_(1 - self.rate * self.decay).sub_(update[start : start + n].reshape(p.shape))
                start += n


class Optimizer:
    """Both optimisers behind one step; ``set_rate`` scales their learning rates together."""

    def __init__(self, model: Nano, *, kind: str, muon_rate: float = 0.02, adam_rate: float = 3e-3) -> None:
        device = next(model.parameters()).device
        self.rates = {"muon": muon_rate, "adam": adam_rate}
        self.muon_rate = torch.zeros((), device=device)
        cuda = device.type == "cuda"
        names = [name for name, _ in model.named_parameters()]
        matrices = [n for n in names if matrix_view(n, model)] if kind == "muon" else []
        rest = [n for n in names if n not in set(matrices)]
        decayed = [n for n in rest if model.get_parameter(n).ndim >= 2 and not n.startswith(("embed", "head"))]
        self.adam_rate = torch.zeros((), device=device)
        self.adam = torch.optim.AdamW(
            [
                {"params": [model.get_parameter(n) for n in decayed], "weight_decay": 0.05},
                {"params": [model.get_parameter(n) for n in rest if n not in set(decayed)], "weight_decay": 0.0},
            ],
            lr=self.adam_rate,
            betas=(0.9, 0.95),
            fused=cuda,
            capturable=cuda,
        )
        self.muon = Muon(model, matrices, self.muon_rate) if matrices else None
        self.parameters = list(model.parameters())

    def set_rate(self, factor: float) -> None:
        """Set both learning rates to ``factor`` times their peak."""
        self.muon_rate.fill_(self.rates["muon"] * factor)
        self.adam_rate.fill_(self.rates["adam"] * factor)

    def step(self) -> Tensor:
        """Clip, update, and return the gradient norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        if self.muon:
            self.muon.step()
        return norm
