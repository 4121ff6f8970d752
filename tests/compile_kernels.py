"""Compile every Triton kernel for the chips of one kind (argument: cuda or rocm); run by tests/test_kernels.py."""

from __future__ import annotations

import importlib
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from test_kernels import CHIPS, COMPILED


def main(kind: str) -> None:
    for chip in CHIPS[kind]:
        for name, (signature, fixed) in COMPILED.items():
            module, _, function = name.partition(".")
            kernel = getattr(importlib.import_module(f"dspark_cli.kernels.{module}"), function)
            types = dict(zip(kernel.arg_names, signature.split(), strict=False))
            types |= dict.fromkeys(fixed, "constexpr")
            source = ASTSource(
                fn=kernel, signature=types, constexprs={(kernel.arg_names.index(k),): v for k, v in fixed.items()}
            )
            made = triton.compile(source, target=GPUTarget(*chip))
            code = made.asm.get("cubin") or made.asm.get("hsaco")
            assert code, f"{name}: no machine code for {chip}: {sorted(made.asm)}"
            print(f"{name} for {chip[1]}: {len(code)} bytes of machine code")


if __name__ == "__main__":
    main(sys.argv[1])
