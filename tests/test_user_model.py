"""The user's own code: found, built as if there were a GPU, explained when it fails, given its weights."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from repbnn_cli.checkpoint import load
from repbnn_cli.errors import CaptureError, CheckpointError, UsageError
from repbnn_cli.user_code.cpu_only import cpu_only
from repbnn_cli.user_code.user_model import build, load_weights, part_of

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, num_classes)

def net(num_classes=10):
    return Net(num_classes)

def broken():
    return torch.ones(2, 3) @ torch.ones(2, 3)

ready = net()
TABLE = {"net": net}
_hidden = net
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Modules and search path after each test as before it."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def _write(text: str, name: str = "mynet.py") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return _write


def usage(spec: str, args: dict[str, object] | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        build(spec, args)
    text = str(caught.value)
    assert text.startswith((f"{spec}: ", f"{spec!r}: "))
    assert "\n" not in text
    return text


def failure(spec: str, args: dict[str, object] | None = None) -> str:
    with pytest.raises(CaptureError) as caught:
        build(spec, args)
    text = str(caught.value)
    assert text.startswith(f"{spec}: ")
    assert "\n" not in text
    return text


# -- finding and calling ----------------------------------------------------------------------------------------------


def test_a_class_a_function_a_ready_network(write: Callable[..., Path]) -> None:
    file = write(NET)
    assert build(f"{file}:Net", {"num_classes": 7, "width": 2}).fc.out_features == 7
    assert build(f"{file}:net").fc.out_features == 10
    assert build(f"{file}:ready") is build(f"{file}:ready")
    assert type(build(f"{file}:net")) is type(build(f"{file}:net"))


def test_a_relative_path_and_a_module_of_the_working_directory(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(NET, "pkg/models/nets.py")
    monkeypatch.chdir(tmp_path)
    assert build("pkg/models/nets.py:net").fc.out_features == 10
    assert build("pkg.models.nets:net", {"num_classes": 3}).fc.out_features == 3


def test_files_beside_it_and_relative_imports(write: Callable[..., Path]) -> None:
    write("SIZE = 5\n", "code/layers.py")
    plain = write("from layers import SIZE\nfrom torch import nn\ndef net(): return nn.Linear(SIZE, 1)\n", "code/a.py")
    assert build(f"{plain}:net").in_features == 5
    write("", "lib/__init__.py")
    write("", "lib/nets/__init__.py")
    write("SIZE = 6\n", "lib/layers.py")
    text = "from ..layers import SIZE\nfrom torch import nn\ndef net(): return nn.Linear(SIZE, 1)\n"
    relative = write(text, "lib/nets/b.py")
    assert build(f"{relative}:net").in_features == 6


def test_relative_imports_without_a_package(write: Callable[..., Path]) -> None:
    write("SIZE = 7\n", "My-Nets/layers.py")
    text = "from . import layers\nfrom torch import nn\ndef net(): return nn.Linear(layers.SIZE, 1)\n"
    assert build(f"{write(text, 'My-Nets/net.py')}:net").in_features == 7
    write("SIZE = 8\n", "top/layers.py")
    text = "from ..layers import SIZE\nfrom torch import nn\ndef net(): return nn.Linear(SIZE, 1)\n"
    assert build(f"{write(text, 'top/nets/net.py')}:net").in_features == 8


def test_two_code_bases_with_modules_of_the_same_name(write: Callable[..., Path]) -> None:
    for size, folder in ((1, "one"), (2, "two")):
        write(f"SIZE = {size}\n", f"{folder}/modules.py")
        text = "from torch import nn\ndef net():\n    from modules import SIZE\n    return nn.Linear(SIZE, 1)\n"
        file = write(text, f"{folder}/models.py")
        assert build(f"{file}:net").in_features == size


def test_an_edited_file_is_read_again(write: Callable[..., Path]) -> None:
    file = write(NET)
    assert build(f"{file}:net").fc.out_features == 10
    write(NET.replace("num_classes=10", "num_classes=100"))
    assert build(f"{file}:net").fc.out_features == 100


def test_a_file_named_like_a_module_in_use(write: Callable[..., Path]) -> None:
    file = write(NET, "types.py")
    before = sys.modules["types"]
    assert build(f"{file}:net").fc.out_features == 10
    assert sys.modules["types"] is before


def test_it_leaves_nothing_behind(write: Callable[..., Path], tmp_path: Path) -> None:
    file = write(f"import argparse, sys\nassert sys.argv == [__file__]\nargparse.ArgumentParser().parse_args()\n{NET}")
    argv = list(sys.argv)
    build(f"{file}:net")
    assert sys.argv == argv
    assert [entry.name for entry in tmp_path.iterdir()] == ["mynet.py"]


def test_standard_output_stays_clean(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    build(f"{write('print(1)' + NET)}:net")
    assert capsys.readouterr() == ("", "1\n")


def test_around_is_active_during_import_and_call(write: Callable[..., Path]) -> None:
    file = write(f"import sys\nSEEN = [sys.flag]\n{NET}\ndef seen():\n    SEEN.append(sys.flag)\n    return net()\n")

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        sys.flag = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del sys.flag  # type: ignore[attr-defined]

    build(f"{file}:seen", around=around())
    assert sys.modules["mynet"].SEEN == [True, True]
    assert not hasattr(sys, "flag")


def test_wrappers_come_off(write: Callable[..., Path]) -> None:
    wrapped = "nn.DataParallel(torch.compile(nn.DataParallel(Compiled(3))))"
    text = f"{NET}\n@torch.compile(dynamic=True)\nclass Compiled(Net): pass\ndef wrapped(): return {wrapped}\n"
    assert build(f"{write(text)}:wrapped").fc.out_features == 3


# -- mistakes in the call ---------------------------------------------------------------------------------------------


STAND_IN = """
from torch import nn

