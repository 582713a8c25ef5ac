import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vitrail.config import RunConfig, flat, replace_dotted
from vitrail.data import ImageDataset, open_data
from vitrail.data.sources import Data
from vitrail.models import MODELS, ShapesOnly, build
from vitrail.recipes import RECIPES, digits
from vitrail.training.preset import SIDES, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Pictures(ImageDataset):
    """Only what the preset looks at."""

    def __init__(self, counts: list[int], size: tuple[int, int], multi_label: bool = False):
        self.counts, self.size, self.multi_label = np.array(counts), size, multi_label

    def __len__(self) -> int:
        return int(self.counts.sum())

    def sizes(self) -> np.ndarray:
        return np.array([self.size, self.size])

    def class_counts(self) -> np.ndarray:
        return self.counts


def data_of(counts: list[int], size: tuple[int, int], classes: tuple[str, ...] = (), multi_label: bool = False) -> Data:
    names = classes or tuple(f"class {i}" for i in range(len(counts)))
    data = open_data([(torch.zeros(3, 8, 8, dtype=torch.uint8), name) for name in names for _ in range(3)])
    return dataclasses.replace(data, train=Pictures(counts, size, multi_label), classes=names, multi_label=multi_label)


@pytest.mark.parametrize("pictures", [300, 4_000, 60_000, 500_000, 3_000_000])
@pytest.mark.parametrize("size", [(20, 20), (64, 80), (480, 640)])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_every_choice_can_be_built_and_is_explained(pictures: int, size: tuple[int, int], device: torch.device) -> None:
    config, reasons = choose(RunConfig(), frozenset(), data_of([pictures // 4] * 4, size), device)
    assert config.input.image_size is not None
    side = config.input.image_size[0]
    assert side in SIDES
    assert side <= 1.1 * max(min(size), SIDES[0])
    with ShapesOnly():
        model = build(replace_dotted(MODELS[config.model], {**config.overrides, "image_size": (side, side)}), config.model)
    tokens = (side // model.config.patch[0]) ** 2
    assert 36 <= tokens <= 256
    assert len(reasons) >= 4
    assert all(reason.startswith("preset: ") for reason in reasons)
    assert any(f"{pictures:,} training pictures" in reason for reason in reasons)


def test_more_pictures_mean_larger_models_and_fewer_epochs() -> None:
    few, many = (choose(RunConfig(), frozenset(), data_of([n] * 4, (256, 256)), CUDA)[0] for n in (500, 400_000))
    assert (few.model, many.model) == ("vit_tiny_patch16_224", "vit_base_patch16_224")
    assert few.schedule.epochs > many.schedule.epochs
    assert few.batch_size < many.batch_size
    assert few.augment.randaugment_ops > many.augment.randaugment_ops


def test_cpus_get_smaller_pictures() -> None:
    data = data_of([2_000] * 4, (500, 500))
    slow, fast = (choose(RunConfig(), frozenset(), data, device)[0] for device in (CPU, CUDA))
    assert (slow.input.image_size, fast.input.image_size) == ((96, 96), (224, 224))


def test_what_was_set_stays_and_is_named() -> None:
    given = RunConfig(model="vit_small_patch16_224", batch_size=40)
    config, reasons = choose(given, frozenset({"model", "batch_size"}), data_of([100] * 4, (300, 300)), CUDA)
    assert (config.model, config.batch_size, dict(config.overrides)) == ("vit_small_patch16_224", 40, {})
    assert config.input.image_size == (224, 224)
    assert any("set by you, so left alone: batch_size, model" in reason for reason in reasons)
    asked = frozenset({"overrides"})
    config, _ = choose(RunConfig(overrides={"image_size": 32}), asked, data_of([100] * 4, (300, 300)), CPU)
    assert config.input.image_size is None, "--set image_size says it"
    assert config.overrides["image_size"] == 32


@pytest.mark.parametrize(
    ("classes", "flipped", "why"),
    [
        (("cat", "dog"), True, "mirrored and"), (("0", "1"), False, "digits or single characters"),
        (("a", "b"), False, "single characters"), (("turn_left", "stop"), False, "'turn_left' names a side"),
        (("cleft", "brightness"), True, "mirrored and"),
    ],
)  # fmt: skip
def test_pictures_are_not_mirrored_where_that_changes_them(classes: tuple[str, ...], flipped: bool, why: str) -> None:
    config, reasons = choose(RunConfig(), frozenset(), data_of([100, 100], (64, 64), classes), CPU)
    assert (config.augment.hflip > 0) == flipped
    assert any(why in reason for reason in reasons)


def test_rare_classes_count_for_more() -> None:
    config, reasons = choose(RunConfig(), frozenset(), data_of([1000, 20], (64, 64)), CPU)
    assert config.objective.balance == "logit-adjustment"
    assert any("20 to 1,000 pictures" in reason for reason in reasons)
    labels, _ = choose(RunConfig(), frozenset(), data_of([1000, 20], (64, 64), multi_label=True), CPU)
    assert labels.objective.balance == "weights"
    assert labels.augment.mixup == 0
    even, _ = choose(RunConfig(), frozenset(), data_of([100, 90], (64, 64)), CPU)
    assert even.objective.balance == "none"


def test_trained_weights_are_tuned_gently(tmp_path: Path) -> None:
    config, reasons = choose(RunConfig(init_from=str(tmp_path)), frozenset({"init_from"}), data_of([500] * 4, (300, 300)), CPU)
    assert config.optim.layer_decay < 1
    assert config.schedule.epochs <= 30
    assert config.input.image_size is None
    assert config.model == RunConfig().model
    assert any("trained weights" in reason for reason in reasons)


def test_an_embedded_set_gets_its_recipe() -> None:
    config, reasons = choose(RunConfig(data="digits", seed=3), frozenset({"data", "seed"}), open_data("digits"), CPU)
    recipe = flat(dataclasses.replace(digits(), seed=3))
    assert {name: value for name, value in flat(config).items() if recipe[name] != value} == {}
    assert "measured recipe" in reasons[0]


def test_a_folder_called_like_a_family_is_not_an_embedded_set(tmp_path: Path) -> None:
    named = dataclasses.replace(data_of([100, 90], (64, 64)), name="swin")
    config, reasons = choose(RunConfig(data=str(tmp_path / "swin")), frozenset({"data"}), named, CPU)
    assert config.model.startswith("vit_")
    assert not any("recipe" in reason for reason in reasons)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_their_command(name: str) -> None:
    recipe = RECIPES[name]
    config = recipe()
    size = {} if config.input.image_size is None else {"image_size": config.input.image_size}
    with ShapesOnly():
        build(replace_dotted(MODELS[config.model], {**config.overrides, **size}))
    assert re.search(rf"vitrail train {config.data or '[a-z]+/'} --recipe {name}\b", recipe.__doc__ or "")
