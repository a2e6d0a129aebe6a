"""Compiled training: the repeated blocks of a network, each kind compiled once (regional compilation)."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from torch import nn

log = logging.getLogger(__name__)

Backend = Literal["inductor", "aot_eager"]
Mode = Literal["default", "max-autotune-no-cudagraphs"]
# Maximum number of graphs per function: blocks of several kinds share torch's function for calling a module.
KEPT_GRAPHS = 64


@dataclass(frozen=True)
class Compilation:
    """How `torch.compile` is used.

    Args:
        backend: `inductor`, or `aot_eager` (the same graphs without a compiler, for tests).
        mode: torch's mode. Modes with CUDA graphs are not supported: they need a fixed shape and fixed memory, which
            batches of several lengths and blocks that share a graph do not have.
        dynamic: whether sizes are variable in a graph; None: torch decides.

    Raises:
        ValueError: an unknown backend or mode.
    """

    backend: Backend = "inductor"
    mode: Mode = "default"
    dynamic: bool | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("backend", self.backend, get_args(Backend)),
            ("mode", self.mode, get_args(Mode)),
        ):
            if value not in allowed:
                raise ValueError(f"compile.{name}={value!r}: must be one of {', '.join(allowed)}")
        if self.mode != "default" and self.backend != "inductor":
            raise ValueError(
                f"compile.mode={self.mode} has no effect with compile.backend={self.backend}: leave it out"
            )

    def check(self, on_gpu: bool) -> None:
        """Raise ValueError if the compiler of the backend is missing on this machine."""
        if self.backend == "inductor" and (missing := missing_compiler(on_gpu)):
            raise ValueError(f"compile needs {missing}; or train without, compile=null")

    def apply(self, module: LightningModule) -> int:
        """Compile, in place, the blocks that a module lists in `compiled_parts()` or `sharded_parts()`; return their
        number. For encoders whose blocks are not called as modules (`compile_functions`), their functions are compiled.

        Names in the state do not change. Nothing is computed yet: torch compiles in the first step. Trained blocks run
        compiled only when gradients are recorded. In validation, sampling and images they run uncompiled, because
        caches and lengths that change with every call would cause repeated compilation.

        Raises:
            ValueError: the module lists no blocks.
        """
        parts: list[nn.Module] = getattr(module, "compiled_parts", getattr(module, "sharded_parts", list))()
        if not parts:
            raise ValueError(
                f"compile has no effect: {type(module).__name__} names no blocks (sharded_parts); compile=null"
            )
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, KEPT_GRAPHS)
        mode = None if self.mode == "default" else self.mode
        for submodule in module.modules():
            compile_functions = getattr(submodule, "compile_functions", None)
            if compile_functions is not None:
                trained = any(parameter.requires_grad for parameter in submodule.parameters())
                compile_functions(functools.partial(self._compile_function, mode=mode, trained=trained))
        for part in parts:
            part.compile(backend=self.backend, mode=mode, dynamic=self.dynamic)
            if any(parameter.requires_grad for parameter in part.parameters()):
                compiled = part._compiled_call_impl
                assert compiled is not None
                part._compiled_call_impl = functools.partial(_call_compiled_in_training, part._call_impl, compiled)
        log.info("%d blocks are compiled in the first steps (%s)", len(parts), self.backend)
        return len(parts)

    def _compile_function(self, run: Callable[..., Any], mode: str | None, trained: bool) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(run, backend=self.backend, mode=mode, dynamic=self.dynamic)
        return functools.partial(_call_compiled_in_training, run, compiled) if trained else compiled


def _call_compiled_in_training(
    uncompiled: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return (compiled if torch.is_grad_enabled() else uncompiled)(*args, **kwargs)


def missing_compiler(on_gpu: bool) -> str:
    """Describe what inductor lacks on this machine; empty if nothing is missing."""
    if on_gpu:
        from torch.utils._triton import has_triton

        if not has_triton():
            return "the package triton for this GPU: pip install triton"
        named = os.environ.get("CC")
        if not any(shutil.which(name) for name in ([named] if named else ["gcc", "clang"])):
            return "a C compiler for triton's launchers: apt-get install gcc, or name one in CC"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "a C++ compiler: apt-get install g++, or name one in CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Python.h): apt-get install python3-dev, or a Python that comes with them"
    return ""
