"""The user's own network: `--model path/to/file.py:callable` imported, built, and given a checkpoint's weights."""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from repbnn_cli.checkpoint import Checkpoint, left_out
from repbnn_cli.checkpoint.identify import (
    Difference,
    Ignores,
    Signature,
    compare,
    narrowed,
    nothing,
    other_classes,
    prefixes_to_try,
    shapes_of,
    starts_within,
)
from repbnn_cli.checkpoint.tied import assign
from repbnn_cli.errors import CaptureError, CheckpointError, UsageError
from repbnn_cli.user_code.code_base import findable
from repbnn_cli.user_code.cpu_only import foreign_code
from repbnn_cli.wording import nearest_file, some

_NARROW = (torch.float16, torch.bfloat16)
_EXPECTED = "expected path/to/file.py:callable or package.module:callable"
# Code that is not the user's, for finding his line in a traceback and his files among the loaded modules.
_FOREIGN = tuple(
    str(Path(folder).resolve())
    for folder in (
        str(Path(torch.__file__).parent),
        str(Path(__file__).parents[1]),
        *(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
    )
)
# Files of the user that were imported here: module name → (file, modification time, size).
_imported: dict[str, tuple[str, int, int]] = {}


def build(
    spec: str, args: Mapping[str, Any] | None = None, *, around: AbstractContextManager[Any] | None = None
) -> nn.Module:
    """Import what ``spec`` names, call it with ``args``, and return the network, out of DataParallel and the like.

    The file's folder, the working directory and what lies above the file (``code_base``) are importable meanwhile,
    ``sys.argv`` holds only the file, standard output goes to standard error, CUDA means the CPU where there is none,
    functions of the old kind run (``foreign_code``), and ``around`` is active during import and call. Raises UsageError
    for a wrong ``spec`` or wrong ``args``, CaptureError for an error in the user's code, with file and line.
    """
    location, name = _parted(spec)
    file = Path(location).resolve() if location.endswith(".py") or os.sep in location else None
    if file is not None and not file.is_file():
        raise UsageError(f"{spec}: there is no file {location}{nearest_file(Path(location), '.py')}")
    if not name:
        known = f"; in this file: {some(_public_names(file), 12)}" if file else ""
        raise UsageError(f"{spec}: names no callable, {_EXPECTED}{known}")
    folders = [str(Path.cwd())]
    if file is not None:
        root = _relative_root(file) if _imports_relatively(file) else _package_root(file)
        folders = [str(file.parent), str(root), str(Path.cwd())]
    _forget_others(folders)
    before = set(sys.modules)
    with around or contextlib.nullcontext(), foreign_code(), _as_a_script(file, folders), findable(file) as above:
        try:
            with _explained(spec):
                module = _import_named(spec, location) if file is None else _import_file(file)
            target = _attribute(spec, module, name)
            with _explained(spec):
                model = _called(spec, target, dict(args or {}))
        finally:
            _remember(before, [*folders, *above])
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec}: gives a {type(model).__name__}, not an nn.Module; name a function that returns one")
    return _unwrapped(model)


def part_of(file: Checkpoint, model: nn.Module) -> tuple[Checkpoint, str]:
    """The file with the model's tensors alone, where others lie beside them; and what those are.

    The file as it is where it fits, or does not fit at all.
    """
    got = shapes_of(file.tensors)
    expected = shapes_of({name: item for name, item in model.state_dict().items() if isinstance(item, Tensor)})
    fits = any(not compare({p + n: s for n, s in got.items()}, expected) for p in prefixes_to_try(file.prefix))
    if fits:
        return file, ""
    if starts := starts_within(got, expected):
        return narrowed(file, starts), left_out(file.tensors, starts[0])
    return _without_strangers(file, expected)


