"""What a training step is made of against its formulas: losses, optimisers, averages, health; calibration, accuracy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_examples import recipe, run, tiny, toy

from repbnn_cli import checkpoint, zoo
from repbnn_cli.binary_conv import BinaryConv2d, FracConv2d, GatedConv2d, IRConv2d, RBNNConv2d, ReCUConv2d, SignConv2d
from repbnn_cli.errors import UsageError
from repbnn_cli.rep_layers import RepBatchNorm2d
from repbnn_cli.runs import Progress
from repbnn_cli.train import engine, health, measure, steps


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a step


def test_distillation_is_the_formula_and_the_teacher_alone_is_cross_entropy_against_its_softmax() -> None:
    logits = torch.randn(5, 4, requires_grad=True)
    lesson, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    stage = recipe("distillation={weight: 0.3, temperature: 2}", "label_smoothing=0.1").stages[0]
    p, q = (lesson / 2).softmax(1), (logits / 2).softmax(1)
    expected = 0.7 * F.cross_entropy(logits, labels, label_smoothing=0.1) + 0.3 * 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(steps.loss_of(stage, logits, labels, lesson), expected)
    alone = recipe("distillation.weight=1").stages[0]
    (ours,) = torch.autograd.grad(steps.loss_of(alone, logits, labels, lesson), logits)
    (theirs,) = torch.autograd.grad(F.cross_entropy(logits, lesson.softmax(1)), logits)
    torch.testing.assert_close(ours, theirs)
    plain = recipe().stages[0]
    assert torch.equal(steps.loss_of(plain, logits, labels, None), F.cross_entropy(logits, labels))


def test_a_network_can_learn_from_its_teacher_alone(tmp_path: Path) -> None:
    teacher = tiny(seed=7)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    outcome = run(tmp_path / "run", "distillation.weight=1", teacher=teacher)
    assert outcome.rows[-1]["loss"] < outcome.rows[0]["loss"]
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_the_gate_penalty_is_the_squared_distance_of_every_threshold() -> None:
    gates = [GatedConv2d(2, 3, 3), GatedConv2d(3, 3, 3)]
    stage = recipe("gates={weight: 5e-6, target: 0.5}").stages[0]
    penalty = steps.gate_penalty(stage, gates)
    assert isinstance(penalty, Tensor)
    assert penalty.item() == pytest.approx(5e-6 * 6 * 1.5**2)  # thresholds start at -1
    assert steps.gate_penalty(recipe().stages[0], gates) == 0.0


def test_weight_decay_goes_by_role_and_no_parameter_is_missed_or_doubled() -> None:
    network = zoo.build("reactnet_resnet18")
    stage = recipe("optimizer={name: adam, weight_decay: {kernels: 1e-5, others: 0}}").stages[0]
    kernels, others = steps.optimizer_for(network, stage, torch.tensor(0.1)).param_groups
    assert (kernels["weight_decay"], others["weight_decay"]) == (1e-5, 0)
    named = {id(p): name for name, p in network.named_parameters()}
    assert sorted(named.values()) == sorted(named[id(p)] for p in [*kernels["params"], *others["params"]])
    convs = {f"{path}.weight" for path, m in network.named_modules() if isinstance(m, nn.Conv2d | BinaryConv2d)}
    assert {named[id(p)] for p in kernels["params"]} == convs
    flat = steps.optimizer_for(zoo.build("birealnet18"), stage, torch.tensor(0.1)).param_groups[0]["params"]
    assert sum(p.dim() == 2 for p in flat) == 16


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * 64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1))

    networks = []
    for name, parts in (("a", 1), ("b", 3)):
        torch.manual_seed(0)
        networks.append(Plain())
        run(tmp_path / name, f"accumulate={parts}", "binarization=none", network=networks[-1])
    torch.testing.assert_close(networks[0].fc.weight, networks[1].fc.weight)
    assert rows(tmp_path / "a")[-1]["loss"] == pytest.approx(rows(tmp_path / "b")[-1]["loss"])


def test_more_parts_than_divide_the_batch_leave_no_single_image() -> None:
    """BatchNorm refuses one value per channel: 10 images in 4 parts are 3, 3, 2, 2."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3))
    seen: list[int] = []
    network[1].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    stage = recipe("accumulate=4", "binarization=none").stages[0]
    step = steps.Step(network, stage, steps.optimizer_for(network, stage, torch.tensor(0.1)), torch.zeros(3))
    step(torch.randn(10, 3, 2, 2), torch.arange(10) % 3)
    assert seen == [3, 3, 2, 2]


def test_a_restored_optimiser_lies_in_memory_as_its_parameters_do() -> None:
    """A file holds everything contiguous; a fused optimiser goes through memory in the parameters' order."""
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    stage, rate = recipe("binarization=none").stages[0], torch.tensor(0.1)
    first = steps.optimizer_for(network, stage, rate)
    network(torch.randn(2, 3, 5, 5)).square().sum().backward()
    first.step()
    held = {n: {k: v.contiguous() for k, v in s.items()} for n, s in first.state_dict()["state"].items()}
    second = steps.optimizer_for(network, stage, rate)
    steps.restore(second, held, rate)
    assert all(group["lr"] is rate for group in second.param_groups)
    for parameter in network.parameters():
        kept, given = first.state[parameter]["momentum_buffer"], second.state[parameter]["momentum_buffer"]
        assert torch.equal(kept, given)
        assert given.stride() == parameter.stride()


