"""Weights from the network: a server on this machine plays the hub and a file host, and misbehaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from tests.checkpoints.server import Host, serving

from vitrail.checkpoints import CheckpointError, create_model, hub, load_model, save_model
from vitrail.checkpoints.pretrained import choose
from vitrail.models import create_model as random_model

Ask: TypeAlias = Callable[..., dict[str, Any]]
REPOSITORY = "someone/micro"
MODEL = f"{REPOSITORY}/resolve/main/model.safetensors"
ASK = """
import json, os, sys
source, settings = sys.argv[1], json.loads(sys.argv[2])
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ.update(settings)
for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
from vitrail.checkpoints import load_model
try:
    model = load_model(source, heads=4)
    print(json.dumps({"classes": model.card.classes, "provenance": model.card.provenance, "sum": float(model.norm.bias.sum())}))
except ValueError as problem:
    print(json.dumps({"error": str(problem)}))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model("vit_micro_patch4_16", num_classes=2)
    torch.nn.init.normal_(model.norm.bias)
    folder = tmp_path_factory.mktemp("hub") / "m"
    save_model(model, folder, format="timm")
    return folder


@pytest.fixture
def host(written: Path):
    files = {f"{REPOSITORY}/resolve/main/{path.name}": path.read_bytes() for path in written.iterdir()}
    files["files/micro.safetensors"] = files[MODEL]
    with serving(Host(files)) as running:
        yield running


