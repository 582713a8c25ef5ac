import pytest
import torch
import torch.nn.functional as F

from vitrail.layers.block import ACTIVATIONS, MLP

EXPECTED = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_in_place_only_without_gradients(name: str) -> None:
    act, x = ACTIVATIONS[name](), torch.linspace(-6, 6, 64).view(2, 32)
    expected = EXPECTED[name](x)
    with torch.no_grad():
        given = x.clone()
        answer = act(given)
    assert answer.data_ptr() == given.data_ptr(), "no second tensor"
    torch.testing.assert_close(answer, expected)
    given = x.clone().requires_grad_()
    answer = act(given)
    torch.testing.assert_close(answer, expected)
    assert torch.equal(given, x), "what the backward pass needs stays"
    answer.sum().backward()
    wanted = x.clone().requires_grad_()
    EXPECTED[name](wanted).sum().backward()
    torch.testing.assert_close(given.grad, wanted.grad)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_mlp_leaves_its_input_alone(name: str) -> None:
    torch.manual_seed(0)
    mlp, x = MLP(8, 32, name), torch.randn(3, 5, 8)
    before, trained = x.clone(), mlp(x)
    with torch.inference_mode():
        assert torch.equal(mlp(x), trained)
    assert torch.equal(x, before)