def test_the_average_is_what_is_evaluated_and_kept(tmp_path: Path) -> None:
    network, seen = tiny(), []

    def look(_: Progress) -> None:
        seen.append(network.fc.weight.detach().clone())

    start = network.fc.weight.detach().clone()
    outcome = run(tmp_path / "run", "ema=0.5", network=network, on_step=look, options=engine.Options(log_every=1))
    average = start
    for weight in seen:
        average = average.lerp(weight, 0.5)
    torch.testing.assert_close(network.fc.weight.detach(), average)
    found = measure.evaluate(network, [(images, labels) for images, labels in _test_batches()])
    assert found.top1 == outcome.top1
    assert torch.equal(checkpoint.load(outcome.last).tensors["fc.weight"], network.fc.weight)


def _test_batches() -> list[tuple[Tensor, Tensor]]:
    split = toy().test
    return [(split.images.float() / 255, split.labels)]


def test_health_is_its_table() -> None:
    torch.manual_seed(0)
    sign, frac, ir = SignConv2d(4, 8, 3), FracConv2d(4, 8, 3), IRConv2d(4, 8, 3)
    for conv in (sign, frac):
        conv.weight.data.normal_(0, 1)
    assert health.dead({"s": sign})["s"] == pytest.approx((sign.weight.abs() > 1).float().mean().item())
    assert health.dead({"f": frac})["f"] == pytest.approx((frac.weight.abs() > 1.3).float().mean().item())
    for conv in (ir, RBNNConv2d(4, 8, 3), ReCUConv2d(4, 8, 3)):
        assert 0 < health.dead({"c": conv})["c"] < 1
        if not isinstance(conv, ReCUConv2d):
            conv.t.fill_(1e-2)
            assert health.dead({"c": conv})["c"] == 0
    before = health.signs({"s": sign})
    sign.weight.data.view(-1)[:72] *= -1
    assert health.flips(before, health.signs({"s": sign})) == {"s": 72 / 288}


def test_dead_weights_of_recu_are_those_without_gradient() -> None:
    torch.manual_seed(0)
    conv = ReCUConv2d(4, 8, 3)
    standard = health.standardised(conv.weight.detach()).mul(2 * math.sqrt(2)).requires_grad_()
    limit = -standard.detach().abs().mean() * math.log(2 - 2 * 0.85)
    (gradient,) = torch.autograd.grad(standard.clamp(-limit, limit).sum(), standard)
    assert health.dead({"c": conv})["c"] == pytest.approx((gradient == 0).float().mean().item())


def test_calibration_is_the_plain_average_over_the_batches() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9)).train()
    network[1].running_mean.fill_(9)
    network[2].eval()
    batches = [(torch.randn(6, 3, 5, 5), torch.zeros(6)) for _ in range(4)]
    assert measure.calibrate(network, batches, 3) == 3
    outputs = [network[0](images) for images, _ in batches[:3]]
    torch.testing.assert_close(network[1].running_mean, torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0))
    torch.testing.assert_close(network[1].running_var, torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0))
    assert network[1].momentum == 0.1
    assert [m.training for m in network] == [True, True, False]
    assert measure.calibrate(nn.Sequential(network[0]), batches, 3) == 0  # has no statistics
    with pytest.raises(UsageError, match=r"^calibrate: saw no batch of the 3 asked for"):
        measure.calibrate(network, [], 3)


def test_calibration_works_through_a_repeat() -> None:
    torch.manual_seed(0)
    plain, rep = nn.BatchNorm2d(16), RepBatchNorm2d(16, repeats=4)
    batches = [(torch.randn(6, 4, 5, 5), torch.zeros(6)) for _ in range(3)]
    measure.calibrate(plain, [(x.repeat(1, 4, 1, 1), y) for x, y in batches], 3)
    measure.calibrate(rep, batches, 3)
    torch.testing.assert_close(rep.running_mean, plain.running_mean)
    torch.testing.assert_close(rep.running_var, plain.running_var)


def test_accuracy_is_counted_over_all_batches_and_modes_are_kept() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    logits = torch.eye(6)[torch.tensor([0, 1, 2, 3])]
    found = measure.evaluate(network, [(logits[:3], torch.tensor([0, 1, 5])), (logits[3:], torch.tensor([3]))])
    assert (found.top1, found.images) == (75, 4)
    assert found.loss == pytest.approx(F.cross_entropy(logits, torch.tensor([0, 1, 5, 3])).item())
    assert network.training
    with pytest.raises(UsageError, match=r"^evaluate: there are no images"):
        measure.evaluate(network, [])
