"""Our table of published weights says what timm and torchvision say of the same files."""

from __future__ import annotations

import pytest

from vitrail.checkpoints.weights import WEIGHTS

pytestmark = pytest.mark.peers


def channels(values: tuple[float, ...]) -> tuple[float, ...]:
    return values * 3 if len(values) == 1 else values


@pytest.mark.parametrize("row", [row for row in WEIGHTS if "hf-hub:timm/" in row.source], ids=lambda row: row.id)
def test_as_timm_says(row) -> None:
    import timm

    theirs = timm.get_pretrained_cfg(row.id)
    assert f"hf-hub:{theirs.hf_hub_id}" == row.source
    p = row.preprocess
    assert (p.mean, p.std) == (channels(theirs.mean), channels(theirs.std)) or (channels(p.mean), channels(p.std)) == (
        theirs.mean,
        theirs.std,
    )
    assert (p.crop_fraction, p.interpolation, p.image_size) == (theirs.crop_pct, theirs.interpolation, theirs.input_size[1:])
    assert row.licence == theirs.license


@pytest.mark.parametrize("row", [row for row in WEIGHTS if "pytorch.org" in row.source], ids=lambda row: row.id)
def test_as_torchvision_says(row) -> None:
    from torchvision.models import get_model_weights

    name = row.file.rsplit("-", 1)[0].replace("_lc", "").replace("_swag", "")
    theirs = next(w for w in get_model_weights(name) if w.url == row.source)
    transforms, p = theirs.transforms(), row.preprocess
    assert [*p.image_size] == transforms.crop_size * 2
    assert p.crop_fraction == pytest.approx(transforms.crop_size[0] / transforms.resize_size[0])
    assert p.interpolation == transforms.interpolation.value
    assert channels(p.mean) == tuple(transforms.mean)
