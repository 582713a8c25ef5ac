"""Pictures of any number of channels stored as arrays: `.npy` files and TIFF of many bands."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from tifffile import TiffFile

_NPY = b"\x93NUMPY"
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def to_uint8(array: np.ndarray) -> UInt8[np.ndarray, "..."]:
    """Pixel values as 0..255: 16-bit ones keep their upper 8 bits, bool is 0 or 255, floats are taken as 0..1.

    Raises ValueError for values that cannot be understood that way.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return (array >> 8).astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"values of type {array.dtype} are no pixels")
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    limit = 1 if array.dtype.kind == "f" else 255
    if not (low >= 0 and high <= limit):  # also refuses NaN
        raise ValueError(
            f"{array.dtype} pixels must lie in 0..{limit}; found {low} .. {high}: rescale them, or store uint8 or uint16"
        )
    return (array * 255 + 0.5).astype(np.uint8) if array.dtype.kind == "f" else array.astype(np.uint8)


def bands_size(data: bytes, channels: int) -> tuple[int, int]:
    """(height, width) of a `.npy` file or a TIFF, from its header. Raises ValueError."""
    if data.startswith(_NPY):
        shape, _, _ = _npy_header(data)
    else:
        with _open_tiff(data) as file:
            shape = tuple(file.series[0].shape)
    axis = _channel_axis(shape, channels)
    height, width = (size for i, size in enumerate(shape) if i != axis)
    return height, width


def read_bands(data: bytes, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """A `.npy` file or a TIFF as (h, w, c); channels stored last, first, or as one page each. Nothing is unpickled.

    Raises ValueError when it is damaged or no picture.
    """
    if data.startswith(_NPY):
        shape, dtype, length = _npy_header(data)
        # Before memory is reserved for what the header claims.
        if np.prod(shape, dtype=object) * dtype.itemsize > len(data) - length:
            raise ValueError(f"truncated: {shape} values of {dtype} do not fit into {len(data) - length:,} bytes")
        array = np.load(io.BytesIO(data), allow_pickle=False)
    else:
        with _open_tiff(data) as file:
            series = file.series[0]
            axis = _channel_axis(series.shape, channels)
            bands = 1 if axis is None else series.shape[axis]
            if bands > max(4, channels):  # before memory is reserved for what the header claims
                raise ValueError(f"has {bands} channels, and {channels} are wanted")
            array = series.asarray()
    axis = _channel_axis(array.shape, channels)
    return to_uint8(array[:, :, None] if axis is None else np.moveaxis(array, axis, -1))


def _open_tiff(data: bytes) -> TiffFile:
    from tifffile import TiffFile  # a quarter of a second that pictures of other kinds need not wait for

    return TiffFile(io.BytesIO(data))


def _npy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type of the values, and where they begin."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
        raise ValueError(f"version {version[0]}.{version[1]} of the .npy format holds no pictures")
    shape, _, dtype = _NPY_HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("values of type object are no pixels")
    return shape, dtype, file.tell()


def _channel_axis(shape: tuple[int, ...], channels: int) -> int | None:
    """Which axis holds the channels: the last if it fits, the first if only that fits, else the shorter one of the two."""
    if len(shape) == 2:
        return None
    if len(shape) != 3:
        raise ValueError(f"an array of shape {shape} is no picture: expected (height, width), with channels last or first")
    if shape[2] == channels or shape[0] == channels:
        return 2 if shape[2] == channels else 0
    return 2 if shape[2] <= shape[0] else 0
