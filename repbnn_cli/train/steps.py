"""A training step, and what it is made of: the loss, the optimiser, the average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli.binary_conv import BinaryConv2d, GatedConv2d
from repbnn_cli.logits import logits_of
from repbnn_cli.train.measure import RUNNING
from repbnn_cli.train.ranks import Ranks
from repbnn_cli.train.recipes import Stage


class Step:
    """One step of a stage's optimiser: `step(images, labels)`, with a batch that may be computed in parts.

    All of it happens on the device and in place, so that it can be recorded as one CUDA graph. forward: images to the
    network's output; by default the network itself. teacher: what the logits are compared with, if anything. totals:
    (3,) loss · images, correct, images, to which this rank's are added. ema: the average to carry on, {} for none.
    watch: is shown each part's loss and images before the backward, and may raise.
    """

    def __init__(
        self,
        network: nn.Module,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        totals: Tensor,
        *,
        forward: Callable[[Tensor], object] | None = None,
        teacher: nn.Module | None = None,
        ema: Mapping[str, Tensor] | None = None,
        ranks: Ranks | None = None,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self.network, self.stage, self.optimizer, self.totals = network, stage, optimizer, totals
        self.forward, self.teacher, self.ema = network if forward is None else forward, teacher, ema or {}
        self.ranks, self.watch = ranks or Ranks(), watch
        self.gated = [m for m in network.modules() if isinstance(m, GatedConv2d)]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        parts = min(self.stage.accumulate, len(labels))
        for x, y in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            logits, lesson = logits_of(self.forward(x)), self._lesson(x)
            loss = loss_of(self.stage, logits, y, lesson) + gate_penalty(self.stage, self.gated)
            if self.watch is not None:
                self.watch(loss, x)
            (loss * (len(y) / len(labels))).backward()
            with torch.no_grad():
                correct = (logits.argmax(1) == y).sum()
                self.totals += torch.stack([loss.detach() * len(y), correct, torch.full_like(loss, len(y))])
        self.ranks.average_gradients(self.parameters)
        self.optimizer.step()
        if self.ema:
            now = averaged(self.network)
            torch._foreach_lerp_([*self.ema.values()], [now[name] for name in self.ema], 1 - self.stage.ema)

    def _lesson(self, images: Tensor) -> Tensor | None:
        if not self.stage.distillation.weight or self.teacher is None:
            return None
        with torch.no_grad():
            return logits_of(self.teacher(images))


def loss_of(stage: Stage, logits: Tensor, labels: Tensor, lesson: Tensor | None) -> Tensor:
    """(1 − w)·cross-entropy with label smoothing + w·T²·KL(teacher ‖ student); logits (N, classes), labels (N,)."""
    weight, t = stage.distillation.weight, stage.distillation.temperature
    if lesson is None or not weight:
        return F.cross_entropy(logits, labels, label_smoothing=stage.label_smoothing)
    taught = F.kl_div((logits / t).log_softmax(1), (lesson / t).log_softmax(1), reduction="batchmean", log_target=True)
    taught = weight * t * t * taught
    if weight == 1:
        return taught
    return taught + (1 - weight) * F.cross_entropy(logits, labels, label_smoothing=stage.label_smoothing)


def gate_penalty(stage: Stage, gated: Sequence[GatedConv2d]) -> Tensor | float:
    """FracBNN's regulariser: weight · Σ ‖threshold − target‖² over the gated convolutions."""
    if not gated or not stage.gates.weight:
        return 0.0
    return stage.gates.weight * torch.stack([(m.threshold - stage.gates.target).square().sum() for m in gated]).sum()


def optimizer_for(network: nn.Module, stage: Stage, lr: Tensor) -> torch.optim.Optimizer:
    """The stage's optimiser over the trainable parameters, kernels of convolutions with their own weight decay."""
    made = stage.optimizer
    kernels: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in network.modules():
        name = module.kernel_name if isinstance(module, BinaryConv2d) else "weight"
        for key, parameter in module.named_parameters(recurse=False):
            # Foreign binary convolutions, too: a kernel is what a layer with a kernel_size calls its weight(s).
            is_kernel = hasattr(module, "kernel_size") and key in (name, "weights")
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                (kernels if is_kernel else others).append(parameter)
    groups = [{"params": kernels, "weight_decay": made.weight_decay.kernels},
              {"params": others, "weight_decay": made.weight_decay.others}]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    fused = True if lr.is_cuda else None  # on a GPU the only kind that takes the rate from the device
    if made.name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=made.betas, fused=fused, capturable=lr.is_cuda)
    return torch.optim.SGD(groups, lr=lr, momentum=made.momentum, nesterov=made.nesterov, fused=fused)


def restore(optimizer: torch.optim.Optimizer, state: Mapping[int, Any], lr: Tensor) -> None:
    """Gives an optimiser of `optimizer_for` the state that another one of the same stage had."""
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for group in optimizer.param_groups:  # load_state_dict puts copies there
        group["lr"] = lr
    for parameter, held in optimizer.state.items():
        for name, value in held.items():
            # A file holds everything contiguous, and a fused optimiser goes through memory in the parameter's order.
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                held[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def averaged(network: nn.Module) -> dict[str, Tensor]:
    """What an average is kept of: parameters and BatchNorm statistics; other buffers are not made to be averaged."""
    parameters = {name for name, _ in network.named_parameters()}
    return {
        name: tensor for name, tensor in network.state_dict().items() if name in parameters or name.endswith(RUNNING)
    }


@torch.no_grad()
def copy_into(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors into the network's own, in place, so that an optimiser keeps its hold on them."""
    if tensors:
        own = network.state_dict()
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def not_persistent(network: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict leaves out: a network's own code may count in them."""
    persistent = network.state_dict()
    return {name: buffer for name, buffer in network.named_buffers() if name not in persistent}


def put_back(network: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Writes into the network what `not_persistent` found in one like it."""
    own = dict(network.named_buffers())
    for name, tensor in buffers.items():
        own[name].copy_(tensor)
