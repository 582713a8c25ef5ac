"""What is wrong with a data set: unreadable pictures, copies within and across splits, contradicting labels, odd sizes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vitrail.data.images import decode_image, image_size, read_file
from vitrail.data.samples import Data, ImageDataset
from vitrail.data.stores import Picture
from vitrail.data.tabulate import Table, each_sample, shortened

NEAR_BITS = 6  # of 64: what saving a JPEG again or resizing it changes
NEAR_ERROR = 0.15  # largest RMS difference of two small copies, as a fraction of their contrast
_THUMB = 32
_CROWD = 64  # neighbours compared among pictures whose hashes share 16 bits
_PIECE = 1024
_TINY, _ODD_FACTOR = 16, 4


class Sample(NamedTuple):
    """One sample of a data set, by name."""

    split: str
    name: str
    label: str


@dataclass(frozen=True)
class CopyGroup:
    """Pictures that are the same file ("exact") or look the same after resizing or saving again ("near")."""

    kind: str
    samples: tuple[Sample, ...]

    @property
    def leaks(self) -> bool:
        """Whether the copies lie in different splits, so that a score on one split rewards memory of another."""
        return len({sample.split for sample in self.samples}) > 1

    @property
    def contradicts(self) -> bool:
        """Whether the copies have different labels."""
        return len({sample.label for sample in self.samples}) > 1


@dataclass(frozen=True)
class DataCheck:
    """Findings about a data set. `odd_sizes`: pictures far smaller or larger than is typical, with (height, width)."""

    name: str
    counts: dict[str, int]
    class_counts: dict[str, dict[str, int]]
    broken: tuple[tuple[Sample, str], ...]
    copies: tuple[CopyGroup, ...]
    odd_sizes: tuple[tuple[Sample, tuple[int, int]], ...]
    imbalance: float  # samples of the largest class over those of the smallest, in the training split (or the first)
    notes: tuple[str, ...]

    @property
    def leaks(self) -> tuple[CopyGroup, ...]:
        """Copies that lie in several splits."""
        return tuple(group for group in self.copies if group.leaks)

    @property
    def contradictions(self) -> tuple[CopyGroup, ...]:
        """Copies with different labels."""
        return tuple(group for group in self.copies if group.contradicts)

    @property
    def ok(self) -> bool:
        """Nothing broken, no leak between splits and no contradicting labels."""
        return not (self.broken or self.leaks or self.contradictions)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        groups = [
            {"kind": group.kind, "leaks": group.leaks, "contradicts": group.contradicts, "samples": _named(group.samples)}
            for group in self.copies
        ]
        return {
            **asdict(self),
            "broken": [{**sample._asdict(), "reason": reason} for sample, reason in self.broken],
            "copies": groups,
            "odd_sizes": [{**sample._asdict(), "size": list(size)} for sample, size in self.odd_sizes],
            "notes": list(self.notes),
            "ok": self.ok,
        }

    def tables(self, limit: int = 20) -> list[Table]:
        """A summary, then one table for each kind of finding, at most `limit` rows each."""
        exact = sum(group.kind == "exact" for group in self.copies)
        summary = [
            ("samples", ", ".join(f"{split} {number:,}" for split, number in self.counts.items())),
            ("unreadable", f"{len(self.broken):,}"),
            ("groups of copies", f"{exact:,} exact, {len(self.copies) - exact:,} near"),
            ("  across splits", f"{len(self.leaks):,}"),
            ("  with different labels", f"{len(self.contradictions):,}"),
            ("largest / smallest class", f"{self.imbalance:.1f}"),
            ("odd sizes", f"{len(self.odd_sizes):,}"),
        ]
        broken = [(*sample, reason) for sample, reason in self.broken]
        odd = [(*sample, f"{width} x {height}") for sample, (height, width) in self.odd_sizes]
        tables = [
            Table(f"Check of {self.name}", ("", "found"), summary),
            Table("Unreadable pictures", ("split", "name", "label", "reason"), shortened(broken, limit)),
            Table("Copies across splits", _COPY_COLUMNS, shortened(_copy_rows(self.leaks), limit)),
            Table("Copies with different labels", _COPY_COLUMNS, shortened(_copy_rows(self.contradictions), limit)),
            Table("Other copies", _COPY_COLUMNS, shortened(_copy_rows(self._harmless()), limit)),
            Table("Odd sizes", ("split", "name", "label", "width x height"), shortened(odd, limit)),
        ]
        return [table for table in tables if table.rows]

    def _harmless(self) -> list[CopyGroup]:
        return [group for group in self.copies if not (group.leaks or group.contradicts)]


_COPY_COLUMNS = ("kind", "first", "copies")


def _copy_rows(groups: Iterable[CopyGroup]) -> list[tuple[str, ...]]:
    def text(sample: Sample) -> str:
        return f"{sample.name} ({sample.split}, {sample.label})"

    return [(g.kind, text(g.samples[0]), ", ".join(map(text, g.samples[1:4])) + ", ..." * (len(g.samples) > 4)) for g in groups]


def _named(samples: Iterable[Sample]) -> list[dict[str, str]]:
    return [sample._asdict() for sample in samples]


class _Look(NamedTuple):
    """What is kept of one picture."""

    digest: bytes
    size: tuple[int, int]
    thumb: Tensor  # uint8 (3, 32, 32)


def check_data(data: Data, *, channels: int = 3, progress: bool = True) -> DataCheck:
    """Read every picture once and report what is broken, copied, contradicting, unequal or of an odd size.

    Near copies share a perceptual hash of the picture's coarse structure up to `NEAR_BITS` bits and, at 16x16 pixels, look the
    same in colour. Copies of which one is cropped or mirrored are not found. channels: of the pictures; 3 unless they are
    arrays of many bands. Unreadable pictures never raise here.
    """
    splits = data.splits()
    samples: list[Sample] = []
    broken: list[tuple[Sample, str]] = []
    digests: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    waiting: list[Tensor] = []
    hashes: list[np.ndarray] = []
    thumbs: list[np.ndarray] = []

    def look(dataset: ImageDataset, index: int) -> _Look:
        return _look(dataset.read(index), channels, dataset.max_pixels)

    for split, index, result in each_sample(data, look, "checking", progress):
        dataset = splits[split]
        sample = Sample(split, dataset.names(index), _label(dataset, index))
        if isinstance(result, Exception):
            broken.append((sample, str(result)))
            continue
        samples.append(sample)
        digests.append(result.digest)
        sizes.append(result.size)
        waiting.append(result.thumb)
        if len(waiting) == _PIECE:
            _reduce(waiting, hashes, thumbs)
    _reduce(waiting, hashes, thumbs)
    named = {(sample.split, sample.name) for sample, _ in broken}
    gone = [(Sample(split, name, ""), reason) for split, part in splits.items() for name, reason in part.bad]
    broken += [(sample, reason) for sample, reason in gone if (sample.split, sample.name) not in named]
    copies = _copies(samples, digests, np.concatenate(hashes), np.concatenate(thumbs)) if samples else ()
    counts = {split: len(dataset) for split, dataset in splits.items()}
    class_counts = {
        split: dict(zip(data.classes, dataset.class_counts().tolist(), strict=True)) for split, dataset in splits.items()
    }
    present = [number for number in next(iter(class_counts.values())).values() if number]
    imbalance = max(present) / min(present) if present else 1.0
    return DataCheck(
        data.name, counts, class_counts, tuple(broken), copies, _odd_sizes(samples, sizes), imbalance, tuple(data.notes)
    )


def _label(dataset: ImageDataset, index: int) -> str:
    if not dataset.multi_label:
        return dataset.classes[int(dataset.targets[index])]
    return "|".join(dataset.classes[at] for at in np.flatnonzero(dataset.targets[index]))


def _look(picture: Picture, channels: int, max_pixels: int) -> _Look:
    if isinstance(picture, str):
        picture = read_file(picture)
    if isinstance(picture, bytes):
        raw = picture
    else:
        raw = np.ascontiguousarray(picture).tobytes() if isinstance(picture, Image.Image) else picture.numpy().tobytes()
    size = image_size(picture)
    image = decode_image(picture, channels=channels, mode="scaled", min_size=(2 * _THUMB, 2 * _THUMB), max_pixels=max_pixels)
    image = image[:3] if channels >= 3 else image[:1].expand(3, -1, -1)
    thumb = F.interpolate(image[None], (_THUMB, _THUMB), mode="bilinear", antialias=True)[0]
    return _Look(hashlib.blake2b(raw, digest_size=16).digest(), size, thumb.contiguous())


def _reduce(waiting: list[Tensor], hashes: list[np.ndarray], thumbs: list[np.ndarray]) -> None:
    """Hash the thumbs waiting, and keep quarter-size copies of them."""
    if waiting:
        pictures = torch.stack(waiting).float()
        hashes.append(perceptual_hash(pictures.mean(1).numpy()))
        thumbs.append(F.avg_pool2d(pictures, 2).flatten(1).round().to(torch.uint8).numpy())
        waiting.clear()


def perceptual_hash(grey: np.ndarray) -> np.ndarray:
    """uint64 (n,) of grey pictures (n, s, s): the signs of their 8x8 lowest cosine frequencies around the median.

    The mean brightness has no part in it.
    """
    side = grey.shape[-1]
    wave = np.cos(np.pi * (2 * np.arange(side) + 1) * np.arange(8)[:, None] / (2 * side))
    frequencies = (wave @ grey @ wave.T).reshape(len(grey), 64)
    above = frequencies > np.median(frequencies[:, 1:], axis=1, keepdims=True)
    above[:, 0] = False
    return np.packbits(above, axis=1).view(np.uint64)[:, 0]


def near_pairs(hashes: np.ndarray, bits: int = NEAR_BITS) -> np.ndarray:
    """int64 (m, 2): pairs of uint64 hashes that differ in at most `bits` bits and agree in one of their four 16-bit parts.

    Up to three differing bits none is missed; in a crowd of more than `_CROWD` that agree in a part, only neighbours
    in sorted order are compared, which keeps the cost linear.
    """
    found = [np.zeros((0, 2), np.int64)]
    parts = hashes.view(np.uint16).reshape(-1, 4)
    for number in range(4):
        order = np.lexsort((hashes, parts[:, number]))
        for offset in range(1, min(_CROWD, len(hashes))):
            one, other = order[:-offset], order[offset:]
            alike = parts[one, number] == parts[other, number]
            if not alike.any():
                break
            alike &= np.bitwise_count(hashes[one] ^ hashes[other]) <= bits
            one, other = one[alike], other[alike]
            new = ~(parts[one, :number] == parts[other, :number]).any(1)  # not found in an earlier part
            found.append(np.sort(np.stack([one[new], other[new]], 1), axis=1))
    return np.concatenate(found)


def _copies(
    samples: Sequence[Sample], digests: Sequence[bytes], hashes: np.ndarray, thumbs: np.ndarray
) -> tuple[CopyGroup, ...]:
    first: dict[bytes, int] = {}
    for at, digest in enumerate(digests):
        first.setdefault(digest, at)
    distinct = np.array(sorted(first.values()))
    parent = [first[digest] for digest in digests]
    pairs = distinct[near_pairs(hashes[distinct])]
    for one, other in pairs[_look_alike(thumbs, pairs)].tolist():
        parent[_root(parent, one)] = _root(parent, other)
    groups: dict[int, list[int]] = defaultdict(list)
    for at in range(len(samples)):
        groups[_root(parent, at)].append(at)
    return tuple(
        CopyGroup("exact" if len({digests[at] for at in group}) == 1 else "near", tuple(samples[at] for at in group))
        for group in groups.values()
        if len(group) > 1
    )


def _root(parent: list[int], at: int) -> int:
    while parent[at] != at:
        parent[at] = parent[parent[at]]
        at = parent[at]
    return at


def _look_alike(thumbs: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """bool (m,): whether the small copies of a pair differ by no more than `NEAR_ERROR` of their contrast."""
    alike = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), _PIECE):
        one, other = (thumbs[pairs[start : start + _PIECE, side]].astype(np.float32) for side in (0, 1))
        error = np.sqrt(((one - other) ** 2).mean(1))
        contrast = np.maximum(np.minimum(one.std(1), other.std(1)), 20)  # 20: else two flat pictures never look alike
        alike[start : start + _PIECE] = error <= NEAR_ERROR * contrast
    return alike


def _odd_sizes(samples: Sequence[Sample], sizes: Sequence[tuple[int, int]]) -> tuple[tuple[Sample, tuple[int, int]], ...]:
    """Pictures below 16 pixels, or with a side four times smaller or larger than the median of that side."""
    if not sizes:
        return ()
    array = np.array(sizes)
    short, long = array.min(1), array.max(1)
    odd = (short < _TINY) | (short * _ODD_FACTOR < np.median(short)) | (long > _ODD_FACTOR * np.median(long))
    return tuple((samples[at], sizes[at]) for at in np.flatnonzero(odd).tolist())
