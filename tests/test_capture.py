"""A captured network computes and learns what the network does and is left alone; what cannot be captured is named."""

from __future__ import annotations

import copy
import inspect
import linecache
from typing import Any

import numpy as np
import pytest
import torch
from idioms import IDIOMS, Tied, Unused
from networks import Residual, Sign, assert_same_outcome, conv, images, randomize, tensors
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import graph
from repbnn_cli.errors import CaptureError
from repbnn_cli.graph.interception import FunctionCall, interceptable


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    with interceptable():
        return randomize(IDIOMS[name]())


# ---------------------------------------------------------------------------------------------------------------------
# The same computation and the same learning


@pytest.mark.parametrize("name", IDIOMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_captured_equals_source_in_outputs_gradients_and_buffers(name: str, dtype: torch.dtype) -> None:
    model = built(name).to(dtype)
    captured = graph.capture(model, (3, 8, 8)).module
    for train in (False, True):
        assert_same_outcome(model, captured, images(dtype=dtype), train=train)


@pytest.mark.parametrize("name", IDIOMS)
def test_captured_in_train_mode_runs_in_both_modes(name: str) -> None:
    model = built(name).train()
    captured = graph.capture(model, (3, 8, 8)).module
    assert captured.training
    for train in (True, False):
        assert_same_outcome(model, captured, images(), train=train)


@pytest.mark.parametrize("name", IDIOMS)
def test_batch_size_is_not_frozen(name: str) -> None:
    model = built(name)
    captured = graph.capture(model, (3, 8, 8)).module
    for batch in (1, 5):
        assert_same_outcome(model, captured, images(batch), train=False)


@pytest.mark.parametrize("name", IDIOMS)
def test_deepcopy_computes_the_same_and_shares_nothing(name: str) -> None:
    captured = graph.capture(built(name), (3, 8, 8)).module
    x = images()
    torch.manual_seed(0)
    expected = tensors(captured(x))
    copied = copy.deepcopy(captured)
    state = captured.state_dict()
    assert list(copied.state_dict()) == list(state)
    pointers = {t.data_ptr() for t in state.values() if t.numel()}
    assert not pointers & {t.data_ptr() for t in copied.state_dict().values() if t.numel()}
    assert [n.meta["where"] for n in copied.graph.nodes] == [n.meta["where"] for n in captured.graph.nodes]
    fresh = copy.deepcopy(graph.capture(built(name), (3, 8, 8)).module)
    torch.manual_seed(0)
    for a, b in zip(tensors(fresh(x)), expected, strict=True):
        assert torch.equal(a, b)


def test_every_binary_convolution_is_a_node_of_its_own() -> None:
    captured = graph.capture(built("BlockWithScale"), (3, 8, 8)).module
    called = [str(n.target) for n in captured.graph.nodes if n.op == "call_module"]
    assert "block.conv" in called
    assert "block" not in called


@pytest.mark.parametrize("name", ["FunctionInForward", "BoundApply"])
def test_custom_functions_are_nodes(name: str) -> None:
    captured = graph.capture(built(name), (3, 8, 8)).module
    functions = [n.target.function for n in captured.graph.nodes if isinstance(n.target, FunctionCall)]
    assert functions
    assert set(functions) == {Sign}


def test_an_apply_that_was_bound_before_is_seen_too() -> None:
    """`sign = Sign.apply` at module level or in __init__, long before anybody thinks of capturing."""
    torch.manual_seed(0)
    model = randomize(IDIOMS["BoundApply"]())
    captured = graph.capture(model, (3, 8, 8)).module
    assert [n.target.function for n in captured.graph.nodes if isinstance(n.target, FunctionCall)] == [Sign]
    assert_same_outcome(model, captured, images(), train=True)


def test_nothing_stays_intercepted() -> None:
    apply, zeros = torch.autograd.Function.__dict__["apply"], torch.zeros
    code = apply.__func__.__code__
    with interceptable():
        assert apply.__func__.__code__ is not code
        with interceptable():
            pass
        assert apply.__func__.__code__ is not code
        x = torch.tensor([0.5, -2.0], requires_grad=True)
        Sign.apply(x).sum().backward()
        assert x.grad.tolist() == [1.0, 0.0]
    with pytest.raises(RuntimeError, match="inside"), interceptable():
        raise RuntimeError("inside")
    assert torch.autograd.Function.__dict__["apply"] is apply
    assert apply.__func__.__code__ is code
    assert torch.zeros is zeros


def test_in_place_writes_are_recorded_in_their_order() -> None:
    """A second run starts from its own input, not from what the first one wrote."""
    model = built("InPlace")
    captured = graph.capture(model, (3, 8, 8)).module
    x = images()
    kept = x.clone()
    assert torch.equal(captured(x), captured(x))
    assert torch.equal(x, kept)


def test_several_inputs_and_defaults() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 4), nn.Conv2d(2, 4, 1)

        def forward(self, x: Tensor, y: Tensor, scale: float = 0.5, *, flip: bool = False) -> Tensor:
            assert not flip
            return self.a(x) + self.b(y) * scale

    model = Two()
    captured = graph.capture(model, [(3, 8, 8), (2, 8, 8)])
    assert captured.example == ((2, 3, 8, 8), (2, 2, 8, 8))
    assert_same_outcome(model, captured.module, images(), images(channels=2), train=True)


