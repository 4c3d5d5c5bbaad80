"""The packed file: a network as inference needs it, 1-bit kernels as bits and every BatchNorm as scale and shift.

A safetensors file, described for readers in other languages in docs/packed-format.md. Its data are, byte for byte, what
`repbnn profile` calls "Packed": both go by `sizes.deployed`. Its header holds, as JSON under `repbnn_packed`:

    version               1
    source, rules         how the network is built, as in a result file (result.py); rules is null for a plain network
    options, provenance   as in a result file; `file` names what it was exported from, with its SHA-256
    kernels               path → shape (O, I/groups, k...), which scale its signs have, and weights with sign 0
    norms                 path → whether the BatchNorm has weight and bias of its own
    unstored              name → shape, of tensors in the state dict that only training needs; they come back as zeros.
                          Or name → name of the stored tensor that it is tied to
    sha256                of all tensors' bytes in order of their names, then of the rest of this JSON

Loading makes the graph again from source and rules, so no code is in the file. A BatchNorm comes back with mean 0,
variance 1 and ε = 0, and the convolutions with their kernel given (packed_kernels.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import repbnn_cli
from repbnn_cli import checkpoint, result, source, surgery, writing
from repbnn_cli.checkpoint import reading
from repbnn_cli.checkpoint.tied import assign
from repbnn_cli.deploy.forms import kernel_signs, kernel_zeros
from repbnn_cli.deploy.match import folded
from repbnn_cli.deploy.packed_kernels import as_stored, give_kernel, scale_behind, scale_beside
from repbnn_cli.deploy.zeros import applied_kernel
from repbnn_cli.errors import CheckpointError, UsageError
from repbnn_cli.graph import Network
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.profiler import shapes
from repbnn_cli.profiler.sizes import Stored, called_kernels, deployed, state_tensors
from repbnn_cli.recognize import Layer, recognize
from repbnn_cli.rep_layers import is_batch_norm
from repbnn_cli.result import ModelSource
from repbnn_cli.rules import RuleSet, loads
from repbnn_cli.source import Origin
from repbnn_cli.user_code.cpu_only import running

KEY = checkpoint.PACKED
VERSION = 1


@dataclass(frozen=True)
class Packed:
    """tensors and header as they stand in the file; zeros: weights with sign 0 that became +1."""

    tensors: Mapping[str, Tensor]
    header: Mapping[str, Any]

    @property
    def data_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def zeros(self) -> int:
        return sum(kernel["zeros"] for kernel in self.header["kernels"].values())


@dataclass(frozen=True)
class Opened:
    """A packed file as a network again, with what the profiler and `fuse` want to know."""

    path: Path
    header: Mapping[str, Any]
    origin: Origin
    network: Network
    layers: dict[str, Layer]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def pack(
    network: Network, layers: Mapping[str, Layer], origin: Origin, *, rules: RuleSet | None = None,
    about: Mapping[str, Any] | None = None, zeros_as_plus: bool = False,
) -> Packed:  # fmt: skip
    """A network in eval mode as packed tensors. about: plain values for the header.

    Raises UsageError for what has no packed form: kernels that are not ±1 times a scale, norms without statistics,
    parameters that are not float32.
    zeros_as_plus: weights with sign 0 become +1, which changes what the network computes; else they are refused.
    """
    for dtype in {p.dtype for p in network.module.parameters() if p.is_floating_point()} - {torch.float32}:
        kind = str(dtype).removeprefix("torch.")
        raise UsageError(f"the network computes in {kind}, a packed one in float32; build it in float32 and save that")
    packing = _Packing(network, zeros_as_plus)
    kernels = called_kernels(network, layers)
    for path, module, stored, layer in _stored(network, layers):
        calls = kernels.get(id(fetch(network.module, path))) if module is None else None
        if calls is None:
            packing.add(path, module, stored, layer)
        else:
            packing.called(path, calls)
    header = {
        "version": VERSION,
        "source": origin.as_plain(),
        "rules": rules.text if rules else None,
        "options": rules.options.model_dump() if rules else None,
        **(about or {}),
        "kernels": packing.kernels,
        "norms": packing.norms,
        "unstored": packing.unstored(),
        "provenance": {"repbnn": repbnn_cli.__version__, "torch": torch.__version__},
    }
    return Packed(packing.tensors, header | {"sha256": _digest(packing.tensors, header)})


def save(packed: Packed, path: str | os.PathLike[str], *, force: bool = False) -> int:
    """Writes the file atomically; the bytes of its header, length field included."""
    writing.save_safetensors(packed.tensors, {KEY: _json(packed.header)}, path, force=force)
    return Path(path).stat().st_size - packed.data_bytes


def _stored(
    network: Network, layers: Mapping[str, Layer]
) -> Iterator[tuple[str, nn.Module | None, list[Stored], Layer | None]]:
    """Every module and parameter that the graph uses, once, in order of the graph: as the profiler counts them."""
    nodes = list(network.graph.nodes)
    called = [fetch(network.module, str(n.target)) for n in nodes if n.op == "call_module"]
    owned = {id(t) for module in called for _, t in state_tensors(module)}
    counted: set[int] = set()
    in_state = {id(t): name for name, t in reversed(list(state_tensors(network.module)))}
    for node in nodes:
        path = str(node.target)
        if node.op == "call_module":
            module: nn.Module = fetch(network.module, path)
            own = {n: t for n, t in state_tensors(module) if id(t) not in counted}
            counted |= {id(t) for t in own.values()}
            if own:
                layer = layers.get(path)
                yield path, module, deployed(module, layer, own), layer
        elif node.op == "get_attr":
            value = fetch(network.module, path)
            if isinstance(value, Tensor) and id(value) in in_state and id(value) not in (owned | counted):
                counted.add(id(value))
                yield path, None, [Stored("", "plain", 0)], None


@dataclass
class _Packing:
    """The tensors of a packed file, as they are collected."""

    network: Network
    zeros_as_plus: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms: dict[str, bool] = field(default_factory=dict)

    def add(self, path: str, module: nn.Module | None, stored: list[Stored], layer: Layer | None) -> None:
        if is_batch_norm(module):
            if module.running_mean is None or module.training:
                why = "in training mode" if module.training else "without running statistics"
                raise UsageError(f"{path}: a BatchNorm {why} depends on its batch; it has no packed form")
            scale, shift = folded(module)
            self.norms[path] = module.weight is not None
            self.tensors |= {f"{path}.scale": scale.float(), f"{path}.shift": shift.float()}
            return
        for entry in stored:
            name = f"{path}.{entry.name}" if entry.name else path
            if entry.encoding == "plain":
                value = fetch(self.network.module, name).detach()
                self.tensors[name] = value.float() if value.is_floating_point() else value
        if module is not None and layer is not None and any(s.encoding == "bits" for s in stored):
            self._kernel(path, layer, scaled=any(s.encoding == "kernel_scale" for s in stored))

    def called(self, latent: str, calls: list[Layer]) -> None:
        """A kernel that a forward binarises itself: stored once for all calls of it, not at all if it is a copy."""
        for layer in calls:
            first = self.kernels.get(calls[0].path)
            if first is None:
                self._kernel(layer.path, layer, scaled=True, latent=latent, calls={c.path for c in calls})
            elif torch.equal(*(applied_kernel(self.network, c.path) for c in (calls[0], layer))):
                self.kernels[layer.path] = first | {"bits": f"{calls[0].path}.kernel_bits"}
            else:
                raise UsageError(f"{layer.path}: makes other bits of {latent} than {calls[0].path} does (several bases "
                                 "of one kernel); they have no packed form, give each a kernel of its own")  # fmt: skip

    def _kernel(
        self, path: str, layer: Layer, *, scaled: bool, latent: str = "", calls: Set[str] = frozenset()
    ) -> None:
        if layer.weight_bits > 1:
            raise UsageError(
                f"{path}: its kernel has {layer.weight_bits} bits, −1, 0 and 1; the packed form is for ±1 times a "
                "scale for each filter"
            )
        applied = applied_kernel(self.network, path)
        zeros = kernel_zeros(applied)
        if zeros and not self.zeros_as_plus:
            raise UsageError(
                f"{path}: {zeros} of its {applied.numel()} weights have sign 0, which no bit can hold; "
                "--zeros-as-plus makes them +1 (the network then computes something slightly else)"
            )
        applied = zeros_made_plus(applied)
        found = kernel_signs(applied)
        if isinstance(found, str):
            raise UsageError(f"{path}: {found}; it has no packed form")
        signs, magnitude = found
        self.tensors[f"{path}.kernel_bits"] = to_bits(signs)
        self.kernels[path] = {"shape": list(applied.shape), "zeros": zeros}
        behind = None
        if latent:
            behind = scale_beside(self.network, latent, calls, signs, magnitude)
            self.kernels[path]["latent"] = latent
        elif scaled and bool((magnitude == 1).all()):
            behind = scale_behind(self.network, path, layer.kernel, signs, magnitude)
        if behind is not None:
            magnitude = behind
            self.kernels[path] |= {"latent": latent or f"{path}.{layer.kernel}", "behind": True}
        name, factor = self._scale(path, magnitude.float(), layer, scaled=scaled)
        self.kernels[path] |= {"scale": name} | ({} if factor == 1 else {"factor": factor})

    def _scale(self, path: str, magnitude: Tensor, layer: Layer, *, scaled: bool) -> tuple[str | None, float]:
        """Which tensor holds the magnitude of each filter, None where all have the same, and what to multiply it by."""
        if scaled:
            self.tensors[f"{path}.kernel_scale"] = magnitude
            return f"{path}.kernel_scale", 1.0
        named = {f"{path}.{name}": self.tensors.get(f"{path}.{name}") for name in layer.out_tensors}
        held = {name: t.flatten().abs().cpu() for name, t in named.items() if t is not None}
        candidates: list[tuple[str | None, Tensor]] = [(None, torch.ones_like(magnitude).cpu()), *held.items()]
        for place, scale in candidates:
            factor = _quotient(magnitude.cpu(), scale)
            if factor is not None:
                return place, factor
        raise UsageError(
            f"{path}: the scale of its filters is a multiple of none of its tensors, as a packed form has it; keep it "
            "as a parameter or buffer with one entry per filter"
        )

    def unstored(self) -> dict[str, list[int] | str]:
        """State-dict entries that the file does not hold, name → shape, or the stored entry that they are tied to.

        Those of norms are left out: they follow from `norms`.
        """
        module = self.network.module
        objects = dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers()))
        stored = {id(objects[name]): name for name in self.tensors if name in objects}
        rest = {n: t for n, t in module.state_dict(keep_vars=True).items() if n not in self.tensors}
        return {
            name: stored.get(id(t), list(t.shape))
            for name, t in rest.items()
            if name.rpartition(".")[0] not in self.norms
        }


def _quotient(magnitude: Tensor, scale: Tensor) -> float | None:
    """The number by which all of `scale` gives `magnitude`, None where there is none."""
    if magnitude.shape != scale.shape or not bool((scale > 0).any()):
        return None
    largest = int(scale.argmax())
    factor = float(magnitude[largest] / scale[largest])
    if not torch.allclose(scale * factor, magnitude, rtol=1e-6, atol=0):
        return None
    return 1.0 if abs(factor - 1) <= 1e-6 else factor


def zeros_made_plus(kernel: Tensor) -> Tensor:
    """A kernel as applied, with the magnitude of its filter where it was 0."""
    largest = kernel.abs().flatten(1).amax(1).view(-1, *[1] * (kernel.ndim - 1))
    return torch.where(kernel == 0, largest, kernel)


def to_bits(signs: Tensor) -> Tensor:
    """±1 (O, I, k...) → uint8 (ceil(n/8),): input channels innermost, then taps, then filters; lowest bit first."""
    flat = signs.movedim(1, -1).reshape(-1).cpu()
    return torch.from_numpy(np.packbits((flat > 0).numpy(), bitorder="little"))


def from_bits(data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The reverse of `to_bits`: ±1 as (O, I, k...) float32."""
    o, i, *taps = shape
    count = torch.Size(shape).numel()
    if data.numel() != (count + 7) // 8:
        raise ValueError(f"{data.numel()} bytes of bits for a kernel of {count} weights")
    bits = torch.from_numpy(np.unpackbits(data.numpy(), count=count, bitorder="little"))
    return (bits.float() * 2 - 1).view(o, *taps, i).movedim(-1, 1).contiguous()