@pytest.fixture
def ask(run_python: Callable[..., str], tmp_path: Path) -> Ask:
    """load_model in a process of its own: the hub's library reads its settings when it is imported."""

    def asked(source: str, **environment: str) -> dict[str, Any]:
        home = {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        return json.loads(run_python(ASK, source, json.dumps({**home, **environment})).splitlines()[-1])

    return asked


def gets(host: Host, path: str) -> list[str]:
    return [asked for method, name, asked in host.asked if method == "GET" and name.endswith(path)]


def test_a_repository_of_a_mirror_is_fetched_once_and_then_needs_no_network(host: Host, ask: Ask) -> None:
    host.cut.add(MODEL)
    first = ask(REPOSITORY, HF_ENDPOINT=host.url)
    assert "error" not in first, first
    assert any("hub someone/micro@aaaaaaaaaaaa" in line for line in first["provenance"])
    assert len(gets(host, "model.safetensors")) == 2  # it was cut; the hub's library goes on in steps of 10 MB
    host.asked.clear()
    again = ask(f"hf-hub:{REPOSITORY}", HF_ENDPOINT=host.url, HF_HUB_OFFLINE="1")
    assert again["sum"] == first["sum"]
    assert not host.asked


def test_a_wrong_hash_is_refused_and_nothing_is_kept(host: Host, ask: Ask, tmp_path: Path) -> None:
    host.wrong_hash.add(MODEL)
    found = ask(REPOSITORY, HF_ENDPOINT=host.url)
    assert "published is 0000000000000000" in found["error"]
    assert not [path for path in (tmp_path / "hf").rglob("*.safetensors") if path.exists()]


@pytest.mark.parametrize("way", ["offline", "nobody answers"])
def test_without_a_network_one_error_names_the_way_by_hand(way: str, ask: Ask) -> None:
    environment = {"HF_HUB_OFFLINE": "1"} if way == "offline" else {}
    message = ask(REPOSITORY, HF_ENDPOINT="http://127.0.0.1:9", **environment)["error"]
    assert "someone/micro: not in the local cache, and the hub could not be asked" in message
    assert "By hand: download model.safetensors and config.json from http://127.0.0.1:9/someone/micro/tree/main" in message
    assert "\n" not in message


def test_a_repository_without_weights(host: Host, ask: Ask) -> None:
    del host.files[MODEL]
    assert "holds no weights that are read here" in ask(REPOSITORY, HF_ENDPOINT=host.url)["error"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path


def test_a_url_that_is_cut_is_resumed(host: Host, cache: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host.cut.add("files/micro.safetensors")
    url = f"{host.url}/files/micro.safetensors"
    model = load_model(url, quiet=True, heads=4)
    assert torch.equal(model.norm.bias, load_model(written, quiet=True, heads=4).norm.bias)
    assert f"downloaded from {url}" in model.card.provenance
    size = len(host.files[MODEL])
    assert gets(host, "micro.safetensors") == ["", f"bytes={size // 2}-"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load_model(url, quiet=True, heads=4)
    assert len(gets(host, "micro.safetensors")) == 2


def test_a_url_that_stays_cut_keeps_what_it_has(host: Host, cache: Path) -> None:
    host.always_cut.add("files/micro.safetensors")
    url = f"{host.url}/files/micro.safetensors"
    with pytest.raises(CheckpointError, match=r"could not be fetched: .* bytes are kept; the next call goes on.*By hand"):
        load_model(url)
    host.always_cut.clear()
    load_model(url, quiet=True, heads=4)
    assert gets(host, "micro.safetensors")[-1].startswith("bytes=")


def test_content_that_changed_meanwhile_is_fetched_anew(host: Host, cache: Path) -> None:
    host.always_cut.add("files/micro.safetensors")
    url = f"{host.url}/files/micro.safetensors"
    with pytest.raises(CheckpointError):
        load_model(url)
    host.always_cut.clear()
    partial = next(cache.rglob("*.part"))
    partial.write_bytes(b"x" * partial.stat().st_size)  # as after a new version of the file
    with pytest.raises(CheckpointError, match="published is"):
        load_model(url)
    load_model(url, quiet=True, heads=4)


def test_hashes_in_names_and_headers(host: Host, cache: Path) -> None:
    host.files["files/micro-0123abcd.pth"] = host.files[MODEL]
    with pytest.raises(CheckpointError, match="published is 0123abcd"):
        load_model(f"{host.url}/files/micro-0123abcd.pth")
    host.wrong_hash.add("files/micro.safetensors")
    with pytest.raises(CheckpointError, match="published is 0000"):
        load_model(f"{host.url}/files/micro.safetensors")
    assert not list(cache.rglob("*.part"))
    assert hub._published_hash("a.npz", "", {"x-goog-hash": "crc32c=x, md5=1B2M2Y8AsgTpgAmY7PhCfg=="}) == (
        "md5",
        "d41d8cd98f00b204e9800998ecf8427e",
    )


def test_urls_that_cannot_be_used(host: Host, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="answers 404"):
        load_model(f"{host.url}/nothing.safetensors")
    with pytest.raises(CheckpointError, match="names no weights"):
        load_model(f"{host.url}/page.html")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set. By hand: .*put it at"):
        load_model(f"{host.url}/files/micro.safetensors")


def test_paths_are_not_taken_for_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("runs/nothing", "./runs/nothing", "model.pth", "weights/model.safetensors", "a/b/c", "/a/b"):
        assert not hub.is_remote(path), path
    for source in ("timm/vit_tiny_patch16_224.augreg_in21k", "hf-hub:runs/nothing", "https://x.org/a.npz", "a/b@main"):
        assert hub.is_remote(source), source
    with pytest.raises(CheckpointError, match="owner/name"):
        load_model("hf-hub:nonsense")


def test_weights_are_chosen_by_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pretend(source, *, quiet, **overrides):
        asked.append((source, overrides))
        return random_model("vit_micro_patch4_16")

    monkeypatch.setattr("vitrail.checkpoints.pretrained.load_model", pretend)
    create_model("vit_tiny_patch16_224", pretrained=True)
    create_model("vit_tiny_patch16_224", "augreg_in21k", num_classes=5, image_size=96, drop_path=0.1)
    create_model("vit_tiny_patch16_224.augreg_in21k", True)
    hub_id = "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"
    assert asked == [
        (f"{hub_id}_ft_in1k", {}),
        (hub_id, {"num_classes": 5, "image_size": 96, "drop_path": 0.1}),
        (hub_id, {}),
    ]
    assert create_model("vit_micro_patch4_16", num_classes=3).config.num_classes == 3
    with pytest.raises(ValueError, match="augreg_in21k"):
        choose("vit_tiny_patch16_224", "augreg_in22k")
    with pytest.raises(ValueError, match="no published weights of vit_micro_patch4_16 are known"):
        choose("vit_micro_patch4_16")
    with pytest.raises(ValueError, match="vit_tiny_patch16_224"):
        choose("vit_tiny_patch16_225")
