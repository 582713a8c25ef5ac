from __future__ import annotations

import dataclasses
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from tests.data.pictures import photo
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitrail.config import AugmentConfig, ConfigError
from vitrail.data import augment_ops as ops
from vitrail.data.augment import RANDAUGMENT_OPS, DeviceAugment, Draws, _mix, check_augment, erased_boxes, randaugment_matrices

PICTURES = torch.stack([torch.from_numpy(photo(36, 44, seed)).permute(2, 0, 1) for seed in range(6)])
FLAT = torch.full((1, 3, 36, 44), 90, dtype=torch.uint8)
FACTORS = np.array([0.0, 0.1, 0.7, 1.0, 1.3, 1.9])
EVERYTHING = AugmentConfig(
    hflip=0.5,
    vflip=0.3,
    affine_degrees=20,
    affine_translate=0.1,
    affine_scale=(0.8, 1.2),
    affine_shear=8,
    elastic=0.05,
    randaugment_ops=3,
    three_augment=True,
    color_jitter=0.4,
    erasing=0.5,
)
BILINEAR = InterpolationMode.BILINEAR


def keys(count: int, epoch: int = 0, first: int = 0) -> torch.Tensor:
    return torch.stack([torch.full((count,), epoch), torch.arange(first, first + count)], 1)


