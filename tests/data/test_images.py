from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tests.data.pictures import encode, exif, photo

from vitrail.data.images import ImageError, decode_image, image_size, open_image
from vitrail.data.pillow import quiet

SHOWN = photo(40, 56)


def as_shown(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def torchvision_pixels(data: bytes, mode: str = "RGB") -> torch.Tensor:
    from torchvision.io import decode_image as reference

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return reference(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode, apply_exif_orientation=True)


@pytest.mark.parametrize("options", [{}, {"quality": 95}, {"subsampling": 0}, {"progressive": True}, {"exif": exif(6)}])
def test_jpeg_pixels_are_those_of_torchvision(options: dict) -> None:
    data = encode(photo(67, 93), "JPEG", **options)
    assert torch.equal(decode_image(data), torchvision_pixels(data))
    assert torch.equal(decode_image(data, channels=1), torchvision_pixels(data, "GRAY"))


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("BMP", {}), ("PPM", {})]
)
def test_lossless_formats_give_their_pixels(kind: str, options: dict, tmp_path: Path) -> None:
    data = encode(SHOWN, kind, **options)
    path = tmp_path / "picture.bin"  # the name's ending does not matter
    path.write_bytes(data)
    for source in (data, bytearray(data), str(path), path):
        image = decode_image(source)
        assert image.dtype == torch.uint8
        assert np.array_equal(as_shown(image), SHOWN)
    assert image_size(path) == (40, 56)
    image += 1  # the memory is the caller's


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encode(SHOWN, kind, exif=exif(orientation), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(as_shown(decode_image(data)), expected)
    assert image_size(data) == expected.shape[:2] == ((56, 40) if orientation >= 5 else (40, 56))
    assert np.array_equal(as_shown(decode_image(Image.open(io.BytesIO(data)))), expected)
    if kind == "JPEG":
        scaled = as_shown(decode_image(data, mode="scaled", min_size=(20, 20)))
        half = np.asarray(
            Image.fromarray(expected).resize((expected.shape[1] // 2, expected.shape[0] // 2), Image.Resampling.BOX)
        )
        assert scaled.shape == half.shape
        assert np.abs(scaled.astype(int) - half).mean() < 4


@pytest.mark.parametrize("value", [0, 9, 77])
def test_a_senseless_orientation_is_ignored(value: int) -> None:
    data = encode(SHOWN, "JPEG", exif=exif(value))
    assert image_size(data) == (40, 56)


def test_a_broken_exif_block_is_ignored() -> None:
    data = encode(SHOWN, "JPEG")
    block = b"Exif\0\0MM\0*\xff\xff\xff\xff"
    broken = data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]
    assert torch.equal(decode_image(broken), decode_image(data))


SCALES = [
    ((300, 400), (300, 400)),
    ((151, 200), (300, 400)),
    ((150, 10), (150, 200)),
    ((75, 100), (75, 100)),
    ((39, 1), (75, 100)),
    ((38, 1), (75, 100)),
    ((37, 50), (38, 50)),
]


@pytest.mark.parametrize(("least", "expected"), SCALES)
def test_scaled_jpegs_are_no_smaller_than_asked(least: tuple[int, int], expected: tuple[int, int]) -> None:
    data = encode(photo(300, 400), "JPEG", quality=92)
    assert decode_image(data, mode="scaled", min_size=least).shape[1:] == expected


def test_scaled_without_a_size_is_the_whole_picture() -> None:
    data = encode(photo(64, 80), "JPEG")
    assert decode_image(data, mode="scaled").shape == (3, 64, 80)
    png = encode(SHOWN, "PNG")
    assert torch.equal(decode_image(png, mode="scaled", min_size=(5, 5)), decode_image(png))


def test_grey_becomes_colour_and_colour_becomes_luma() -> None:
    grey = SHOWN[:, :, 0]
    for kind in ("PNG", "JPEG"):
        data = encode(grey, kind)
        assert torch.equal(decode_image(data, channels=3), decode_image(data, channels=1).expand(3, -1, -1))
    luma = decode_image(encode(SHOWN, "PNG"), channels=1)
    assert np.array_equal(luma[0].numpy(), np.asarray(Image.fromarray(SHOWN).convert("L")))


def test_palette_and_bilevel_pictures_show_their_colours() -> None:
    palette = Image.fromarray(SHOWN).quantize(32)
    assert np.array_equal(as_shown(decode_image(encode(palette, "PNG"))), np.asarray(palette.convert("RGB")))
    bilevel = Image.fromarray(SHOWN).convert("1")
    assert np.array_equal(as_shown(decode_image(encode(bilevel, "PNG")))[..., 0], np.asarray(bilevel) * 255)


def test_transparent_parts_are_shown_on_white() -> None:
    opacity = np.zeros((40, 56, 1), np.uint8)
    opacity[:, 28:] = 255
    data = encode(np.concatenate([SHOWN, opacity], 2), "PNG")
    image = as_shown(decode_image(data))
    assert (image[:, :28] == 255).all()
    assert np.array_equal(image[:, 28:], SHOWN[:, 28:])
    assert (decode_image(data, channels=1)[0, :, :28] == 255).all()
    assert np.array_equal(as_shown(decode_image(data, channels=4))[..., 3:], opacity)
    palette = Image.fromarray(SHOWN).quantize(8)
    clear = encode(palette, "PNG", transparency=0)
    assert (as_shown(decode_image(clear))[np.asarray(palette) == 0] == 255).all()


def test_opaque_pictures_have_full_opacity() -> None:
    for kind in ("PNG", "JPEG"):
        assert (decode_image(encode(SHOWN, kind), channels=4)[3] == 255).all()


def test_cmyk_is_shown_in_its_colours() -> None:
    flat = Image.new("RGB", (32, 24), (200, 60, 20)).convert("CMYK")
    for kind in ("TIFF", "JPEG"):  # Pillow writes Adobe's inverted CMYK into JPEG
        image = decode_image(encode(flat, kind))
        assert (image.float().mean((1, 2)) - torch.tensor([200.0, 60, 20])).abs().max() < 6
    assert decode_image(encode(flat, "JPEG"), mode="scaled", min_size=(3, 4)).shape == (3, 24, 32)


def test_sixteen_bits_keep_the_upper_eight() -> None:
    deep = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29
    for data in (encode(deep, "PNG"), encode(deep, "TIFF"), encode(Image.fromarray(deep.astype(np.int32)), "PPM")):
        assert np.array_equal(decode_image(data, channels=1)[0].numpy(), deep >> 8)
        assert decode_image(data).shape == (3, 40, 56)
    colour = np.stack([deep, deep[::-1], deep[:, ::-1]], 2)
    assert np.array_equal(as_shown(decode_image(tiff(colour, photometric="rgb"))), colour >> 8)


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_many_channels_from_arrays_and_tiff() -> None:
    bands = photo(20, 30, channels=5)
    planes = np.ascontiguousarray(bands.transpose(2, 0, 1))
    files = {
        "npy, channels last": npy(bands),
        "npy, channels first": npy(planes),
        "tiff, interleaved": tiff(bands, photometric="minisblack", planarconfig="contig"),
        "tiff, planes": tiff(planes, photometric="minisblack", planarconfig="separate"),
        "tiff, pages": tiff(planes, photometric="minisblack"),
        "tiff, compressed": tiff(bands, photometric="minisblack", planarconfig="contig", compression="zlib", predictor=True),
    }
    for name, data in files.items():
        assert np.array_equal(as_shown(decode_image(data, channels=5)), bands), name
        assert image_size(data) == (20, 30), name
        if name == "tiff, pages":  # the first page is a grey picture of its own
            assert np.array_equal(as_shown(decode_image(data, channels=1)), bands[:, :, :1])
            continue
        with pytest.raises(ImageError, match=r"5 channels, and 3 are wanted"):
            decode_image(data)
    with pytest.raises(ImageError, match=r"3 channels, and 5 are wanted"):
        decode_image(encode(SHOWN, "PNG"), channels=5)
    four = tiff(bands[..., :4].copy(), photometric="minisblack", planarconfig="contig")
    assert np.array_equal(as_shown(decode_image(four, channels=4)), bands[..., :4])


def test_array_files_of_other_types() -> None:
    grey = SHOWN[:, :, 0]
    assert np.array_equal(decode_image(npy(grey), channels=1)[0].numpy(), grey)
    assert np.array_equal(decode_image(npy(grey / np.float32(255)), channels=1)[0].numpy(), grey)
    assert np.array_equal(decode_image(npy(grey > 100), channels=1)[0].numpy(), (grey > 100) * 255)
    assert np.array_equal(decode_image(npy(grey.astype(np.int64)), channels=1)[0].numpy(), grey)
    assert decode_image(npy(SHOWN), channels=1).shape == (1, 40, 56)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (SHOWN.astype(np.float32), "must lie in 0..1"),
        (np.full((4, 4), np.nan), "must lie in 0..1"),
        (SHOWN.astype(np.int16) * 100, "must lie in 0..255"),
        (np.zeros((4, 4, 4, 3), np.uint8), "no picture"),
        (np.zeros((0, 4), np.uint8), "empty picture"),
        (np.array([["a"]]), "no pixels"),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_image(npy(array))


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("must-not-appear",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = io.BytesIO()
    np.save(file, np.array([[Bomb()]], dtype=object), allow_pickle=True)
    with pytest.raises(ImageError, match="object"):
        decode_image(file.getvalue())
    assert not (tmp_path / "must-not-appear").exists()


def test_tensors_and_pil_images() -> None:
    tensor = torch.from_numpy(SHOWN).permute(2, 0, 1)
    assert torch.equal(decode_image(tensor), tensor)
    assert torch.equal(decode_image(tensor[:1]), tensor[:1].expand(3, -1, -1))
    assert torch.equal(decode_image(Image.fromarray(SHOWN)), tensor)
    assert image_size(tensor) == image_size(Image.fromarray(SHOWN)) == (40, 56)
    with pytest.raises(ImageError, match="uint8"):
        decode_image(tensor.float())


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
        red, green, blue = decode_image(data).float().mean((1, 2)).tolist()
        assert red > 240
        assert max(green, blue) < 10


JPEG, PNG = encode(SHOWN, "JPEG"), encode(SHOWN, "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"an empty file \(0 bytes\)"),
        (b"this is a text, not a photo", "not a picture: it begins with the text 'this is a text, not a ph"),
        (b"BMW, GIF8 and other letters", "begins with the text 'BMW"),
        (b"\0" * 5000, "begins with zeros only"),
        (b"\1\2\3\4" * 9, "begins with the bytes 01 02 03 04"),
        (JPEG[:-300], "a JPEG file cut short"),
        (JPEG[:100], "a JPEG file cut short"),
        (JPEG[:3] + b"\xff" * 40, "a damaged JPEG file"),
        (PNG[: len(PNG) // 2], "a PNG file cut short"),
        (PNG[:20], "a (damaged|.*cut short)"),
        (npy(SHOWN)[:-1], "a NumPy file cut short"),
        (encode(SHOWN, "TIFF")[:300], "a TIFF file cut short"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_the_reason_is_plain(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(ImageError, match=reason):
            decode_image(source)
        with pytest.raises(ImageError, match=reason):
            decode_image(source, mode="scaled", min_size=(4, 4))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no such file: .*nothing\.jpg"):
        decode_image(tmp_path / "nothing.jpg")
    with pytest.raises(ImageError, match=r"cannot be read|not an ordinary file"):
        image_size(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        image_size("a\0b.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="not an ordinary file"):
        image_size(tmp_path / "pipe.jpg")


def bomb(kind: str) -> bytes:
    """A small file whose header claims 65,000 x 65,000 pixels."""
    if kind == "PNG":
        import zlib

        head = b"IHDR" + (65_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
        return PNG[:8] + (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big") + PNG[33:]
    if kind == "npy":
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (65_000, 65_000)})
        return file.getvalue()
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + (65_000).to_bytes(2, "big") * 2 + JPEG[at + 4 :]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "npy"])
def test_decompression_bombs_are_refused_from_the_header(kind: str) -> None:
    data = bomb(kind)
    for mode in ("exact", "scaled"):
        with pytest.raises(ImageError, match="65000 x 65000 = 4,225,000,000 pixels, more than the 178,956,970 allowed"):
            decode_image(data, mode=mode, min_size=(4, 4))
    assert image_size(data) == (65_000, 65_000)


def test_the_limit_of_pixels_is_the_callers() -> None:
    assert decode_image(PNG, max_pixels=40 * 56).shape == (3, 40, 56)
    for data in (PNG, JPEG, torch.from_numpy(SHOWN).permute(2, 0, 1)):
        with pytest.raises(ImageError, match="2,240 pixels"):
            open_image(data, max_pixels=40 * 56 - 1)


def test_stray_bytes_in_a_jpeg_are_forgiven() -> None:
    stray = JPEG[:-2] + b"stray bytes" + JPEG[-2:]
    assert torch.equal(decode_image(stray), decode_image(JPEG))
    assert torch.equal(decode_image(JPEG + b"\0" * 100), decode_image(JPEG))


def test_no_program_is_started_for_postscript() -> None:
    with pytest.raises(ImageError, match="not a picture"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")


VALID = [encode(photo(24, 33), kind, **options) for kind, options in [
    ("JPEG", {"exif": exif(5)}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("TIFF", {}),
    ("TIFF", {"compression": "packbits"}), ("BMP", {}), ("PPM", {}), ("JPEG2000", {}), ("AVIF", {})]]  # fmt: skip
VALID += [npy(photo(8, 9)), tiff(photo(8, 9, channels=6), photometric="minisblack", planarconfig="contig")]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, min(len(data), 400) - 1) | st.integers(0, len(data) - 1))
        data[place] = draw(st.integers(0, 255))
    end = draw(st.integers(1, len(data))) if draw(st.booleans()) else len(data)
    return bytes(data[:end])


def test_damaged_files_give_a_picture_or_an_image_error(capfd: pytest.CaptureFixture[str]) -> None:
    reasons: list[str] = []

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(damaged_files() | st.binary(max_size=200), st.sampled_from([1, 3, 4, 6]), st.booleans())
    def check(data: bytes, channels: int, scaled: bool) -> None:
        try:
            size = image_size(data)
            image = decode_image(
                data, channels=channels, mode="scaled" if scaled else "exact", min_size=(3, 3), max_pixels=1_000_000
            )
        except ImageError as problem:
            reasons.append(str(problem))
            return
        assert image.dtype == torch.uint8
        assert image.shape[0] == channels
        assert scaled or tuple(image.shape[1:]) == size

    check()
    assert len(reasons) > 50
    assert all(reason and "\n" not in reason for reason in reasons)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_a_huge_but_allowed_picture_warns_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # Pillow warns from here on
    assert decode_image(PNG).shape == (3, 40, 56)
    assert Image.MAX_IMAGE_PIXELS == 1500


def test_quiet_restores_the_filters_whatever_thread_leaves_first() -> None:
    before = list(warnings.filters)
    inside, leave = threading.Event(), threading.Event()

    def overlap() -> None:
        with quiet():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=overlap)
    thread.start()
    inside.wait(10)
    with quiet():
        leave.set()
        thread.join()
        warnings.warn("nobody hears this", stacklevel=1)
    assert warnings.filters == before


def test_decoding_loads_neither_torchvision_nor_tifffile(run_python: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "picture.jpg").write_bytes(JPEG)
    code = """if True:
        import sys
        from vitrail.data.images import decode_image
        print(tuple(decode_image(sys.argv[1]).shape), {"torchvision", "tifffile"} & set(sys.modules))"""
    assert run_python(code, str(tmp_path / "picture.jpg"), fresh=True).strip() == "(3, 40, 56) set()"