def _without_strangers(file: Checkpoint, expected: Signature) -> tuple[Checkpoint, str]:
    """The file without tensors of things that the model has no part of (a loss, a teacher), if it fits then."""
    for prefix in prefixes_to_try(file.prefix):
        difference = compare({prefix + n: s for n, s in shapes_of(file.tensors).items()}, expected)
        own = {name.partition(".")[0] for name in expected}
        others = [n.removeprefix(prefix) for n in difference.unexpected if n.partition(".")[0] not in own]
        if others and len(others) == difference.count:
            kept = {n: t for n, t in file.tensors.items() if n not in others}
            return replace(file, tensors=kept), f"left out {some(others)}, of which the model has no part"
    return file, ""


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    prefix: str = "",
    ignores: Ignores = nothing,
    path: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Put ``tensors`` into ``model``, all of them or CheckpointError; returns the model, its mode untouched.

    The tensors are taken over, not copied, in the wider of their own dtype and the model's: as by `load_state_dict` a
    checkpoint of half precision gives a model of single precision. Parameter objects, ties between them and
    ``requires_grad`` stay. ``prefix`` is what ``checkpoint.load`` took off the names and may be put back; names that
    ``ignores`` holds for may be absent or too many. The error's notes (PEP 678) list the disagreeing tensors, each kind
    in a line.
    """
    held = {name: item for name, item in model.state_dict(keep_vars=True).items() if isinstance(item, Tensor)}
    differences = {p: _difference(tensors, held, ignores, p) for p in prefixes_to_try(prefix)}
    best = min(differences, key=lambda p: differences[p].count)
    if differences[best]:
        if _takes(model, tensors):  # its own loading knows other names: those of the former weight_norm
            model.load_state_dict(dict(tensors))
            return model
        raise does_not_fit(differences[best], path)
    given = {best + name: tensor.detach() for name, tensor in tensors.items()}
    given = {name: tensor for name, tensor in given.items() if name in held and tensor.shape == held[name].shape}
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    if any(tensor.is_meta for tensor in held.values()):
        assign(model, {name: _fitted(tensor, held[name]) for name, tensor in given.items()}, strict=False)
    elif all(own.get(name) is tensor for name, tensor in held.items()):
        for name, tensor in given.items():
            held[name].data = _fitted(tensor, held[name])
    else:
        # The model translates its state dict: only its own loading knows what the entries mean.
        model.load_state_dict(given, strict=False)
    return model


def _takes(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    try:
        copy.deepcopy(model).load_state_dict(dict(tensors), strict=True)
    except Exception:  # somebody else's loading
        return False
    return True


def _fitted(tensor: Tensor, place: Tensor) -> Tensor:
    """The tensor for this place: where it is, and in the wider of both kinds of real numbers."""
    real = tensor.is_floating_point() and place.is_floating_point()
    dtype = torch.promote_types(tensor.dtype, place.dtype) if real else place.dtype
    return tensor.to(tensor.device if place.is_meta else place.device, dtype)


def widened(tensors: Mapping[str, Tensor], model: nn.Module) -> str:
    """What to say where a model has taken tensors of 16 bits with more bits of its own; "" where it has not."""
    narrow = {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.dtype in _NARROW}
    if not narrow or any(p.dtype in _NARROW for p in model.parameters()):
        return ""
    return f"its weights in {' and '.join(sorted(narrow))} were taken in the network's own precision"


def _difference(tensors: Mapping[str, Tensor], held: Mapping[str, Tensor], ignores: Ignores, prefix: str) -> Difference:
    return compare({prefix + name: shape for name, shape in shapes_of(tensors).items()}, shapes_of(held), ignores)


def does_not_fit(
    difference: Difference, path: str | os.PathLike[str] | None, advice: str = "check --model and --model-args"
) -> CheckpointError:
    """What separates tensors from a network in one line, in notes one kind a line; advice: what to do about it."""
    classes = other_classes(difference)
    if classes is not None:
        advice = f"it was trained with {classes} outputs, set that in --model-args"
    start = "the checkpoint" if path is None else f"{path}:"
    error = CheckpointError(f"{start} does not fit the model: {', '.join(difference.lines(shown=1))}; {advice}")
    for line in difference.lines():
        error.add_note(line)
    return error


def _parted(spec: str) -> tuple[str, str]:
    location, colon, name = spec.rpartition(":")
    if not colon:
        location, name = spec, ""
    if not location:
        raise UsageError(f"{spec!r}: {_EXPECTED}")
    return location, name


def _called(spec: str, target: Any, args: dict[str, Any]) -> Any:
    if isinstance(target, nn.Module):
        if args:
            raise UsageError(f"{spec}: is a ready network, it takes no --model-args ({', '.join(args)})")
        return target
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return target(**args)
    try:
        signature.bind(**args)
    except TypeError as error:
        parameters = ", ".join(str(parameter) for parameter in signature.parameters.values()) or "no arguments"
        raise UsageError(f"{spec}: takes ({parameters}): {error}; set it in --model-args as JSON") from None
    return target(**args)


def _attribute(spec: str, module: ModuleType, name: str) -> Any:
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            public = _public_callables(module)
            near = difflib.get_close_matches(name, public, n=3)
            choice = f"nearest: {', '.join(near)}" if near else f"it has: {some(public, 12) or 'no callables'}"
            raise UsageError(f"{spec}: no {name} in {module.__name__}; {choice}")
        target = getattr(target, part)
    if not callable(target):
        public = _public_callables(module)
        raise UsageError(f"{spec}: {name} is a {type(target).__name__}, not callable; it has: {some(public, 12)}")
    return target


def _public_callables(module: ModuleType) -> list[str]:
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value)
        and f"{getattr(value, '__module__', None)}.".startswith(f"{module.__name__}.")  # a package's parts included
    }  # fmt: skip
    networks = [name for name, value in own.items() if not isinstance(value, type) or issubclass(value, nn.Module)]
    return networks or list(own)


def _public_names(file: Path) -> list[str]:
    """Functions and classes at the top of a file, read without running it."""
    with contextlib.suppress(SyntaxError, ValueError, OSError):
        body = ast.parse(file.read_bytes()).body
        kinds = (ast.FunctionDef, ast.ClassDef)
        return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]
    return []


def _import_named(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"{spec}: there is no module {error.name} here; run in its folder, {_EXPECTED}") from None
        raise  # the module is there, something that it imports is not


def _import_file(file: Path) -> ModuleType:
    if _imports_relatively(file):  # a folder without __init__.py is a package, too, for those who import it from above
        parts = file.relative_to(_relative_root(file)).with_suffix("").parts
        return importlib.import_module(".".join(parts))
    # Under its own name, so that the user's files find it when they import each other; never in place of a module
    # that Python or torch use.
    names = (file.stem, f"user_{file.stem}")
    for name in names:
        if name in sys.modules and _imported.get(name, ("", 0, 0))[0] == str(file):
            return sys.modules[name]
    free = file.stem not in sys.modules and file.stem not in sys.stdlib_module_names
    name = names[0] if free else names[1]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file}: is not a Python file; {_EXPECTED}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _package_root(file: Path) -> Path:
    """The folder from which the file is imported: the first one upwards that is no package."""
    folder = file.parent
    while (folder / "__init__.py").exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _imports_relatively(file: Path) -> int:
    """How many folders above the file its relative imports reach: 1 for `from . import x`, 0 where there are none."""
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, ValueError):  # said when it is imported
        return 0
    return max((node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)), default=0)


def _relative_root(file: Path) -> Path:
    """The folder from which a file with relative imports is imported: above its package, and above all it asks for."""
    asked = file.parents[_imports_relatively(file)]
    return min(asked, _package_root(file), key=lambda folder: len(folder.parts))


@contextlib.contextmanager
def _as_a_script(file: Path | None, folders: Sequence[str]) -> Iterator[None]:
    """What the user's code sees as long as it runs here; put back in any case."""
    path, argv, bytecode, compiler = list(sys.path), list(sys.argv), sys.dont_write_bytecode, torch.compile
    sys.path[:0] = dict.fromkeys(folders)
    # Research code parses arguments on import; ours are not for it.
    sys.argv[:] = [str(file) if file else ""]
    sys.dont_write_bytecode = True
    # A compiled network cannot be captured; its wrapper would come off anyway, after seconds of loading the compiler.
    torch.compile = _as_it_is
    importlib.invalidate_caches()
    try:
        # Standard output belongs to the command's own result (--json).
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.path[:], sys.argv[:], sys.dont_write_bytecode, torch.compile = path, argv, bytecode, compiler