def test_shapes_only_gives_the_same_graph_without_reading_a_kernel() -> None:
    model = Residual()
    full = graph.capture(model, (3, 8, 8))
    with torch.no_grad():
        model.conv1.weight.fill_(float("nan"))
    shapes = graph.capture(model, (3, 8, 8), shapes_only=True)
    assert str(shapes.graph) == str(full.graph)
    for a, b in zip(shapes.graph.nodes, full.graph.nodes, strict=True):
        assert getattr(a.meta["value"], "shape", None) == getattr(b.meta["value"], "shape", None)


# ---------------------------------------------------------------------------------------------------------------------
# Names, order, sharing


def test_state_dict_keeps_names_order_and_what_is_never_called() -> None:
    model = built("Unused")
    assert isinstance(model, Unused)
    captured = graph.capture(model, (3, 8, 8)).module
    assert list(captured.state_dict()) == list(model.state_dict())
    assert [n for n, _ in captured.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert "scratch" not in captured.state_dict()
    assert torch.equal(captured.scratch, model.scratch)
    assert captured.nothing is None
    assert [n for n, _ in captured.named_modules()] == [n for n, _ in model.named_modules()]
    for name, tensor in captured.state_dict().items():
        assert tensor.data_ptr() == model.state_dict()[name].data_ptr()


def test_tied_parameters_stay_tied() -> None:
    model = built("Tied")
    assert isinstance(model, Tied)
    captured = graph.capture(model, (3, 8, 8)).module
    assert captured.other.weight is captured.conv.weight
    copied = copy.deepcopy(captured)
    assert copied.other.weight is copied.conv.weight
    assert copied.conv.weight is not model.conv.weight


def test_constants_made_in_forward_are_no_parameters_and_stay_off_the_model() -> None:
    model = built("ConstantsInForward")
    attributes = set(vars(model)), set(model._buffers)
    captured = graph.capture(model, (3, 8, 8)).module
    assert (set(vars(model)), set(model._buffers)) == attributes
    assert list(captured.state_dict()) == list(model.state_dict())


def test_train_and_eval_reach_every_leaf() -> None:
    model = randomize(Residual())
    captured = graph.capture(model, (3, 8, 8)).module
    captured.train()
    assert all(m.training for m in captured.modules())
    before = model.bn1.running_mean.clone()
    captured(images())
    assert not torch.equal(model.bn1.running_mean, before)
    captured.eval()
    assert not any(m.training for m in captured.modules())


# ---------------------------------------------------------------------------------------------------------------------
# The model afterwards


class Restless(nn.Module):
    """Changes whatever it can reach in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.bn = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(3))
        self.steps, self.history, self.cache = 0, [], {}

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.history.append(x)
        self.cache["last"] = x
        self.features = x
        self.calls += 1
        self.bn.weight.data.mul_(0.5)
        with torch.no_grad():
            self.bn.bias.add_(1)
        return self.bn(self.conv(x)) * torch.rand(())


@pytest.mark.parametrize("training", [False, True])
def test_capture_leaves_the_model_as_it_was(training: bool) -> None:
    model = Restless().train(training)
    model.conv.eval()
    model.bn.weight.requires_grad_(False)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    state = copy.deepcopy(model.state_dict())
    pointers = {n: t.data_ptr() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    graph.capture(model, (3, 8, 8))
    assert torch.equal(torch.get_rng_state(), random)
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == pointers
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert (model.steps, model.history, model.cache) == (0, [], {})
    assert not hasattr(model, "features")
    assert [p.requires_grad for p in model.parameters()] == [True, False, True]
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    assert model.bn.bias.grad is None
    model(images())  # still its own forward


def test_capture_leaves_the_model_as_it_was_when_it_fails() -> None:
    class Fails(Restless):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("no luck")

    model = Fails()
    model.conv.eval()
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    lookup = nn.Module.__getattr__
    with pytest.raises(CaptureError, match="no luck"):
        graph.capture(model, (3, 8, 8))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert (model.steps, model.history, model.cache) == (0, [], {})
    assert nn.Module.__getattr__ is lookup


# ---------------------------------------------------------------------------------------------------------------------
# What is said, and what is refused


def line_of(function: Any, text: str) -> str:
    """file.py:12 of the line of `function` that holds `text`."""
    lines, start = inspect.getsourcelines(function)
    offset = next(i for i, line in enumerate(lines) if text in line)
    return f"test_capture.py:{start + offset}"


def test_frozen_branch_is_noted_with_its_place() -> None:
    network = graph.capture(built("FrozenBranch"), (3, 8, 8))
    (note,) = network.notes
    place = IDIOMS["FrozenBranch"].body
    lines, start = inspect.getsourcelines(place)
    number = start + next(i for i, line in enumerate(lines) if "if x.abs()" in line)
    assert note == f"idioms.py:{number}: a branch on a tensor's value is frozen to what the example input did"


@pytest.mark.parametrize("name", [n for n in IDIOMS if n != "FrozenBranch"])
def test_nothing_is_noted_where_nothing_is_frozen(name: str) -> None:
    assert graph.capture(built(name), (3, 8, 8)).notes == []


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.register_buffer("mean", torch.zeros(4))


class BufferAssigned(Refused):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.mean = x.mean((0, 2, 3))
        return x


class SummedUp(Refused):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        total = torch.zeros(4)
        total += x.mean((0, 2, 3))
        return x * total.view(1, 4, 1, 1)


class PutTogether(Refused):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        parts = torch.empty(2, 4, 8, 8)
        parts[:, :2] = x[:, 2:]
        return parts


class OutsideTorch(Refused):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.from_numpy(x.detach().numpy().round())


class WrongShape(Refused):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.view(-1, 7)


class Vanishing(Refused):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x @ self.missing


@pytest.mark.parametrize(
    ("model", "text", "says"),
    [
        (BufferAssigned, "self.mean =", ["assigns `mean` of the network", "self.mean.copy_(...)", "leaf: true"]),
        (SummedUp, "total +=", ["the forward makes of numbers alone", "`x.new_zeros(8)`", "`z = z + y` for `z += y`"]),
        (PutTogether, "parts[:, :2]", ["writes into a tensor that the forward makes", "`x.new_zeros(8)`"]),
        (OutsideTorch, "from_numpy", ["cannot be captured", "leaf: true", "module of its own"]),
        (
            WrongShape,
            "x.view",
            [
                "the network itself does not run here",
                "(2, 3, 8, 8)",
                "shape '[-1, 7]' is invalid",
                "check --input-size",
            ],
        ),
        (Vanishing, "self.missing", ["the network itself does not run here", "no attribute 'missing'"]),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_refusals_name_file_line_construct_and_remedy(model: type[nn.Module], text: str, says: list[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        graph.capture(model(), (3, 8, 8))
    message = str(caught.value)
    assert line_of(model.forward, text) in message
    assert "\n" not in message
    for part in says:
        assert part in message
    assert caught.value.exit_code == 3


def test_the_construct_is_quoted() -> None:
    with pytest.raises(CaptureError) as caught:
        graph.capture(WrongShape(), (3, 8, 8))
    assert "`return x.view(-1, 7)`" in str(caught.value)
    linecache.checkcache()


@pytest.mark.parametrize("model", [BufferAssigned, OutsideTorch])
def test_the_remedy_works(model: type[nn.Module]) -> None:
    """What the messages advise, a leaf, lets each of them through."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 1.5

    whole = Whole()
    network = graph.capture(whole, (3, 8, 8), leaf=lambda path, m: True if isinstance(m, Refused) else None)
    assert [str(n.target) for n in network.graph.nodes if n.op == "call_module"] == ["inner"]
    x = images()
    for train in (True, False):
        whole.train(train)
        network.module.train(train)
        assert torch.equal(network.module(x), whole(x))


def test_a_mode_branch_that_changes_nothing_is_let_through() -> None:
    class Harmless(Refused):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.seen = True
            return F.hardtanh(self.conv(x))

    model = Harmless()
    assert_same_outcome(model, graph.capture(model, (3, 8, 8)).module, images(), train=True)


def test_shapes_only_looks_at_values_where_the_network_decides_on_them() -> None:
    model = built("FrozenBranch")
    network = graph.capture(model, (3, 8, 8), shapes_only=True)
    assert len(network.notes) == 1
    assert_same_outcome(model, network.module, images(), train=False)


# ---------------------------------------------------------------------------------------------------------------------
# Fallbacks


class Outside(nn.Module):
    """Leaves torch halfway, between layers of its own."""

    def __init__(self, kernel: bool) -> None:
        super().__init__()
        self.scale = nn.Conv2d(4, 4, 1) if kernel else nn.ReLU()
        self.gain = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.clip(self.gain(self.scale(x)).detach().numpy(), 0, 1))


