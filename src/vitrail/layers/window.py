"""Attention inside windows of a map: which token lies where, and the layer (Swin, arXiv 2103.14030; v2, arXiv 2111.09883)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .attention import AttentionSite, attend
from .bias import ContinuousBias, RelativeBias

Size = tuple[int, int]


def window_rows(grid: Size, window: Size, shift: Size = (0, 0), pad_first: bool = True) -> Int64[Tensor, "windows n"]:
    """The token that every row of every window holds: its number in raster order on `grid`, or -1 where there is only padding.

    This is how recorded attention finds its pixels: query i and key j of window w are the tokens rows[w, i] and rows[w, j].
    The map is padded at the bottom and right to whole windows and rolled up and left by `shift`, in this order or (not
    `pad_first`) in the other; windows lie in raster order.
    """
    (h, w), (wh, ww) = grid, window
    tall, wide = -h % wh, -w % ww
    tokens = torch.arange(h * w).view(h, w)
    back = (-shift[0], -shift[1])
    if pad_first:
        tokens = F.pad(tokens, (0, wide, 0, tall), value=-1).roll(back, (0, 1))
    else:
        tokens = F.pad(tokens.roll(back, (0, 1)), (0, wide, 0, tall), value=-1)
    cut = tokens.view((h + tall) // wh, wh, (w + wide) // ww, ww)
    return cut.transpose(1, 2).reshape(-1, wh * ww)


def window_mask(grid: Size, window: Size, shift: Size) -> Tensor:
    """Booleans (windows, n, n): true where rolling has put two tokens into one window that are no neighbours in the map."""
    sides = []
    for side, step, moved in zip(grid, window, shift, strict=True):
        padded = side + -side % step
        place = torch.arange(padded)
        sides.append((place >= padded - step).long() + (place >= padded - moved) if moved else torch.zeros_like(place))
    region = 3 * sides[0][:, None] + sides[1]
    cut = region.view(len(sides[0]) // window[0], window[0], len(sides[1]) // window[1], window[1])
    rows = cut.transpose(1, 2).reshape(-1, window[0] * window[1])
    return rows[:, :, None] != rows[:, None]


class Layout(NamedTuple):
    """The tokens of a map in the order of its windows.

    rows (windows * n) numbers the token of each row, with h * w for padding; back (h * w) numbers the row of each token; mask
    (windows, n, n) is added to the logits, None where no window is torn; raster: the order is that of the map.
    """

    rows: Tensor
    back: Tensor
    mask: Tensor | None = None
    raster: bool = False

    @property
    def padded(self) -> bool:
        """Whether some rows hold no token."""
        return self.rows.shape[0] > self.back.shape[0]

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return Layout(self.rows.to(device), self.back.to(device), mask, self.raster)


def make_layout(grid: Size, window: Size, shift: Size, pad_first: bool, mask_value: float) -> Layout:
    """The layout of a map of `grid` tokens, from integers alone."""
    torn = shift != (0, 0)
    mask = mask_value * window_mask(grid, window, shift).float() if torn else None
    return order_layout(window_rows(grid, window, shift, pad_first).flatten(), grid)._replace(
        mask=mask, raster=grid == window and not torn
    )


def order_layout(rows: Int64[Tensor, " m"], grid: Size) -> Layout:
    """The layout of an order, in which every token of a map occurs once; -1 marks padding."""
    count = grid[0] * grid[1]
    rows = torch.where(rows < 0, count, rows)
    back = torch.zeros(count + 1, dtype=torch.long).scatter(0, rows, torch.arange(rows.shape[0]))[:count]
    return Layout(rows, back)


class LayoutBuffers(nn.Module):
    """A layout that moves with its model and is in no checkpoint."""

    rows: Tensor
    back: Tensor
    mask: Tensor | None

    def __init__(self, layout: Layout):
        super().__init__()
        self.raster = layout.raster
        for name in ("rows", "back", "mask"):
            self.register_buffer(name, layout._asdict()[name], persistent=False)

    def forward(self) -> Layout:
        """The layout."""
        return Layout(self.rows, self.back, self.mask, self.raster)


class _Gather(torch.autograd.Function):
    """x[:, index] where `inverse` undoes `index`: the backward pass gathers too, much faster than autograd's scatter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return _take(x, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _take(gradient, ctx.saved_tensors[0]), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    if index.shape[0] > x.shape[1]:
        x = F.pad(x, (0, 0, 0, 1))  # the row of zeros that padding points to
    return x.index_select(1, index)


