"""From pixels to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each mapped linearly to `width` channels (ViT, section 3.1), as a strided convolution."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int], bias: bool = True):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch, bias=bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], tuple[int, int, int]]:
        """Tokens in row-major order and their grid (1, rows, columns)."""
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2), (1, x.shape[2], x.shape[3])


def resize_patches(weight: Float[Tensor, "d c h w"], size: tuple[int, int], rule: str = "bilinear") -> Float[Tensor, "d c H W"]:
    """A patch embedding for patches of another size; the same size returns the weight itself (FlexiViT, arXiv 2212.08013).

    Pseudo-inverse resizing (section 3.4): the weight whose products with enlarged patches are those of the old one with the
    patches as they were, exactly where patches grow, in the least-squares sense where they shrink. Patches are resized
    bilinearly without antialiasing, as by the authors, axis by axis; rule="bicubic" with antialiasing, as by timm.
    """
    old = (weight.shape[2], weight.shape[3])
    if old == tuple(size):
        return weight
    back = [torch.linalg.pinv(_stretch(a, b, rule)) for a, b in zip(old, size, strict=True)]  # old x new
    return torch.einsum("dchw,hy,wx->dcyx", weight.double(), *back).to(weight.dtype).contiguous()


def _stretch(old: int, new: int, rule: str) -> Float[Tensor, "new old"]:
    """Resampling of a line as a matrix."""
    lines = torch.eye(old, dtype=torch.float64)[None, None]
    return F.interpolate(lines, (old, new), mode=rule, align_corners=False, antialias=rule == "bicubic")[0, 0].T


class TubeletEmbed(nn.Module):
    """Non-overlapping boxes of (frames, rows, columns), each mapped linearly to `width` channels (ViViT, section 3.2).

    A tubelet of one frame is the paper's uniform frame sampling.
    """

    def __init__(self, channels: int, width: int, tubelet: tuple[int, int, int]):
        super().__init__()
        self.tubelet = tubelet
        self.proj = nn.Conv3d(channels, width, kernel_size=tubelet, stride=tubelet)

    def forward(self, x: Float[Tensor, "b c t h w"]) -> tuple[Float[Tensor, "b n d"], tuple[int, int, int]]:
        """Tokens frame by frame, row by row, and their grid (T, H, W)."""
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3], x.shape[4])


def frames_problem(frames: int, multiple: int) -> str:
    """Why a clip of so many frames does not divide into tubelets, with the nearest valid numbers; "" when it does."""
    if frames > 0 and frames % multiple == 0:
        return ""
    lower, upper = frames // multiple * multiple, -(-max(frames, 1) // multiple) * multiple
    options = f"{lower} or {upper}" if lower > 0 else str(upper)
    return f"{frames} frames are not divisible by the tubelet of {multiple}; nearest valid: {options}"


def size_problem(size: tuple[int, int], multiple: tuple[int, int]) -> str:
    """Why an image of (height, width) does not divide into patches, with the nearest valid sizes; "" when it does."""
    if all(side > 0 and side % step == 0 for side, step in zip(size, multiple, strict=True)):
        return ""
    lower = tuple(max(step, side // step * step) for side, step in zip(size, multiple, strict=True))
    upper = tuple(max(step, -(-side // step) * step) for side, step in zip(size, multiple, strict=True))
    options = f"{lower[0]}x{lower[1]}" + (f" or {upper[0]}x{upper[1]}" if upper != lower else "")
    return (
        f"image size {size[0]}x{size[1]} is not divisible by the patch {multiple[0]}x{multiple[1]}; "
        f"nearest valid: {options} (height x width)"
    )
