"""Decoding videos side by side with hand-written pipelines on torchvision: `python -m benchmarks.video`.

All sides take a file to uint8 frames of 224 x 224 (resize 256, bilinear, and centre crop), on one thread. `sequential` is
every frame of the video in order; `random` is a clip of 16 frames, every fourth one, from a random time. The peers:

    pyav        opens the file, seeks to the key frame before that time, decodes on, converts and transforms what it takes
    torchcodec  asks its decoder for the frames, by number, and transforms them (exact seeking, the default: the approximate one
                fails at the end of videos that do not say how many frames they have)

torchcodec runs where it is installed and finds FFmpeg's libraries. Passes over all videos alternate between both sides; what is
reported is the median of the pairwise ratios peer / ours with its 95 % bootstrap interval (above 1: ours is faster), frames per
second, and how far the pixels lie apart. Our side reads the packets of a file once per process, to know when its frames are
shown; that is timed as the cell `index`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from benchmarks.models import time_pairs
from benchmarks.results import bootstrap_interval, machine, merge
from vitrail.config import AugmentConfig, Preprocess
from vitrail.data.clips import clip_for_train, clips_for_eval
from vitrail.data.footage import Footage
from vitrail.data.video import VIDEO_SUFFIXES, video_index

Load = Callable[[Path, float | None], Tensor]
PACKAGES = ("torch", "torchvision", "av", "torchcodec")
CLIP = Preprocess(image_size=(224, 224), crop_fraction=0.875, interpolation="bilinear", frames=16, stride=4)
TRANSFORM = v2.Compose([v2.Resize(256, InterpolationMode.BILINEAR, antialias=True), v2.CenterCrop(224)])
NO_CROP = AugmentConfig(crop="none")


def ours(path: Path, start: float | None) -> Tensor:
    """All frames, or a clip that begins at a fraction of what is possible."""
    index = video_index(str(path))
    if start is None:
        return clips_for_eval(Footage(str(path)), replace(CLIP, frames=len(index.pts), stride=1))[0]
    generator = torch.Generator().manual_seed(int(1e6 * start))
    return clip_for_train(Footage(str(path)), CLIP, NO_CROP, generator)


def by_pyav(path: Path, start: float | None) -> Tensor:
    """The loop that one writes by hand."""
    taken = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        step, first = 1, 0.0
        if start is not None:
            step, rate = CLIP.stride, float(stream.average_rate)
            seconds = float(container.duration or 0) / av.time_base  # some containers do not count their frames
            first = first_frame(start, stream.frames or round(seconds * rate)) / rate
            container.seek(int(first / stream.time_base), stream=stream)
        number = 0
        for frame in container.decode(stream):
            if frame.time + 1e-6 < first:
                continue
            if number % step == 0:
                taken.append(TRANSFORM(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)))
            number += 1
            if start is not None and len(taken) == CLIP.frames:
                break
    if start is not None:  # a video that is too short shows its last frame again
        taken += [taken[-1]] * (CLIP.frames - len(taken))
    return torch.stack(taken, 1)


def by_torchcodec(path: Path, start: float | None) -> Tensor:
    """A decoder asked for frames by number."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1)
    if start is None:  # in pieces: a whole video does not fit into memory everywhere
        frames = len(decoder)
        pieces = [TRANSFORM(decoder[at : min(at + 32, frames)]) for at in range(0, frames, 32)]
        return torch.cat(pieces).transpose(0, 1)
    first = first_frame(start, len(decoder))
    wanted = [min(first + CLIP.stride * at, len(decoder) - 1) for at in range(CLIP.frames)]
    return TRANSFORM(decoder.get_frames_at(wanted).data).transpose(0, 1)


def first_frame(start: float, frames: int) -> int:
    """The number at which our clip begins."""
    generator = torch.Generator().manual_seed(int(1e6 * start))
    place = float(torch.rand((), generator=generator, dtype=torch.float64))
    return int(place * max(frames - (CLIP.frames - 1) * CLIP.stride, 1))


def peers() -> dict[str, Load]:
    """Those that run here, by name."""
    found: dict[str, Load] = {"pyav": by_pyav}
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError) as problem:  # RuntimeError: it finds no libraries of FFmpeg
        print(f"without torchcodec: {str(problem).splitlines()[0]}")
    else:
        found["torchcodec"] = by_torchcodec
    return found


def time_cell(paths: list[Path], starts: list[float] | None, pairs: int, peer: Load) -> dict[str, Any]:
    """Alternating passes over all videos, and whether both sides took the same frames."""

    def whole(load: Load) -> Callable[[], None]:
        def run() -> None:
            for path in paths:
                for start in starts or [None]:
                    load(path, start)

        return run

    frames, same, differences = 0, True, []
    for path in paths:
        for start in starts or [None]:
            one, other = ours(path, start), peer(path, start)
            frames += one.shape[1]
            same &= torch.equal(one, other)
            count = min(one.shape[1], other.shape[1])
            differences.append(float((one[:, :count].float() - other[:, :count]).abs().mean()))
    ours_s, peer_s = time_pairs(whole(ours), whole(peer), pairs)
    ratios = [b / a for a, b in zip(ours_s, peer_s, strict=True)]
    low, high = bootstrap_interval(ratios)
    return {
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "ours_per_second": frames / statistics.median(ours_s),
        "peer_per_second": frames / statistics.median(peer_s),
        "same": same,
        "worst_mean_difference": max(differences),
        "frames": frames,
        "pairs": pairs,
        "files": [path.name for path in paths],
    }


def time_index(paths: list[Path], pairs: int) -> dict[str, Any]:
    """Seconds to learn when the frames of a file are shown; it is done once per file and process."""
    seconds = []
    for _ in range(pairs):
        for path in paths:
            data = path.read_bytes()  # an index of bytes is never remembered
            begin = time.perf_counter()
            video_index(data)
            seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds), "files": [path.name for path in paths]}


def make_videos(folder: Path, number: int = 2, frames: int = 120) -> None:
    """H.264 of 640 x 360: a view that drifts over a made texture."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        scene = rng.integers(0, 255, (60, 100, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        with av.open(str(folder / f"made-{seed}.mp4"), "w") as out:
            stream = out.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 360, 640, "yuv420p"
            for at in range(frames):
                view = np.ascontiguousarray(scene[at // 2 : at // 2 + 360, at : at + 640])
                out.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
            out.mux(stream.encode(None))


def run(paths: list[Path], pairs: int) -> None:
    """All cells; each is merged into the results as soon as it is known."""
    where = machine(packages=PACKAGES)
    starts = np.random.default_rng(0).random(4).tolist()
    for peer, load in peers().items():
        for name, chosen in (("sequential", None), ("random", starts)):
            row = time_cell(paths, chosen, pairs, load)
            merge("video", f"{name} {peer}", row, where)
            speed = f"{row['ours_per_second']:.0f} against {row['peer_per_second']:.0f} frames/s"
            same = "the same frames" if row["same"] else f"frames differ by up to {row['worst_mean_difference']:.2f}"
            cell = f"{name} {peer}"
            print(f"{cell:22s} {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]  {speed}  {same}", flush=True)
    row = time_index(paths, pairs)
    merge("video", "index", row, where)
    print(f"{'index':22s} {1e3 * row['seconds']:.1f} ms a file", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Prepare the videos and run the cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder with videos; without it they are made")
    parser.add_argument("--pairs", type=int, default=9)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = given.videos or Path(name)
        if given.videos is None:
            make_videos(folder)
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
        if not paths:
            parser.error(f"{folder}: no video")
        run(paths, given.pairs)


if __name__ == "__main__":
    main()
