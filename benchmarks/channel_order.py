"""Reorders the channels of a CIFAR ResNet so that filters which will share a RepBconv's channel are alike.

    python benchmarks/channel_order.py checkpoints/irnet_resnet20_cifar10.pth --data cifar10:DIR -o reordered.pth
    repbnn transform reordered.pth --beta 2 -o reordered.repbnn.pt
    repbnn calibrate reordered.repbnn.pt --data cifar10:DIR

`repbnn transform` lets filters o and o + O/2 share a channel. The network computes the same in any order of a stage's
channels; here it is the order in which one signal per pair misses the least of the BatchNorms' outputs, over all layers
of a stage: by the covariance on 512 images (`--by outputs`), or by what the kernels' signs have in common, weighted as
for inputs that resemble their neighbours (`--by kernels`). What it is worth: docs/inheritance.md.
"""

from __future__ import annotations

import argparse

import networkx
import torch
from torch import Tensor, nn

from repbnn_cli import data, source
from repbnn_cli.train import feeds, recipes

Order = list[int]  # position → channel of the network as it was
NEIGHBOURS = 0.7  # assumed correlation of binarised inputs one pixel apart
IMAGES = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--by", choices=("outputs", "kernels"), default="outputs")
    parser.add_argument("-o", "--output", required=True)
    given = parser.parse_args()
    network = source.from_checkpoint(given.checkpoint).model.eval()
    images = first_images(given.data)
    covariances = covariances_of(network, images)
    stages = by_stage(covariances)
    costs = [
        sum(missed(cov if given.by == "outputs" else by_kernels(network, norm, cov)) for norm, cov in group)
        for group in stages
    ]
    orders = orders_of(costs)
    for stage, (group, order) in enumerate(zip(stages, orders, strict=True), 1):
        was, now = (
            sum(float(missed(cov)[pairs(o)].sum()) for _, cov in group) / len(group) for o in (range(len(order)), order)
        )
        print(f"stage {stage}: one signal per pair misses {was:.1%} of the variance as it is, {now:.1%} reordered")
    with torch.no_grad():
        before = network(images)
        network.load_state_dict(reordered(network.state_dict(), orders))
        print(f"logits: max |Δ| = {float((network(images) - before).abs().max()):.1g}")
    torch.save({"state_dict": network.state_dict()}, given.output)


def first_images(spec: str) -> Tensor:
    """(IMAGES, 3, 32, 32), normalised, not augmented."""
    found = data.load(spec)
    recipe = recipes.load("irnet-cifar10-resnet20").header.model_copy(update={"augmentation": "none", "batch": IMAGES})
    feed = feeds.open_feed(found, recipe, seed=0, device=torch.device("cpu"), channels_last=False)
    return next(iter(feed.train.epoch(0)))[0]


def covariances_of(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Name of each BatchNorm over a stream → (C, C) covariance of its outputs."""
    found: dict[str, Tensor] = {}

    def keep(name: str, out: Tensor) -> None:
        found[name] = out.transpose(0, 1).flatten(1).cov()

    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: keep(name, out))
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return found


def by_stage(covariances: dict[str, Tensor]) -> list[list[tuple[str, Tensor]]]:
    """The BatchNorms of stages 1, 2 and 3; the stem's feeds stage 1."""
    starts = (("layer1.", "bn1"), "layer2.", "layer3.")
    return [[(name, cov) for name, cov in covariances.items() if name.startswith(start)] for start in starts]


def by_kernels(network: nn.Module, norm: str, covariance: Tensor) -> Tensor:
    """The covariance of a BatchNorm's outputs as its kernels let expect it; of the measured one only the variances."""
    kernel = network.get_submodule(norm.replace("bn", "conv")).weight.detach().double()
    if norm != "bn1":
        kernel = (kernel - kernel.mean((1, 2, 3), keepdim=True)).sign()
    size = kernel.shape[2]
    place = torch.cartesian_prod(torch.arange(size), torch.arange(size)).double()
    shared = NEIGHBOURS ** torch.cdist(place, place, p=1)
    flat = kernel.flatten(2)
    products = torch.einsum("acp,pq,bcq->ab", flat, shared, flat)
    scale = (covariance.diagonal().double() / products.diagonal()).sqrt()
    return products * scale * scale[:, None]


def missed(covariance: Tensor) -> Tensor:
    """(C, C): the share of a layer's variance that the best single signal for channels a and b misses of the two."""
    variance = covariance.diagonal()
    middle = (variance + variance[:, None]) / 2
    half = (((variance - variance[:, None]) / 2) ** 2 + covariance**2).sqrt()
    return ((middle - half) / variance.sum()).double()


def pairs(order: Order | range) -> tuple[list[int], list[int]]:
    return list(order[: len(order) // 2]), list(order[len(order) // 2 :])


def orders_of(costs: list[Tensor]) -> list[Order]:
    """An order for each stage. Old channels lie where the shortcut's zeros put them, in the middle of the next stage's,
    so that each of them shares with a new one."""
    first = matched(costs[0], [(a, b) for a in range(len(costs[0])) for b in range(a)])
    orders = [[a for a, _ in first] + [b for _, b in first]]
    for cost in costs[1:]:
        width, quarter = len(cost), len(cost) // 4
        old = range(quarter, 3 * quarter)
        new = [*range(quarter), *range(3 * quarter, width)]
        partner = dict(matched(cost, [(a, b) for a in old for b in new]))
        partner |= {b: a for a, b in partner.items()}
        order = [-1] * quarter + [quarter + c for c in orders[-1]] + [-1] * quarter
        orders.append([c if c >= 0 else partner[order[(p + width // 2) % width]] for p, c in enumerate(order)])
    return orders


def matched(cost: Tensor, allowed: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs of a perfect matching of the least cost, each as in `allowed`."""
    graph = networkx.Graph()
    graph.add_weighted_edges_from((a, b, -float(cost[a, b])) for a, b in allowed)
    known = set(allowed)
    found = networkx.max_weight_matching(graph, maxcardinality=True)
    return sorted(edge if edge in known else edge[::-1] for edge in found)


def reordered(state: dict[str, Tensor], orders: list[Order]) -> dict[str, Tensor]:
    made = {}
    for name, tensor in state.items():
        parts = name.split(".")
        stage = int(parts[0][5]) if parts[0].startswith("layer") else {"linear": 4, "bn2": 3}.get(parts[0], 1)
        out = None if stage == 4 else orders[stage - 1]
        if parts[0] == "linear" or (tensor.ndim == 4 and parts[0] != "conv1"):
            enters = stage > 1 and (parts[0] == "linear" or parts[1:3] == ["0", "conv1"])
            into = orders[stage - 2] if enters else orders[stage - 1]
            tensor = tensor[:, into] if tensor.ndim > 1 else tensor
        made[name] = tensor[out].clone() if out is not None and tensor.ndim else tensor.clone()
    return made


if __name__ == "__main__":
    main()
