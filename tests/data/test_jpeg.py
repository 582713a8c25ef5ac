from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tests.data.pictures import encode, exif, photo

from vitrail.data.images import ImageError, open_image
from vitrail.data.jpeg import JpegImage, open_jpeg

PIXELS = photo(201, 154)
KINDS = {
    "4:2:0": {},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "optimised": {"optimize": True},
    "turned": {"exif": exif(6)},
}


def jpeg(data: bytes, channels: int = 3) -> JpegImage:
    image = open_jpeg(data, channels)
    assert image is not None
    return image


@pytest.mark.parametrize("options", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_upper_rows_are_those_of_the_whole_picture(options: dict, channels: int) -> None:
    image = jpeg(encode(PIXELS, "JPEG", quality=90, **options), channels)
    for scale, reduction in ((1.0, 1), (0.5, 2), (0.25, 4), (0.125, 8)):
        whole, _ = image.decode(scale)
        assert whole.shape == (-(-201 // reduction), -(-154 // reduction), channels)
        for rows in (1, 15, 16, 63, 100, 150, 175, 201):
            top, found = image.decode(scale, rows)
            assert found == reduction
            assert len(top) < len(whole) or rows > 150
            used = -(-rows // reduction)
            assert np.array_equal(top[:used], whole[:used])


def test_grey_jpegs_too() -> None:
    image = jpeg(encode(PIXELS[:, :, 0], "JPEG"))
    assert np.array_equal(image.decode(rows=64)[0][:64], image.decode()[0][:64])


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}])
def test_other_layouts_are_decoded_whole(options: dict) -> None:
    image = jpeg(encode(PIXELS, "JPEG", **options))
    assert not image.frame
    assert image.decode(rows=16)[0].shape == (201, 154, 3)
    assert np.array_equal(image.decode(rows=16)[0], image.decode()[0])


def test_a_missing_end_is_noticed_though_the_wanted_rows_are_there() -> None:
    data = encode(PIXELS, "JPEG", quality=95)
    for missing in (2, 10, len(data) // 4):
        with pytest.raises(ImageError, match="cut short"):
            open_image(data[:-missing]).decode(rows=32)


def test_damage_among_the_wanted_rows_is_noticed() -> None:
    """Then the whole picture is decoded, and what Pillow makes of it counts, as without a limit of rows."""
    data = bytearray(encode(PIXELS, "JPEG", quality=95))
    start = data.index(b"\xff\xda") + 200
    data[start : start + 2] = b"\xff\xd9"  # the picture's end, early
    image = jpeg(bytes(data))
    assert image.decode(rows=64)[0].shape == PIXELS.shape
    assert np.array_equal(image.decode(rows=64)[0], image.decode()[0])


def test_damage_below_them_does_no_harm() -> None:
    data = bytearray(encode(PIXELS, "JPEG", quality=95))
    whole = jpeg(bytes(data)).decode()[0]
    data[-400:-100] = b"\xff\x00" * 150
    assert np.array_equal(jpeg(bytes(data)).decode(rows=64)[0][:64], whole[:64])


def test_two_sizes_are_refused() -> None:
    """A second frame header: simplejpeg reads the first, Pillow the last."""
    data = encode(PIXELS, "JPEG")
    at = data.index(b"\xff\xc0")
    frame = bytearray(data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")])
    frame[5:9] = (60_000).to_bytes(2, "big") * 2
    doubled = data[:at] + data[at : at + len(frame)] + bytes(frame) + data[at + len(frame) :]
    with pytest.raises(ImageError):
        open_image(doubled).decode()


def test_what_is_left_to_pillow() -> None:
    assert open_jpeg(encode(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), 3) is None
    assert open_jpeg(b"\xff\xd8\xff nonsense", 3) is None
