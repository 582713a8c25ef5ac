import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from vitrail.checkpoints import load_model
from vitrail.config import ConfigError, ModelCard, OptimConfig
from vitrail.models import create_model
from vitrail.training import optim, state

CARD = ModelCard(classes=tuple("abcdefghij"))


def make(seed: int = 0, ema: bool = True, **overrides: object) -> state.TrainState:
    """A model after two optimiser steps."""
    torch.manual_seed(seed)
    model = create_model("resnet_micro" if overrides.pop("cnn", False) else "vit_micro_patch4_16", **overrides)
    optimizer = optim.build_optimizer(model, OptimConfig(), torch.device("cpu"))
    average = optim.build_ema(model, 0.9) if ema else None
    for _ in range(2):
        model(torch.randn(2, 3, 16, 16)).logsumexp(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)
    scaler = GradScaler("cpu", enabled=True, init_scale=2.0**seed)
    return state.TrainState(
        model, optimizer, average, scaler, state.Progress(step=2 + seed, total=9, window={"loss": 0.1 + 0.2})
    )


def everything(made: state.TrainState) -> dict[str, torch.Tensor]:
    assert made.ema is not None
    return {**made.model.state_dict(), **optim.optimizer_tensors(made.optimizer), **made.ema.state_dict(prefix="ema.")}


@pytest.mark.parametrize("cnn", [False, True])
def test_a_checkpoint_holds_everything(tmp_path: Path, cnn: bool) -> None:
    saved, other = make(3, cnn=cnn), make(4, cnn=cnn)
    state.restore(state.save_checkpoint(tmp_path, saved, CARD, 2), other)
    assert other.progress == saved.progress
    assert other.scaler.get_scale() == 8.0
    mine, theirs = everything(other), everything(saved)
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_checkpoint_is_a_model_that_can_be_loaded(tmp_path: Path) -> None:
    saved = make()
    model = load_model(state.save_checkpoint(tmp_path, saved, CARD, 2))
    assert model.card.classes == CARD.classes
    torch.testing.assert_close(model.head.linear.weight, saved.model.head.linear.weight)


def test_only_the_newest_stay_and_nothing_temporary(tmp_path: Path) -> None:
    for seed in range(4):
        state.save_checkpoint(tmp_path, make(seed, depth=1), CARD, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000005"]


def test_incomplete_checkpoints_are_ignored_and_cleaned(tmp_path: Path) -> None:
    good = state.save_checkpoint(tmp_path, make(0, depth=1), CARD, 5)
    cut, without, broken = (state.save_checkpoint(tmp_path, make(seed, depth=1), CARD, 5) for seed in (1, 2, 3))
    cut.joinpath(state.TENSORS).write_bytes(cut.joinpath(state.TENSORS).read_bytes()[:-1])
    without.joinpath(state.MODEL).unlink()
    broken.joinpath(state.COUNTERS).write_text('{"format": 1, "bytes')
    (tmp_path / "checkpoints" / ".step-00000009.abc").mkdir()
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    assert state.newest_checkpoint(tmp_path) == good
    assert len(state.remove_unfinished(tmp_path)) == 4
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-notes"]


def test_an_empty_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert state.newest_checkpoint(tmp_path) is None
    assert state.remove_unfinished(tmp_path) == []


def test_saving_the_same_step_again_keeps_the_first(tmp_path: Path) -> None:
    first = state.save_checkpoint(tmp_path, make(), CARD, 2)
    before = first.joinpath(state.MODEL).stat().st_mtime_ns
    assert state.save_checkpoint(tmp_path, make(), CARD, 2) == first
    assert first.joinpath(state.MODEL).stat().st_mtime_ns == before


def test_a_failed_save_names_what_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    first = state.save_checkpoint(tmp_path, make(0), CARD, 1)
    monkeypatch.setattr(state, "write_safetensors", full)
    with pytest.raises(state.SaveError, match=r"could not save step 3.*disk full.*resumed from .*step-00000002"):
        state.save_checkpoint(tmp_path, make(1), CARD, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [first.name]
    shutil.rmtree(first)
    with pytest.raises(state.SaveError, match="no checkpoint was saved before"):
        state.save_checkpoint(tmp_path, make(1), CARD, 1)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = state.save_checkpoint(tmp_path, make(), CARD, 2)
    with pytest.raises(ConfigError, match="does not belong to the settings"):
        state.restore(path, make(depth=1))


def test_progress_is_kept_to_the_last_bit(tmp_path: Path) -> None:
    path = state.save_checkpoint(tmp_path, make(), CARD, 2)
    assert json.loads((path / state.COUNTERS).read_text())["progress"]["window"]["loss"] == 0.1 + 0.2


def test_reseeding_is_a_pure_function_of_seed_step_and_rank() -> None:
    draws = {}
    for key in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (2**40, 0, 0)]:
        state.reseed(*key)
        draws[key] = torch.rand(4)
    torch.rand(9)
    state.reseed(0, 1, 0)
    assert torch.equal(torch.rand(4), draws[0, 1, 0])
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(draws)
