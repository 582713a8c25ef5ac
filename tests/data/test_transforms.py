from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tests.data.pictures import encode, exif, photo
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from vitrail.config import AugmentConfig, ConfigError, Preprocess
from vitrail.data.images import ImageError, decode_image, open_image
from vitrail.data.opened import OpenImage
from vitrail.data.transforms import (
    Box,
    Normalise,
    decode_box,
    decode_for_eval,
    decode_for_train,
    fitted_size,
    random_box,
    resize_fit,
)

MODES = {name: InterpolationMode(name) for name in ("bilinear", "bicubic", "nearest")}


def picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(photo(height, width, channels=channels)).permute(2, 0, 1)


def grey_levels(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize(
    ("size", "crop"), [((90, 130), 1.0), ((131, 90), 0.875), ((64, 64), 0.9), ((20, 33), 0.8), ((32, 47), 1.0)]
)
def test_crop_gives_the_pixels_of_torchvision(size: tuple[int, int], crop: float, interpolation: str) -> None:
    image = picture(*size)
    reference = v2.Compose([v2.Resize(math.floor(32 / crop), MODES[interpolation], antialias=True), v2.CenterCrop(32)])
    preprocess = Preprocess(image_size=(32, 32), crop_fraction=crop, interpolation=interpolation)  # type: ignore[arg-type]
    assert torch.equal(resize_fit(image, preprocess), reference(image))
    assert torch.equal(resize_fit(image.contiguous(), preprocess), reference(image))


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_any_number_of_channels(channels: int) -> None:
    image = picture(50, 70, channels)
    reference = v2.Compose([v2.Resize(36, MODES["bicubic"], antialias=True), v2.CenterCrop(32)])
    result = resize_fit(image, Preprocess(image_size=(32, 32), channels=channels, crop_fraction=0.875))
    assert torch.equal(result, reference(image))


@pytest.mark.parametrize("size", [(90, 130), (131, 90), (40, 300)])
def test_a_rectangle_is_covered_and_cut(size: tuple[int, int]) -> None:
    preprocess = Preprocess(image_size=(24, 48), crop_fraction=0.8, interpolation="bilinear")
    height, width = fitted_size(size, preprocess)
    assert height >= 30
    assert width >= 60
    assert min(height - 30, width - 60) == 0
    assert abs(height / width - size[0] / size[1]) < 0.02 * size[0] / size[1] + 1 / width
    expected = F.center_crop(F.resize(picture(*size), [height, width], MODES["bilinear"], antialias=True), [24, 48])
    assert torch.equal(resize_fit(picture(*size), preprocess), expected)


@pytest.mark.parametrize(
    ("size", "inner"), [((60, 90), (21, 32)), ((90, 61), (32, 22)), ((16, 16), (32, 32)), ((2, 300), (1, 32))]
)
def test_pad_shows_the_whole_picture(size: tuple[int, int], inner: tuple[int, int]) -> None:
    preprocess = Preprocess(image_size=(32, 32), fit="pad", pad_value=7)
    top, left = (32 - inner[0]) // 2, (32 - inner[1]) // 2
    resized = F.resize(picture(*size), list(inner), MODES["bicubic"], antialias=True)
    expected = F.pad(resized, [left, top, 32 - left - inner[1], 32 - top - inner[0]], fill=7)
    assert torch.equal(resize_fit(picture(*size), preprocess), expected)


def test_stretch_sets_both_sides() -> None:
    preprocess = Preprocess(image_size=(24, 40), fit="stretch", crop_fraction=0.5)
    expected = F.resize(picture(70, 50), [24, 40], MODES["bicubic"], antialias=True)
    assert torch.equal(resize_fit(picture(70, 50), preprocess), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_evaluation_of_a_file(orientation: int) -> None:
    data = encode(photo(120, 200), "JPEG", quality=95, exif=exif(orientation))
    preprocess = Preprocess(image_size=(32, 32), crop_fraction=0.875, interpolation="bilinear")
    shown = torch.from_numpy(np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))).permute(2, 0, 1)
    expected = v2.Compose([v2.Resize(36, MODES["bilinear"], antialias=True), v2.CenterCrop(32)])(shown)
    exact = decode_for_eval(data, preprocess)
    assert torch.equal(exact, expected)
    scaled = decode_for_eval(data, preprocess, "scaled")
    assert scaled.shape == (3, 32, 32)
    assert open_image(data).decode(0.5)[1] == 2
    assert 0 < grey_levels(scaled, expected) < 2


