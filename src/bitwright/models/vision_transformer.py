"""A plain vision transformer with explicit attention: patches, a class token, pre-norm blocks, a linear head.

Every operator is a module (products of attention as `MatMul`), so that training with compressed activations and counts
of what autograd keeps see all of them. Source: arXiv 2012.12877 (DeiT); shapes Ti, S and B.
"""

from __future__ import annotations

import torch
from torch import nn

from bitwright.core.errors import InputError
from bitwright.models.compressed_activations import MatMul


class Attention(nn.Module):
    """Softmax attention of `heads` heads over (batch, tokens, width); `fused` takes torch's fused kernel, which keeps
    no weights."""

    def __init__(self, width: int, heads: int, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scores, self.softmax, self.values = MatMul(), nn.Softmax(-1), MatMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) to the same."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            heads = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            weights = self.softmax(self.scores(q * (width // self.heads) ** -0.5, k.transpose(-2, -1)))
            heads = self.values(weights, v)
        mixed: torch.Tensor = self.out(heads.transpose(1, 2).reshape(batch, tokens, width))
        return mixed


class Block(nn.Module):
    """Pre-norm attention and MLP of four times the width, with residuals."""

    def __init__(self, width: int, heads: int, fused: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, fused)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) to the same."""
        x = x + self.attention(self.norm1(x))
        made: torch.Tensor = x + self.mlp(self.norm2(x))
        return made


class VisionTransformer(nn.Module):
    """Images (batch, channels, side, side) to logits (batch, classes)."""

    def __init__(self, width: int, heads: int, depth: int = 12, side: int = 224, patch: int = 16, channels: int = 3,
                 classes: int = 1000, fused: bool = False) -> None:  # fmt: skip
        super().__init__()
        if width % heads or side % patch:
            raise InputError(f"{heads} heads do not divide width {width}, or patches of {patch} the side {side}.")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, fused) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) from the class token."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), dim=1) + self.places
        logits: torch.Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def deit(size: str, classes: int = 1000, fused: bool = False) -> VisionTransformer:
    """DeiT "Ti", "S" or "B" with random weights; `fused` attention. Raises InputError for other sizes."""
    heads = {"Ti": 3, "S": 6, "B": 12}
    if size not in heads:
        raise InputError(f"DeiT comes in {', '.join(heads)}, not {size!r}.")
    return VisionTransformer(64 * heads[size], heads[size], classes=classes, fused=fused)