class HelperOutside(Refused):
    def __init__(self, kernel: bool = False) -> None:
        super().__init__()
        self.helper = Outside(kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(self.conv(x)) * 2


def test_a_block_without_convolutions_is_kept_whole_where_it_cannot_be_traced() -> None:
    model = HelperOutside().eval()
    network = graph.capture(model, (3, 8, 8))
    first, second = network.attempts
    assert first.startswith("recorded, every block traced into: ")
    assert "in module helper cannot be captured" in first
    assert second == "recorded, with helper kept whole: 5 operators"
    assert "helper cannot be traced into and is kept whole" in network.notes
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(network.module(x), model(x))


def test_but_not_one_that_would_hide_a_convolution() -> None:
    with pytest.raises(CaptureError, match="in module helper cannot be captured"):
        graph.capture(HelperOutside(kernel=True), (3, 8, 8))


def test_one_attempt_is_enough_as_a_rule() -> None:
    attempts = graph.capture(Residual(), (3, 8, 8)).attempts
    assert len(attempts) == 1
    assert attempts[0].startswith("recorded, every block traced into: ")


class HeadOfAnotherSize(nn.Module):
    """A fault of the network's own, in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(x.flatten(1)) if self.training else x


def test_a_network_that_does_not_run_in_training_is_told_so() -> None:
    with pytest.raises(
        CaptureError, match=r"itself does not run here \(torch .*, in training mode\) on an input \(2, 3, "
    ):
        graph.capture(HeadOfAnotherSize().eval(), (3, 8, 8))
    with pytest.raises(CaptureError, match=r"check --input-size \(of images 3x32x32\) and"):
        graph.capture(HeadOfAnotherSize().eval(), (8,))


def test_a_network_that_does_not_run_is_no_matter_of_attempts() -> None:
    with pytest.raises(CaptureError, match="the network itself does not run here") as caught:
        graph.capture(nn.Sequential(nn.Sequential(nn.ReLU(), nn.MaxPool2d(7)), nn.Conv2d(3, 3, 9)), (3, 2, 2))
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize("name", ["graph", "meta", "code", "in_training"])
def test_a_name_that_graph_modules_have_is_refused_in_one_line(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Conv2d(3, 4, 3))
    with pytest.raises(CaptureError, match=rf"^self.{name} of Sequential: torch.fx's GraphModule has an attribute"):
        graph.capture(model, (3, 8, 8))


def test_a_decision_on_what_took_many_steps_is_captured_in_time_that_grows_with_them() -> None:
    """Spectral normalisation by 40 power iterations: each step uses the last one twice, 2⁴⁰ paths in all."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3) * 3)

        def forward(self, x: Tensor) -> Tensor:
            u = self.weight[0]
            for _ in range(40):
                v = self.weight.t() @ u
                v = v / v.norm()
                u = self.weight @ v
                u = u / u.norm()
            sigma = u @ (self.weight @ v)
            weight = self.weight / sigma if sigma > 1 else self.weight
            return F.conv2d(x, weight[:, :, None, None])

    model = Spectral().eval()
    x = images(2, 3)
    assert torch.equal(graph.capture(model, (3, 8, 8)).module(x), model(x))


def test_example_inputs_are_real_numbers_whatever_comes_first() -> None:
    model = nn.Module()
    model.counts = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    assert [x.dtype for x in graph.random_inputs(model, [(1, 2)], seed=0)] == [torch.float64]