class Box:
    def __init__(self, *held):
        self.held = held[0]
        if len(held) > 1:
            self.other = held[1]

    def __getattr__(self, name):
        return getattr(self.__dict__["held"], name)  # KeyError on an object that copy made

    def __call__(self, x):
        return self.held(x)

    @property
    def __class__(self):
        return self.held.__class__

def net():
    return nn.Sequential(Box(Box(nn.Linear(2, 3))), nn.Sequential(Box(nn.ReLU())))

def two():
    return nn.Sequential(Box(nn.Linear(2, 3), nn.Linear(2, 4)))
"""


def test_what_passes_for_a_module_gives_way_to_the_module(write: Callable[..., Path]) -> None:
    file = write(STAND_IN)
    model = build(f"{file}:net")
    assert [type(m) for m in model.modules()] == [nn.Sequential, nn.Linear, nn.Sequential, nn.ReLU]
    assert list(copy.deepcopy(model).state_dict()) == ["0.weight", "0.bias"]
    with pytest.raises(
        CaptureError, match="0 of Sequential passes for a Linear but is a Box; replace it by the module"
    ):
        build(f"{file}:two")


def test_mistakes_in_the_name(write: Callable[..., Path], tmp_path: Path) -> None:
    file = write(NET)
    assert f"there is no file {tmp_path}/mynte.py; did you mean {file}?" in usage(f"{tmp_path}/mynte.py:net")
    assert "there is no file nowhere/x.py; check the path" in usage("nowhere/x.py:net")
    assert usage(str(file)).endswith(
        "names no callable, expected path/to/file.py:callable or package.module:callable; "
        "in this file: Net, net, broken"
    )
    assert "names no callable" in usage(f"{file}:")
    assert "expected path/to/file.py:callable" in usage(":net")
    assert usage(f"{file}:nett").endswith("no nett in mynet; nearest: net")
    assert usage(f"{file}:resnext101").endswith("no resnext101 in mynet; it has: Net, net, broken, ready")
    assert usage(f"{file}:TABLE").endswith("TABLE is a dict, not callable; it has: Net, net, broken, ready")
    assert "there is no module nowhere here" in usage("nowhere.models:net")
    many = write("".join(f"def net{n}(): pass\n" for n in range(15)), "many.py")
    for said in (usage(f"{many}:zzz"), usage(str(many))):
        assert said.endswith("net0, net1, net2, net3, net4, net5, net6, net7, net8, net9, net10, net11 and 3 more")


def test_what_a_package_offers_from_its_parts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "offering").mkdir()
    (tmp_path / "offering" / "__init__.py").write_text("import torch\nfrom .parts import build\n", "utf-8")
    (tmp_path / "offering" / "parts.py").write_text("def build():\n    return None\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert usage("offering:nothing").endswith("no nothing in offering; it has: build")


def test_mistakes_in_the_arguments(write: Callable[..., Path]) -> None:
    file = write(NET)
    assert usage(f"{file}:Net").endswith(
        "takes (num_classes, width=4): missing a required argument: 'num_classes'; set it in --model-args as JSON"
    )
    assert "got an unexpected keyword argument 'classes'" in usage(f"{file}:net", {"classes": 3})
    assert "is a ready network, it takes no --model-args (width)" in usage(f"{file}:ready", {"width": 3})
    assert usage(f"{file}:broken_type").startswith(f"{file}:broken_type: no broken_type")


def test_not_a_network(write: Callable[..., Path]) -> None:
    file = write("def net(): return {'a': 1}\n")
    assert usage(f"{file}:net").endswith("gives a dict, not an nn.Module; name a function that returns one")


# -- errors in the user's code ----------------------------------------------------------------------------------------


def test_errors_name_the_users_line(write: Callable[..., Path]) -> None:
    file = write(NET)
    assert f"{file}:15 raises RuntimeError: mat1 and mat2" in failure(f"{file}:broken")
    bad = write("import torch\nx = torch.nosuch\n", "bad.py")
    assert f"{bad}:2 raises AttributeError: module 'torch' has no attribute 'nosuch'" in failure(f"{bad}:net")
    syntax = write("a = 1\ndef net(:\n", "syntax.py")
    assert f"{syntax}:2 raises SyntaxError" in failure(f"{syntax}:net")
    absent = write("\nimport tensorboard_of_his_own\n", "absent.py")
    assert f"{absent}:2 needs the module tensorboard_of_his_own; install it" in failure(f"{absent}:net")


def test_programs_that_end_themselves(write: Callable[..., Path]) -> None:
    text = "import argparse\np = argparse.ArgumentParser()\np.add_argument('data')\nargs = p.parse_args()\n"
    file = write(text, "train.py")
    assert f"{file}:4 ends the program (exit 2); it has to be importable" in failure(f"{file}:net")


# -- code written for a GPU -------------------------------------------------------------------------------------------


@needs_no_gpu
def test_code_written_for_a_gpu(write: Callable[..., Path]) -> None:
    text = """