def _as_it_is(model: Any = None, **_: Any) -> Any:
    return (lambda decorated: decorated) if model is None else model


def _forget_others(folders: Sequence[str]) -> None:
    """Two code bases often have modules of the same name; and an edited file has to be read again."""
    stamps = {file: _stamp(file) for file, _, _ in _imported.values()}
    stale = any(
        stamps[file] != (modified, size) or not file.startswith(tuple(folder + os.sep for folder in folders))
        for file, modified, size in _imported.values()
    )
    if stale:
        for name in _imported:
            sys.modules.pop(name, None)
        _imported.clear()


def _remember(before: set[str], folders: Sequence[str]) -> None:
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and str(file).startswith(tuple(folder + os.sep for folder in folders)) and not _is_foreign(str(file)):
            _imported[name] = (str(file), *_stamp(str(file)))


def _stamp(file: str) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return (0, 0)
    return status.st_mtime_ns, status.st_size


def _is_foreign(file: str) -> bool:
    return file.startswith("<") or str(Path(file).resolve()).startswith(tuple(folder + os.sep for folder in _FOREIGN))


@contextlib.contextmanager
def _explained(spec: str) -> Iterator[None]:
    """Errors of the user's code as one line with his file and line."""
    try:
        yield
    except UsageError:
        raise
    except SystemExit as error:
        raise CaptureError(
            f"{spec}: {_where(error)} ends the program (exit {error.code}); it has to be importable and callable "
            "without command line arguments"
        ) from error
    except ModuleNotFoundError as error:
        raise CaptureError(
            f"{spec}: {_where(error)} needs the module {error.name}; install it, or run where it can be imported"
        ) from error
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 300 else text[:297] + "..."
        raise CaptureError(f"{spec}: {_where(error)} raises {type(error).__name__}: {text}") from error


def _where(error: BaseException) -> str:
    """`file:line` of the innermost line that is the user's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_foreign(frame.filename)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "the call"


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]  # what torch.compile gives back
        else:
            _without_stand_ins(model)
            return model


def _without_stand_ins(model: nn.Module) -> None:
    """Puts the module itself in the place of an object that only passes for it: `__class__` says so, its type does not.

    Libraries that exchange implementations wrap their layers so. Such an object has none of a module's own attributes.
    """
    for module in list(model.modules()):
        for name, child in module._modules.items():
            while child is not None and not issubclass(type(child), nn.Module):
                held = [v for v in vars(child).values() if isinstance(v, nn.Module) and v.__class__ is child.__class__]
                if len(held) != 1:
                    raise CaptureError(
                        f"{name} of {type(module).__name__} passes for a {child.__class__.__name__} but is a "
                        f"{type(child).__name__}; replace it by the module itself in a function that --model names"
                    )
                child = held[0]
            module._modules[name] = child
