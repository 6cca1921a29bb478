"""Looks at what every operator of PyTorch computes, or moves it as rounding may."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flax_resblock.port.graphs import leaves

_COPIES = {
    getattr(torch.ops.aten, name)
    for name in ("cat", "clone", "constant_pad_nd", "index", "stack", "where", "_to_copy")
}
"""Operators whose results are numbers that they were given."""

_DEEPCOPY = {getattr(torch.ops.aten, name) for name in ("clone", "new_empty", "set_")}
"""Operators that ``copy.deepcopy`` uses, for example for what a module keeps of an earlier call."""


class Dtypes(TorchDispatchMode):
    """Collects the floating dtypes of what is computed within it; a copy computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket not in _DEEPCOPY:
            self.dtypes |= {one.dtype for one in _floating(made)}
        return made


class Rounded(TorchDispatchMode):
    """Moves every number that is computed within it by at most a unit in the last place, in the
    backward pass too, and takes long sums in another order: such a sum is uncertain by more than
    its last place, and by the same amount wherever its terms move by theirs.

    What an operator only copies stays, and so do whole numbers: masks, counts and places are exact.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self._in_another_order(func, args, kwargs or {})
        given = {_memory(one) for one in _floating(args)}
        for one in _floating(made) if func.overloadpacket not in _COPIES else ():
            if _memory(one) not in given:
                signs = torch.randint(-1, 2, one.shape, generator=self.generator)
                signs = torch.where(one == one.round(), 0, signs)
                one.mul_(1 + torch.finfo(one.dtype).eps * signs.to(one.dtype))
        return made

    def _in_another_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator returns, of tensors whose axes are permuted if it sums over these."""
        aten: Any = torch.ops.aten
        if func is aten.convolution.default and args[8] == 1 and not args[6]:
            images, kernel, *rest = args
            order = self._order(images.shape[1])
            return func(images[:, order], kernel[:, order], *rest, **kwargs)
        if func is aten.convolution_backward.default and args[9] == 1 and not args[7]:
            cotangent, images, kernel, *rest = args
            batch, channels = self._order(len(images)), self._order(len(kernel))
            moved = cotangent[batch][:, channels], images[batch], kernel[channels]
            found = func(*moved, *rest, **kwargs)
            orders = batch, channels, channels
            return tuple(
                one if one is None else one[order.argsort()]
                for one, order in zip(found, orders, strict=True)
            )
        if func in (aten.mm.default, aten.addmm.default):
            *bias, left, right = args
            order = self._order(len(right))
            return func(*bias, left[:, order], right[order], **kwargs)
        if func in (aten.native_batch_norm.default, aten.native_batch_norm_backward.default):
            several = 1 if func is aten.native_batch_norm.default else 2
            batch, last = self._order(len(args[0])), self._order(args[0].shape[-1])
            last = last if args[0].ndim > 2 else torch.arange(len(last))
            moved = [one[batch][..., last] for one in args[:several]]
            first, *found = func(*moved, *args[several:], **kwargs)
            back = first if first is None else first[batch.argsort()][..., last.argsort()]
            return (back, *found)
        return func(*args, **kwargs)

    def _order(self, length: int) -> torch.Tensor:
        return torch.randperm(length, generator=self.generator)


def _floating(several: Any) -> list[torch.Tensor]:
    """The tensors of floating dtype among what an operator takes or returns."""
    tensors = [one for one in leaves(several) if isinstance(one, torch.Tensor)]
    return [one for one in tensors if one.is_floating_point()]


def _memory(tensor: torch.Tensor) -> int:
    """Where its numbers are, which a view shares with what it is a view of."""
    return tensor.untyped_storage().data_ptr()
