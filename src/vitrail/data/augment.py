"""Augmentation of uint8 batches on the device they are on, every choice drawn per sample.

What happens to a sample is a pure function of (seed, epoch and copy, sample index): the numbers come from a counter-based
hash, not from a generator with a state, so they are the same for any batch, rank, worker and device. They are drawn on the
host, where it must be known anyway which samples an operation has to run on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import permutations

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from torch import Tensor, nn

from vitrail.config import AugmentConfig, ConfigError
from vitrail.data import augment_ops as ops

RANDAUGMENT_OPS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "saturation", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
_GEOMETRIC = RANDAUGMENT_OPS[1:6]
_BINS = 30.0  # the magnitude at which an operation reaches the end of torchvision's range (31 bins, 0 .. 30)
_JITTERED = ("brightness", "contrast", "saturation")
_BLUR_SIGMA = (0.1, 2.0)  # DeiT III (Touvron et al. 2022), appendix: Gaussian blur of the 3-Augment
_SOLARIZE_AT = 128
_ERASED_AREA = (0.02, 1 / 3)  # Zhong et al. 2017, section 4.2, with the upper end of the DeiT recipe
_ERASED_RATIO = (0.3, 1 / 0.3)
_TRIES = 10  # of drawing a box that fits
_GROUP = 2_400_000  # values that a thread takes at a time
_CPU_CHUNK = 600_000  # values worked on together on a CPU, so that they stay in its caches: 4 pictures of 224 x 224

# Each purpose draws from its own stream, so that switching one on or off leaves the others' numbers alone.
_FLIP, _AFFINE, _THREE, _JITTER, _ERASE, _NOISE, _RANDAUGMENT = range(7)  # RandAugment: one for each of its operations
_BEND = 64
_BEND_GRID = 4  # control points along a side


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "augment", lambda: torch.set_num_threads(1))  # which counts for the calling thread only


class Draws:
    """Uniform numbers for a batch of samples, each a hash of (seed, key, index, stream, counter)."""

    def __init__(self, seed: int, keys: Int64[np.ndarray, "b 2"]) -> None:
        words = keys.astype(np.uint64)
        state = _mix(np.array([seed % 2**64], np.uint64))
        for column in range(2):
            state = _mix(state + words[:, column] * _GOLDEN)
        self.state = np.broadcast_to(state, len(keys))

    def bits(self, stream: int, count: int, rows: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """uint64 (b, count)."""
        counters = np.uint64(stream << 40) + np.arange(1, count + 1, dtype=np.uint64)
        return _mix(self.state[rows, None] + counters * _GOLDEN)

    def uniform(self, stream: int, count: int) -> np.ndarray:
        """float64 (b, count) in [0, 1), 53 random bits."""
        return (self.bits(stream, count) >> np.uint64(11)) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014, figure 17, after Stafford's variant 13), wrapping."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class DeviceAugment(nn.Module):
    """What AugmentConfig asks for after decoding and before normalising: flips, affine and elastic moves, RandAugment,
    3-Augment, colour jitter and random erasing, in this order.

    Operations on colour are left out where there are not three channels. Raises ConfigError for settings out of range.
    """

    def __init__(self, augment: AugmentConfig) -> None:
        super().__init__()
        check_augment(augment)
        a = self.augment = augment
        moves = a.affine_degrees or a.affine_translate or a.affine_shear or a.affine_scale != (1.0, 1.0)
        stages = (
            (self._flip, a.hflip or a.vflip),
            (self._affine, moves or a.elastic),
            (self._randaugment, a.randaugment_ops and a.randaugment_probability),
            (self._three_augment, a.three_augment),
            (self._jitter, a.color_jitter),
            (self._erase, a.erasing),
        )
        self.stages = [stage for stage, wanted in stages if wanted]

    def forward(
        self, images: UInt8[Tensor, "b c *t h w"], keys: Int64[Tensor, "b 2"], seed: int
    ) -> UInt8[Tensor, "b c *t h w"]:
        """keys: (epoch or copy, sample index) of each sample, best kept on the CPU. The input is left as it is.

        All frames of a clip share what is drawn: they are worked on as pictures of one key.
        """
        if not self.stages:
            return images
        if images.ndim == 5:
            frames = images.shape[2]
            pictures = self(images.transpose(1, 2).flatten(0, 1), keys.repeat_interleave(frames, 0), seed)
            return pictures.unflatten(0, (-1, frames)).transpose(1, 2)
        result, rows = torch.empty_like(images, memory_format=torch.contiguous_format), keys.cpu().numpy()
        if images.device.type != "cpu" or torch.get_num_threads() == 1:
            self._augment(images, result, rows, seed)
            return result
        # Many small operations: divided among torch's own threads, each would wait for the slowest of them, and for long where
        # loader processes want the cores too. So the samples are divided instead, and each thread works alone.
        pool, group = _threads(torch.get_num_threads()), max(1, _GROUP // images.shape[1:].numel())
        parts = zip(images.split(group), result.split(group), np.split(rows, range(group, len(rows), group)), strict=True)
        for done in [pool.submit(self._augment, *part, seed) for part in parts]:
            done.result()
        return result

    def _augment(self, images: Tensor, result: Tensor, keys: np.ndarray, seed: int) -> None:
        with torch.inference_mode(result.is_inference()):
            result.copy_(images)
            draws = Draws(seed, keys)
            for stage in self.stages:
                stage(result, draws)

    def _flip(self, images: Tensor, draws: Draws) -> None:
        across, down = draws.uniform(_FLIP, 2).T
        _apply(images, across < self.augment.hflip, lambda part: part.flip(3))
        _apply(images, down < self.augment.vflip, lambda part: part.flip(2))

    def _affine(self, images: Tensor, draws: Draws) -> None:
        a, (height, width) = self.augment, images.shape[2:]
        turn, right, down, grow, lean = draws.uniform(_AFFINE, 5).T * 2 - 1
        matrices = ops.affine_matrices(
            angle=np.radians(turn * a.affine_degrees),
            translate=(right * a.affine_translate * width, down * a.affine_translate * height),
            scale=a.affine_scale[0] + (grow + 1) / 2 * (a.affine_scale[1] - a.affine_scale[0]),
            shear=(np.radians(lean * a.affine_shear), 0.0),
        )
        everything = np.ones(len(images), bool)
        if not a.elastic:
            return _apply(images, everything, ops.warp, matrices)
        bends = draws.uniform(_BEND, 2 * _BEND_GRID**2).reshape(-1, 2, _BEND_GRID, _BEND_GRID) * 2 - 1
        bends *= a.elastic * np.array([width, height])[:, None, None]
        return _apply(images, everything, ops.warp, matrices, bends)

    def _randaugment(self, images: Tensor, draws: Draws) -> None:
        """Cubuk et al. 2019; the operations and their ranges are those of torchvision's RandAugment, bilinear."""
        a, strength = self.augment, self.augment.randaugment_magnitude / _BINS
        for turn in range(a.randaugment_ops):
            which, signs, applied = draws.uniform(_RANDAUGMENT + turn, 3).T
            chosen = np.where(applied < a.randaugment_probability, (which * len(RANDAUGMENT_OPS)).astype(int), 0)
            signed = np.where(signs < 0.5, -strength, strength)
            matrices = randaugment_matrices(chosen, signed, (images.shape[2], images.shape[3]))
            _apply(images, (chosen > 0) & (chosen <= len(_GEOMETRIC)), ops.warp, matrices)
            for name, operation in _enhancements(images.shape[1]).items():
                _apply(images, chosen == RANDAUGMENT_OPS.index(name), operation, 1 + 0.9 * signed)
            for name, plain in _without_sign(strength).items():
                _apply(images, chosen == RANDAUGMENT_OPS.index(name), plain)

    def _three_augment(self, images: Tensor, draws: Draws) -> None:
        """One of grey, solarised or blurred for every picture (Touvron et al. 2022, DeiT III, section 3)."""
        which, width = draws.uniform(_THREE, 2).T
        chosen = (which * 3).astype(int)
        if images.shape[1] == 3:
            _apply(images, chosen == 0, ops.grayscale)
        _apply(images, chosen == 1, lambda part: ops.solarize(part, _SOLARIZE_AT))
        _apply(images, chosen == 2, ops.gaussian_blur, _BLUR_SIGMA[0] + width * (_BLUR_SIGMA[1] - _BLUR_SIGMA[0]))

    def _jitter(self, images: Tensor, draws: Draws) -> None:
        """Brightness, contrast and saturation, in random order, as torchvision's ColorJitter."""
        numbers, strength = draws.uniform(_JITTER, 4), self.augment.color_jitter
        low = max(0.0, 1 - strength)
        factors = low + numbers[:, 1:] * (1 + strength - low)
        orders = np.array(list(permutations(range(3))))[(numbers[:, 0] * 6).astype(int)]
        enhancements = _enhancements(images.shape[1])
        for turn in range(3):
            for number, name in enumerate(_JITTERED):
                if name in enhancements:
                    _apply(images, orders[:, turn] == number, enhancements[name], factors[:, number])

    def _erase(self, images: Tensor, draws: Draws) -> None:
        """A rectangle of every chosen picture becomes noise (Zhong et al. 2017, "RE-R")."""
        channels = images.shape[1]
        applied, boxes = erased_boxes(draws, self.augment.erasing, (images.shape[2], images.shape[3]))
        for row in np.flatnonzero(applied).tolist():
            top, left, height, width = boxes[row].tolist()
            count = channels * height * width
            noise = draws.bits(_NOISE, -(-count // 8), [row]).view(np.uint8)[0, :count].reshape(channels, height, width)
            images[row, :, top : top + height, left : left + width] = torch.from_numpy(noise).to(images.device)


def randaugment_matrices(
    chosen: Int64[np.ndarray, " b"], signed: Float64[np.ndarray, " b"], size: tuple[int, int]
) -> Float64[np.ndarray, "b 3 3"]:
    """The move that each sample's geometric operation makes, `signed` in -1..1 of its range; none for the other operations."""
    height, width = size
    shear_x, shear_y, translate_x, translate_y, rotate = (chosen == RANDAUGMENT_OPS.index(name) for name in _GEOMETRIC)
    sheared = shear_x | shear_y
    return ops.affine_matrices(
        angle=-np.radians(30 * signed * rotate),
        translate=(np.trunc(150 / 331 * width * signed * translate_x), np.trunc(150 / 331 * height * signed * translate_y)),
        shear=(np.arctan(0.3 * signed * shear_x), np.arctan(0.3 * signed * shear_y)),
        centre=(-width / 2 * sheared, -height / 2 * sheared),
    )


def erased_boxes(
    draws: Draws, probability: float, size: tuple[int, int]
) -> tuple[Bool[np.ndarray, " b"], Int64[np.ndarray, "b 4"]]:
    """Which samples lose a rectangle, and (top, left, height, width) of it, drawn as torchvision's RandomErasing does."""
    height, width = size
    numbers = draws.uniform(_ERASE, 1 + 4 * _TRIES)
    area, ratio, down, right = numbers[:, 1:].reshape(-1, _TRIES, 4).transpose(2, 0, 1)
    area = height * width * (_ERASED_AREA[0] + area * (_ERASED_AREA[1] - _ERASED_AREA[0]))
    ratio = np.exp(np.log(_ERASED_RATIO[0]) + ratio * np.log(_ERASED_RATIO[1] / _ERASED_RATIO[0]))
    tall, wide = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (tall >= 1) & (wide >= 1) & (tall < height) & (wide < width)
    boxes = np.stack([down * (height - tall + 1), right * (width - wide + 1), tall, wide], 2).astype(np.int64)
    return (numbers[:, 0] < probability) & fits.any(1), boxes[np.arange(len(boxes)), fits.argmax(1)]


def _enhancements(channels: int) -> dict[str, Callable[..., Tensor]]:
    named = {"brightness": ops.brightness, "contrast": ops.contrast, "sharpness": ops.sharpness}
    return {**named, "saturation": ops.saturation} if channels == 3 else named


def _without_sign(strength: float) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "posterize": lambda part: ops.posterize(part, 8 - round(4 * strength)),
        "solarize": lambda part: ops.solarize(part, 255 * (1 - strength)),
        "autocontrast": ops.autocontrast,
        "equalize": ops.equalize,
    }


def _apply(images: Tensor, chosen: np.ndarray, operation: Callable[..., Tensor], *parameters: np.ndarray) -> None:
    """Replace the chosen samples by the operation's result; parameters have one entry for every sample of the batch."""
    rows = np.flatnonzero(chosen)
    together = max(1, _CPU_CHUNK // images.shape[1:].numel()) if images.device.type == "cpu" else max(len(rows), 1)
    for at in range(0, len(rows), together):
        part = rows[at : at + together]
        index = torch.from_numpy(part).to(images.device, non_blocking=True)
        result = operation(images.index_select(0, index), *(values[part] for values in parameters))
        images.index_copy_(0, index, result)


def check_augment(augment: AugmentConfig) -> None:
    """Raises ConfigError for a probability, range or strength that makes no sense, naming the setting."""
    limits = {
        **dict.fromkeys(("hflip", "vflip", "erasing", "randaugment_probability", "mix_probability", "mix_switch"), (0, 1)),
        "affine_translate": (0, 1),
        "affine_degrees": (0, 180),
        "affine_shear": (0, 89),
        "elastic": (0, 0.5),
        "randaugment_magnitude": (0, 31),
        "randaugment_ops": (0, 14),
        "color_jitter": (0, float("inf")),
        "mixup": (0, float("inf")),
        "cutmix": (0, float("inf")),
        "repeats": (1, float("inf")),
    }
    for name, (low, high) in limits.items():
        value = getattr(augment, name)
        if not low <= value <= high:
            allowed = f"{low} or more" if high == float("inf") else f"from {low} to {high}"
            raise ConfigError(f"{name} must be {allowed}, given {value}")
    for name, top in (("crop_scale", 1.0), ("crop_ratio", float("inf")), ("affine_scale", float("inf"))):
        low, high = getattr(augment, name)
        if not 0 < low <= high <= top:
            limit = " <= 1" if top == 1 else ""
            raise ConfigError(f"{name} must be two numbers with 0 < first <= second{limit}, given {low}, {high}")
