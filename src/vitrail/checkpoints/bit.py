"""BiT checkpoints: timm, transformers, and Google's own .npz (big_transfer). The trunk's rules also serve the hybrids."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelCard, Preprocess
from vitrail.models.bit import VARIANTS, BiTConfig, TrunkConfig

from .mapping import CheckpointError, Rule, convolution, rename, transform
from .sources import Files, Source, timm_card, timm_files, transformers_card, transformers_files

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]
GOOGLE_BIT_EPS = 1e-10
_PLAIN = Preprocess(crop_fraction=0.875, interpolation="bilinear")


def find_stages(state: State, third: Callable[[int, int], str], axis: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(depths, widths) of the stages; `third` names a block's third kernel, whose `axis` counts its outputs."""
    depths: list[int] = []
    while third(len(depths), 0) in state:
        s, depth = len(depths), 1
        while third(s, depth) in state:
            depth += 1
        depths.append(depth)
    return tuple(depths), tuple(state[third(s, 0)].shape[axis] for s in range(len(depths)))


def told(hints: Hints) -> dict[str, Any]:
    """What the user says about the trunk (trunk.groups=8)."""
    return {name.removeprefix("trunk."): value for name, value in hints.items() if name.startswith("trunk.")}


def need(config: Any, project: str, **needed: Any) -> None:
    """Raise CheckpointError when a setting is not the one that the project's network has built in."""
    for name, value in needed.items():
        found = getattr(config, name)
        if found != value:
            raise CheckpointError(
                f"{project} cannot hold {name}={found!r} (it has {value!r}); nearest: format='vitrail', or load the weights "
                f"with that setting changed to accept a slightly different function"
            )


def _classes(state: State, key: str, axis: int = 0) -> int:
    return state[key].shape[axis] if key in state else 0


# timm -----------------------------------------------------------------------------------------------------------------


def timm_trunk_rules(ours: str, theirs: str, depths: tuple[int, ...]) -> list[Rule]:
    """timm's ResNetV2 without its head; a network without stages is saved as the bare stem."""
    stem = f"{theirs}stem." if depths else theirs
    a, b = ours + "stages.{s}.{i}.", theirs + "stages.{s}.blocks.{i}."
    return [
        *rename(ours + "stem.conv.weight", stem + "conv.weight"),
        *rename(ours + "stem.norm.{weight,bias}", stem + "norm.{weight,bias}"),
        *rename(a + "{conv1,conv2,conv3}.weight", b + "{conv1,conv2,conv3}.weight"),
        *rename(a + "{norm1,norm2,norm3}.{weight,bias}", b + "{norm1,norm2,norm3}.{weight,bias}"),
        *rename(a + "shortcut.weight", b + "downsample.conv.weight"),
        *rename(a + "shortcut_norm.{weight,bias}", b + "downsample.norm.{weight,bias}"),
    ]


def _timm_rules(config: BiTConfig) -> list[Rule]:
    return [
        *timm_trunk_rules("", "", config.trunk.depths),
        *rename("norm.{weight,bias}", "norm.{weight,bias}"),
        *transform("head.linear.weight", "head.fc.weight", lambda t: t.flatten(1), lambda t: t[:, :, None, None]),
        *rename("head.linear.bias", "head.fc.bias"),
    ]


