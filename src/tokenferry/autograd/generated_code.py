"""Keep the calls of a graph in their order in the code that torch.compile's Inductor generates.

Calls are collective: all ranks have to make them in one order. Inductor knows that of torch's own collectives only. It
sorts the operators of a graph by their data alone, and so as fusion and peak memory suit it: by sizes, which differ
between ranks that have different numbers of tokens. Calls that do not need each other's results, of layers side by
side, or their backward passes, could then come in another order on each rank. It also eliminates what has no use: on
a rank without tokens, calls whose results only make empty tensors and zeros.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch._ops import OpOverload

_INDUCTOR = "torch._inductor.lowering"


def keep_order(operators: Sequence[OpOverload]) -> None:
    """Keep each of these operators in its graph, and make it depend on the one of them that comes before it.

    Contract: local. Once; and only if Inductor has been imported, as it is when it compiles.
    """
    if _INDUCTOR not in sys.modules:
        return
    from torch._inductor import lowering
    from torch._library.utils import get_layout_constraint_tag

    for operator in operators:
        if operator in lowering.lowerings:
            return
        constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(operator))  # the default one
        lowering.make_fallback(operator, layout_constraint=constraint)  # type: ignore[no-untyped-call]
        lowering.lowerings[operator] = _after_the_last(operators, lowering.lowerings[operator])


def _after_the_last(operators: Sequence[OpOverload], lower: Callable[..., object]) -> Callable[..., object]:
    """Return a lowering of an operator whose kernel runs after that of the last of ``operators`` in the graph."""
    from torch._inductor.virtualized import V

    def lower_in_order(*args: object, **kwargs: object) -> object:
        graph, known = V.graph, len(V.graph.operations)
        result = lower(*args, **kwargs)
        calls: list[Any] = [one for one in graph.operations if getattr(one, "op_overload", None) in operators]
        (mine,) = [one for one in calls if one in graph.operations[known:]]
        mine.has_side_effects = lambda: True  # as torch marks its own
        if len(calls) > 1:
            graph.additional_buffer_deps[mine.get_operation_name()].add(calls[-2].get_name())
        return result

    return lower_in_order
