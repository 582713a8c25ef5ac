"""Streams asked while they arrive: the windows of the same file, answers when they are due, a clean end however it comes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tests.clipnet import ClipConfig, ClipNet
from tests.data.videos import frames, write_video

from vitrail.config import ModelCard, Preprocess
from vitrail.data import live
from vitrail.data.footage import Footage
from vitrail.data.live import Stream, is_stream
from vitrail.data.windows import windows_for_eval, windows_of_stream
from vitrail.inference import Predictor

PREPROCESS = Preprocess(image_size=(16, 16), frames=4, stride=2, interpolation="bilinear")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2.2 s at 25 frames a second, as it would be sent."""
    path = tmp_path_factory.mktemp("sent") / "recording.ts"
    write_video(path, frames(55, (24, 32), 1), gop=5)
    return path


@contextmanager
def server(send: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of an HTTP server that answers once, with whatever `send` writes, and then hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\nConnection: close\r\n")
                send(connection)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/live.ts"
        thread.join(20)


def predictor(**settings: object) -> Predictor:
    torch.manual_seed(0)
    model = ClipNet(ClipConfig(image_size=(16, 16), num_classes=3))
    model.card = ModelCard(classes=("a", "b", "c"), preprocess=PREPROCESS)
    return Predictor(model, device="cpu", precision="fp32", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("window", "every"), [(None, 0.0), (0.5, 0.0), (0.8, 0.5), (0.2, 0.6), (9.0, 0.0)])
def test_windows_are_those_of_the_file(recording: Path, tmp_path: Path, window: float | None, every: float) -> None:
    """A pipe that another program writes into, and the same file on disk."""
    os.mkfifo(pipe := tmp_path / "camera.ts")
    assert is_stream(str(pipe))
    writer = threading.Thread(target=lambda: pipe.write_bytes(recording.read_bytes()))
    writer.start()
    found = list(windows_of_stream(Stream(str(pipe)), PREPROCESS, window, every))
    writer.join()
    expected = list(windows_for_eval(Footage(str(recording)), PREPROCESS, window, every))
    np.testing.assert_allclose([part[:2] for part in found], [part[:2] for part in expected], atol=1e-6)
    assert all(torch.equal(ours.views, theirs.views) for ours, theirs in zip(found, expected, strict=True))


def test_a_stream_that_breaks_off_keeps_what_was_answered(recording: Path) -> None:
    """Half of what was announced arrives: every window until there, then the reason."""
    data = recording.read_bytes()

    def half(connection: socket.socket) -> None:
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(data) + data[: len(data) // 2])

    with server(half) as address:
        *answers, last = predictor(window=0.32)([address])
    assert len(answers) >= 2
    assert [answer.start for answer in answers[:2]] == pytest.approx([0.0, 0.32])
    assert all(answer.label and not answer.error for answer in answers)
    assert last.error.startswith("the stream stopped after")


def test_a_stream_that_ends_is_no_error(recording: Path) -> None:
    data = recording.read_bytes()
    with server(lambda connection: connection.sendall(b"Content-Length: %d\r\n\r\n" % len(data) + data)) as address:
        answers = predictor(window="clip")([address])
    assert not [answer.error for answer in answers if answer.error]
    assert [answer.start for answer in answers] == pytest.approx([0.32 * at for at in range(6)] + [1.88])


def test_a_stream_that_falls_silent_is_given_up(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window is answered before the next one arrives."""
    monkeypatch.setattr(live, "SILENT_SECONDS", 0.5)
    done = threading.Event()

    def part(connection: socket.socket) -> None:
        connection.sendall(b"\r\n" + recording.read_bytes()[: recording.stat().st_size // 2])
        done.wait(20)

    with server(part) as address:
        answers = list(predictor(window=0.32).stream([address]))
        done.set()
    assert not answers[0].error
    assert answers[-1].error.startswith("the stream stopped after")


def test_no_stream(recording: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        free = listening.getsockname()[1]
    ask = predictor(window=1.0)
    assert ask([f"http://127.0.0.1:{free}/a.ts"])[0].error.startswith("no stream: ")
    assert ask(["/dev/video77"])[0].error == "no such camera; cameras here: none"
    assert "device file, as in /dev/video0" in ask(["0"])[0].error
    assert "ftp:// is none of http, https" in ask(["ftp://127.0.0.1/a.ts"])[0].error
    assert "file:// is none of" in ask([f"file://{recording}"])[0].error
    assert 'give window seconds, or "clip"' in predictor()(["rtsp://127.0.0.1/a"])[0].error
    monkeypatch.setattr(live, "_CAMERA", str(tmp_path / "video"))
    (tmp_path / "video1").write_bytes(b"")
    assert "cameras here: " + str(tmp_path / "video1") in ask([str(tmp_path / "video0")])[0].error
    if "v4l2" not in live.load_av().formats_available:
        assert "built without cameras" in ask([str(tmp_path / "video1")])[0].error


def test_streams_without_a_frame(recording: Path, tmp_path: Path) -> None:
    """Nothing at all, something else, or a video that is announced and does not come: one answer that says so."""
    with av.open(str(tmp_path / "announced.mp4"), "w", options={"movflags": "empty_moov+frag_keyframe"}) as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        out.start_encoding()
    announced = (tmp_path / "announced.mp4").read_bytes()
    reasons = {
        b"": "no stream: what came from there is no video, or ended before its first frame",
        b"<html>not here</html>": "no stream: what came from there is no video",
        recording.read_bytes()[:376]: "no stream: what came from there is no video",
        announced: "the stream stopped before its first frame",
    }
    for data, reason in reasons.items():
        answer = b"Content-Length: %d\r\n\r\n" % len(data) + data
        with server(lambda connection, answer=answer: connection.sendall(answer)) as address:  # type: ignore[misc]
            (only,) = predictor(window=1.0)([address])
        assert only.error.startswith(reason), data[:20]
    os.mkfifo(pipe := tmp_path / "camera.mp4")
    writer = threading.Thread(target=lambda: pipe.write_bytes(announced))
    writer.start()
    (only,) = predictor(window=1.0)([pipe])
    writer.join()
    assert only.error == "the stream stopped before its first frame"


def test_a_playlist_from_the_network_cannot_read_files_here(recording: Path) -> None:
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{recording}\n#EXT-X-ENDLIST\n"
    with server(lambda connection: connection.sendall(b"\r\n" + playlist.encode())) as address:
        assert "no stream" in predictor(window=1.0)([address.replace(".ts", ".m3u8")])[0].error


def test_gaps_and_a_clock_that_goes_back() -> None:
    """Nothing for longer than a window gives no window; time never runs backwards."""

    class Fake:
        rate, ended = 10.0, ""

        def __init__(self, *given: object) -> None: ...
        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *problem: object) -> None: ...
        def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
            for at in [*range(20), *range(95, 110)]:
                yield at / 10, np.full((16, 16, 3), at, np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.data.windows.Arriving", Fake)
        found = list(windows_of_stream(Stream("rtsp://x"), PREPROCESS, 1.0))
    assert [part.start for part in found] == pytest.approx([0.0, 1.0, 9.0, 10.0])
    assert found[2].views.min() >= 19
    assert found[3].views[0, 0, :, 0, 0].tolist() == sorted(found[3].views[0, 0, :, 0, 0].tolist())