def furthest(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    assert ours.dtype == torch.uint8
    assert ours.shape == theirs.shape
    return int((ours.int() - theirs.int()).abs().max())


@pytest.mark.parametrize(
    ("name", "channels"),
    [(name, channels) for name in ("brightness", "contrast", "sharpness") for channels in (3, 1)] + [("saturation", 3)],
)
def test_enhancements_are_torchvisions(name: str, channels: int) -> None:
    pictures = PICTURES[:, :channels]
    expected = torch.stack([getattr(F, f"adjust_{name}")(p, f) for p, f in zip(pictures, FACTORS.tolist(), strict=True)])
    ours = getattr(ops, name)(pictures, FACTORS)
    assert furthest(ours, expected) <= 1
    assert furthest(ours[3:4], pictures[3:4]) <= 1
    assert furthest(ours[4:5], pictures[4:5]) > 1


@pytest.mark.parametrize("bits", range(9))
def test_posterize_is_torchvisions(bits: int) -> None:
    assert furthest(ops.posterize(PICTURES, bits), F.posterize(PICTURES, bits)) == 0


@pytest.mark.parametrize("threshold", [0, 100.5, 128, 255])
def test_solarize_is_torchvisions(threshold: float) -> None:
    assert furthest(ops.solarize(PICTURES, threshold), F.solarize(PICTURES, threshold)) == 0


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_histogram_operations_are_torchvisions(name: str) -> None:
    two_values = torch.where(PICTURES[:1] > 120, 200, 10).to(torch.uint8)
    dark = PICTURES // 5 + 30
    for pictures in (PICTURES, FLAT, two_values, dark, torch.cat([FLAT, PICTURES])):
        assert furthest(getattr(ops, name)(pictures), getattr(F, name)(pictures)) == 0
    assert furthest(getattr(ops, name)(dark), dark) > 50


def test_grayscale_is_torchvisions() -> None:
    assert furthest(ops.grayscale(PICTURES), F.rgb_to_grayscale(PICTURES, num_output_channels=3)) <= 1


def test_gaussian_blur_is_torchvisions() -> None:
    sigma = np.linspace(0.1, 2.0, 6)
    expected = torch.stack([F.gaussian_blur(p, [13, 13], [s, s]) for p, s in zip(PICTURES, sigma.tolist(), strict=True)])
    assert furthest(ops.gaussian_blur(PICTURES, sigma), expected) <= 1
    tiny = PICTURES[:, :, :3, :1]  # smaller than the kernel
    assert ops.gaussian_blur(tiny, sigma).shape == tiny.shape
    assert furthest(ops.gaussian_blur(FLAT[:, :, :2, :5], np.array([2.0])), FLAT[:, :, :2, :5]) == 0


def test_warp_is_torchvisions_affine() -> None:
    angle, scale, lean = (
        np.array([0, 13, -40, 90, 5, 171.0]),
        np.array([1, 0.7, 1.4, 1, 1.1, 0.9]),
        np.array([0, 5, -9, 0, 20, 3.0]),
    )
    right, down = np.array([0, 3, -7, 0, 2, 1.0]), np.array([0, -2, 5, 4, 0, 3.0])
    matrices = ops.affine_matrices(np.radians(angle), (right, down), scale, (np.radians(lean), np.radians(-lean / 2)))
    expected = torch.stack([
        F.affine(p, angle[i], [right[i], down[i]], scale[i], [lean[i], -lean[i] / 2], interpolation=BILINEAR)
        for i, p in enumerate(PICTURES)])  # fmt: skip
    assert furthest(ops.warp(PICTURES, matrices), expected) <= 1


def test_bends_move_pixels_by_what_the_grid_says() -> None:
    still = ops.affine_matrices(np.zeros(6))
    assert torch.equal(ops.warp(PICTURES, still, np.zeros((6, 2, 4, 4))), PICTURES)
    shift = np.zeros((6, 2, 4, 4))
    shift[:, 0], shift[:, 1] = 3, -2  # fetched from 3 pixels to the right and 2 above
    moved = ops.warp(PICTURES, still, shift)
    assert torch.equal(moved[:, :, 2:, :-3], PICTURES[:, :, :-2, 3:])


def test_elastic_bending_alone_changes_shapes_but_not_much() -> None:
    images = torch.zeros(64, 1, 24, 24, dtype=torch.uint8)
    images[:, :, :, 12:] = 255
    bent = DeviceAugment(AugmentConfig(hflip=0, elastic=0.1))(images, keys(64), 0)
    edges = (bent[:, 0, 5:-5, 6:-6] > 127).sum(2).double()  # white pixels of the inner rows: 6, had nothing moved
    assert edges.std(1).mean() > 0.3
    assert 2 <= edges.min() < 5
    assert 7 < edges.max() <= 10


@pytest.mark.parametrize("size", [(36, 44), (32, 32)])
@pytest.mark.parametrize("name", RANDAUGMENT_OPS[1:6])
def test_randaugments_moves_are_torchvisions(name: str, size: tuple[int, int]) -> None:
    pictures = PICTURES[:, :, : size[0], : size[1]]
    height, width = size
    strength = np.array([0, 0.3, -0.3, 1, -1, 0.55])
    matrices = randaugment_matrices(np.full(6, RANDAUGMENT_OPS.index(name)), strength, size)
    for picture, m, ours in zip(pictures, strength.tolist(), ops.warp(pictures, matrices), strict=True):
        lean = math.degrees(math.atan(0.3 * m))
        if name == "rotate":
            expected = F.rotate(picture, 30 * m, interpolation=BILINEAR)
        elif name.startswith("shear"):
            shear = [lean, 0.0] if name == "shear_x" else [0.0, lean]
            expected = F.affine(picture, 0.0, [0, 0], 1.0, shear, interpolation=BILINEAR, center=[0, 0])
        else:
            move = [int(150 / 331 * width * m), 0] if name == "translate_x" else [0, int(150 / 331 * height * m)]
            expected = F.affine(picture, 0.0, move, 1.0, [0.0, 0.0], interpolation=BILINEAR)
        assert furthest(ours, expected) <= 1


def test_other_operations_do_not_move_the_picture() -> None:
    still = [i for i, name in enumerate(RANDAUGMENT_OPS) if i not in range(1, 6)]
    matrices = randaugment_matrices(np.array(still), np.ones(len(still)), (30, 40))
    assert np.allclose(matrices, np.eye(3))


def only(name: str, count: int = 400, magnitude: float = 15) -> tuple[AugmentConfig, np.ndarray]:
    """RandAugment with one operation, and which of `count` samples draw it alone."""
    augment = AugmentConfig(hflip=0, randaugment_ops=1, randaugment_magnitude=magnitude)
    which = Draws(7, keys(count).numpy()).uniform(6, 3)[:, 0]
    return augment, np.flatnonzero((which * len(RANDAUGMENT_OPS)).astype(int) == RANDAUGMENT_OPS.index(name))


@pytest.mark.parametrize(
    "name", ["identity", "brightness", "saturation", "contrast", "sharpness", "posterize", "solarize", "equalize"]
)
def test_randaugment_applies_the_drawn_operation_at_torchvisions_strength(name: str) -> None:
    augment, samples = only(name)
    assert 10 < len(samples) < 60
    drawn = keys(400)[samples]
    pictures = PICTURES[:1].expand(len(samples), -1, -1, -1)
    up, down = {
        "identity": (PICTURES[0],) * 2,
        "brightness": (F.adjust_brightness(PICTURES[0], 1.45), F.adjust_brightness(PICTURES[0], 0.55)),
        "saturation": (F.adjust_saturation(PICTURES[0], 1.45), F.adjust_saturation(PICTURES[0], 0.55)),
        "contrast": (F.adjust_contrast(PICTURES[0], 1.45), F.adjust_contrast(PICTURES[0], 0.55)),
        "sharpness": (F.adjust_sharpness(PICTURES[0], 1.45), F.adjust_sharpness(PICTURES[0], 0.55)),
        "posterize": (F.posterize(PICTURES[0], 6),) * 2,
        "solarize": (F.solarize(PICTURES[0], 127.5),) * 2,
        "autocontrast": (F.autocontrast(PICTURES[0]),) * 2,
        "equalize": (F.equalize(PICTURES[0]),) * 2,
    }[name]
    results = DeviceAugment(augment)(pictures, drawn, 7)
    like_up = [furthest(result, up) <= 1 for result in results]
    like_down = [furthest(result, down) <= 1 for result in results]
    assert all(a or b for a, b in zip(like_up, like_down, strict=True))
    if not torch.equal(up, down):
        assert 0.2 < np.mean(like_up) < 0.8


def test_flips() -> None:
    augment = DeviceAugment(AugmentConfig(hflip=0.3, vflip=0.6))
    pictures = PICTURES[:1, :, :8, :9].expand(2000, -1, -1, -1)
    results = augment(pictures, keys(2000), 1)
    kinds = {(0, 0): pictures[0], (1, 0): pictures[0].flip(2), (0, 1): pictures[0].flip(1), (1, 1): pictures[0].flip((1, 2))}
    counts = {kind: (results == kind_picture).all(1).all(1).all(1).sum().item() for kind, kind_picture in kinds.items()}
    assert sum(counts.values()) == 2000
    for (across, down), found in counts.items():
        expected = 2000 * (0.3 if across else 0.7) * (0.6 if down else 0.4)
        assert abs(found - expected) < 4 * math.sqrt(expected)


def test_affine_parameters_stay_in_their_ranges() -> None:
    """A blob turned, moved and scaled: where it lands says what was drawn."""
    size = 65
    blob = torch.zeros(1, 1, size, size, dtype=torch.uint8)
    blob[:, :, 30:35, 50:55] = 255  # 20 pixels to the right of the centre
    augment = DeviceAugment(AugmentConfig(hflip=0, affine_degrees=30, affine_scale=(0.8, 1.2)))
    results = augment(blob.expand(500, -1, -1, -1), keys(500), 3).double()
    axis = torch.arange(size) - (size - 1) / 2
    mass = results.sum((1, 2, 3))
    x, y = (results.sum((1, 2)) * axis).sum(1) / mass, (results.sum((1, 3)) * axis).sum(1) / mass
    angles, lengths = torch.rad2deg(torch.atan2(y, x)), torch.hypot(x, y) / 20
    assert angles.abs().max() < 30.5
    assert angles.min() < -28
    assert angles.max() > 28
    assert lengths.min() > 0.79
    assert lengths.max() < 1.21
    assert lengths.max() - lengths.min() > 0.38


def test_three_augment_gives_one_of_three() -> None:
    results = DeviceAugment(AugmentConfig(hflip=0, three_augment=True))(PICTURES[:1].expand(600, -1, -1, -1), keys(600), 0)
    grey = torch.tensor([furthest(r[:1], r[1:2]) == 0 for r in results])
    solarised = torch.tensor([torch.equal(r, F.solarize(PICTURES[0], 128)) for r in results])
    assert not (grey & solarised).any()
    for found in (grey, solarised, ~(grey | solarised)):
        assert 150 < found.sum() < 250
    blurred = results[~(grey | solarised)].double()
    assert (blurred.var((1, 2, 3)) <= PICTURES[0].double().var() + 1).all()


def test_colour_jitter_keeps_to_its_strength_and_varies_the_order() -> None:
    grey_bar = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    results = DeviceAugment(AugmentConfig(hflip=0, color_jitter=0.25))(grey_bar.expand(500, -1, -1, -1), keys(500), 0)
    values = results[:, 0, 0, 0].double()  # a flat grey picture answers to brightness only
    assert 74 <= values.min() < 78
    assert 122 < values.max() <= 125
    pictures = PICTURES[:1].expand(200, -1, -1, -1)
    numbers = Draws(0, keys(200).numpy()).uniform(3, 4)
    results = DeviceAugment(AugmentConfig(hflip=0, color_jitter=0.4))(pictures, keys(200), 0)
    names = ["brightness", "contrast", "saturation"]
    orders = list(permutations(range(3)))
    for row in range(40):
        expected = PICTURES[0]
        for which in orders[int(numbers[row, 0] * 6)]:
            expected = getattr(F, f"adjust_{names[which]}")(expected, 0.6 + 0.8 * numbers[row, 1 + which])
        assert furthest(results[row], expected) <= 3  # three operations, each within one


def test_erasing_puts_noise_into_a_rectangle() -> None:
    pictures = torch.full((1, 3, 40, 50), 100, dtype=torch.uint8).expand(600, -1, -1, -1)
    results = DeviceAugment(AugmentConfig(hflip=0, erasing=0.25))(pictures, keys(600), 2)
    applied, boxes = erased_boxes(Draws(2, keys(600).numpy()), 0.25, (40, 50))
    assert 110 < applied.sum() < 190
    for row in range(600):
        top, left, height, width = boxes[row]
        expected = pictures[row].clone()
        if applied[row]:
            inside = results[row, :, top : top + height, left : left + width]
            expected = F.erase(expected, top, left, height, width, inside)
            assert 0.02 * 0.8 <= height * width / 2000 <= 0.34 * 1.2
        assert torch.equal(results[row], expected)
    noise = torch.cat(
        [results[i, :, b[0] : b[0] + b[2], b[1] : b[1] + b[3]].flatten() for i, b in enumerate(boxes) if applied[i]]
    )
    assert abs(noise.double().mean() - 127.5) < 1
    assert abs(noise.double().std() - 73.9) < 1


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_sample_does_not_depend_on_its_batch(channels: int) -> None:
    pictures = torch.stack([torch.from_numpy(photo(33, 29, seed, channels)).permute(2, 0, 1) for seed in range(40)])
    before, augment = pictures.clone(), DeviceAugment(EVERYTHING)
    together = augment(pictures, keys(40, epoch=3), 11)
    assert torch.equal(pictures, before)
    assert together.shape == pictures.shape
    assert sum(torch.equal(a, b) for a, b in zip(together, pictures, strict=True)) < 4
    for row in range(40):
        assert torch.equal(augment(pictures[row : row + 1], keys(1, 3, row), 11)[0], together[row])
    order = torch.randperm(40)[:23]
    assert torch.equal(augment(pictures[order], keys(40, 3)[order], 11), together[order])
    last = pictures.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(last, keys(40, epoch=3), 11), together)