import torch
from torch import nn
torch.cuda.set_device(0)
torch.cuda.manual_seed_all(1)
torch.backends.cudnn.benchmark = True
device = torch.device("cuda:0")
scale = torch.ones(2, device=device)
assert torch.cuda.is_available() is False

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, device="cuda").cuda()
        self.w = nn.Parameter(torch.randn(2, 2).cuda().to("cuda:1").to(device).to(0))
        self.register_buffer("b", torch.cuda.FloatTensor([1, 2]) + torch.zeros(2).type("torch.cuda.FloatTensor"))
        self.c = torch.zeros(2).type(torch.cuda.LongTensor).cuda(non_blocking=True)
        with torch.cuda.device(0):
            self.d = torch.tensor([1.0], device="cuda", pin_memory=True).pin_memory()
        with torch.device("cuda"):
            self.e = torch.zeros(3)
        self.f = torch.zeros(1).new_zeros(2, device=torch.device("cuda", 0))
        assert torch.einsum("cuda,cuda->", torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)) == 1

def net():
    torch.cuda.synchronize()
    model = nn.DataParallel(Net().cuda(), device_ids=[0, 1]).cuda()
    return model.to(device=torch.device("cuda", torch.cuda.current_device()))
"""
    originals = (torch.load, torch.cuda.set_device, torch.cuda.FloatTensor, torch.Tensor.cuda)
    model = build(f"{write(text)}:net")
    kept = [*model.parameters(), *model.buffers(), model.c, model.d, model.e, model.f]
    assert {tensor.device.type for tensor in kept} == {"cpu"}
    assert model.c.dtype == torch.int64
    assert originals == (torch.load, torch.cuda.set_device, torch.cuda.FloatTensor, torch.Tensor.cuda)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()


@needs_no_gpu
@pytest.mark.filterwarnings("ignore:torch.set_default_tensor_type")
def test_default_types_and_loading(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with cpu_only():
        torch.set_default_tensor_type("torch.cuda.FloatTensor")
        torch.set_default_device("cuda")
        assert torch.zeros(1).device.type == "cpu"
        assert torch.load(tmp_path / "a.pt", map_location="cuda:0")["w"].device.type == "cpu"
        assert torch.load(tmp_path / "a.pt")["w"].device.type == "cpu"
        torch.set_default_device(None)
    torch.set_default_device(None)


@needs_no_gpu
def test_it_ends_after_an_error() -> None:
    original = torch.load
    with pytest.raises(KeyError), cpu_only():
        raise KeyError
    assert torch.load is original


# -- weights ----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        self.fc = nn.Linear(2, classes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_are_taken_over_without_losing_bits(dtype: torch.dtype) -> None:
    model, source = Small().eval(), Small()
    model.fc.weight.requires_grad_(False)
    weight = model.fc.weight
    given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in source.state_dict().items()}
    assert load_weights(model, given) is model
    assert not model.training
    assert model.fc.weight is weight
    assert weight.dtype == torch.promote_types(dtype, torch.float32)  # as load_state_dict widens 16 bits
    assert not weight.requires_grad
    assert (weight.data_ptr() == given["fc.weight"].data_ptr()) == (dtype != torch.float16)
    assert model.backbone[1].num_batches_tracked.dtype == torch.int64
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, given[name])


def test_ties_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    load_weights(model, {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)})
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, torch.ones(2, 2))


def test_a_network_on_the_meta_device_gets_its_weights() -> None:
    with torch.device("meta"):
        model = Small()
    load_weights(model, Small().state_dict())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


def test_a_model_that_translates_its_state_dict() -> None:
    class Packed(nn.Linear):
        def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
            destination[prefix + "packed"] = torch.stack([self.weight.detach().flatten(), self.bias.detach()])

        def _load_from_state_dict(self, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
            self.weight.data.copy_(state[prefix + "packed"][0].view(2, 1))
            self.bias.data.copy_(state[prefix + "packed"][1])

    model = Packed(1, 2)
    load_weights(model, {"packed": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    assert model.weight.flatten().tolist() == [1.0, 2.0]
    assert model.bias.tolist() == [3.0, 4.0]


def test_a_prefix_that_belongs_to_the_model_is_put_back() -> None:
    model = nn.ModuleDict({"model": nn.Linear(1, 1)})
    load_weights(model, {"weight": torch.tensor([[5.0]]), "bias": torch.tensor([6.0])}, prefix="module.model.")
    assert model["model"].weight.item() == 5.0


def test_a_model_beside_other_tensors_is_found(tmp_path: Path) -> None:
    path, state = tmp_path / "a.pt", Small().state_dict()
    torch.save({**{f"lit.net.{name}": t for name, t in state.items()}, "acc.tp": torch.zeros(1)}, path)
    file, said = part_of(load(path), Small())
    assert said == "took the tensors under lit.net, left out acc.tp"
    assert file.tensors.keys() == state.keys()
    load_weights(Small(), file.tensors, prefix=file.prefix)
    torch.save(state, path)
    assert part_of(load(path), Small())[1] == ""
    torch.save({**{f"net.{name}": t for name, t in state.items() if name != "fc.bias"}, "tp": torch.zeros(1)}, path)
    assert part_of(load(path), Small())[1] == ""  # incomplete: refused by load_weights as it is


def test_ignored_names_and_absent_counters() -> None:
    source = {name: t for name, t in Small().state_dict().items() if not name.endswith("num_batches_tracked")}
    load_weights(Small(), source)
    load_weights(Small(), {**source, "placeholder": torch.ones(1)}, ignores=lambda name: name == "placeholder")
    held = {name: t for name, t in source.items() if name != "fc.bias"}
    load_weights(Small(), held, ignores=lambda name: name == "fc.bias")


def test_weights_that_do_not_fit() -> None:
    state = Small().state_dict()
    state["extra"] = state.pop("backbone.0.weight")
    state["fc.bias"] = torch.ones(5)
    model = Small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state, path="a.pt")
    assert str(caught.value) == (
        "a.pt: does not fit the model: 1 missing (backbone.0.weight), 1 unexpected (extra), "
        "1 mis-shaped (fc.bias (5,), expected (3,)); check --model and --model-args"
    )
    assert len(caught.value.__notes__) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_number_of_classes_is_pointed_out() -> None:
    with pytest.raises(CheckpointError, match="it was trained with 100 outputs, set that in --model-args"):
        load_weights(Small(), Small(100).state_dict())


def test_tensors_of_things_that_the_model_has_no_part_of_are_left_out(tmp_path: Path) -> None:
    path, state = tmp_path / "a.pt", Small().state_dict()
    torch.save({**state, "criterion.weight": torch.zeros(3), "teacher.fc.weight": torch.zeros(3)}, path)
    file, said = part_of(load(path), Small())
    assert said == "left out criterion.weight, teacher.fc.weight, of which the model has no part"
    assert file.tensors.keys() == state.keys()
    torch.save({**state, "criterion.weight": torch.zeros(3), "fc.scale": torch.zeros(3)}, path)
    file, said = part_of(load(path), Small())
    assert said == ""  # fc is a part of the model: another model than this one
    with pytest.raises(CheckpointError, match="does not fit the model: 2 unexpected"):
        load_weights(Small(), file.tensors, prefix=file.prefix)


def test_counters_of_thop_are_left_out(tmp_path: Path) -> None:
    path, state = tmp_path / "a.pt", Small().state_dict()
    torch.save(
        {**state, "total_ops": torch.zeros(1), "fc.total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1)}, path
    )
    file = load(path)
    assert file.tensors.keys() == state.keys()
    assert file.notes == ("left out thop's counters (total_ops, fc.total_ops, fc.total_params)",)
