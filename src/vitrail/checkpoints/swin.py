"""Swin checkpoints, v1 and v2: timm, transformers and the original code; torchvision's are in `swin_torchvision`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelCard, Preprocess
from vitrail.layers.position import grid_side
from vitrail.models.swin import VARIANTS, SwinConfig, grids

from .mapping import CheckpointError, Rule, drop, fuse, rename
from .sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Files,
    Source,
    count_blocks,
    timm_card,
    timm_files,
    transformers_card,
    transformers_files,
)

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]


def build_config(state: State, hints: Hints, stage: str, table: str, scale: str, **known: Any) -> tuple[SwinConfig, list[str]]:
    """A config from shapes; windows and image size come from what is `known`, from tables, from published rows, or a guess.

    `stage` is the name of a stage's blocks with {s}, `table` and `scale` the places of v1's bias table and v2's logit scale in
    a block.
    """
    notes: list[str] = []
    stages = sum(count_blocks(state, stage.format(s=s)) > 0 for s in range(16))
    blocks = [stage.format(s=s) for s in range(stages)]
    version = 2 if blocks[0] + "0." + scale in state else 1
    tables = [state[b + "0." + table] for b in blocks] if version == 1 else []
    config: dict[str, Any] = {
        "version": version, "depths": tuple(count_blocks(state, b) for b in blocks),
        "heads": tuple(t.shape[1] for t in tables) or tuple(state[b + "0." + scale].shape[0] for b in blocks),
        **{key: value for key, value in known.items() if value is not None},
    }  # fmt: skip
    if tables and "window" not in config:
        side = (grid_side(tables[0].shape[0]) + 1) // 2
        config["window"] = (side, side)
    if "window" not in config:
        config["window"] = _pair(hints.get("window", 8))
        if "window" not in hints:
            notes.append("guess: windows of 8x8 (v2 weights do not tell; window=... decides)")
    sides = [(math.isqrt(t.shape[0]) + 1) // 2 for t in tables]
    built = hints.get("built_size") or config.pop("image_size", None) or _built_size(config, sides, notes)
    made = SwinConfig(**config, image_size=_pair(built))
    expected = [(2 * h - 1) * (2 * w - 1) for h, w in made.windows]
    if tables and expected != [t.shape[0] for t in tables]:
        raise CheckpointError(
            f"bias tables of {[t.shape[0] for t in tables]} offsets do not fit windows {made.windows} of pictures of "
            f"{made.image_size}; name the size the weights were built for: built_size=(height, width)"
        )
    return made, notes


def _built_size(config: dict[str, Any], sides: list[int], notes: list[str]) -> tuple[int, int]:
    window, patch = config["window"][0], config["patch"]
    for s, side in enumerate(sides):
        if side < window:  # a window that shrank to its map
            return side * 2**s * patch[0], side * 2**s * patch[1]
    shape = tuple(config[key] for key in ("version", "width", "depths", "window", "patch"))
    for row in VARIANTS.values():
        if shape == (row.version, row.width, row.depths, row.window, row.patch):
            return row.image_size
    side = window * 2 ** (len(config["depths"]) - 1)
    notes.append(f"guess: built for {side * patch[0]}x{side * patch[1]} pictures (image_size=... decides)")
    return side * patch[0], side * patch[1]


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, (int, float)) else (int(value[0]), int(value[1]))


def _from_name(name: str) -> dict[str, Any]:
    """Window, image size and v2's pre-training window from a published name ("...window12to16_192to256")."""
    hit = re.search(r"window(\d+)(?:to(\d+))?_(\d+)(?:to(\d+))?", name)
    if hit is None:
        return {}
    window, later, size, larger = (int(part) if part else 0 for part in hit.groups())
    found: dict[str, Any] = {"window": _pair(later or window), "image_size": _pair(larger or size)}
    if later:
        found["pretrained_windows"] = tuple(_pair(min(window, size // 4 // 2**s)) for s in range(4))
    return found


def _name(files: Files) -> str:
    return str(files.get("", {}).get("name", ""))


def stem(patch_weight: Tensor, hidden: Tensor) -> dict[str, Any]:
    """What the patch embedding and the first layer of an MLP tell."""
    width, channels, *patch = patch_weight.shape
    return {"width": width, "in_channels": channels, "patch": tuple(patch), "mlp_ratio": hidden.shape[0] / width}


def classes(state: State, key: str) -> int:
    """Rows of a classifier, 0 without one."""
    return state[key].shape[0] if key in state else 0


def check_plan(config: SwinConfig, project: str, needed: dict[str, Any], **rule: Any) -> None:
    """Raise CheckpointError when the project's Swin has not these parts, or by its own rule plans other windows."""
    for name, value in ({"norm_eps": 1e-5} | needed).items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{project} cannot hold {name}={getattr(config, name)!r} (it has {value!r}); nearest: format='vitrail'"
            )
    if config.window[0] != config.window[1] or config.patch[0] != config.patch[1]:
        raise CheckpointError(
            f"{project} holds square windows and patches, not {config.window} and {config.patch}; nearest: format='vitrail'"
        )
    other = dataclasses.replace(config, **rule)
    maps = grids(config.grid, len(config.depths))
    same = config.windows == other.windows
    same &= all(config.shift(s, grid) == other.shift(s, grid) for s, grid in enumerate(maps))
    padded = any(side % step for grid, window in zip(maps, config.windows, strict=True)
                 for side, step in zip(grid, window, strict=True))  # fmt: skip
    if not same or (padded and other.pad_first != config.pad_first):
        raise CheckpointError(
            f"{project} would cut pictures of {config.image_size} into other windows (fit {other.fit!r}, padding "
            f"{'before' if other.pad_first else 'after'} rolling; this model: {config.fit!r}, "
            f"{'before' if config.pad_first else 'after'}); nearest: format='vitrail'"
        )


def _pretrained(config: SwinConfig) -> list[int]:
    """v2's pre-training windows as one number per stage, 0 where it is the window itself."""
    return [h for h, _ in config.pretrained_windows] or [0] * len(config.depths)


# timm and the original code -------------------------------------------------------------------------------------------

_BUFFERS = ("relative_position_index", "relative_coords_table")


def _timm_rules(config: SwinConfig, downsample: int = 0, head: str = "head.fc") -> list[Rule]:
    ours, theirs = "stages.{s}.blocks.{i}.", "layers.{s}.blocks.{i}."
    rules = [
        *rename("embed.proj.{weight,bias}", "patch_embed.proj.{weight,bias}"),
        *rename("embed_norm.{weight,bias}", "patch_embed.norm.{weight,bias}"),
        *rename("position.table", "absolute_pos_embed"),
        *rename(ours + "{norm1,norm2}.{weight,bias}", theirs + "{norm1,norm2}.{weight,bias}"),
        *rename(ours + "attn.{qkv,proj}.{weight,bias}", theirs + "attn.{qkv,proj}.{weight,bias}"),
        *rename(ours + "attn.bias.table", theirs + "attn.relative_position_bias_table"),
        *rename(ours + "attn.logit_scale", theirs + "attn.logit_scale"),
        *fuse(ours + "attn.qv_bias", theirs + "attn.q_bias", theirs + "attn.v_bias"),
        *rename(ours + "attn.bias.fc1.{weight,bias}", theirs + "attn.cpb_mlp.0.{weight,bias}"),
        *rename(ours + "attn.bias.fc2.weight", theirs + "attn.cpb_mlp.2.weight"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", theirs + "mlp.{fc1,fc2}.{weight,bias}"),
        *drop(theirs + "attn_mask", *(theirs + "attn." + name for name in (*_BUFFERS, "k_bias"))),
        *rename("norm.{weight,bias}", "norm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", head + ".{weight,bias}"),
    ]
    for s in range(1, len(config.depths)):
        merge = f"layers.{s - downsample}.downsample."
        rules += rename(f"stages.{s}.merge." + "norm.{weight,bias}", merge + "norm.{weight,bias}")
        rules += rename(f"stages.{s}.merge.reduction.weight", merge + "reduction.weight")
    return rules


def _timm_shapes(state: State, hints: Hints, head: str, **known: Any) -> tuple[SwinConfig, list[str]]:
    return build_config(
        state, hints, "layers.{s}.blocks.", "attn.relative_position_bias_table", "attn.logit_scale",
        num_classes=classes(state, head + ".weight"),
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in state or "layers.0.blocks.0.attn.q_bias" in state,
        position_table="absolute_pos_embed" in state,
        **(stem(state["patch_embed.proj.weight"], state["layers.0.blocks.0.mlp.fc1.weight"]) | known),
    )  # fmt: skip


def _timm_infer(state: State, files: Files, hints: Hints) -> tuple[SwinConfig, list[str]]:
    beside = files.get("config.json", {})
    args = beside.get("model_args") or {}
    known = _from_name(_name(files)) | _from_name(str(beside.get("architecture", "")))
    size = beside.get("pretrained_cfg", {}).get("input_size")
    known |= {"image_size": _pair(size[1:])} if size else {}
    named = (("image_size", "img_size"), ("window", "window_size"))
    known |= {ours: _pair(args[theirs]) for ours, theirs in named if theirs in args}
    if any(args.get("pretrained_window_sizes") or ()):
        known["pretrained_windows"] = tuple(_pair(w) for w in args["pretrained_window_sizes"])
    fit = "always" if args.get("always_partition") else "built"
    return _timm_shapes(state, hints, "head.fc", **known, fit=fit, pad_first=False, bias_resize="geometric")


def _timm_card(config: SwinConfig, files: Files) -> ModelCard:
    fraction = 0.9 if config.image_size[0] < 384 else 1.0
    return timm_card(config.image_size, files, preprocess(config, fraction))


def preprocess(config: SwinConfig, fraction: float) -> Preprocess:
    """Swin's pictures: ImageNet's statistics, bicubic, the crop a part of the resized picture."""
    return Preprocess(config.image_size, config.in_channels, "crop", fraction, "bicubic", IMAGENET_MEAN, IMAGENET_STD)


def _timm_export(config: SwinConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    fit = "always" if config.fit == "always" else "built"
    check_plan(config, "timm", {"position_table": False}, fit=fit, pad_first=False)
    args: dict[str, Any] = {
        "img_size": list(config.image_size), "patch_size": config.patch[0], "embed_dim": config.width,
        "depths": list(config.depths), "num_heads": list(config.heads), "window_size": config.window[0],
        "mlp_ratio": config.mlp_ratio, "qkv_bias": config.qkv_bias,
    }  # fmt: skip
    if fit == "always":
        args["always_partition"] = True
    if config.in_channels != 3:
        args["in_chans"] = config.in_channels
    if config.version == 2:
        args["pretrained_window_sizes"] = _pretrained(config)
    name = "swin_tiny_patch4_window7_224" if config.version == 1 else "swinv2_tiny_window8_256"
    return timm_files(name, config, card, args)


def _ms_rules(config: SwinConfig) -> list[Rule]:
    return _timm_rules(config, downsample=1, head="head")


def _ms_infer(state: State, files: Files, hints: Hints) -> tuple[SwinConfig, list[str]]:
    known = _from_name(_name(files)) | _from_name(str(files.get("config.json", {}).get("architecture", "")))
    patch = tuple(state["patch_embed.proj.weight"].shape[2:])
    coordinates = [state[k] for k in sorted(state) if k.endswith(".blocks.0.attn.relative_coords_table")]
    if coordinates:
        known["window"] = tuple((side + 1) // 2 for side in coordinates[0].shape[1:3])
        known["pretrained_windows"] = tuple(_unit(table) for table in coordinates)
    mask = state.get("layers.0.blocks.1.attn_mask")
    if mask is not None:
        side = math.isqrt(mask.shape[0]) * math.isqrt(mask.shape[1])
        known["image_size"] = (side * patch[0], side * patch[1])
    if "absolute_pos_embed" in state:
        side = grid_side(state["absolute_pos_embed"].shape[1])
        known["image_size"] = (side * patch[0], side * patch[1])
    return _timm_shapes(state, hints, "head", **known, fit="built_both", bias_resize="bicubic_plain")


def _unit(table: Tensor) -> tuple[int, int]:
    """The window in whose unit a stored table (1, 2 h - 1, 2 w - 1, 2) of logarithmic offsets is measured."""
    sides = [(side + 1) // 2 for side in table.shape[1:3]]
    furthest = [float(2 ** (3 * table[..., axis].max()) - 1) / 8 for axis in (0, 1)]
    units = [round((side - 1) / far) + 1 if far else side for side, far in zip(sides, furthest, strict=True)]
    return units[0], units[1]


def _ms_card(config: SwinConfig, files: Files) -> ModelCard:
    return ModelCard(preprocess=preprocess(config, 0.875))  # resize to 256 / 224 of the size, then crop


def _ms_export(config: SwinConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    check_plan(config, "microsoft", {}, fit="built_both", pad_first=True)
    return {}


# transformers ---------------------------------------------------------------------------------------------------------


def _hf_rules(config: SwinConfig) -> list[Rule]:
    root = "swin." if config.version == 1 else "swinv2."
    ours, theirs = "stages.{s}.blocks.{i}.", root + "encoder.layers.{s}.blocks.{i}."
    attention = theirs + "attention.self."
    stem = root + "embeddings."
    rules = [
        *rename("embed.proj.{weight,bias}", stem + "patch_embeddings.projection.{weight,bias}"),
        *rename("embed_norm.{weight,bias}", stem + "norm.{weight,bias}"),
        *rename("position.table", stem + "position_embeddings"),
        *rename(ours + "{norm1,norm2}.{weight,bias}", theirs + "{layernorm_before,layernorm_after}.{weight,bias}"),
        *fuse(ours + "attn.qkv.weight", *(f"{attention}{name}.weight" for name in ("query", "key", "value"))),
        *rename(ours + "attn.bias.table", attention + "relative_position_bias_table"),
        *rename(ours + "attn.logit_scale", attention + "logit_scale"),
        *rename(ours + "attn.bias.fc1.{weight,bias}", attention + "continuous_position_bias_mlp.0.{weight,bias}"),
        *rename(ours + "attn.bias.fc2.weight", attention + "continuous_position_bias_mlp.2.weight"),
        *rename(ours + "attn.proj.{weight,bias}", theirs + "attention.output.dense.{weight,bias}"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", theirs + "{intermediate,output}.dense.{weight,bias}"),
        *drop(*(attention + name for name in _BUFFERS), stem + "mask_token", "decoder.0.{weight,bias}"),
        *rename("norm.{weight,bias}", root + "layernorm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "classifier.{weight,bias}"),
    ]
    if config.version == 1:
        rules += fuse(ours + "attn.qkv.bias", *(f"{attention}{name}.bias" for name in ("query", "key", "value")))
    else:
        rules += fuse(ours + "attn.qv_bias", attention + "query.bias", attention + "value.bias")
    for s in range(1, len(config.depths)):
        merge = f"{root}encoder.layers.{s - 1}.downsample."
        rules += rename(f"stages.{s}.merge." + "norm.{weight,bias}", merge + "norm.{weight,bias}")
        rules += rename(f"stages.{s}.merge.reduction.weight", merge + "reduction.weight")
    return rules


def _hf_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bare encoders (SwinModel) are saved without the prefix."""
    if any(key.startswith(("swin.", "swinv2.")) for key in state):
        return state
    root = "swinv2." if any(key.endswith("logit_scale") for key in state) else "swin."
    return {root + key: value for key, value in state.items()}


def _hf_infer(state: State, files: Files, hints: Hints) -> tuple[SwinConfig, list[str]]:
    settings = files.get("config.json", {})
    if settings.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"config.json: hidden_act {settings['hidden_act']!r} is not known here; allowed: gelu")
    root = "swinv2." if any(key.startswith("swinv2.") for key in state) else "swin."
    block = root + "encoder.layers.0.blocks.0."
    names = (("window", "window_size"), ("image_size", "image_size"))
    known: dict[str, Any] = {ours: _pair(settings[theirs]) for ours, theirs in names if theirs in settings}
    if any(settings.get("pretrained_window_sizes") or ()):
        known["pretrained_windows"] = tuple(_pair(w) for w in settings["pretrained_window_sizes"])
    two = root == "swinv2."
    if two and root + "embeddings.position_embeddings" in state:
        raise CheckpointError("transformers' Swinv2 with absolute positions has one position too many and cannot run itself")
    return build_config(
        state, hints, root + "encoder.layers.{s}.blocks.", "attention.self.relative_position_bias_table",
        "attention.self.logit_scale", num_classes=classes(state, "classifier.weight"),
        qkv_bias=block + "attention.self.query.bias" in state, position_table=root + "embeddings.position_embeddings" in state,
        norm_eps=float(settings.get("layer_norm_eps", 1e-5)), fit="built_both" if two else "call_both",
        mask_value=-200.0 if two else -100.0,
        **stem(state[root + "embeddings.patch_embeddings.projection.weight"], state[block + "intermediate.dense.weight"]),
        **known,
    )  # fmt: skip


def _hf_card(config: SwinConfig, files: Files) -> ModelCard:
    default = preprocess(config, 1.0)
    card = transformers_card(config.image_size, files, default)
    return card if "preprocessor_config.json" in files else dataclasses.replace(card, preprocess=default)


def _hf_export(config: SwinConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    needed = {"position_table": False} if config.version == 2 else {}
    check_plan(config, "transformers", needed, fit="call_both" if config.version == 1 else "built_both", pad_first=True)
    kind = "Swin" if config.version == 1 else "Swinv2"
    square = config.image_size[0] == config.image_size[1]
    settings: dict[str, Any] = {
        "architectures": [f"{kind}ForImageClassification"], "model_type": kind.lower(), "embed_dim": config.width,
        "image_size": config.image_size[0] if square else list(config.image_size), "patch_size": config.patch[0],
        "num_channels": config.in_channels, "depths": list(config.depths), "num_heads": list(config.heads),
        "window_size": config.window[0], "mlp_ratio": config.mlp_ratio, "qkv_bias": config.qkv_bias, "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.attention_dropout,
        "drop_path_rate": config.drop_path, "use_absolute_embeddings": config.position_table, "layer_norm_eps": config.norm_eps,
    }  # fmt: skip
    if config.version == 2:
        settings["pretrained_window_sizes"] = _pretrained(config)
    return transformers_files(config, card, settings, "ViTImageProcessor")


def _has_blocks(state: State) -> bool:
    return "patch_embed.norm.weight" in state and "layers.0.blocks.0.attn.qkv.weight" in state


def _is_original(state: State) -> bool:
    """timm of today merges at the start of a stage and calls the classifier head.fc; older timm files are like the original."""
    return _has_blocks(state) and ("layers.0.downsample.reduction.weight" in state or "head.weight" in state)


def _is_timm(state: State) -> bool:
    return _has_blocks(state) and not _is_original(state)


def _is_hf(state: State) -> bool:
    return any(key.endswith("encoder.layers.0.blocks.0.attention.self.query.weight") for key in state)


SOURCES = (
    Source("timm", "swin", _is_timm, _timm_infer, _timm_rules, _timm_card, _timm_export),
    Source(
        "microsoft", "swin", _is_original, _ms_infer, _ms_rules, _ms_card, _ms_export, container="model.pth", inside="model"
    ),
    Source("transformers", "swin", _is_hf, _hf_infer, _hf_rules, _hf_card, _hf_export, _hf_clean),
)
