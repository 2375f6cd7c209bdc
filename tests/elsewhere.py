"""A device that is not the CPU, on the CPU: its tensors hold ordinary ones and say that they lie elsewhere.

What a GPU refuses is refused here: an operation over tensors of two places (single numbers and indices aside), and numpy without a copy to the
CPU. Code that takes the path of "any other device" runs to its end where there is none, and gives the numbers of the CPU.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
ELSEWHERE = torch.device(NAME, 0)


class There(torch.Tensor):
    """A tensor elsewhere; `held` is what it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=ELSEWHERE
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Within it tensors can be made and sent elsewhere."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


def _held(value):
    return value.held if isinstance(value, There) else value


def _run(operator, args, kwargs):
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    if there and operator not in COPIES:
        first = args[:1] if operator._schema.name in INDEXED else tensors
        stray = [x for x in pytree.tree_leaves(first) if isinstance(x, torch.Tensor) and not isinstance(x, There) and x.dim()]
        if stray:
            raise RuntimeError(f"{operator}: tensors of two devices")
    device = kwargs.get("device")
    lands = bool(there) if device is None else torch.device(device).type == NAME
    if device is not None and lands:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = operator(*pytree.tree_map(_held, args), **pytree.tree_map(_held, kwargs))
    if operator._schema.is_mutable:  # the result is one of the arguments
        return pytree.tree_map(lambda o: next((x for x in there if x.held is o), o), out)
    return pytree.tree_map(lambda o: There(o) if lands and isinstance(o, torch.Tensor) else o, out)


def _copy(source, target, non_blocking=False):
    _held(target).copy_(_held(source))
    return target


# what torch calls past the two ways above, where it makes tensors of numbers
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty_strided", lambda size, stride, dtype=None, **_: There(torch.empty_strided(size, stride, dtype=dtype)), "PrivateUse1")
_library.impl("empty.memory_format", lambda size, dtype=None, **_: There(torch.empty(size, dtype=dtype)), "PrivateUse1")
_library.impl("_copy_from", _copy, "PrivateUse1")
