"""Every golden case of ViViT: same keys in, same numbers out, same keys back; and the flax file it is published in."""

from __future__ import annotations

import pytest
import torch
from tests import golden, proofs

from vitrail.checkpoints import CheckpointError, load_model, save_model
from vitrail.checkpoints.io import read_flax
from vitrail.checkpoints.mapping import write
from vitrail.checkpoints.store import SOURCES
from vitrail.layers.attention import record_attention
from vitrail.models import create_model

PEER = [i for i, c in golden.manifest().items() if c["family"] == "vivit"]
AUTHORS = {
    "vivit_tiny_model1_joint_token": {"built_size": (32, 32)},
    "vivit_tiny_model2_fe_token": {},
    "vivit_tiny_model3_fsa_time_space": {"built_size": (32, 32)},
    "vivit_tiny_model4_fdp": {"built_size": 32, "model": "factorised_dot_product"},
}


def hints(case_id: str) -> dict:
    return {"heads": 4, "built_size": (32, 32)} if "tinycfg" in case_id else {}


def outputs_of_blocks(model: torch.nn.Module, into: dict[str, torch.Tensor], name: str) -> None:
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _module, _args, out, i=i: into.update({f"{name}{i}": out}))


def rewritten(state: dict[str, torch.Tensor], model: torch.nn.Module) -> bool:
    (source,) = (s for s in SOURCES if s.recognise(state))
    back, clean = write(source.rules(model.config), model.state_dict()), source.clean(dict(state))
    return set(back) == set(clean) and all(torch.equal(back[key], clean[key]) for key in clean)


@pytest.mark.parametrize("case_id", PEER)
def test_matches_the_peer(case_id: str, record_property) -> None:
    case = golden.manifest()[case_id]
    state = golden.state(case)
    model = load_model(state, quiet=True, **hints(case_id))
    want, x = golden.outputs(case), golden.inputs(case).transpose(1, 2)
    got: dict[str, torch.Tensor] = {}
    outputs_of_blocks(model, got, "block.")
    with torch.inference_mode():
        if "tinycfg" in case_id:
            with record_attention(model) as maps:
                got["features"] = model.features(x).tokens
            got |= {f"attn.{i}": maps[f"blocks.{i}.attn.site"] for i in range(model.config.depth)}
            got["logits"] = model(x)
        else:
            features = model.features(x)
            got |= {"features": features.tokens, "logits": model.head(model.pool(features))}
    errors = {key: golden.worst(golden.strided(case, key, got[key]), value) for key, value in want.items()}
    proofs.record(record_property, case_id, max(errors.values()))
    assert max(errors.values()) <= 1e-5, errors
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]
    assert rewritten(state, model)


@pytest.mark.parametrize("case_id", AUTHORS)
def test_matches_the_authors(case_id: str, tmp_path, record_property) -> None:
    case, want = golden.original(case_id), golden.original_outputs(case_id)
    state = golden.original_state(case)
    model = load_model(state, quiet=True, **AUTHORS[case_id])
    x = torch.from_numpy(golden.normals(case["input"]["name"], case["input"]["shape"])).permute(0, 4, 1, 2, 3)
    got: dict[str, torch.Tensor] = {}
    outputs_of_blocks(model, got, "i.block")
    with torch.inference_mode():
        features = model.features(x)
        got |= {"logits": model(x), "pre_logits": model.pool(features), "i.encoded": features.tokens}
        got["i.embedding"] = model.embed(x)[0].unflatten(1, model.config.grid)
    errors = {key: float((got[key].reshape(value.shape) - value).abs().max()) for key, value in want.items()}
    error = max(golden.worst(got[key].reshape(value.shape), value) for key, value in want.items())
    proofs.record(record_property, case_id, error)
    assert max(errors.values()) <= 2e-5, errors
    assert rewritten(state, model)
    path = save_model(model, tmp_path / "out", format="scenic")
    assert path.name == "checkpoint"
    again = load_model(tmp_path / "out", quiet=True, **AUTHORS[case_id])
    with torch.inference_mode():  # as above: with gradients another kernel may attend
        assert torch.equal(again(x), got["logits"])


def test_trees_of_the_training_code(tmp_path) -> None:
    """A training state keeps the weights under optimizer/target, beside other arrays; older flax numbered parts otherwise."""
    msgpack = pytest.importorskip("msgpack")
    state = golden.original_state(golden.original("vivit_tiny_model1_joint_token"))
    old = {"LayerNorm_1": "LayerNorm_2", "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1"}
    old |= {"MlpBlock_0": "MlpBlock_3"}

    def leaf(tensor: torch.Tensor) -> object:
        array = tensor.numpy()
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))

    tree: dict = {"optimizer": {"target": {}, "state": {"step": leaf(torch.tensor(7))}}, "global_step": 7}
    for name, tensor in state.items():
        *parents, last = name.split("/")
        node = tree["optimizer"]["target"]
        for parent in parents:
            node = node.setdefault(old.get(parent, parent), {})
        node[last] = leaf(tensor)
    kernel = state["embedding/kernel"]
    halves = {str(i): leaf(half) for i, half in enumerate(kernel.flatten().chunk(2))}
    sizes = {str(i): size for i, size in enumerate(kernel.shape)}
    tree["optimizer"]["target"]["embedding"]["kernel"] = {"__msgpack_chunked_array__": True, "shape": sizes, "chunks": halves}
    file = tmp_path / "checkpoint_7"
    file.write_bytes(msgpack.packb(tree))
    model, same = (load_model(source, quiet=True, built_size=32) for source in (file, state))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a complete flax file"):
        read_flax(file)
    file.write_bytes(msgpack.packb({"params": msgpack.ExtType(2, b"")}))
    with pytest.raises(CheckpointError, match="extension type 2"):
        read_flax(file)


def test_what_a_project_cannot_hold_is_said(tmp_path) -> None:
    model = create_model("vivit_micro", model="factorised_encoder")
    with pytest.raises(CheckpointError, match="transformers cannot hold model='factorised_encoder'"):
        save_model(model, tmp_path / "a", format="transformers")
    model = create_model("vivit_micro", position="separate")
    with pytest.raises(CheckpointError, match="scenic cannot hold position='separate'"):
        save_model(model, tmp_path / "b", format="scenic")
    state = golden.original_state(golden.original("vivit_tiny_model1_joint_token"))
    state["Transformer/posembed_input/pos_embedding"] = torch.zeros(1, 1 + 60, 32)
    with pytest.raises(CheckpointError, match="built_size"):
        load_model(state)


@pytest.mark.parametrize("model", ["joint", "factorised_encoder"])
def test_positions_follow_another_clip(model: str, tmp_path) -> None:
    built = create_model("vivit_micro", model=model).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(built, tmp_path / "m.safetensors")
    x = torch.randn(1, 3, 8, 8, 16)
    other = load_model(tmp_path / "m.safetensors", quiet=True, frames=8, image_size=(8, 16))  # as many tokens as before
    assert other.config.grid == (4, 2, 4)
    assert (
        load_model(golden.original_state(golden.original("vivit_tiny_model2_fe_token")), quiet=True).card.preprocess.frames == 8
    )
    torch.testing.assert_close(other(x), built(x))
    channels = load_model(tmp_path / "m.safetensors", quiet=True, in_channels=1)
    grey = torch.randn(1, 1, 4, 16, 16)
    torch.testing.assert_close(channels(grey), built(grey.expand(-1, 3, -1, -1, -1)), atol=1e-5, rtol=1e-4)
