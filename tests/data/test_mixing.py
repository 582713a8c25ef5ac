from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from vitrail.config import AugmentConfig
from vitrail.data.mixing import cut_boxes, mix, mix_batch

IMAGES = torch.rand(64, 3, 20, 24, generator=torch.Generator().manual_seed(0))
CODES = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 1, 20, 24)  # every pixel says which picture it is from
ONE_HOT = torch.eye(64)


def run(images: torch.Tensor = CODES, targets: torch.Tensor = ONE_HOT, seed: int = 0, **settings: float) -> tuple:
    return mix_batch(images, targets, AugmentConfig(**settings), torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def test_the_arithmetic_is_torchvisions() -> None:
    rolled = torch.arange(64).roll(1)
    labels = torch.arange(64)
    for share in (0.0, 0.3, 1.0):
        reference = v2.MixUp(num_classes=64)
        params = {"labels": labels, "batch_size": 64, "lam": share}
        images, targets = mix(IMAGES, ONE_HOT, rolled, np.full(64, share), np.zeros((64, 4), np.int64))
        torch.testing.assert_close(images, reference.transform(IMAGES, params))
        torch.testing.assert_close(targets, reference.transform(labels, params))
    reference = v2.CutMix(num_classes=64)
    share = 1 - 7 * 12 / 480
    params = {"labels": labels, "batch_size": 64, "box": (5, 3, 17, 10), "lam_adjusted": share}
    images, targets = mix(IMAGES, ONE_HOT, rolled, np.full(64, share), np.tile([3, 10, 5, 17], (64, 1)))
    assert torch.equal(images, reference.transform(IMAGES, params))
    torch.testing.assert_close(targets, reference.transform(labels, params))


def test_mixup_blends_pictures_and_targets_alike() -> None:
    images, targets = run(mixup=0.8)
    torch.testing.assert_close(images[:, 0], (targets @ torch.arange(64.0)).view(64, 1, 1).expand(64, 20, 24))
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    shares = targets.diagonal()
    assert len(shares.unique()) == 64
    assert ((targets > 0).sum(1) <= 2).all()


def test_cutmix_pastes_whole_pixels_and_counts_them() -> None:
    images, targets = run(cutmix=1.0)
    counted = torch.stack([(images[:, 0] == code).double().mean((1, 2)) for code in range(64)], 1)
    torch.testing.assert_close(targets.double(), counted, atol=1e-6, rtol=0)
    assert 0.3 < targets.diagonal().mean() < 0.8
    pasted = [(images[i, 0] != i).nonzero() for i in range(64)]
    for places in pasted:  # a filled rectangle
        if len(places):
            assert len(places) == (places.max(0).values - places.min(0).values + 1).prod()


def test_both_are_switched_per_sample() -> None:
    images, _ = run(mixup=0.8, cutmix=1.0, mix_switch=0.25)
    blended = ((images[:, 0] != images[:, 0].round()).any(1).any(1)).double().mean()
    assert 0.6 < blended < 0.9
    images, _ = run(mixup=0.8, cutmix=1.0, mix_switch=1.0)
    assert torch.equal(images, images.round())


def test_some_are_left_alone() -> None:
    images, targets = run(mixup=0.8, cutmix=1.0, mix_probability=0.5)
    alone = targets.diagonal() == 1
    assert 20 < alone.sum() < 46
    assert torch.equal(images[alone], CODES[alone])
    assert torch.equal(run(mixup=0.8, mix_probability=0.0)[0], CODES)


def test_no_picture_is_its_own_partner() -> None:
    for seed in range(30):
        _, targets = run(CODES[:3], torch.eye(3), seed, mixup=5.0)
        assert ((targets > 0).sum(1) == 2).all()


def test_shares_follow_the_beta_distribution() -> None:
    shares = torch.cat([run(seed=seed, mixup=0.4)[1].diagonal() for seed in range(40)]).double()
    assert abs(shares.mean() - 0.5) < 0.03
    assert abs(shares.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.015


def test_boxes_have_the_area_they_should_where_they_fit() -> None:
    rng = np.random.default_rng(0)
    boxes = cut_boxes(rng, np.full(2000, 0.75), (40, 60))
    heights, widths = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    assert heights.max() == 20
    assert widths.max() == 30
    assert boxes.min() == 0
    assert boxes[:, 1].max() == 40
    assert boxes[:, 3].max() == 60
    untouched = cut_boxes(rng, np.ones(5), (40, 60))
    assert ((untouched[:, 1] == untouched[:, 0]) & (untouched[:, 3] == untouched[:, 2])).all()


def test_multi_label_targets_and_half_precision() -> None:
    labels = (torch.rand(64, 7, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    images, targets = run(IMAGES.bfloat16(), labels, mixup=0.8, cutmix=1.0)
    assert images.dtype == torch.bfloat16
    assert targets.dtype == torch.float32
    assert ((targets >= 0) & (targets <= 1)).all()
    assert not torch.equal(targets, labels)


def test_the_generator_decides() -> None:
    settings = {"mixup": 0.8, "cutmix": 1.0}
    for a, b in zip(run(IMAGES, seed=3, **settings), run(IMAGES, seed=3, **settings), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(run(IMAGES, seed=3, **settings)[0], run(IMAGES, seed=4, **settings)[0])


@pytest.mark.parametrize("count", [0, 1, 64])
def test_nothing_to_mix(count: int) -> None:
    settings = {} if count == 64 else {"mixup": 1.0}
    images, targets = run(IMAGES[:count], ONE_HOT[:count], **settings)
    assert torch.equal(images, IMAGES[:count])
    assert torch.equal(targets, ONE_HOT[:count])


def test_clips_are_mixed_frame_by_frame_alike() -> None:
    images, targets = torch.rand(6, 3, 8, 10), torch.eye(6)
    clips = images[:, :, None].expand(-1, -1, 4, -1, -1)
    for augment in (AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0), AugmentConfig(mixup=0.4, cutmix=1.0)):
        alone, soft = mix_batch(images, targets, augment, torch.Generator().manual_seed(5))
        mixed, same = mix_batch(clips, targets, augment, torch.Generator().manual_seed(5))
        assert torch.equal(soft, same)
        assert all(torch.equal(mixed[:, :, at], alone) for at in range(4))
        assert not torch.equal(alone, images)
