import pytest
import torch

from vitrail.layers.attention import record_attention
from vitrail.models import MODELS, create_model, family_of


def trained(**settings):
    model = create_model("deit_micro", **settings).eval()
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    return model


def test_plain_variants_are_vits_and_distilled_ones_are_not() -> None:
    families = {name: family_of(config) for name, config in MODELS.items() if name.startswith("deit_")}
    assert len(families) == 13
    assert all((family == "deit") == ("distilled" in name or "micro" in name) for name, family in families.items())


def test_the_three_predictions() -> None:
    x = torch.randn(2, 3, 16, 16)
    model = trained()
    first, second = model.both(x)
    torch.testing.assert_close(model(x), (first + second) / 2)
    answers = {}
    for prediction in ("class", "distillation"):
        other = create_model("deit_micro", prediction=prediction).eval()
        other.load_state_dict(model.state_dict())
        answers[prediction] = other(x)
        assert f"prediction={prediction}" in repr(other.head)
    torch.testing.assert_close(answers["class"], first)
    torch.testing.assert_close(answers["distillation"], second)
    assert not torch.allclose(first, second)


def test_each_head_reads_its_own_token() -> None:
    model, x = trained(), torch.randn(1, 3, 16, 16)
    features = model.features(x)
    assert features.prefix == 2
    embedding = model.pool(features)
    torch.testing.assert_close(embedding, torch.cat([features.tokens[:, 0], features.tokens[:, 1]], 1))
    torch.testing.assert_close(model.head.both(embedding)[1], model.head.distilled(features.tokens[:, 1]))


def test_new_heads_keep_the_prediction_and_no_head_passes_embeddings_on() -> None:
    model = trained(prediction="class")
    model.reset_head(7)
    assert (model.head.prediction, model.head.distilled.out_features) == ("class", 7)
    bare = create_model("deit_micro", num_classes=0).eval()
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(bare(x), bare.features(x).tokens[:, :2].mean(1))


def test_checkpointing_reaches_the_blocks() -> None:
    model = create_model("deit_micro")
    model.set_checkpointing()
    assert model.backbone.checkpointing


def test_initial_weights_are_those_of_deit() -> None:
    torch.manual_seed(0)
    model = create_model("deit_micro", width=128, mlp_dim=512)
    assert model.backbone.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.backbone.blocks[0].mlp.fc1.bias.any()
    for token in (model.backbone.class_token, model.backbone.registers):
        assert 0.01 < token.std().item() < 0.03


def test_attention_covers_both_tokens() -> None:
    model = trained()
    with record_attention(model, "blocks.2") as maps:
        model(torch.randn(1, 3, 16, 16))
    assert maps["backbone.blocks.2.attn.site"].shape == (1, 4, 18, 18)
