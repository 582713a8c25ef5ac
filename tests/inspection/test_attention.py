from __future__ import annotations

import pytest
import torch

from vitrail.inspection.attention import attention_distance, look, patch_attention, rollout
from vitrail.models import create_model


def planted(n: int, targets: list[int]) -> torch.Tensor:
    """(1, 1, n, n): token i attends to targets[i] only."""
    return torch.nn.functional.one_hot(torch.tensor(targets), n).float()[None, None]


@pytest.mark.parametrize("residual", [True, False])
def test_rollout_of_identity_attention_is_the_identity(residual: bool) -> None:
    eye = torch.eye(5).expand(2, 3, 5, 5)
    assert torch.equal(rollout([eye, eye, eye], residual), torch.eye(5).expand(2, 5, 5))


def test_rollout_follows_the_path_backwards_through_the_layers() -> None:
    first = planted(3, [1, 2, 0])  # token i of layer 1 comes from i + 1 of the input
    second = planted(3, [2, 2, 2])  # everything of layer 2 comes from token 2 of layer 1
    assert rollout([first, second], residual=False)[0].argmax(1).tolist() == [0, 0, 0]
    expected = (0.5 * second[0, 0] + 0.5 * torch.eye(3)) @ (0.5 * first[0, 0] + 0.5 * torch.eye(3))
    assert torch.allclose(rollout([first, second])[0], expected)


def test_rollout_rows_stay_shares() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 4, 7, 7).softmax(-1) for _ in range(5)]
    for residual in (True, False):
        assert torch.allclose(rollout(maps, residual).sum(-1), torch.ones(2, 7), atol=1e-5)


def test_rollout_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        rollout([])


def test_distance_of_a_fixed_offset_is_that_offset_in_pixels() -> None:
    rows, columns, patch = 3, 4, (8, 16)
    n = rows * columns
    right = [i + 1 if i % columns < columns - 1 else i - 1 for i in range(n)]  # one column away
    down = [(i + columns) % n if i < n - columns else i - columns for i in range(n)]  # one row away
    for targets, pixels in ((right, 16.0), (down, 8.0), (list(range(n)), 0.0)):
        found = attention_distance(planted(n, targets), (1, rows, columns), patch, prefix=0)
        assert found.item() == pytest.approx(pixels)


def test_distance_ignores_prefix_tokens() -> None:
    torch.manual_seed(0)
    among = torch.randn(2, 3, 6, 6).softmax(-1)
    with_prefix = torch.rand(2, 3, 8, 8)
    with_prefix[:, :, 2:, 2:] = 0.3 * among  # 70 % of every row goes to the two prefix tokens
    expected = attention_distance(among, (1, 2, 3), (4, 4), 0)
    assert torch.allclose(attention_distance(with_prefix, (1, 2, 3), (4, 4), 2), expected, atol=1e-5)


def test_distance_of_uniform_attention_over_frames_is_that_of_one_frame() -> None:
    one, two = torch.full((1, 1, 4, 4), 1 / 4), torch.full((1, 1, 8, 8), 1 / 8)
    single = attention_distance(one, (1, 2, 2), (1, 1), 0)
    assert single.item() == pytest.approx((0 + 1 + 1 + 2**0.5) / 4)
    assert attention_distance(two, (2, 2, 2), (1, 1), 0).item() == pytest.approx(single.item())


def test_patch_attention_lays_rows_out_as_they_lie_in_the_picture() -> None:
    weights = planted(1 + 6, [1 + 4] * 7)[:, 0]  # every token looks at patch 4: row 1, column 1 of a 2 x 3 grid
    for query in (0, None):
        found = patch_attention(weights, (1, 2, 3), 1, query)
        assert found[0, 0].tolist() == [[0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("settings", "asking"),
    [
        ({}, "the class token"),
        ({"pool": "mean", "class_token": False}, "the mean over all patches"),
        ({"pool": "attention", "registers": 2}, "the pooling query"),
    ],
)
def test_look_at_a_model(settings: dict, asking: str) -> None:
    torch.manual_seed(0)
    model = create_model("vit_micro_patch4_16", **settings).train()
    view = look(model, torch.randn(2, 3, 16, 24))
    assert view is not None
    assert view.asking == asking
    assert view.last.shape == view.rollout.shape == (2, 1, 4, 6)
    assert (view.last >= 0).all()
    assert (view.rollout.flatten(1).sum(1) <= 1 + 1e-5).all()
    assert len(view.distances) == 3
    assert all(d.min() > 0 and d.max() < 24 for d in view.distances.values())
    assert model.training


def test_look_finds_the_planted_patch() -> None:
    """Keys of one patch made to win every query: both maps must light up there and nowhere else."""
    torch.manual_seed(0)
    model = create_model("vit_micro_patch4_16", depth=1, **{"position.kind": "none"})
    images = torch.zeros(1, 3, 16, 16)
    images[:, :, 8:12, 4:8] = torch.rand(3, 4, 4)  # the only patch that is not empty: row 2, column 1
    with torch.no_grad():
        token = model.blocks[0].norm1(model.embed(images)[0])[0, 2 * 4 + 1]
        width = token.shape[0]
        qkv = model.blocks[0].attn.qkv
        qkv.weight.zero_()
        qkv.bias.zero_()
        qkv.weight[width : 2 * width] = 30 * torch.outer(torch.ones(width), token / token.norm() ** 2)
        qkv.bias[:width] = 1.0  # a constant query that the planted token's key answers
    view = look(model, images)
    assert view is not None
    assert view.last[0, 0].argmax().item() == view.rollout[0, 0].argmax().item() == 2 * 4 + 1
    assert view.last[0, 0, 2, 1] > 0.99


def test_a_convolutional_network_has_no_attention() -> None:
    assert look(create_model("resnet_micro"), torch.randn(1, 3, 16, 16)) is None
