"""Graphs of the emulated device, and how PyTorch's own operations run on it.

A recording holds what was started while it was made: kernels, copies, fills and PyTorch's operations, each with the
addresses of its tensors and its numbers as they were. As on a device, nothing is computed while it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from support.emulated.memory import Address

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.emulated.device import EmulatedDevice

# The host waits for their result; in inference mode some come as they are, and not as what they are made of.
_READS = ("_local_scalar_dense", "item", "nonzero", "argwhere", "masked_select", "equal", "is_nonzero")


class Recording:
    """What a capture wrote down."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, Callable[..., None], Any]] = []
        self._pool: list[torch.Tensor] = []  # results of PyTorch's operations: the graph's own memory

    def add(self, what: str, call: Callable[..., None], *args: Any) -> None:
        """`call(*args)`, with the tensors that will be at the same addresses."""
        names = iter(f"tensor {number} of {what}" for number in range(1000))
        remembered = tree_map(lambda x: Address(x, next(names)) if isinstance(x, torch.Tensor) else x, args)
        self._calls.append((what, call, remembered))

    def keep(self, results: list[torch.Tensor]) -> None:
        self._pool += results

    def play(self) -> list[tuple[str, Callable[[], None]]]:
        """Everything to be done once more. Raises FreedMemory: some of its memory is gone."""
        return [(what, _bound(call, _found(args))) for what, call, args in self._calls]


def _found(args: Any) -> Any:
    return tree_map(lambda x: x.tensor() if isinstance(x, Address) else x, args)


def _bound(call: Callable[..., None], args: Sequence[Any]) -> Callable[[], None]:
    return lambda: call(*args)


class Operations(TorchDispatchMode):
    """PyTorch's operations on tensors of the device, in the thread that entered it.

    Outside of a capture an operation waits for the work of the current stream, and of no other, and is done at once:
    one of the orders that a device may choose. In a capture it is written down.
    """

    def __init__(self, device: EmulatedDevice) -> None:
        super().__init__()
        self._device = device
        self._inside = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For the device's own work: operations inside are PyTorch's and no more."""
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if self._inside:
            return func(*args, **given)
        with self.paused():
            return self._run(func, args, given)

    def _run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        device, recording = self._device, self._device.recording
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        touches = any(device.blocks.kind_of(tensor) == "device" for tensor in tensors if tensor.numel())
        name = func.overloadpacket.__name__
        if not (touches or recording):
            return func(*args, **kwargs)
        if _may_be_view(func):
            out = func(*args, **kwargs)
            if not _with_own_memory(out, tensors):
                return out
        if name in _READS and touches:
            device.refuse_in_capture(f"reads a result ({name})")
        if recording is None:
            device.current.run_until(device.current.started)
            out = func(*args, **kwargs)
            self._adopt(out, tensors)
            return out
        if func._schema.is_mutable:
            recording.add(name, lambda given, more: func(*given, **more), list(args), dict(kwargs))
            return _aliased(func, args, kwargs)
        out = func(*args, **kwargs)  # for its shape
        results = self._adopt(out, tensors)
        if not results:  # as dropout gives back what it was given
            return out
        recording.keep(results)
        recording.add(
            name, lambda given, more, into: _again(func, given, more, into), list(args), dict(kwargs), results
        )
        for result in results:
            if result.is_floating_point():
                result.fill_(float("nan"))  # nothing has been computed
        return out

    def _adopt(self, out: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Results with memory of their own, which lie on the device from now on."""
        results = _with_own_memory(out, tensors)
        for result in results:
            self._device.adopt(result)
        return results


def _again(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], into: list[torch.Tensor]) -> None:
    out = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
    for before, now in zip(into, out, strict=True):
        before.copy_(now)


def _with_own_memory(out: Any, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results that are no other looks at the memory of what was given."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    return [result for result in results if result.untyped_storage().data_ptr() not in known]


def _may_be_view(func: Any) -> bool:
    """It changes nothing, and its result may be another look at what it is given: always, or as `to` and `reshape` do
    where no copy is needed.
    """
    if func.overloadpacket.__name__ == "_unsafe_view":
        return True
    returns = func._schema.returns
    return not func._schema.is_mutable and any(each.alias_info is not None for each in returns)


def _aliased(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation that changes its arguments returns: these."""
    changed = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed.append(kwargs[argument.name] if argument.name in kwargs else args[index])
    count = len(func._schema.returns)
    assert count in (0, len(changed)), f"{func} returns more than what it changes"
    return None if not count else changed[0] if count == 1 else tuple(changed)