def test_the_number_of_threads_changes_nothing() -> None:
    """Also under inference mode, which belongs to a thread."""
    pictures = torch.stack([torch.from_numpy(photo(120, 130, seed)).permute(2, 0, 1) for seed in range(4)]).repeat(30, 1, 1, 1)
    augment = DeviceAugment(EVERYTHING)
    alone = augment(pictures, keys(120), 0)
    torch.set_num_threads(3)
    try:
        assert torch.equal(augment(pictures, keys(120), 0), alone)
        with torch.inference_mode():
            assert torch.equal(augment(pictures, keys(120), 0), alone)
        assert augment(pictures[:0], keys(0), 0).shape == (0, 3, 120, 130)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_every_part_of_the_key_matters() -> None:
    augment, pictures = DeviceAugment(EVERYTHING), PICTURES[:1].expand(8, -1, -1, -1)
    base = augment(pictures, keys(8), 0)
    assert torch.equal(augment(pictures, keys(8), 0), base)
    for other in (
        augment(pictures, keys(8), 1),
        augment(pictures, keys(8, epoch=1), 0),
        augment(pictures, keys(8, first=8), 0),
    ):
        assert not any(torch.equal(a, b) for a, b in zip(other, base, strict=True))


def test_switching_one_part_on_leaves_the_others_choices() -> None:
    flips = AugmentConfig(hflip=0.5)
    pictures = PICTURES[:1].expand(50, -1, -1, -1)
    plain = DeviceAugment(flips)(pictures, keys(50), 0)
    erased = DeviceAugment(dataclasses.replace(flips, erasing=1.0))(pictures, keys(50), 0)
    assert ((plain == erased).float().mean((1, 2, 3)) > 0.6).all()


