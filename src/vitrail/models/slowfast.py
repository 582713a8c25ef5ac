"""SlowFast networks (Feichtenhofer et al., arXiv 1812.03982), their slow pathway alone, and non-local blocks (1711.07971).

Two ResNets look at one clip: a wide one at every alpha-th frame and a narrow one at all of them, which feeds the wide one
after every stage.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.attention import AttentionSite, attend, attention_sites
from vitrail.layers.conv import ConvNorm, ReLU
from vitrail.layers.embed import frames_problem
from vitrail.layers.features import Features
from vitrail.layers.head import ClassifierHead, window_means
from vitrail.layers.norm import normalise
from vitrail.layers.route import Route, Site, Step, coarser, pooled, tile

from .base import Model

SLOW_FRAMES, NONLOCAL_KINDS = ("every", "linspace"), ("softmax", "dot_product")
EXPANSION, FUSION_RATIO, FAST_STEM = 4, 2, 5


@dataclass(frozen=True)
class SlowFastConfig:
    """Everything that decides the function of a SlowFast; any clip works whose number of frames alpha divides."""

    image_size: tuple[int, int] = (224, 224)
    frames: int = 32  # of the clip: what the fast pathway sees
    in_channels: int = 3
    num_classes: int = 400
    alpha: int | None = 4  # frames of the clip per frame of the slow pathway; None: the slow pathway alone, on all frames
    slow_frames: str = "every"  # every alpha-th (the paper); linspace: spread from the first to the last (both public codes)
    width: int = 64  # channels of the slow stem
    beta_inv: int = 8  # how much narrower the fast pathway is
    depths: tuple[int, ...] = (3, 4, 6, 3)
    slow_kernels: tuple[int, ...] = (1, 1, 3, 3)  # frames that the first convolution of a block sees, by stage
    fast_kernels: tuple[int, ...] = (3, 3, 3, 3)
    temporal_blocks: tuple[int, ...] = (3, 4, 6, 3)  # in so many first blocks of a stage; in later ones it sees one frame
    fusion_kernel: int = 7  # frames of the convolutions from fast to slow; the paper: 5
    nonlocals: tuple[tuple[int, ...], ...] = ((), (), (), ())  # slow blocks of every stage that a non-local block follows
    nonlocal_kind: str = "softmax"
    dropout: float = 0.0  # before the classifier; published: 0.5

    def __post_init__(self) -> None:
        """Raise ValueError on settings that contradict each other."""
        for name, allowed in (("slow_frames", SLOW_FRAMES), ("nonlocal_kind", NONLOCAL_KINDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        for name in ("slow_kernels", "fast_kernels", "temporal_blocks", "nonlocals"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; depths names {len(self.depths)} stages")
        if problem := frames_problem(self.frames, self.alpha or 1):
            raise ValueError(problem)
        if self.alpha is not None and self.width % self.beta_inv:
            nearest = max(1, round(self.width / self.beta_inv)) * self.beta_inv
            raise ValueError(f"width {self.width} is not divisible by beta_inv {self.beta_inv}; nearest: {nearest}")


class NonLocal(nn.Module):
    """Attention of all cells of a clip to the cells of its half-sized frames, added through a norm that starts at zero."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        inner = width // 2
        self.kind = kind
        self.query = nn.Conv3d(width, inner, 1)
        self.key = nn.Conv3d(width, inner, 1)
        self.value = nn.Conv3d(width, inner, 1)
        self.site = AttentionSite()
        self.proj = nn.Conv3d(inner, width, 1)
        self.norm = nn.BatchNorm3d(width)

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """`dot_product` has no softmax, so no probabilities that could be recorded: two products, the small one first."""
        pooled = F.max_pool3d(x, (1, 2, 2)) if min(x.shape[3:]) > 1 else x
        q, k, v = (conv(y).flatten(2).transpose(1, 2)[:, None] for conv, y in
                   ((self.query, x), (self.key, pooled), (self.value, pooled)))  # b 1 n d  # fmt: skip
        if self.kind == "softmax":
            y = attend(q, k, v, site=self.site)
        else:
            y = q @ (k.transpose(2, 3) @ v) / k.shape[2]
        return x + normalise(self.norm, self.proj(y[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])))


class Bottleneck(nn.Module):
    """kx1x1, 1x3x3 (with the stride) and 1x1x1 convolutions, a shortcut, and perhaps a non-local block behind."""

    def __init__(self, cin: int, inner: int, kernel: int, stride: int, nonlocal_kind: str | None):
        super().__init__()
        cout = inner * EXPANSION
        self.conv1 = ConvNorm(cin, inner, (kernel, 1, 1))
        self.conv2 = ConvNorm(inner, inner, (1, 3, 3), (1, stride, stride))
        self.conv3 = ConvNorm(inner, cout, (1, 1, 1), act=None)
        changes = stride > 1 or cin != cout
        self.shortcut = ConvNorm(cin, cout, (1, 1, 1), (1, stride, stride), act=None) if changes else nn.Identity()
        self.act = ReLU()
        self.nonlocal_block = NonLocal(cout, nonlocal_kind) if nonlocal_kind else nn.Identity()

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b d t i j"]:
        """Post-activation residual."""
        y = self.conv3(self.conv2(self.conv1(x)))
        y += self.shortcut(x)  # in place: one map less to allocate
        return self.nonlocal_block(self.act(y))


