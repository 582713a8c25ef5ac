"""What is wrong with a data set: unreadable samples, copies within and across splits, contradicting labels, odd sizes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.data.looks import Look, look_at
from vitrail.data.samples import Data, ImageDataset
from vitrail.data.tabulate import Table, each_sample, shortened

NEAR_BITS = 6  # of 64: what saving a JPEG again or resizing it changes
NEAR_ERROR = 0.15  # largest RMS difference of two small copies, as a fraction of their contrast
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
    """Samples that are the same file ("exact"), look the same after resizing or saving again ("near"), or are parts of a video
    in different splits ("parts")."""

    kind: str
    samples: tuple[Sample, ...]

    @property
    def leaks(self) -> bool:
        """Whether the copies lie in different splits, so that a score on one split rewards memory of another."""
        return len({sample.split for sample in self.samples}) > 1

    @property
    def contradicts(self) -> bool:
        """Whether the copies have different labels, which parts of a video may have."""
        return self.kind != "parts" and len({sample.label for sample in self.samples}) > 1


@dataclass(frozen=True)
class DataCheck:
    """Findings about a data set.

    damaged: videos of which a part cannot be decoded. odd_sizes: samples far smaller or larger than is typical, with (height,
    width).
    """

    name: str
    noun: str  # what a sample is called
    counts: dict[str, int]
    class_counts: dict[str, dict[str, int]]
    broken: tuple[tuple[Sample, str], ...]
    damaged: tuple[tuple[Sample, str], ...]
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
        """Nothing broken or damaged, no leak between splits and no contradicting labels."""
        return not (self.broken or self.damaged or self.leaks or self.contradictions)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        groups = [
            {"kind": group.kind, "leaks": group.leaks, "contradicts": group.contradicts, "samples": _named(group.samples)}
            for group in self.copies
        ]
        return {
            **asdict(self),
            "broken": [{**sample._asdict(), "reason": reason} for sample, reason in self.broken],
            "damaged": [{**sample._asdict(), "reason": reason} for sample, reason in self.damaged],
            "copies": groups,
            "odd_sizes": [{**sample._asdict(), "size": list(size)} for sample, size in self.odd_sizes],
            "notes": list(self.notes),
            "ok": self.ok,
        }

    def tables(self, limit: int = 20) -> list[Table]:
        """A summary, then one table for each kind of finding, at most `limit` rows each."""
        kinds = Counter(group.kind for group in self.copies)
        summary = [
            ("samples", ", ".join(f"{split} {number:,}" for split, number in self.counts.items())),
            ("unreadable", f"{len(self.broken):,}"),
            ("damaged", f"{len(self.damaged):,}"),
            ("groups of copies", f"{kinds['exact']:,} exact, {kinds['near']:,} near"),
            ("  across splits", f"{len(self.leaks):,}"),
            ("  with different labels", f"{len(self.contradictions):,}"),
            ("largest / smallest class", f"{self.imbalance:.1f}"),
            ("odd sizes", f"{len(self.odd_sizes):,}"),
        ]
        broken, damaged = ([(*sample, reason) for sample, reason in found] for found in (self.broken, self.damaged))
        odd = [(*sample, f"{width} x {height}") for sample, (height, width) in self.odd_sizes]
        tables = [
            Table(f"Check of {self.name}", ("", "found"), summary),
            Table(f"Unreadable {self.noun}s", ("split", "name", "label", "reason"), shortened(broken, limit)),
            Table(f"Damaged {self.noun}s", ("split", "name", "label", "reason"), shortened(damaged, limit)),
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


def check_data(data: Data, *, channels: int = 3, progress: bool = True) -> DataCheck:
    """Read every sample once, of videos all frames, and report what is broken, copied, contradicting, unequal or of odd size.

    Near copies of pictures share a perceptual hash of their coarse structure up to `NEAR_BITS` bits and, at 16x16 pixels, look
    the same in colour. Copies of which one is cropped or mirrored are not found, and of videos only those of the same bytes.
    channels: of the pictures; 3 unless they are arrays of many bands. Unreadable samples never raise here.
    """
    splits = data.splits()
    samples: list[Sample] = []
    looks: list[Look] = []
    broken: list[tuple[Sample, str]] = []
    waiting: list[Tensor] = []
    hashes = [np.zeros(0, np.uint64)]
    thumbs = [np.zeros((0, 3 * 16 * 16), np.uint8)]
    for split, index, result in each_sample(data, partial(look_at, channels=channels), "checking", progress):
        sample = Sample(split, splits[split].names(index), _label(splits[split], index))
        if isinstance(result, Exception):
            broken.append((sample, str(result)))
            continue
        samples.append(sample)
        looks.append(result._replace(thumb=None))
        if result.thumb is not None:
            waiting.append(result.thumb)
        if len(waiting) == _PIECE:
            _reduce(waiting, hashes, thumbs)
    _reduce(waiting, hashes, thumbs)
    named = {(sample.split, sample.name) for sample, _ in broken}
    gone = [(Sample(split, name, ""), reason) for split, part in splits.items() for name, reason in part.bad]
    broken += [(sample, reason) for sample, reason in gone if (sample.split, sample.name) not in named]
    first = next(iter(splits.values()))
    if first.video:
        copies = _video_copies(samples, looks)
    else:
        copies = _copies(samples, [look.digest for look in looks], np.concatenate(hashes), np.concatenate(thumbs))
    class_counts = {
        split: dict(zip(data.classes, dataset.class_counts().tolist(), strict=True)) for split, dataset in splits.items()
    }
    present = [number for number in next(iter(class_counts.values())).values() if number]
    return DataCheck(
        name=data.name,
        noun=first.noun,
        counts={split: len(dataset) for split, dataset in splits.items()},
        class_counts=class_counts,
        broken=tuple(broken),
        damaged=tuple((sample, look.damage) for sample, look in zip(samples, looks, strict=True) if look.damage),
        copies=copies,
        odd_sizes=_odd_sizes(samples, [look.size for look in looks]),
        imbalance=max(present) / min(present) if present else 1.0,
        notes=tuple(data.notes),
    )


def _label(dataset: ImageDataset, index: int) -> str:
    if not dataset.multi_label:
        return dataset.classes[int(dataset.targets[index])]
    return "|".join(dataset.classes[at] for at in np.flatnonzero(dataset.targets[index]))


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
    # By more than rounding, which else decides in a flat picture, and differently on every machine.
    above = frequencies > np.median(frequencies[:, 1:], axis=1, keepdims=True) + 1e-3
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
    distinct = np.array(sorted(first.values()), np.int64)
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


def _video_copies(samples: Sequence[Sample], looks: Sequence[Look]) -> tuple[CopyGroup, ...]:
    """The same part of the same file more than once, and files of which parts lie in several splits."""
    files: dict[bytes, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample, look in zip(samples, looks, strict=True):
        files[look.digest][look.part].append(sample)
    groups = []
    for parts in files.values():
        groups += [CopyGroup("exact", tuple(same)) for same in parts.values() if len(same) > 1]
        group = CopyGroup("parts", tuple(sample for same in parts.values() for sample in same))
        if len(parts) > 1 and group.leaks:
            groups.append(group)
    return tuple(groups)


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
