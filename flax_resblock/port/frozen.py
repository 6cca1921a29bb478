"""Parts that run under ``torch.no_grad()``: a trace shows what they compute, and what leaves them
is detached here. And parts under ``torch.autocast(enabled=False)``, which changes nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.fx.traceback import annotate, preserve_node_meta

PYTORCH = f"{Path(torch.__file__).parent}{os.sep}"
"""How the paths of PyTorch's own files begin."""
_MARK = "flax_resblock_without_gradients"


@contextmanager
def without_gradients_seen() -> Iterator[None]:
    """Within it, a trace marks the nodes that are computed without gradients."""
    kinds: Any = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled)
    before = {kind: (kind.__init__, kind.__enter__, kind.__exit__) for kind in kinds}
    marks: list[Any] = []

    def genuine(self: Any, which: int, *arguments: Any) -> None:
        kind = next(one for one in type(self).__mro__ if one in before)
        before[kind][which](self, *arguments)

    def create(self: Any, *mode: Any) -> None:
        if _is_own(sys._getframe(1)):
            self.mode = bool(mode[0]) if mode else isinstance(self, torch.enable_grad)
        else:
            genuine(self, 0, *mode)

    def enter(self: Any) -> None:
        if _is_own(sys._getframe(1)):
            on = getattr(self, "mode", isinstance(self, torch.enable_grad))
            marks.append(annotate({_MARK: not on}))
            marks[-1].__enter__()
        else:
            genuine(self, 1)

    def leave(self: Any, *error: Any) -> None:
        if _is_own(sys._getframe(1)):
            marks.pop().__exit__(*error)
        else:
            genuine(self, 2, *error)

    try:
        with torch.no_grad(), preserve_node_meta():
            for kind in kinds:
                kind.__init__, kind.__enter__, kind.__exit__ = create, enter, leave
            yield
    finally:
        for kind, methods in before.items():
            kind.__init__, kind.__enter__, kind.__exit__ = methods


def _is_own(frame: Any) -> bool:
    """Whether a frame is of the user's code: PyTorch switches gradients off itself, too."""
    code = frame.f_code
    if code.co_name == "decorate_context":
        code = getattr(frame.f_locals.get("func"), "__code__", code)
    return not code.co_filename.startswith(PYTORCH)


@contextmanager
def no_idle_autocast() -> Iterator[None]:
    """Within it ``torch.autocast(..., enabled=False)`` leaves no trace: it fixes no precision where
    none is switched on around it, and switching one on does leave a trace.
    """
    autocast: Any = torch.autocast
    enter, leave = autocast.__enter__, autocast.__exit__
    autocast.__enter__ = lambda self: enter(self) if self._enabled else self
    autocast.__exit__ = lambda self, *error: leave(self, *error) if self._enabled else None
    try:
        yield
    finally:
        autocast.__enter__, autocast.__exit__ = enter, leave


def detach(graph: Any) -> None:
    """Detaches what leaves the marked parts of a graph."""
    inside = {
        node
        for node in graph.nodes
        if node.op == "call_function" and (node.meta.get("custom") or {}).get(_MARK)
    }
    for node in [one for one in graph.nodes if one in inside]:
        later = [user for user in node.users if user not in inside]
        value = node.meta.get("val")
        if not later or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        place = node.next
        while place in inside:
            place = place.next
        with graph.inserting_before(place):
            made = graph.call_function(torch.ops.aten.detach.default, (node,))
        of_both = [[*one.meta.get("nn_module_stack", {}).items()] for one in (node, place)]
        stack = [one for one, other in zip(*of_both, strict=False) if one == other]
        made.meta = {**node.meta, "nn_module_stack": dict(stack or of_both[0][:1])}
        for user in later:
            user.replace_input_with(node, made)