class Pathway(nn.Module):
    """The stem and the stages of one pathway; `fused` channels more enter every stage than the one before gave."""

    def __init__(self, config: SlowFastConfig, width: int, stem_kernel: int, kernels: tuple[int, ...], fused: tuple[int, ...],
                 nonlocals: tuple[tuple[int, ...], ...]):  # fmt: skip
        super().__init__()
        self.stem = ConvNorm(config.in_channels, width, (stem_kernel, 7, 7), (1, 2, 2))
        self.stem_pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        channels, stages = width, []
        for s, depth in enumerate(config.depths):
            inner, blocks = width * 2**s, []
            channels += fused[s]
            for i in range(depth):
                kernel = kernels[s] if i < config.temporal_blocks[s] else 1
                kind = config.nonlocal_kind if i in nonlocals[s] else None
                blocks.append(Bottleneck(channels, inner, kernel, 2 if s > 0 and i == 0 else 1, kind))
                channels = inner * EXPANSION
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.dim = channels


class SlowFast(Model):
    """A SlowFast for clips (b, c, t, h, w); the slow pathway takes its frames out of the clip.

    Its tokens lie on the grid of the slow pathway: the slow cell's channels, then those of the fast pathway, averaged over
    the alpha frames that belong to it. `pathways` gives both apart.
    """

    family = "slowfast"
    config: SlowFastConfig

    def __init__(self, config: SlowFastConfig):
        super().__init__()
        self.config = c = config
        stages, none = len(c.depths), ((),) * len(c.depths)
        narrow = c.width // c.beta_inv
        given = tuple(narrow * (EXPANSION * 2 ** (s - 1) if s else 1) for s in range(stages))  # fast channels before a stage
        fused = tuple(FUSION_RATIO * n for n in given) if c.alpha else (0,) * stages
        self.slow = Pathway(c, c.width, 1, c.slow_kernels, fused, c.nonlocals)
        self.fast = Pathway(c, narrow, FAST_STEM, c.fast_kernels, (0,) * stages, none) if c.alpha else None
        self.fusions = nn.ModuleList(
            ConvNorm(n, FUSION_RATIO * n, (c.fusion_kernel, 1, 1), (c.alpha or 1, 1, 1)) for n in (given if c.alpha else ())
        )
        self.dim = self.slow.dim + (self.fast.dim if self.fast is not None else 0)
        self.drop = nn.Dropout(c.dropout)
        self.head = ClassifierHead(self.dim, c.num_classes)
        self._init_weights()

    def features(self, x: Float[Tensor, "b c t h w"]) -> Features:
        """Cells of the last maps of both pathways. Raises ValueError for frames that alpha does not divide."""
        return self._join(*self._maps(*self.split(x))[-1])

    def pyramid(self, x: Float[Tensor, "b c t h w"]) -> list[Features]:
        """The cells of both pathways after every stage, finest first."""
        return [self._join(slow, fast) for slow, fast in self._maps(*self.split(x))]

    def pathways(self, x: Float[Tensor, "b c t h w"]) -> list[Features]:
        """The last maps as they are: the slow pathway's and, if there is one, the fast pathway's."""
        return [_cells(maps) for maps in self._maps(*self.split(x))[-1] if maps is not None]

    def pool(self, features: Features) -> Float[Tensor, "b c"]:
        """The mean over the map: both pathways' global means, one behind the other."""
        return self.drop(features.tokens.mean(1))

    def attention_route(self, size: tuple[int, ...]) -> Route:
        """Non-local blocks alone; convolutions lie between them, so nothing joins them to what the classifier reads."""
        steps = []
        for name in attention_sites(self):  # slow.stages.1.3.nonlocal_block.site
            shrunk = 2 ** (2 + int(name.split(".")[2]))
            grid = (size[0] // (self.config.alpha or 1), -(-size[1] // shrunk), -(-size[2] // shrunk))
            cells = keys = tile(grid, size)
            links = None
            if min(grid[1:]) > 1:
                window = ((2, 2), (2, 2), (0, 0))
                keys = coarser(cells, *window)
                links = pooled(cells, keys, *window)
            asked, held = torch.arange(cells.tokens)[None], torch.arange(keys.tokens)[None]
            steps.append(Step(cells, (Site(name, asked, held, cells, keys, links),), None))
        return Route(tile((1, 1, 1), size), tuple(steps))

    def split(self, x: Float[Tensor, "b c t h w"]) -> tuple[Float[Tensor, "b c s h w"], Float[Tensor, "b c t h w"] | None]:
        """The inputs of the slow and of the fast pathway."""
        self.check_input(x)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        if self.config.alpha is None:
            return x, None
        if self.config.slow_frames == "every":
            return x[:, :, :: self.config.alpha], x
        t = x.shape[2]
        return x.index_select(2, torch.linspace(0, t - 1, t // self.config.alpha).long().to(x.device)), x

    def position_logits(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b p k"]:
        """Logits at every position of a window of the built size, for clips of that size or larger ones."""
        c, shrunk = self.config, 2 ** (len(self.config.depths) + 1)
        window = (c.frames // (c.alpha or 1), math.ceil(c.image_size[0] / shrunk), math.ceil(c.image_size[1] / shrunk))
        means = window_means(self.features(x), window)
        return self.head(means.flatten(0, 1)).unflatten(0, means.shape[:2])

    def probabilities(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b k"]:
        """The published answer: softmax of the logits at every position, then their mean.

        At the built size there is one position and this is the softmax of `forward`'s logits; on larger clips `forward`
        averages the map before the classifier instead.
        """
        return self.position_logits(x).softmax(-1).mean(1)

    def _maps(self, slow: Tensor, fast: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """Both pathways' maps after every stage, before the fast one is fused into the slow one."""
        slow = self.slow.stem_pool(self.slow.stem(slow))
        if self.fast is not None:
            fast = self.fast.stem_pool(self.fast.stem(fast))
        found = []
        for s in range(len(self.config.depths)):
            if self.fast is not None:
                slow = torch.cat([slow, self.fusions[s](fast)], 1)
            for block in self.slow.stages[s]:  # type: ignore[attr-defined]
                slow = self.run_block(block, slow)
            if self.fast is not None:
                for block in self.fast.stages[s]:  # type: ignore[attr-defined]
                    fast = self.run_block(block, fast)  # type: ignore[arg-type]
            found.append((slow, fast))
        return found

    def _join(self, slow: Tensor, fast: Tensor | None) -> Features:
        if fast is None:
            return _cells(slow)
        return _cells(torch.cat([slow, fast.unflatten(2, (slow.shape[2], -1)).mean(3)], 1))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, frames, height, width)."""
        return (self.config.in_channels, self.config.frames, *self.config.image_size)

    @property
    def input_multiple(self) -> tuple[int, int]:
        """Any size works."""
        return (1, 1)

    @property
    def frame_multiple(self) -> int:
        """alpha, or any number for the slow pathway alone."""
        return self.config.alpha or 1

    def reset_head(self, num_classes: int) -> None:
        """A new zero-initialised classifier."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.head = ClassifierHead(self.dim, num_classes).to(self.slow.stem.conv.weight.device)

    def layer_ids(self) -> dict[str, int]:
        """Stems 0, then every block counts (a fusion with the block that it feeds), the head last."""
        depths = self.config.depths
        starts, last = [sum(depths[:s]) for s in range(len(depths))], sum(depths) + 1
        ids = {}
        for name, _ in self.named_parameters():
            part = name.split(".")
            if part[0] == "fusions":
                ids[name] = starts[int(part[1])] + 1
            elif part[1] == "stages":
                ids[name] = starts[int(part[2])] + int(part[3]) + 1
            else:
                ids[name] = last if part[0] == "head" else 0
        return ids

    @torch.no_grad()
    def _init_weights(self) -> None:
        """He initialisation; the last normalisation of a branch starts at zero, so that blocks start as identities."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3.norm.weight)  # type: ignore[arg-type]
            if isinstance(module, NonLocal):
                nn.init.zeros_(module.norm.weight)


def _cells(maps: Tensor) -> Features:
    return Features(maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3], maps.shape[4]), 0)


_R101: dict[str, Any] = {"depths": (3, 4, 23, 3), "fusion_kernel": 5}
# SlowFast paper, Tables 1 and 2 (frames of the slow pathway x their stride); fusion kernels as in the published configurations
VARIANTS: dict[str, SlowFastConfig] = {
    "slowfast_r50_4x16": SlowFastConfig(alpha=8, fusion_kernel=5),
    "slowfast_r50_8x8": SlowFastConfig(),
    "slowfast_r101_8x8": SlowFastConfig(**_R101),
    "slowfast_r101_16x8": SlowFastConfig(frames=64, **_R101),
    "slowfast_r101_16x8_nonlocal": SlowFastConfig(
        frames=64, nonlocals=((), (), (6, 13, 20), ()), nonlocal_kind="dot_product", **_R101
    ),
    "slow_r50_4x16": SlowFastConfig(frames=4, alpha=None),
    "slow_r50_8x8": SlowFastConfig(frames=8, alpha=None),
    "slowfast_micro": SlowFastConfig(
        (16, 16), 4, num_classes=10, alpha=2, width=12, beta_inv=4, depths=(1, 2), slow_kernels=(1, 3), fast_kernels=(3, 3),
        temporal_blocks=(1, 1), fusion_kernel=3, nonlocals=((), (1,)),
    ),
}  # fmt: skip

CONFIG = SlowFastConfig
MODEL = SlowFast