def test_a_thread_of_pixels_is_refused_not_inflated() -> None:
    data = encode(np.zeros((1, 60_000, 3), np.uint8), "PNG")
    for mode in ("exact", "scaled"):
        with pytest.raises(ImageError, match="60000 x 1 pixels are too long a shape to be cut to 224 x 224"):
            decode_for_eval(data, Preprocess(), mode)  # type: ignore[arg-type]
    assert decode_for_eval(data, Preprocess(image_size=(32, 32), fit="pad")).shape == (3, 32, 32)
    assert decode_for_train(data, Preprocess(image_size=(32, 32)), AugmentConfig(), torch.Generator()).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(20, 30), (64, 50), (33, 32)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_small_pictures_are_enlarged_as_torchvision_does(size: tuple[int, int], orientation: int) -> None:
    data = encode(photo(*size), "PNG", exif=exif(orientation))
    expected = v2.Compose([v2.Resize(40, MODES["bicubic"], antialias=True), v2.CenterCrop(32)])(decode_image(data))
    assert torch.equal(decode_for_eval(data, Preprocess(image_size=(32, 32), crop_fraction=0.8)), expected)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_scaled_evaluation_is_close_to_the_exact_one(fit: str) -> None:
    preprocess = Preprocess(image_size=(28, 36), fit=fit)  # type: ignore[arg-type]
    for height, width in ((301, 403), (299, 180)):
        data = encode(photo(height, width, seed=height), "JPEG", quality=92)
        assert grey_levels(decode_for_eval(data, preprocess), decode_for_eval(data, preprocess, "scaled")) < 2.5


def test_evaluation_refuses_bad_input() -> None:
    with pytest.raises(ImageError, match="empty file"):
        decode_for_eval(b"", Preprocess())
    with pytest.raises(ImageError, match="max_pixels"):
        decode_for_eval(encode(photo(20, 20), "PNG"), Preprocess(), max_pixels=399)
    with pytest.raises(ImageError, match="max_pixels"):
        decode_for_train(encode(photo(20, 20), "PNG"), Preprocess(), AugmentConfig(), torch.Generator(), max_pixels=399)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_of_a_file_is_torchvisions_resized_crop(orientation: int) -> None:
    data = encode(photo(150, 230), "JPEG", quality=95, exif=exif(orientation))
    image = open_image(data)
    box = Box(16, 24, 96, 88)
    preprocess = Preprocess(image_size=(32, 40), interpolation="bilinear")
    expected = F.resized_crop(decode_image(data), *box, [32, 40], MODES["bilinear"], antialias=True)
    assert torch.equal(decode_box(image, box, preprocess, "exact"), expected)
    scaled = decode_box(image, box, preprocess, "scaled")
    assert scaled.shape == (3, 32, 40)
    assert grey_levels(scaled, expected) < 2.5