def gather(x: Float[Tensor, "b n c"], index: Tensor, inverse: Tensor) -> Float[Tensor, "b m c"]:
    """Tokens in another order, or with rows of zeros put in (index n) or left out again; `inverse` is the way back."""
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_exporting():
        return _Gather.apply(x, index, inverse)  # type: ignore[no-untyped-call]
    return _take(x, index)


def reorder(x: Float[Tensor, "b n c"], old: Layout | None, new: Layout | None) -> Float[Tensor, "b m c"]:
    """Tokens from the order of one layout to that of another; None is raster order, as `ordered` gives it."""
    if old is new:
        return x
    if old is None or new is None:
        there = (new.rows, new.back) if new is not None else (old.back, old.rows)  # type: ignore[union-attr]
        return gather(x, *there)
    return gather(x, old.back[new.rows], new.back[old.rows])


def ordered(layout: Layout) -> Layout | None:
    """The order in which tokens wait for blocks of a layout: its own, but raster where that is the same or has padding."""
    return None if layout.raster or layout.padded else layout


class _Kept(NamedTuple):
    """A bias and what it was made of; holding the weights keeps their identity from being given to others."""

    mask: Tensor | None
    state: tuple[Any, ...]
    weights: tuple[nn.Parameter, ...]
    bias: Tensor


class WindowAttention(nn.Module):
    """Self-attention among the n tokens of each window, with a learned bias per offset.

    `cosine` is v2: queries and keys have unit length, a learned scale per head (at most 100) and keys no additive bias, and
    the offsets' bias comes from a small network. Rows of `qkv` are ordered [q, k, v] x heads x head dim.
    """

    def __init__(
        self, width: int, heads: int, window: Size, *, cosine: bool, qkv_bias: bool, pretrained: Size, dropout: float,
        attention_dropout: float,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.cosine = heads, cosine
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias and not cosine)
        self.qv_bias = nn.Parameter(torch.zeros(2 * width)) if qkv_bias and cosine else None
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10))) if cosine else None
        self.bias = ContinuousBias(window, heads, pretrained) if cosine else RelativeBias(window, heads)
        self.site = AttentionSite(attention_dropout)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)
        self._kept: _Kept | None = None

    def forward(self, x: Float[Tensor, "b m c"], layout: Layout) -> Float[Tensor, "b m c"]:
        """Tokens in the layout's order, or in raster order where the layout has padding (which attends as zeros would)."""
        if layout.padded:
            x = gather(x, layout.rows, layout.back)
        b, m, c = x.shape
        n = self.bias.window[0] * self.bias.window[1]
        qkv = self.qkv(x) if self.qv_bias is None else F.linear(x, self.qkv.weight, self._sparse_bias())
        q, k, v = qkv.view(b * m // n, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)  # w k n d
        scale = None
        if self.logit_scale is not None:
            gain = self.logit_scale.clamp(max=math.log(100)).exp()
            q = (F.normalize(q.float(), dim=-1) * gain).to(v.dtype)
            k, scale = F.normalize(k.float(), dim=-1).to(v.dtype), 1.0
        bias = self._position_bias(layout.mask, v.dtype)
        y = attend(q, k, v, bias, site=self.site, scale=scale, groups=1 if layout.mask is None else m // n)
        y = self.drop(self.proj(y.transpose(1, 2).reshape(b, m, c)))
        return gather(y, layout.back, layout.rows) if layout.padded else y

    def _sparse_bias(self) -> Tensor:
        q, v = self.qv_bias.chunk(2)  # type: ignore[union-attr]
        return torch.cat([q, torch.zeros_like(q), v])

    def _position_bias(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Bias of the offsets and mask of the torn windows in one, (1 or windows, k, n, n).

        In eval mode without gradients it is computed once per weights and map: new tensors, changes in place, other types or
        devices and `train()` renew it.
        """
        weights = tuple(self.bias.parameters())
        if torch.compiler.is_compiling() or self.training or (torch.is_grad_enabled() and weights[0].requires_grad):
            return self._combine(mask, dtype)
        if not all(type(p) is nn.Parameter and not p.is_inference() for p in weights):  # counted on tensors without storage
            return self._combine(mask, dtype)
        state = (dtype, *((id(p), p.data_ptr(), p.device, p.dtype, p._version) for p in weights))
        if self._kept is None or self._kept.mask is not mask or self._kept.state != state:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = _Kept(mask, state, weights, self._combine(mask, dtype))
        return self._kept.bias

    def _combine(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        bias = self.bias()[None]
        return (bias if mask is None else bias + mask[:, None]).to(dtype)

    def train(self, mode: bool = True) -> WindowAttention:
        """Forget the kept bias, which the weights may outgrow unseen."""
        self._kept = None
        return super().train(mode)
