"""What is hidden, what is guessed, and that nothing of the hidden patches reaches the encoder."""

from typing import Any

import pytest
import torch

from vitrail.cost import count_flops
from vitrail.layers.position import PositionConfig
from vitrail.models import create_model
from vitrail.models.mae import MaskedAutoencoder
from vitrail.models.masked import MaskedPatches
from vitrail.models.pretext import Pretext, rows_of

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
FAMILIES = ("vit_micro_patch4_16", "deit_micro", "hybrid_micro")


def pretext(kind: type[Pretext] = MaskedPatches, name: str = FAMILIES[0], overrides: dict[str, Any] | None = None, **more: Any):
    torch.manual_seed(0)
    return kind(create_model(name, num_classes=0, **(overrides or {})), MEAN, STD, **more)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """As data.transforms does it, from values of 0 to 255."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    return torch.addcmul((-mean / std).float(), pixels.float(), (1 / (255 * std)).float())


def pictures(count: int = 2) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    return normalised(torch.randint(0, 256, (count, 3, 16, 16), generator=draws))


def test_half_of_the_patches_are_corrupted_80_10_10() -> None:
    masked = pretext(overrides={"image_size": (64, 64)})  # 256 patches
    draws = masked.draw(400, "cpu", torch.Generator().manual_seed(0))
    c = masked.corruption(draws)
    corrupted = torch.zeros(400, 256, dtype=torch.bool).scatter(1, c.order[:, :128], True)
    assert corrupted.sum(1).eq(128).all()
    assert not (c.masked & c.swapped).any()
    assert not ((c.masked | c.swapped) & ~corrupted).any()
    n = 400 * 128
    for share, kind in ((0.8, c.masked), (0.1, c.swapped)):
        assert abs(int(kind.sum()) / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert torch.equal(c.masked, corrupted & (draws[..., 1] < 0.8))
    assert abs(corrupted.float().mean(0) - 0.5).max() < 4 * 0.5 / 400**0.5  # no place is preferred
    assert not (c.source == torch.arange(256)).any()  # another patch, any other
    assert (torch.bincount((c.source - torch.arange(256)).remainder(256).flatten(), minlength=256) > 0).sum() == 255


@pytest.mark.parametrize(("ratio", "hidden"), [(0.5, 8), (0.75, 12), (0.01, 1), (0.99, 15)])
def test_the_share_of_hidden_patches(ratio: float, hidden: int) -> None:
    assert pretext(ratio=ratio).hidden_count == hidden


def test_the_mean_colour_is_numbered_by_its_upper_three_bits() -> None:
    masked = pretext()
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[0, :, :4, :4] = torch.tensor([31, 32, 255]).view(3, 1, 1)  # 0, 1, 7
    pixels[0, :, :4, 4:8] = torch.tensor([224, 100, 64]).view(3, 1, 1)  # 7, 3, 2
    pixels[0, 0, :2, 8:12], pixels[0, 0, 2:4, 8:12] = 0, 64  # mean 32: level 1
    truth = masked.truth(normalised(pixels))
    assert truth.shape == (1, 16, 1)
    assert truth[0, :4, 0].tolist() == [0 * 64 + 1 * 8 + 7, 7 * 64 + 3 * 8 + 2, 64, 0]
    every = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)  # one value a pixel
    cells = pretext(target="colours").truth(normalised(every))
    assert cells.shape == (1, 16, 16)  # patches of 4 x 4 pixels downsized to 4 x 4 are themselves
    values = every[0, 0].unfold(0, 4, 4).unfold(1, 4, 4).reshape(16, 16) // 32
    assert torch.equal(cells[0], values * (64 + 8 + 1))
    grey = MaskedPatches(create_model("vit_micro_patch4_16", num_classes=0, in_channels=1), (0.5,), (0.5,))
    assert grey.head.out_features == 8


def test_larger_patches_are_downsized_by_means() -> None:
    masked = pretext(overrides={"patch": (8, 8)}, target="colours")
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[0, 1, 0:2, 2:4] = torch.tensor([[0.0, 255.0], [255.0, 255.0]])  # the second cell of the first patch: 191.25
    cells = masked.truth(normalised(pixels))[0]
    assert cells[0, 1] == 5 * 8
    assert cells.sum() == 40


def test_pixels_are_regressed_with_an_l2_loss() -> None:
    masked, images = pretext(target="pixels"), pictures()
    torch.testing.assert_close(masked.picture(masked.truth(images)), images)
    torch.nn.init.zeros_(masked.head.weight)
    draws = masked.draw(2, "cpu")
    values = masked(images, draws)
    hidden = masked.corruption(draws).order[:, :8]
    by_hand = torch.stack([images[i].unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2)[:, hidden[i]] for i in range(2)])
    assert values["loss"].item() == pytest.approx(by_hand.square().mean().item(), rel=1e-5)
    assert values["loss"].item() == pytest.approx(values["baseline"].item())


def test_the_loss_of_colours_is_the_cross_entropy_of_the_corrupted_patches() -> None:
    masked, images = pretext(), pictures()
    draws = masked.draw(2, "cpu")
    c = masked.corruption(draws)
    scores, truth = masked.guess(images, c).detach(), masked.truth(images)
    losses = [-scores[i, j].log_softmax(0)[truth[i, c.order[i, j], 0]] for i in range(2) for j in range(masked.hidden_count)]
    assert masked(images, draws)["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_an_autoencoder_compares_normalised_pixels_of_hidden_patches() -> None:
    mae, images = pretext(MaskedAutoencoder), pictures()
    draws = mae.draw(2, "cpu")
    order = mae.order(draws)
    guesses, total = mae.guess(images, order).detach(), 0.0
    for i in range(2):
        for j in range(12):
            row, column = divmod(int(order[i, j]), 4)
            patch = images[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()
            patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            total += float((guesses[i, j] - patch).square().mean())
    assert mae(images, draws)["loss"].item() == pytest.approx(total / 24, rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_the_encoder_sees_the_visible_patches_only(name: str) -> None:
    mae = pretext(MaskedAutoencoder, name)
    images = pictures().requires_grad_()
    order = mae.order(mae.draw(2, "cpu"))
    tokens, grid = mae.tokens(images)
    encoded = mae.encode(tokens, grid, order[:, 12:])
    assert encoded.shape[1] == 4 + mae.vit.config.prefix
    encoded.square().sum().backward()
    touched = mae.patches(images.grad).abs().sum(2)
    assert touched.gather(1, order[:, :12]).eq(0).all()
    assert touched.gather(1, order[:, 12:]).gt(0).all()
    images.grad = None
    mae.guess(images, order).sum().backward()
    assert mae.patches(images.grad).abs().sum(2).gather(1, order[:, :12]).eq(0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_guesses_do_not_depend_on_masked_patches(name: str) -> None:
    masked = pretext(name=name)
    images = pictures().requires_grad_()
    c = masked.corruption(masked.draw(2, "cpu"))
    c = c._replace(swapped=torch.zeros_like(c.swapped))  # a swapped patch may be a copy of a masked one
    masked.guess(images, c).sum().backward()
    touched = masked.patches(images.grad).abs().sum(2) > 0
    assert torch.equal(touched, ~c.masked)


@pytest.mark.parametrize("position", [{"kind": "1d"}, {"kind": "2d", "place": "layers"}, {"kind": "sincos", "place": "shared"}])
def test_visible_patches_keep_their_own_positions(position: dict[str, str]) -> None:
    """All patches in another order are encoded as in their own order, so every one has its own position."""
    vit = create_model("vit_micro_patch4_16", num_classes=0, registers=1, position=PositionConfig(**position)).eval()
    tokens, grid = vit.embed(pictures())
    order = torch.rand(2, 16).argsort(1)
    whole, shuffled = vit.encode(tokens, grid), vit.encode(tokens, grid, order)
    torch.testing.assert_close(shuffled[:, 2:], rows_of(whole[:, 2:], order), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shuffled[:, :2], whole[:, :2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "name", "overrides"),
    [
        (MaskedPatches, "vit_micro_patch4_16", {"pool": "attention", "class_token": False, "mask_token": True}),
        (MaskedAutoencoder, "vit_micro_patch4_16", {"pool": "mean", "norm_after_pool": True, "registers": 2}),
        (MaskedPatches, "hybrid_micro", {}), (MaskedAutoencoder, "deit_micro", {}),
    ],
)  # fmt: skip
def test_everything_trained_gets_a_gradient_and_a_layer(kind: type[Pretext], name: str, overrides: dict[str, Any]) -> None:
    made = pretext(kind, name, overrides)
    made(pictures())["loss"].backward()
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert set(made.layer_ids()) == {name for name, _ in made.named_parameters()}
    assert made.no_weight_decay() <= set(made.layer_ids())
    again = pretext(kind, name, overrides)
    torch.nn.init.ones_(made.mask_token)
    again.load_own_state(made.own_state())
    assert again.mask_token.eq(1).all()
    assert not any(key.startswith("model.") for key in made.own_state())


@pytest.mark.parametrize("kind", [MaskedPatches, MaskedAutoencoder])
def test_pictures_for_the_eye(kind: type[Pretext]) -> None:
    made, images = pretext(kind), pictures()
    draws = made.draw(2, "cpu")
    original, hidden, guessed = (made.patches(picture) for picture in made.show(images, draws))
    assert made.show(images, draws).original.sub(made.scaled(images)).abs().max() == 0
    concealed = made.order(draws)[:, : made.hidden_count]
    seen = made.order(draws)[:, made.hidden_count :]
    for shown in (hidden, guessed):
        torch.testing.assert_close(rows_of(shown, seen), rows_of(original, seen))
    assert not torch.equal(rows_of(guessed, concealed), rows_of(original, concealed))
    assert ((guessed >= 0) & (guessed <= 1)).all()
    if kind is MaskedAutoencoder:
        assert rows_of(hidden, concealed).eq(0.5).all()


def test_a_guessed_colour_is_drawn_as_the_middle_of_its_level() -> None:
    masked = pretext()
    torch.nn.init.zeros_(masked.head.weight)
    masked.head.bias.data[2 * 64 + 0 * 8 + 7] = 1.0
    draws = masked.draw(1, "cpu")
    guessed = masked.patches(masked.show(pictures(1), draws).guessed)[0, masked.order(draws)[0, 0]]
    torch.testing.assert_close(guessed.view(16, 3), torch.tensor([2.5 / 8, 0.5 / 8, 7.5 / 8]).expand(16, 3))


def test_hidden_patches_cost_the_encoder_nothing() -> None:
    model = create_model("vit_tiny_patch16_224", num_classes=0, depth=4)
    whole, quarter = count_flops(model), count_flops(MaskedAutoencoder(model, MEAN, STD, depth=1, width=48))
    assert quarter < 0.4 * whole


@pytest.mark.parametrize(
    ("kind", "name", "overrides", "more", "message"),
    [
        (MaskedPatches, "swin_micro", {}, {}, r"families vit, deit, hybrid; swin_micro \(swin\) merges patches .*: vit_"),
        (MaskedPatches, "timesformer_micro", {}, {}, r"takes clips"),
        (MaskedAutoencoder, "hybrid_micro", {}, {}, r"families vit, deit; hybrid_micro \(hybrid\) mixes patches"),
        (MaskedAutoencoder, "vit_micro_patch4_16", {"position": PositionConfig("relative")}, {}, "use 1d, 2d or sincos"),
        (MaskedAutoencoder, "vit_micro_patch4_16", {}, {"width": 18}, "nearest valid: 16"),
        (MaskedAutoencoder, "vit_micro_patch4_16", {}, {"ratio": 1.0}, "mask_ratio is 1; allowed: above 0, below 1"),
        (MaskedPatches, "vit_micro_patch4_16", {}, {"target": "color"}, "allowed: colour, colours, pixels"),
        (MaskedPatches, "vit_micro_patch4_16", {"in_channels": 5}, {}, "32,768 colours; use mask_target pixels"),
        (MaskedPatches, "vit_micro_patch4_16", {"patch": (2, 2)}, {"target": "colours"}, "cannot be downsized to 4 x 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_so_is_refused(
    kind: type[Pretext], name: str, overrides: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pretext(kind, name, overrides, **more)