def test_a_scaled_box_decodes_no_more_than_it_needs_and_never_less(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, int]] = []
    decode = OpenImage.decode

    def spy(image: OpenImage, *arguments: object, **options: object) -> tuple[np.ndarray, int]:
        result = decode(image, *arguments, **options)
        decoded.append(result[0].shape[:2])
        return result

    monkeypatch.setattr(OpenImage, "decode", spy)
    image, preprocess = open_image(encode(photo(640, 640), "JPEG")), Preprocess(image_size=(32, 32))
    for side, expected in ((31, 640), (83, 640), (84, 320), (166, 320), (167, 160), (333, 80), (640, 80)):
        decode_box(image, Box(640 - side, 0, side, side), preprocess)
        assert decoded.pop() == (expected, expected), side
    for bottom, rows in ((100, 112), (300, 304), (606, 608), (622, 624), (624, 640)):
        decode_box(image, Box(bottom - 40, 0, 40, 40), preprocess)
        assert decoded.pop() == (rows, 640), bottom
        decode_box(image, Box(bottom - 90, 0, 90, 90), preprocess)
        assert decoded.pop() == (rows // 2, 320), bottom


def test_colour_is_enlarged_plainly_only_where_the_picture_is_reduced() -> None:
    """Of a scaled box: to 0.7 or less, yet not so far that the decoder reduces it."""
    patches = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    image = open_image(encode(patches, "JPEG", quality=90, subsampling="4:2:0"))
    for side, plain in ((60, False), (91, False), (93, True), (160, True)):
        box, preprocess = Box(0, 0, side, side), Preprocess(image_size=(64, 64))
        exact, scaled = (decode_box(image, box, preprocess, mode).int() for mode in ("exact", "scaled"))
        assert ((exact - scaled).abs().max() > 15) == plain, side


def test_a_scaled_box_keeps_its_place() -> None:
    """A bright square in the dark: its centre of mass must not move, whatever the reduction and the picture's odd size."""
    for height, width in ((509, 707), (512, 704), (1001, 1403)):
        pixels = np.full((height, width, 3), 20, np.uint8)
        pixels[height // 2 - 40 : height // 2 + 40, width // 2 - 40 : width // 2 + 40] = 220
        for orientation in range(1, 9):
            image = open_image(encode(pixels, "JPEG", quality=95, exif=exif(orientation)))
            box = Box(0, 0, *image.size)
            places = []
            for mode in ("exact", "scaled"):
                result = (
                    decode_box(image, box, Preprocess(image_size=(60, 60), interpolation="bilinear"), mode)[0].double() - 20
                )
                y, x = torch.meshgrid(torch.arange(60.0), torch.arange(60.0), indexing="ij")
                places.append(((result * y).sum() / result.sum(), (result * x).sum() / result.sum()))
            assert math.dist(*places) < 0.06


def test_random_boxes_are_distributed_as_torchvisions() -> None:
    augment = AugmentConfig(crop_scale=(0.2, 0.9), crop_ratio=(0.6, 1.8))
    generator = torch.Generator().manual_seed(0)
    ours = torch.tensor([random_box((200, 300), augment, generator) for _ in range(4000)]).double()
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(8, scale=(0.2, 0.9), ratio=(0.6, 1.8), antialias=True)
    drawn = [reference.make_params([torch.zeros(1, 200, 300)]) for _ in range(4000)]
    theirs = torch.tensor([[one[key] for key in ("top", "left", "height", "width")] for one in drawn]).double()
    assert ((ours[:, 0] + ours[:, 2] <= 200) & (ours[:, 1] + ours[:, 3] <= 300)).all()
    for column in range(4):
        a, b = ours[:, column].sort().values, theirs[:, column].sort().values
        points = torch.cat([a, b])
        gap = (torch.searchsorted(a, points, right=True) - torch.searchsorted(b, points, right=True)).abs().max() / 4000
        assert gap < 1.95 * math.sqrt(2 / 4000)  # two-sample Kolmogorov-Smirnov at 0.1 %


@pytest.mark.parametrize(("size", "box"), [((10, 1000), Box(0, 493, 10, 13)), ((1000, 10), Box(493, 0, 13, 10))])
def test_very_long_pictures_give_their_centre(size: tuple[int, int], box: Box) -> None:
    assert random_box(size, AugmentConfig(crop_scale=(0.9, 1.0)), torch.Generator()) == box


def test_training_is_a_pure_function_of_the_generator() -> None:
    data = encode(photo(150, 230), "JPEG")
    preprocess, augment = Preprocess(image_size=(32, 32)), AugmentConfig()

    def run(seed: int, mode: str = "scaled") -> torch.Tensor:
        return decode_for_train(data, preprocess, augment, torch.Generator().manual_seed(seed), mode)  # type: ignore[arg-type]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert grey_levels(run(1), run(1, "exact")) < 6  # a scaled crop may begin a fraction of an output pixel earlier
    box = random_box((150, 230), augment, torch.Generator().manual_seed(5))
    expected = F.resized_crop(decode_image(data), *box, [32, 32], MODES["bicubic"], antialias=True)
    assert torch.equal(run(5, "exact"), expected)


def test_training_without_crop_is_the_evaluation_fit() -> None:
    data = encode(photo(50, 70), "PNG")
    preprocess = Preprocess(image_size=(32, 32), fit="pad")
    for mode in ("exact", "scaled"):
        trained = decode_for_train(data, preprocess, AugmentConfig(crop="none"), torch.Generator(), mode)  # type: ignore[arg-type]
        assert torch.equal(trained, decode_for_eval(data, preprocess, mode))  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [encode(photo(50, 70), "PNG"), Image.fromarray(photo(50, 70)), picture(50, 70)])
def test_every_kind_of_source(data: bytes | Image.Image | torch.Tensor) -> None:
    preprocess = Preprocess(image_size=(32, 32))
    assert torch.equal(decode_for_eval(data, preprocess), resize_fit(picture(50, 70), preprocess))
    for channels in (1, 3):
        trained = decode_for_train(data, Preprocess(image_size=(32, 32), channels=channels), AugmentConfig(), torch.Generator())
        assert trained.shape == (channels, 32, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pixels_lie_together_in_memory(kind: str) -> None:
    data = encode(photo(100, 120), kind)
    preprocess = Preprocess(image_size=(32, 32), crop_fraction=0.9)
    for result in (decode_for_eval(data, preprocess), decode_for_train(data, preprocess, AugmentConfig(), torch.Generator())):
        assert (result.stride(0), result.stride(2)) == (1, 3)  # a batch of them can be filled row by row


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (0.5,)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.4,), (0.1, 0.2, 0.3))]
)
def test_normalise_is_torchvisions(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images = torch.stack([picture(20, 30), picture(20, 30).flip(2)])
    normalise = Normalise(Preprocess(mean=mean, std=std))
    expected = F.normalize(
        F.to_dtype(images, torch.float32, scale=True), list(mean) * (3 // len(mean)), list(std) * (3 // len(std))
    )
    result = normalise(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-6)
    assert not normalise.state_dict()


def test_normalise_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="mean has 2 values, but there are 3 channels"):
        Normalise(Preprocess(mean=(0.5, 0.5)))
    with pytest.raises(ConfigError, match="std must be positive"):
        Normalise(Preprocess(std=(0.0,)))


def test_normalise_can_be_exported(run_python: Callable[..., str]) -> None:
    code = """if True:
        import torch
        from vitrail.config import Preprocess
        from vitrail.data.transforms import Normalise
        images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
        module = Normalise(Preprocess())
        exported = torch.export.export(module, (images,)).module()
        print(torch.equal(exported(images), module(images)))"""
    assert run_python(code).strip() == "True"
