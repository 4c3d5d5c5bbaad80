"""Compiles Triton kernels for an H100/H200 (sm_90) without having one, and reads what came out.

Run as a program, so that the process has no TRITON_INTERPRET: `python tests/emitted_code.py FILE:KERNEL ...`, each
compiled for every case that CASES lists; prints JSON {kernel: [{case, registers, spills, ptx}]}.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ARCHITECTURE = 90
Case = dict[str, Any]


def compiled(cases: list[Case]) -> list[dict[str, Any]]:
    """One result per case {kernel: "file:name", signature, constants, warps, divisible}, from a process of its own.

    divisible: arguments known to be divisible by 16, as Triton finds out when it launches a kernel: allocations, most
    channel numbers. Constants that start with "tl." are names in triton.language.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, __file__], input=json.dumps(cases), env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    results: list[dict[str, Any]] = json.loads(ran.stdout)
    return results


def _compile(case: Case) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case["kernel"].split(":")
    kernel = getattr(importlib.import_module(f"repbnn_cli.kernels.{module}"), name)
    constants = {n: _constant(value) for n, value in case["constants"].items()}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.get("divisible", [])}
    signature = {**case["signature"], **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, {n: signature[n] for n in kernel.arg_names}, constexprs=constants, attrs=aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", ARCHITECTURE, 32), options={"num_warps": case.get("warps", 4)}
    )
    ptx = made.asm["ptx"]
    return {"ptx": ptx, "ttgir": made.asm["ttgir"], **_assembled(ptx)}


def _constant(value: Any) -> Any:
    import triton.language

    return getattr(triton.language, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value


def _assembled(ptx: str) -> dict[str, int]:
    """Registers per thread and spilled bytes, as the assembler that comes with Triton reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = [f"-arch=sm_{ARCHITECTURE}a", str(source), "-o", f"{folder}/kernel.cubin"]
        ran = subprocess.run([get_ptxas(ARCHITECTURE).path, "-v", *target], capture_output=True, text=True)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert registers is not None, said
    assert len(spills) == 2, said
    return {"registers": int(registers[1]), "spills": sum(map(int, spills))}


if __name__ == "__main__":
    json.dump([_compile(case) for case in json.load(sys.stdin)], sys.stdout)
