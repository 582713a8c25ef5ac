"""TimeSformer's attention schemes against explicit masks, and the published sizes and costs."""

from __future__ import annotations

import pytest
import torch

from vitrail import cost
from vitrail.layers.attention import record_attention
from vitrail.models import ShapesOnly, create_model
from vitrail.models.timesformer import SCHEMES

# Counted from the text with 400 classes; the paper's Table 1 prints 121.4, 85.9, 85.9, 121.4 and 156.8 million.
PARAMETERS = {
    "divided": 121_566_352, "joint": 86_112_400, "space": 86_106_256, "local_global": 121_566_352, "axial": 157_020_304,
}  # fmt: skip
# By torch's counter on transformers' models; TimeSformer's paper prints .59 TFLOPs for three views, ViViT's 455.2 GMACs.
FLOPS = {"timesformer_base_divided_8x224": 391_660_560_384, "vivit_base_16x2": 903_049_506_816}


def small(attention: str, **settings) -> torch.nn.Module:
    made = create_model("timesformer_micro", attention=attention, depth=2, **settings).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.mark.parametrize("attention", PARAMETERS)
def test_published_sizes(attention: str) -> None:
    with ShapesOnly():
        model = create_model(f"timesformer_base_{attention}_8x224")
    assert cost.count_parameters(model) == PARAMETERS[attention]


@pytest.mark.parametrize("name", FLOPS)
def test_published_costs(name: str) -> None:
    with ShapesOnly():
        model = create_model(name)
    assert cost.count_flops(model) == FLOPS[name]


def neighbours(axis: str, grid: tuple[int, int, int]) -> torch.Tensor:
    """(n, n): which patches may see each other, from their coordinates alone."""
    t, h, w = torch.unravel_index(torch.arange(grid[0] * grid[1] * grid[2]), grid)
    keys = {
        "joint": [t * 0], "space": [t], "time": [h, w], "width": [t, h], "height": [t, w],
        "local": [h * 2 // grid[1], w * 2 // grid[2]], "sparse": [t % 2, h % 2, w % 2],
    }[axis]  # fmt: skip
    return torch.stack([key[:, None] == key for key in keys]).all(0)


def masked(attn: torch.nn.Module, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Joint attention of all tokens under a mask (n, n)."""
    b, n, c = x.shape
    q, k, v = attn.qkv(x).view(b, n, 3, attn.heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


def with_token(attn: torch.nn.Module, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """As `masked`, with a class token that every patch sees and that looks at one group after the other, on average."""
    whole = torch.nn.functional.pad(seen, (1, 0, 1, 0), value=True)
    answers = []
    for group in seen.unique(dim=0):
        whole[0, 1:] = group
        answers.append(masked(attn, x, whole.clone()))
    return torch.cat([torch.stack(answers).mean(0)[:, :1], answers[0][:, 1:]], 1)


def by_masks(model: torch.nn.Module, clip: torch.Tensor) -> torch.Tensor:
    """The whole model, every scheme as joint attention under masks, on convolution, norms and MLPs of its own."""
    b, c, t, h, w = clip.shape
    x = model.embed(clip.transpose(1, 2).reshape(b * t, c, h, w))[0].reshape(b, -1, model.config.width)
    x = torch.cat([model.class_token.expand(b, -1, -1), x], 1) + model.position(model.config.grid)
    for block in model.blocks:
        *early, last = block.axes
        for axis in early:
            step, patches = block.steps[axis], x[:, 1:]
            y = step.fc(masked(step.attn, step.norm(patches), neighbours(axis, model.config.grid)))
            x = torch.cat([x[:, :1], patches + y], 1)
        x = x + with_token(block.attn[last], block.norm1(x), neighbours(last, model.config.grid))
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0])


@pytest.mark.parametrize("attention", ["divided", "local_global", "axial", "joint"])
def test_every_scheme_is_joint_attention_under_masks(attention: str) -> None:
    model = small(attention, image_size=(16, 24))
    clip = torch.randn(2, *model.input_shape)
    answers = []
    for function in (model, lambda x: by_masks(model, x)):
        model.zero_grad()
        y = function(clip)
        y.square().sum().backward()
        answers.append((y.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    torch.testing.assert_close(answers[0][0], answers[1][0], atol=1e-4, rtol=1e-4)
    for name, gradient in answers[0][1].items():
        largest = answers[1][1][name].abs().max()
        assert largest > 0, name
        assert (gradient - answers[1][1][name]).abs().max() <= 1e-3 * largest, name


def test_space_only_averages_what_frames_say() -> None:
    model = small("space")
    clip = torch.randn(2, *model.input_shape)
    order = torch.randperm(4)
    torch.testing.assert_close(model(clip[:, :, order]), model(clip))
    alone = model.features(clip[:, :, 1:2])
    torch.testing.assert_close(model.features(clip).maps()[:, :, 1], alone.maps()[:, :, 0])


@pytest.mark.parametrize("attention", SCHEMES)
def test_every_scheme_trains_and_exports(attention: str) -> None:
    model = create_model("timesformer_micro", attention=attention, drop_path=0.1, depth=2)
    assert not any(step.fc.weight.any() for block in model.blocks for step in block.steps.values())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.set_checkpointing()
    x = torch.randn(4, *model.input_shape)
    model(x).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},))
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]), atol=1e-4, rtol=1e-4)
    with record_attention(model) as maps:
        model(x)
    sites = [f"blocks.0.steps.{axis}.attn.site" for axis in SCHEMES[attention][:-1]]
    assert list(maps)[: len(sites) + 1] == [*sites, f"blocks.0.attn.{SCHEMES[attention][-1]}.site"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "axis"}, "allowed: space, joint, divided, local_global, axial"),
        ({"attention": "local_global", "image_size": (12, 16)}, "nearest valid: 8x16 or 16x16"),
        ({"attention": "local_global", "frames": 3}, "3 frames .* nearest valid: 2 or 4"),
        ({"heads": 5}, "nearest valid: 4 or 2"),
    ],
)
def test_wrong_choices_name_the_right_ones(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("timesformer_micro", **settings)
