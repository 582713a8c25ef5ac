"""`vitrail predict`: what is in these pictures or videos."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from vitrail.cli.parse import parse
from vitrail.config import ConfigError, DataConfig

EXAMPLES = """\
vitrail predict runs/photos-vit_tiny_patch16_224 holiday/                 all pictures in and below a folder
vitrail predict runs/photos-vit_tiny_patch16_224 a.jpg 'b/**/*.png' --format csv > answers.csv
find . -name '*.webp' | vitrail predict model.safetensors - --format jsonl --top 3
vitrail predict runs/motion-vivit game.mp4 --window 2 --every 1 --format jsonl        every second, what the next two show
vitrail predict game.mp4 --model runs/motion-vivit --draw drawn.mp4                   a copy with the answers on its frames"""


@dataclass(frozen=True)
class Arguments:
    """Answer pictures or videos with a trained model; class names and preprocessing come from the model.

    They stream through: memory does not grow with their number, nor with the length of a video that is asked in windows. A file
    that cannot be read is answered with the reason.
    """

    files: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL FILES...", help_behavior_hint="(required)")
    ]
    """A run directory, a checkpoint, or a folder with one; then pictures or videos, folders, patterns, - for paths on
    stdin, one a line, or a stream: an address such as rtsp://..., a pipe, a camera; "bikes" is an embedded film."""
    model: str = ""  # the model may also stand here; all words without a flag are then files
    format: Literal["table", "jsonl", "csv"] = "table"  # table for eyes, JSON lines and CSV for programs
    top: int = 5  # answers per picture in jsonl and csv
    errors: Literal["keep", "raise"] = "keep"  # raise: stop at the first picture that cannot be read
    decode: Literal["exact", "scaled"] = "exact"  # scaled is faster on large JPEGs and slightly less exact
    max_pixels: int = DataConfig.max_pixels  # larger pictures are refused as decompression bombs
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: the fast one of the device
    batch_size: int = 32  # pictures or clips at once
    clips: int | None = None  # of a video, spread over it, that are averaged; unset: what the model's card says
    crops: int | None = None  # of each clip, along its longer side, that are averaged
    window: float = 0.0  # seconds: a video is answered for every such stretch; 0 = one answer, of a stream one a clip
    every: float = 0.0  # seconds from one window to the next, 0 = one after the other
    draw: str = ""  # write videos with the answers on their frames: a file (.mp4, .mov, .mkv), or a folder for several
    workers: int = -1  # decoding threads, -1 = one per core


def run(words: Sequence[str]) -> int:
    """Answer; 1 when no picture could be answered."""
    arguments = parse(Arguments, words, prog="vitrail predict", examples=EXAMPLES)
    model, files = arguments.model, arguments.files
    if not model and files:
        model, files = files[0], files[1:]
    if not files:
        raise ConfigError("name at least one picture, folder or pattern, or - to read paths from stdin")
    from vitrail.data.live import is_stream
    from vitrail.data.samples import count
    from vitrail.inference import Predictor, write_predictions

    streams = any(map(is_stream, files))
    if streams and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # whoever reads along gets each answer at once
    predictor = Predictor(
        model,
        device=arguments.device,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        top=arguments.top,
        decode=arguments.decode,
        workers=arguments.workers,
        errors=arguments.errors,
        max_pixels=arguments.max_pixels,
        clips=arguments.clips,
        crops=arguments.crops,
        window="clip" if (arguments.draw or streams) and not arguments.window else arguments.window,
        every=arguments.every,
    )
    windows = predictor.window != 0
    predictions = predictor.stream(files)
    if arguments.draw:
        from vitrail.inference.annotate import annotated, check_drawable

        check_drawable(files, arguments.draw)
        predictions = annotated(predictions, arguments.draw, arguments.max_pixels)
    start = time.perf_counter()
    answered, failed = write_predictions(predictions, arguments.format, sys.stdout, times=windows)
    noun = "window" if windows else "clip" if predictor.preprocess.frames else "picture"
    if failed:
        print(f"{count(answered, noun)} answered, {failed} could not be read", file=sys.stderr)
    if not answered and not failed:
        print(f"no {noun} was named" + (": stdin holds no path" if "-" in files else ""), file=sys.stderr)
    if windows and answered:
        from vitrail.cost import resident_peak

        drawn = f", drawn into {arguments.draw}" if arguments.draw else ""
        spent = f"{time.perf_counter() - start:.1f} s, peak memory {resident_peak() / 2**20:,.0f} MiB"
        print(f"{count(answered, noun)} in {spent}{drawn}", file=sys.stderr)
    return int(not answered)
