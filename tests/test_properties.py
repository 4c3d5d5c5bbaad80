"""Random binary networks: shapes, costs and the merged-kernel identity hold for whatever they are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from merged_reference import assert_identical, both
from networks import assert_same_outcome, images, outcome, planned, randomize
from random_networks import Block, Network, Spec, specs
from torch import nn

from repbnn_cli import graph, surgery, verify
from repbnn_cli.rep_layers import RepMixin

often = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.generate),  # the networks are small already; making them smaller takes minutes
)
BETAS = st.sampled_from((2, 4))
INHERIT = st.sampled_from(("fold", "reshape"))
WAYS = st.sampled_from(("all", "1_over_beta", "1_over_beta2"))
KINDS = {
    "plain": ("plain", "down"),
    "residual": ("residual", "down"),
    "concatenating": ("cat", "dense", "residual", "down"),
    "gated": ("gate", "residual"),
    "grouped": ("grouped", "plain", "residual"),
    "splitting": ("split", "residual", "down"),
    "everything": ("plain", "residual", "down", "cat", "dense", "gate", "grouped", "split"),
}


def network(spec: Spec) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Network(spec))


def check(spec: Spec, **options: Any) -> None:
    model, beta = network(spec), options["beta"]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    plan = planned(model, **options)
    rep = surgery.apply(plan)
    certificate = verify.verify(model, plan, rep, gradients=True)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    if not spec.in_other_words:  # the reference replaces modules; test_products.py has another for these
        actual, expected, _ = both(model, rep, images())
        assert_identical(actual, expected)
        check_shapes(model, rep, beta)
        check_costs(model, rep)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def check_shapes(model: nn.Module, rep: nn.Module, beta: int) -> None:
    assert list(rep.state_dict()) == list(model.state_dict())
    own = dict(rep.named_modules())
    for path, module in model.named_modules():
        other = own[path]
        if isinstance(other, RepMixin):
            groups = getattr(module, "groups", 1)
            before, after = (m.weight if hasattr(m, "weight") else m.weights for m in (module, other))
            assert before.numel() == after.numel()
            if before.ndim == 4:
                out, into, *kernel = before.shape
                assert tuple(after.shape) == (out // beta, into * beta, *kernel)
            assert groups == getattr(other, "groups", 1)
        elif isinstance(module, nn.BatchNorm2d | nn.PReLU) and module.weight.numel() > 1:
            assert other.weight.numel() == beta * module.weight.numel()


def check_costs(model: nn.Module, rep: nn.Module) -> None:
    """Multiply-accumulates of every RepConv, counted at run time from what it is given and what it computes."""
    own = dict(rep.named_modules())
    repeating = [p for p, m in own.items() if isinstance(m, RepMixin)]
    assert _macs(model, repeating) == _macs(rep, repeating)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and path == "stem":
            assert torch.equal(own[path].weight, module.weight)


def _macs(network: nn.Module, paths: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}

    def count(path: str) -> Any:
        def hook(module: nn.Module, args: Any, out: torch.Tensor) -> None:
            kernel = module.weight if hasattr(module, "weight") else module.weights
            counts[path] = kernel.numel() * out.shape[2:].numel()

        return hook

    hooks = [network.get_submodule(p).register_forward_hook(count(p)) for p in paths]
    with torch.no_grad():
        network(images())
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_random_networks(kind: str) -> None:
    @settings(often, max_examples=25 if kind == "everything" else 15)
    @given(spec=specs(*KINDS[kind]), beta=BETAS, inherit=INHERIT, last_layer=WAYS)
    def holds(spec: Spec, beta: int, inherit: str, last_layer: str) -> None:
        check(spec, beta=beta, inherit=inherit, last_layer=last_layer)

    holds()


@settings(often, max_examples=15)
@given(spec=specs(*KINDS["everything"], ordinary=True), train=st.booleans())
@example(spec=Spec(8, (Block("cat", "foreign", "none", 3), Block("down", "IR-Net", "prelu")), "1x1", False), train=True)
def test_capture_and_beta_1_are_the_identity(spec: Spec, train: bool) -> None:
    model = network(spec)
    captured = graph.capture(model, (3, 8, 8))
    assert_same_outcome(model, captured.module, images(3), train=train)
    rep = surgery.apply(planned(model, beta=1))
    for a, b in zip(
        outcome(model, model, (images(3),), train=train), outcome(rep, rep, (images(3),), train=train), strict=True
    ):
        values = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
        for x, y in values:
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x, y)


@settings(often, max_examples=10)
@given(spec=specs("residual", "plain", "down", "gate", ordinary=True), beta=BETAS)
def test_batch_norm_before_the_repeat(spec: Spec, beta: int) -> None:
    model = network(spec)
    plan = planned(model, rule="bn-before-repeat", beta=beta)
    rep = surgery.apply(plan)
    certificate = verify.verify(model, plan, rep, gradients=False)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    actual, expected, _ = both(model, rep, images())
    assert_identical(actual, expected)
