"""A second device for machines that have none: tensors of it meet no tensor of the host.

They hold their numbers on the host and say that they are on "cuda". As on a real device, an op on
both is an error, but for numbers without dimensions; stricter than a real one, so is indexing a
tensor with one of the host, which waits. `Device.reads` counts what the host reads, `Device.sent`
the numbers that are sent to or made on the device from nothing that is there.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

OTHER = torch.device("meta")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OnDevice(Tensor):
    """A tensor of the other device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=OTHER,
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:  # which torch refuses of subclasses
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of Device")


class Device(TorchDispatchMode):
    """While it is entered, the other device is there."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        ours = [x for x in given if isinstance(x, OnDevice)]
        hosts = [x for x in given if not isinstance(x, OnDevice) and x.dim()]
        if ours and hosts and func not in _COPIES:
            raise RuntimeError(f"{func}: tensors of {OTHER} and of the host")
        target = kwargs.get("device")
        on_device = bool(ours) if target is None else torch.device(target).type == OTHER.type
        if ours and (not on_device or func is torch.ops.aten._local_scalar_dense.default):
            self.reads += 1
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(_unwrap, (args, kwargs))
        result = func(*args, **kwargs)
        if result is None:  # of an op in place on a list
            return None
        if not on_device:
            # A copy to where the numbers are held would be no copy.
            return tree_map(lambda x: x.clone() if isinstance(x, Tensor) and ours else x, result)
        if not ours:
            self.sent += result.numel()
        in_place = re.search(r"[^_]_$", func._schema.name)  # and no operator, as __and__
        if in_place and isinstance(given[0], OnDevice):
            return given[0]
        return tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, result)


def _unwrap(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def moved(module: nn.Module) -> nn.Module:
    """The module with its weights on the other device."""
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                held = OnDevice(weight.detach())
                part._parameters[name] = nn.Parameter(held, requires_grad=True)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module
