"""Owns the registry of networks: name → architecture, built without reading a file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
from torch import nn

from repbnn_cli.errors import UsageError
from repbnn_cli.zoo import birealnet, float_resnet, fracbnn, irnet, rbnn, reactnet, recu


@dataclass(frozen=True)
class Arch:
    """One network: what it is called, what it eats, and how it is built.

    input_shape is (channels, height, width); unit_range says that inputs lie in [0, 1] instead of being normalised
    (fracbnn_imagenet takes normalised images and undoes it itself);
    ignored and ignored_prefix name tensors that a checkpoint may hold and that the network does not need.
    """

    name: str
    network: str
    method: str
    data: str
    builder: Callable[[int], nn.Module]
    unit_range: bool = False
    ignored: frozenset[str] = frozenset()
    ignored_prefix: str | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (3, 32, 32) if self.data == "CIFAR-10" else (3, 224, 224)

    @property
    def num_classes(self) -> int:
        return 10 if self.data == "CIFAR-10" else 1000

    def ignores(self, tensor: str) -> bool:
        """Whether a checkpoint's tensor of this name is to be left unread."""
        prefixed = self.ignored_prefix is not None and tensor.startswith(self.ignored_prefix)
        return prefixed or tensor in self.ignored


def _cifar(name: str, network: str, method: str, builder: Callable[[int], nn.Module]) -> Arch:
    return Arch(name, network, method, "CIFAR-10", builder)


def _imagenet(name: str, network: str, method: str, builder: Callable[[int], nn.Module]) -> Arch:
    return Arch(name, network, method, "ImageNet", builder)


# FracBNN's encoder publishes its thermometer levels, sized by the training batch; ours makes them in forward.
_PLACEHOLDER = frozenset({"encoder.placeholder"})

_ALL = (
    _cifar("irnet_resnet20", "ResNet-20", "IR-Net", irnet.irnet_resnet20),
    _cifar("recu_resnet20", "ResNet-20", "ReCU", recu.recu_resnet20),
    _cifar("rbnn_resnet20", "ResNet-20", "RBNN", rbnn.rbnn_resnet20),
    _cifar("rbnn_resnet20_bireal", "ResNet-20", "RBNN-bireal", rbnn.rbnn_resnet20_bireal),
    _cifar("irnet_resnet18", "ResNet-18", "IR-Net", irnet.irnet_resnet18),
    _cifar("rbnn_resnet18", "ResNet-18", "RBNN", rbnn.rbnn_resnet18),
    _cifar("recu_resnet18", "ResNet-18", "ReCU", recu.recu_resnet18),
    _cifar("irnet_vgg_small", "VGG-small", "IR-Net", irnet.irnet_vgg_small),
    _cifar("rbnn_vgg_small", "VGG-small", "RBNN", rbnn.rbnn_vgg_small),
    _cifar("recu_vgg_small", "VGG-small", "ReCU", recu.recu_vgg_small),
    Arch(
        "fracbnn_resnet20",
        "ResNet-20",
        "FracBNN",
        "CIFAR-10",
        fracbnn.fracbnn_resnet20,
        unit_range=True,
        ignored=_PLACEHOLDER,
    ),
    Arch(
        "fracbnn_resnet20_1bit",
        "ResNet-20",
        "FracBNN (1 bit)",
        "CIFAR-10",
        fracbnn.fracbnn_resnet20_1bit,
        unit_range=True,
        ignored=_PLACEHOLDER,
    ),
    _cifar("resnet20", "ResNet-20", "full precision", float_resnet.resnet20),
    _cifar("resnet20_bireal", "ResNet-20-bireal", "full precision", float_resnet.resnet20_bireal),
    _imagenet("birealnet18", "ResNet-18", "Bi-Real Net", birealnet.birealnet18),
    _imagenet("birealnet34", "ResNet-34", "Bi-Real Net", birealnet.birealnet34),
    _imagenet("irnet_imagenet_resnet18", "ResNet-18", "IR-Net", irnet.irnet_imagenet_resnet18),
    _imagenet("irnet_imagenet_resnet34", "ResNet-34", "IR-Net", irnet.irnet_imagenet_resnet34),
    _imagenet("rbnn_imagenet_resnet18", "ResNet-18", "RBNN", rbnn.rbnn_imagenet_resnet18),
    _imagenet("rbnn_imagenet_resnet34", "ResNet-34", "RBNN", rbnn.rbnn_imagenet_resnet34),
    _imagenet("recu_imagenet_resnet18", "ResNet-18", "ReCU", recu.recu_imagenet_resnet18),
    _imagenet("recu_imagenet_resnet34", "ResNet-34", "ReCU", recu.recu_imagenet_resnet34),
    _imagenet("reactnet_a", "ReActNet-A", "ReActNet", reactnet.reactnet_a),
    _imagenet("adambnn_reactnet_a", "ReActNet-A", "AdamBNN", reactnet.adambnn_reactnet_a),
    _imagenet("reactnet_resnet18", "ResNet-18", "ReActNet", reactnet.reactnet_resnet18),
    Arch(
        "fracbnn_imagenet",
        "ReActNet-A",
        "FracBNN",
        "ImageNet",
        fracbnn.fracbnn_imagenet,
        ignored=_PLACEHOLDER,
        ignored_prefix="teacher.",
    ),
)
ARCHS: Mapping[str, Arch] = MappingProxyType({arch.name: arch for arch in _ALL})


def build(name: str, num_classes: int | None = None) -> nn.Module:
    """A freshly initialised network, in train mode; raises UsageError for a name that is not in ARCHS."""
    if name not in ARCHS:
        nearest = difflib.get_close_matches(name, ARCHS, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(nearest)}; " if nearest else ""
        raise UsageError(f"unknown network '{name}'; {hint}see 'repbnn zoo'")
    arch = ARCHS[name]
    return arch.builder(arch.num_classes if num_classes is None else num_classes)


@cache
def signature(name: str) -> Mapping[str, tuple[int, ...]]:
    """Names → shapes of the network's state dict, in its order; built on the meta device, so nothing is allocated."""
    with torch.device("meta"):
        state = build(name).state_dict()
    return MappingProxyType({key: tuple(value.shape) for key, value in state.items()})
