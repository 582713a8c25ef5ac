"""Who can tell a motion from the same motion backwards: every model of clips but those that take frames one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vitrail.data import open_data
from vitrail.data.embedded.motion import MotionStore, draw, reverse
from vitrail.models import create_model

BLIND: dict[str, tuple[str, dict[str, Any]]] = {
    "TimeSformer, space only": ("timesformer_micro", {"attention": "space"}),
    "ViViT, frames averaged": (
        "vivit_micro", {"model": "factorised_encoder", "temporal_depth": 0, "tubelet": (1, 4, 4), "position": "separate"},
    ),
}  # fmt: skip
SEEING: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"TimeSformer, {name}": ("timesformer_micro", {"attention": name}) for name in
       ("joint", "divided", "local_global", "axial")},
    **{f"ViViT, {name}": ("vivit_micro", {"model": name, "pool": "mean"}) for name in
       ("joint", "factorised_encoder", "factorised_self_attention", "factorised_dot_product")},
    **{name: (name, {}) for name in ("mvit_micro", "mvitv2_micro_clip", "x3d_micro", "slowfast_micro")},
}  # fmt: skip


@pytest.fixture(scope="module")
def clips() -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (8, 3, 8, 32, 32): one clip of every motion, and the clips that the data set draws for the opposite motions."""
    data = open_data("motion").train
    assert data is not None
    store = data.store
    assert isinstance(store, MotionStore)
    scenes = [store.scene(row) for row in range(8)]
    there, back = (torch.stack([draw(s, store.drawings) for s in some]) for some in (scenes, [reverse(s) for s in scenes]))
    # Fifteen frames of sixteen, every second one, so that the clip backwards shows the same frames.
    assert torch.equal(back.flip(2), there)
    clip = nn.functional.interpolate(there[:, :, :15].float() / 255 - 0.5, (15, 32, 32))[:, :, ::2]
    return clip, clip.flip(2)


def answers(name: str, settings: dict[str, Any], clips: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    model = create_model(name, image_size=(32, 32), frames=8, num_classes=8, **settings).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    with torch.no_grad():
        there, back = (model(x) for x in clips)
    return there, back


@pytest.mark.parametrize("name", BLIND)
def test_without_attention_over_time_a_clip_and_its_reversal_get_one_answer(name: str, clips: Any) -> None:
    """So of two reversed samples, which have two classes, such a model gets one wrong, whatever it has learned."""
    there, back = answers(*BLIND[name], clips)
    assert (there - back).abs().max() < 1e-4 * there.std(0).mean()  # far less than what tells clips apart, which it does


@pytest.mark.parametrize("name", SEEING)
def test_all_others_can_tell_them_apart(name: str, clips: Any) -> None:
    there, back = answers(*SEEING[name], clips)
    assert ((there - back).abs().mean(1) > 2e-3 * there.std(0).mean()).all()


def test_a_timesformer_from_scratch_needs_its_own_start_to_see_order(clips: Any) -> None:
    """As published it has neither times nor steps over time at first: its features of a clip backwards are the same."""
    moved = {}
    for init in ("normal", "xavier"):
        torch.manual_seed(0)
        model = create_model("timesformer_micro", image_size=(32, 32), frames=8, init=init).eval()
        with torch.no_grad():
            there, back = (model.pool(model.features(x)) for x in clips)
        moved[init] = float((there - back).abs().mean() / there.std(0).mean())
    assert moved["normal"] < 1e-4
    assert moved["xavier"] > 0.02, moved
