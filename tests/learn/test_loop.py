"""The supervised loop: schedule, skipped steps, decay, determinism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from distrl.config import SFTConfig
from distrl.learn.loop import Loss, TrainingFailed, adamw, train
from distrl.models.crew import Crew

SETTINGS: dict[str, Any] = {"lr": 0.05, "warmup": 0.1, "weight_decay": 0.0, "grad_clip": 1.0}


def quadratic(module: nn.Module, targets: Sequence[float]) -> Loss:
    gaps = module(torch.ones(1, 2)) - torch.tensor(targets)
    return Loss(mean=gaps.square().mean(), count=len(targets), metrics={"gap": gaps.mean().item()})


def run(batches, *, loss=quadratic, epochs=1, module=None, **more):
    torch.manual_seed(0)
    module = module or nn.Linear(2, 1)
    seen = []
    report = train(
        module,
        lambda epoch: [[target] for target in batches],
        loss,
        SFTConfig(epochs=epochs, **{**SETTINGS, **more}),
        on_step=lambda step, total, metrics: seen.append((step, total, dict(metrics))),
    )
    return module, report, seen


def test_it_minimises_and_reports_every_step():
    module, report, seen = run([3.0] * 100, epochs=2)
    assert module(torch.ones(1, 2)).item() == pytest.approx(3.0, abs=0.05)
    steps = [(step, total) for step, total, metrics in seen if "loss" in metrics]
    assert steps == [(i + 1, 200) for i in range(200)]
    assert report.steps == 200 and report.skipped == 0 and not module.training
    assert report.items == 100, "the loss is that of the last epoch alone"


def test_the_loss_that_is_reported_is_a_mean_over_items():
    def known(module: nn.Module, batch: Sequence[float]) -> Loss:
        return Loss(mean=0 * module(torch.ones(1, 2)).sum() + batch[0], count=len(batch))

    report = train(
        nn.Linear(2, 1),
        lambda epoch: [[1.0], [5.0, 5.0, 5.0]],
        known,
        SFTConfig(epochs=1, **SETTINGS),
        on_step=lambda *_: None,
    )
    assert (report.loss, report.items) == ((1 + 3 * 5) / 4, 4)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [m["lr"] for _, _, m in run([0.0] * 100)[2] if "lr" in m]
    assert rates[0] == pytest.approx(0.005) and rates[9] == pytest.approx(0.05)
    assert max(rates) == pytest.approx(0.05) and rates[-1] == pytest.approx(0.005, rel=0.02)


def test_dropout_is_off():
    """What threads draw from one generator would depend on who comes first."""
    module = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
    _, _, seen = run([3.0] * 20, module=module.train(), lr=1e-9)
    assert len({m["loss"] for _, _, m in seen if "loss" in m}) == 1


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    torch.manual_seed(1)
    module = nn.Linear(2, 1)
    before = module.weight.detach().clone()
    _, report, seen = run([float("nan")] * 2, module=module)
    assert torch.equal(module.weight, before)
    assert report.skipped == 2 and all("loss" not in m for _, _, m in seen)
    _, report, _ = run([1.0, float("nan"), float("nan"), 1.0, float("nan")])
    assert report.skipped == 3, "three, but never three in a row"


def test_a_loss_that_is_not_finite_is_skipped_whatever_its_gradient_says():
    def endless(module: nn.Module, targets: Sequence[float]) -> Loss:
        found = quadratic(module, targets)
        return Loss(mean=found.mean + float("inf"), count=found.count)

    assert run([3.0, 3.0], loss=endless)[1].skipped == 2


def test_a_gradient_that_is_not_finite_is_skipped_too():
    def steep(module, targets):
        # the root's slope at 0 is infinite: a finite loss with a gradient that is not
        return Loss(mean=(module.weight * 0).sum().abs().sqrt(), count=1)

    module, report, _ = run([0.0] * 2, loss=steep)
    assert report.skipped == 2 and torch.isfinite(module.weight).all()


def test_three_in_a_row_stop_it_with_the_cause():
    with pytest.raises(TrainingFailed, match=r"3 steps in a row.*step 4, loss nan"):
        run([1.0] + [float("nan")] * 3)


@pytest.mark.parametrize("size", [2, 3])
def test_a_crew_comes_to_what_one_thread_does_and_to_the_same_bits_every_time(size):
    """Of unequal shares, one of them with a weight of its own in the mean."""
    batches = [[1.0, 2.0, 4.0, 8.0, 16.0], [3.0], [5.0, 7.0]]

    def trained(crew):
        torch.manual_seed(0)
        module, seen = nn.Linear(2, 1), []
        train(
            module,
            lambda epoch: batches,
            quadratic,
            SFTConfig(epochs=2, **SETTINGS),
            on_step=lambda *row: seen.append(row[2]),
            crew=crew,
        )
        rows = [(row["loss"], row["gap"], row["grad_norm"]) for row in seen if "loss" in row]
        return module.weight.detach(), rows

    crew = Crew(size)
    try:
        (weight, rows), (again, _), (alone, expected) = map(trained, (crew, crew, Crew()))
    finally:
        crew.close()
    assert torch.equal(weight, again)
    torch.testing.assert_close(weight, alone)
    assert rows == [pytest.approx(row, rel=1e-5) for row in expected]
    torch.manual_seed(0)
    plain = nn.Linear(2, 1)
    quadratic(plain, batches[0]).mean.backward()
    norm = nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    assert rows[0][2] == pytest.approx(norm.item())


def test_no_batches_are_an_error():
    with pytest.raises(TrainingFailed, match="not one batch"):
        run([])


def test_vectors_are_not_decayed():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    groups = adamw(module, 1e-3, 0.1).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay[id(module[0].weight)] == 0.1
    assert {decay[id(p)] for p in (module[0].bias, *module[1].parameters())} == {0.0}


def test_frozen_weights_stay():
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    before = module.bias.clone()
    run([3.0] * 20, module=module)
    assert torch.equal(module.bias, before)


def test_the_epoch_s_metrics_are_reported():
    torch.manual_seed(0)
    seen = []
    train(
        nn.Linear(2, 1),
        lambda epoch: [[1.0]] * (epoch + 1),
        quadratic,
        SFTConfig(epochs=2, **SETTINGS),
        on_step=lambda *row: seen.append(row),
        on_epoch=lambda epoch: {"epoch": epoch},
    )
    assert [row for row in seen if "epoch" in row[2]] == [
        (1, 3, {"epoch": 1}),
        (3, 3, {"epoch": 2}),
    ]
