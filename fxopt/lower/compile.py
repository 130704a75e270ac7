"""Handing the rewritten graph on: to Inductor with the user's mode, or to eager where no compiler is found."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch.fx import GraphModule

from fxopt.graph.scope import gradients_on
from fxopt.lower.outline_memory import NO_REUSE, has_bodies
from fxopt.lower.outline_seal import opening_inner, sealed
from fxopt.options import Options

log = logging.getLogger(__name__)


def missing_compiler(example_inputs: Sequence[Any]) -> str | None:
    """Why Inductor can't compile for these inputs' devices on this machine, or None."""
    kinds = {x.device.type for x in example_inputs if isinstance(x, Tensor)}
    return next((reason for reason in map(_missing_for, sorted(kinds)) if reason), None)


@functools.cache
def _missing_for(device_type: str) -> str | None:
    if device_type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "no C++ compiler was found (install g++ or clang, or set CXX)"
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton is not installed or does not support this GPU"
    return None


def start_compilers(example_inputs: Sequence[Any]) -> None:
    """Start the processes in which Inductor compiles Triton kernels, where there will be some.

    They take seconds to come up. Until then kernels are compiled one by one; started with the first stage, they are
    there when the last one needs them.
    """
    if launches(example_inputs):
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()


def launches(example_inputs: Sequence[Any]) -> bool:
    """Whether there are inputs on a device whose kernels the host launches."""
    return any(isinstance(x, Tensor) and x.device.type != "cpu" for x in example_inputs)


def uses_cuda_graphs(options: Options) -> bool:
    """Whether Inductor will replay the graph as a CUDA graph in this mode, where it can."""
    return bool(patches(options).get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs))


def patches(options: Options) -> dict[str, Any]:
    """Inductor's configuration for the mode and the options that the user named."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(options.mode)) | dict(options.inductor)


def compile_graph(module: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Compile with Inductor in the mode that `options` names; what it returns takes and gives flat arguments."""
    chosen = patches(options)
    together = _launched_together(module, example_inputs, options)
    if together:
        try:
            return _compile(module, example_inputs, chosen | together)
        except torch._dynamo.exc.RestartAnalysis:
            raise
        except Exception as error:
            log.warning("Inductor can't compile with %s, which fxopt switched on: %s", together, error, exc_info=True)
    return _compile(module, example_inputs, chosen)


def _launched_together(module: GraphModule, example_inputs: Sequence[Any], options: Options) -> dict[str, Any]:
    """Inductor's option to launch small kernels that don't need each other as one, where it is to be switched on.

    In CUDA graphs, where a launch of 1 us in a step of decoding costs 1.5 us whatever it computes: the rotary
    embeddings of q and k and the writes of their cache become one.
    """
    wanted = uses_cuda_graphs(options) and hasattr(torch._inductor.config, "combo_kernels")
    if (
        not wanted
        or not launches(example_inputs)
        or "combo_kernels" in options.inductor
        or gradients_flow(module, example_inputs)
    ):
        return {}
    return {"combo_kernels": True}


def _compile(module: GraphModule, example_inputs: Sequence[Any], config: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    inputs = list(example_inputs)
    run: Any
    if not has_bodies(module):
        run = compile_fx(module, inputs, config_patches=config)
    elif gradients_flow(module, example_inputs):
        with torch._functorch.config.patch(donated_buffer=False):
            run = compile_fx(module, inputs, config_patches=config | NO_REUSE)
    else:
        with sealed(module):
            run = compile_fx(module, inputs, inner_compile=opening_inner, config_patches=config)
    return run


def run_eagerly(module: GraphModule, reason: str) -> Callable[..., Any]:
    """The graph run op by op, with a warning that says why (once a reason)."""
    warn_once(reason)
    return module.forward


@functools.cache
def warn_once(reason: str) -> None:
    """Say that there will be no Inductor, once a reason."""
    message = f"fxopt runs its graphs op by op, without Inductor: {reason}"
    log.warning(message)
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def gradients_flow(module: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether the graph may be differentiated: an input asks for gradients and grad mode is on, around it or inside."""
    return gradients_on(module.graph) and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