def test_nothing_to_do() -> None:
    nothing = DeviceAugment(AugmentConfig(hflip=0))
    assert nothing(PICTURES, keys(6), 0) is PICTURES
    assert DeviceAugment(EVERYTHING)(PICTURES[:0], keys(0), 0).shape == (0, 3, 36, 44)
    never = DeviceAugment(AugmentConfig(hflip=0, randaugment_ops=2, randaugment_probability=0.0))
    assert torch.equal(never(PICTURES, keys(6), 0), PICTURES)


def test_tiny_pictures_survive_everything() -> None:
    for size in ((1, 1), (2, 3), (1, 9)):
        tiny = PICTURES[:, :, : size[0], : size[1]]
        assert DeviceAugment(EVERYTHING)(tiny, keys(6), 0).shape == tiny.shape


def test_draws_are_uniform_and_independent() -> None:
    numbers = Draws(0, keys(20_000).numpy()).uniform(0, 6)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in numbers.T:
        gap = np.abs(np.sort(column) - (np.arange(20_000) + 0.5) / 20_000).max()
        assert gap < 1.95 / math.sqrt(20_000)  # Kolmogorov-Smirnov at 0.1 %
    others = [Draws(1, keys(20_000).numpy()), Draws(0, keys(20_000, 1).numpy()), Draws(0, keys(20_000, 0, 1).numpy())]
    columns = np.concatenate(
        [numbers, *(draws.uniform(0, 2) for draws in others), Draws(0, keys(20_000).numpy()).uniform(1, 2)], 1
    )
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 5 / math.sqrt(20_000)
    assert np.abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 5 / math.sqrt(20_000)
    assert len(np.unique(Draws(5, keys(20_000).numpy()).bits(2, 4))) == 80_000