def _json(header: Mapping[str, Any]) -> str:
    """The one text of a header: sorted keys, no spaces."""
    return json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 of all data, tensor by tensor in order of their names, and of the header but for the digest itself."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    digest.update(_json({key: value for key, value in header.items() if key != "sha256"}).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def is_packed(file: checkpoint.Checkpoint) -> bool:
    """Whether a file that was read is a packed network."""
    return KEY in file.metadata


def read(path: str | os.PathLike[str]) -> Packed:
    """Tensors and header of a packed file, checked against its SHA-256; CheckpointError for any other file."""
    place = Path(path)
    kind = reading.kind_of(place)
    tensors, texts = reading.content_of(place, kind, unsafe=False) if kind == reading.SAFETENSORS else ({}, {})
    if KEY not in texts:
        raise CheckpointError(f"{path}: is no packed network; expected a file that `repbnn export packed` wrote")
    try:
        header = json.loads(texts[KEY])
        version, wanted = int(header["version"]), str(header["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); export the network again") from None
    if version > VERSION:
        raise CheckpointError(
            f"{path}: written by a newer repbnn (format version {version}, this one reads up to {VERSION}); "
            "update with: pip install --upgrade repbnn"
        )
    if _digest(tensors, header) != wanted:
        raise CheckpointError(f"{path}: is damaged, it does not have the SHA-256 that its header states; copy it again")
    return Packed(tensors, header)


def open_packed(path: str | os.PathLike[str], model: ModelSource | None = None) -> Opened:
    """Builds the network of a packed file; `model` builds a source network that is not in the zoo."""
    return build(read(path), path, model)


def build(packed: Packed, path: str | os.PathLike[str], model: ModelSource | None = None) -> Opened:
    """The same, of what a file holds. path: for messages."""
    try:
        origin = Origin.from_plain(packed.header["source"])
        built = result.source_model(Path(path), origin, model)
        network, layers = _captured(built, origin, packed.header, _state(packed))
        _give(network.module, layers, packed)
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:  # of a damaged header, too
        made = packed.header.get("source")
        own = made.get("model") if isinstance(made, Mapping) else None
        hint = f"; it was made with --model {own}" if own else ""
        first = " ".join(str(error).split())
        first = first if len(first) <= 200 else f"{first[:200].rpartition(' ')[0]} …"
        raise CheckpointError(
            f"{path}: its tensors do not fit the network that its source and rules make{hint} ({first})"
        ) from error
    return Opened(Path(path), packed.header, origin, network, layers)


def load_packed(path: str | os.PathLike[str], model: ModelSource | None = None) -> nn.Module:
    """The network of a packed file, in eval mode, for inference alone: its kernels and norms are as deployed.

    model: needed when the source network is the user's own, as for `load`.
    """
    return open_packed(path, model).network.module


def _captured(
    built: nn.Module, origin: Origin, header: Mapping[str, Any], state: dict[str, Tensor]
) -> tuple[Network, dict[str, Layer]]:
    if header["rules"] is None:
        network = source.capture(built, origin)
        layers = recognize(network)  # before zeros take the place of its kernels
        assign(network.module, state)
        network.module.eval()
        return network, layers
    rules = loads(header["rules"], name="rules stored in the packed file")
    network = source.capture(built, origin, rules)
    with running(built):
        plan = surgery.plan(network, rules)
        module = surgery.apply(plan, state=state)
    return shapes.rep_network(plan, module.eval())


def _state(packed: Packed) -> dict[str, Tensor]:
    """A whole state dict: what is stored, neutral norms, zeros for the rest."""
    own = {f"{path}.{name}" for path in packed.header["kernels"] for name in ("kernel_bits", "kernel_scale")}
    state = {
        n: t for n, t in packed.tensors.items() if n not in own and n.rpartition(".")[0] not in packed.header["norms"]
    }
    for path, affine in packed.header["norms"].items():
        scale, shift = packed.tensors[f"{path}.scale"], packed.tensors[f"{path}.shift"]
        state |= {f"{path}.running_mean": torch.zeros_like(scale), f"{path}.running_var": torch.ones_like(scale)}
        state |= {f"{path}.num_batches_tracked": torch.tensor(0)}
        if affine:
            state |= {f"{path}.weight": scale, f"{path}.bias": shift}
    for name, held in packed.header["unstored"].items():
        if isinstance(held, str):
            state[name] = packed.tensors[held]
        else:
            whole = name.endswith("num_batches_tracked")
            state[name] = torch.zeros(held, dtype=torch.int64 if whole else torch.float32)
    return state


def _give(root: nn.Module, layers: Mapping[str, Layer], packed: Packed) -> None:
    """Norms become their affine map, and convolutions get their kernel."""
    for path in packed.header["norms"]:
        norm = root.get_submodule(path)
        assert is_batch_norm(norm)
        norm.eps = 0.0
        norm.weight = nn.Parameter(packed.tensors[f"{path}.scale"])
        norm.bias = nn.Parameter(packed.tensors[f"{path}.shift"])
    for path, kernel in packed.header["kernels"].items():
        signs = from_bits(packed.tensors[kernel.get("bits", f"{path}.kernel_bits")], tuple(kernel["shape"]))
        scaled = signs * kernel.get("factor", 1)
        if kernel["scale"] is not None:
            magnitude = packed.tensors[kernel["scale"]].flatten().abs()
            scaled = scaled * magnitude.view(-1, *[1] * (signs.ndim - 1))
        module = root.get_submodule(path)
        wanted = layers[path].kernel_shape if path in layers else None
        if wanted and tuple(kernel["shape"]) != tuple(wanted):
            raise ValueError(f"{path}: a kernel of {tuple(kernel['shape'])}, expected {tuple(wanted)}")
        if "latent" in kernel:  # the forward reads it: its kernel, which is given, or the scale behind it
            latent: Tensor = fetch(root, kernel["latent"])
            latent.data = as_stored(scaled, latent.shape)
        give_kernel(module, signs if kernel.get("behind") else scaled)
