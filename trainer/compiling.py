"""torch.compile for functions that call this project's operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compiled(function: Callable[..., Any], *, dynamic: bool | None = None) -> Any:
    """`function` through TorchInductor, as one graph.

    Args:
        function: what to compile, at its first call.
        dynamic: as torch.compile takes it; False compiles every shape anew.
    """
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=inductor)


def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """TorchInductor as a backend of torch.compile, with all operators declared to it.

    By now whatever the graph calls is imported; backward operators come with their forward ones.
    """
    from torch._inductor.compile_fx import compile_fx  # here: it takes seconds

    _declare_operators()
    return compile_fx(graph, inputs)


def _declare_operators() -> None:
    """Give every operator the lowering that TorchInductor would give it when it first meets it.

    That of torch 2.11 then formats a log line, wanted or not, with all that leads to the operator's
    arguments. Behind ten blocks of residual sums this takes minutes.
    """
    from torch._inductor import lowering
    from torch._library.custom_ops import OPDEFS
    from torch._library.utils import get_layout_constraint_tag

    for name, definition in OPDEFS.items():
        operator = definition._opoverload
        if name.startswith("fairway::") and operator not in lowering.lowerings:
            tag = get_layout_constraint_tag(operator, with_default=True)
            constraint = lowering.tag_to_layout_constraint(tag)
            lowering.make_fallback(operator, layout_constraint=constraint)