def _timm_infer(state: State, files: Files, hints: Hints) -> tuple[BiTConfig, list[str]]:
    depths, widths = find_stages(state, lambda s, i: f"stages.{s}.blocks.{i}.conv3.weight")
    known = {"preactivation": "stem.norm.weight" not in state} | told(hints)
    trunk = TrunkConfig(depths, widths, state["stem.conv.weight"].shape[0], **known)
    size = files.get("config.json", {}).get("pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:]
    channels, classes = state["stem.conv.weight"].shape[1], _classes(state, "head.fc.weight")
    return BiTConfig((int(size[0]), int(size[1])), channels, classes, trunk), []


def _timm_card(config: BiTConfig, files: Files) -> ModelCard:
    return timm_card(config.image_size, files, dataclasses.replace(_PLAIN, channels=config.in_channels))


def _timm_export(config: BiTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    known = next((name for name, row in VARIANTS.items() if row.trunk == config.trunk and name.endswith("_bit")), None)
    if known is None:
        need(config.trunk, "timm", **{f.name: getattr(TrunkConfig, f.name) for f in dataclasses.fields(TrunkConfig)[3:]})
        sizes = f"depths {config.trunk.depths} and widths {config.trunk.widths}"
        raise CheckpointError(f"timm names no BiT of {sizes}; it has {', '.join(VARIANTS)}; nearest: format='vitrail'")
    args = {"in_chans": config.in_channels} if config.in_channels != 3 else {}
    return timm_files(known, config, card, args, fixed_size=False)


# transformers ---------------------------------------------------------------------------------------------------------


def _hf_rules(config: BiTConfig) -> list[Rule]:
    a, b = "stages.{s}.{i}.", "bit.encoder.stages.{s}.layers.{i}."
    return [
        *rename("stem.conv.weight", "bit.embedder.convolution.weight"),
        *rename("stem.norm.{weight,bias}", "bit.embedder.norm.{weight,bias}"),
        *rename(a + "{conv1,conv2,conv3}.weight", b + "{conv1,conv2,conv3}.weight"),
        *rename(a + "{norm1,norm2,norm3}.{weight,bias}", b + "{norm1,norm2,norm3}.{weight,bias}"),
        *rename(a + "shortcut.weight", b + "downsample.conv.weight"),
        *rename(a + "shortcut_norm.{weight,bias}", b + "downsample.norm.{weight,bias}"),
        *rename("norm.{weight,bias}", "bit.norm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "classifier.1.{weight,bias}"),
    ]


def _hf_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bare encoders (BitModel) are saved without the "bit." prefix."""
    return {key if key.startswith(("bit.", "classifier.")) else f"bit.{key}": value for key, value in state.items()}


def _hf_infer(state: State, files: Files, hints: Hints) -> tuple[BiTConfig, list[str]]:
    settings, notes = files.get("config.json", {}), []
    before = "bit.embedder.norm.weight" not in state
    padding, dynamic = str(settings.get("global_padding") or "").upper(), bool(settings.get("embedding_dynamic_padding"))
    wrong = [
        f"{n}={settings[n]!r}"
        for n, known in (("hidden_act", "relu"), ("output_stride", 32))
        if settings.get(n, known) != known
    ]
    if padding not in ("", "SAME") or (dynamic and (before or not padding)):
        wrong.append(f"global_padding={padding!r} with embedding_dynamic_padding={dynamic}")
    if wrong:
        raise CheckpointError(f"config.json: no model here has {', '.join(wrong)}")
    if not settings and not told(hints):
        notes.append("guess: 32 groups, symmetric padding (config.json tells; else trunk.groups=..., trunk.padding=...)")
    pools = {"": "zeros" if before else "zeros_early", "SAME": "same" if dynamic else "valid"}
    known = {
        "preactivation": before, "groups": int(settings.get("num_groups", 32)), "padding": "same" if padding else "symmetric",
        "stem_pool": pools[padding],
    }  # fmt: skip
    depths, widths = find_stages(state, lambda s, i: f"bit.encoder.stages.{s}.layers.{i}.conv3.weight")
    trunk = TrunkConfig(depths, widths, state["bit.embedder.convolution.weight"].shape[0], **known | told(hints))
    channels, classes = state["bit.embedder.convolution.weight"].shape[1], _classes(state, "classifier.1.weight")
    size = files.get("preprocessor_config.json", {}).get("crop_size") or {}
    image_size = (int(size.get("height", 224)), int(size.get("width", 224)))
    return BiTConfig(image_size, channels, classes, trunk), notes


def _hf_card(config: BiTConfig, files: Files) -> ModelCard:
    return transformers_card(config.image_size, files, dataclasses.replace(_PLAIN, channels=config.in_channels))


def _hf_export(config: BiTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    trunk = config.trunk
    same, dynamic = trunk.padding == "same", trunk.stem_pool == "same"
    if same:
        pool = "same" if dynamic and not trunk.preactivation else "valid"
    else:
        pool = "zeros" if trunk.preactivation else "zeros_early"
    need(trunk, "transformers", norm_eps=1e-5, std_rule="variance", std_eps=1e-8, stem_pool=pool)
    settings = {
        "architectures": ["BitForImageClassification"], "model_type": "bit", "num_channels": config.in_channels,
        "embedding_size": trunk.stem_width, "hidden_sizes": list(trunk.widths), "depths": list(trunk.depths),
        "layer_type": "preactivation" if trunk.preactivation else "bottleneck", "hidden_act": "relu",
        "global_padding": "SAME" if same else None, "embedding_dynamic_padding": dynamic, "num_groups": trunk.groups,
        "drop_path_rate": config.drop_path, "output_stride": 32, "width_factor": 1,
    }  # fmt: skip
    return transformers_files(config, card, settings, "BitImageProcessor")


# Google (big_transfer) ------------------------------------------------------------------------------------------------

_KERNEL = "standardized_conv2d/kernel"


def _google_rules(config: BiTConfig) -> list[Rule]:
    rules = [
        *convolution("stem.conv.weight", f"resnet/root_block/{_KERNEL}"),
        *rename("norm.{weight,bias}", "resnet/group_norm/{gamma,beta}"),
        *transform(
            "head.linear.weight", "resnet/head/conv2d/kernel", lambda t: t.flatten(0, 2).T, lambda t: t.T[None, None]
        ),
        *rename("head.linear.bias", "resnet/head/conv2d/bias"),
    ]  # fmt: skip
    for s, depth in enumerate(config.trunk.depths):
        for i in range(depth):  # units count from 1 in two digits
            ours, theirs = f"stages.{s}.{i}.", f"resnet/block{s + 1}/unit{i + 1:02d}/"
            rules += convolution(ours + "{conv1,conv2,conv3}.weight", theirs + "{a,b,c}/" + _KERNEL)
            rules += rename(ours + "{norm1,norm2,norm3}.{weight,bias}", theirs + "{a,b,c}/group_norm/{gamma,beta}")
            rules += convolution(ours + "shortcut.weight", f"{theirs}a/proj/{_KERNEL}")
    return rules


def _google_infer(state: State, files: Files, hints: Hints) -> tuple[BiTConfig, list[str]]:
    root = state[f"resnet/root_block/{_KERNEL}"]
    depths, widths = find_stages(state, lambda s, i: f"resnet/block{s + 1}/unit{i + 1:02d}/c/{_KERNEL}", axis=3)
    known = {"std_eps": GOOGLE_BIT_EPS} | told(hints)
    trunk = TrunkConfig(depths, widths, root.shape[3], **known)
    classes = _classes(state, "resnet/head/conv2d/kernel", 3)
    side = 480 if trunk.stem_width == 256 else 448  # what the fine-tuned files are meant for
    return BiTConfig((224, 224) if classes == 21843 else (side, side), root.shape[2], classes, trunk), []


def _google_card(config: BiTConfig, files: Files) -> ModelCard:
    return ModelCard(preprocess=Preprocess(config.image_size, config.in_channels, "stretch", 1.0, "bilinear"))


def _google_export(config: BiTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    built_in = {f.name: getattr(TrunkConfig, f.name) for f in dataclasses.fields(TrunkConfig)[3:]}
    need(config.trunk, "Google's npz", **built_in | {"std_eps": GOOGLE_BIT_EPS})
    return {}


def _is_timm(state: State) -> bool:
    return "stem.conv.weight" in state and "stages.0.blocks.0.conv3.weight" in state and "norm.running_mean" not in state


def _is_hf(state: State) -> bool:
    return any(key.endswith("embedder.convolution.weight") for key in state)


SOURCES = (
    Source("timm", "bit", _is_timm, _timm_infer, _timm_rules, _timm_card, _timm_export),
    Source("transformers", "bit", _is_hf, _hf_infer, _hf_rules, _hf_card, _hf_export, _hf_clean),
    Source(
        "google", "bit", lambda state: f"resnet/root_block/{_KERNEL}" in state, _google_infer, _google_rules, _google_card,
        _google_export, container="model.npz", one_preprocess=True,
    ),
)  # fmt: skip