def test_draws_are_the_published_hash() -> None:
    """SplitMix64 with seed 1234567: the first outputs of the reference implementation."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(3)], np.uint64)
    assert _mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hflip": 1.5}, "hflip must be from 0 to 1, given 1.5"),
        ({"erasing": -0.1}, "erasing must be from 0 to 1"),
        ({"randaugment_magnitude": 40}, "randaugment_magnitude must be from 0 to 31"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale must be two numbers with 0 < first <= second <= 1"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio must be two numbers with 0 < first <= second"),
        ({"affine_scale": (0.0, 1.0)}, "affine_scale"),
        ({"mixup": -1.0}, "mixup must be 0 or more"),
        ({"repeats": 0}, "repeats must be 1 or more"),
        ({"hflip": math.nan}, "hflip"),
    ],
)
def test_settings_out_of_range_are_named(change: dict, message: str) -> None:
    check_augment(AugmentConfig())
    with pytest.raises(ConfigError, match=message):
        DeviceAugment(dataclasses.replace(AugmentConfig(), **change))


@pytest.mark.gpu
def test_on_a_gpu_the_same_happens() -> None:
    augment = DeviceAugment(EVERYTHING)
    pictures = PICTURES.repeat(8, 1, 1, 1)
    ours, theirs = augment(pictures, keys(48), 0), augment(pictures.cuda(), keys(48), 0).cpu()
    assert (ours.int() - theirs.int()).abs().float().mean() < 0.05


def test_frames_of_a_clip_share_what_is_drawn() -> None:
    """A clip of one still picture stays still under everything, and is augmented as the picture alone would be."""
    images = torch.from_numpy(np.stack([photo(24, 32, seed) for seed in range(4)])).permute(0, 3, 1, 2)
    clips = images[:, :, None].expand(-1, -1, 5, -1, -1)
    keys = torch.tensor([[2, index] for index in range(4)])
    augment = DeviceAugment(
        AugmentConfig(
            hflip=0.5, vflip=0.5, affine_degrees=20, randaugment_ops=2, three_augment=True, color_jitter=0.4, erasing=1.0
        )
    )
    moved, alone = augment(clips, keys, 3), augment(images, keys, 3)
    assert moved.shape == clips.shape
    assert all(torch.equal(moved[:, :, at], alone) for at in range(5))
    assert not torch.equal(alone, images)
