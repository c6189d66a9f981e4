"""Tensors on the device: what is done with them is queued, at torch's dispatcher."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from simulated.memory import PinnedMemory, unwrite, unwritten
from simulated.streams import Device, Stream, Task

PLACE = torch.device("cuda", 0)
_aten = torch.ops.aten
_known_results: dict[str, Any] = {}


class _Block:
    """A piece of device memory, which a tensor and its views share; other streams that use it."""

    def __init__(self) -> None:
        self.used_in: list[Stream] = []


class DeviceTensor(Tensor):
    """A tensor on the device; `memory`, a tensor on the host, holds its bytes."""

    memory: Tensor
    block: _Block

    @staticmethod
    def __new__(cls, memory: Tensor, block: _Block) -> "DeviceTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device="meta",  # where it is a CUDA device, torch asks the driver for it
        )
        made.memory, made.block = memory, block
        return made

    device = property(lambda _: PLACE)

    def record_stream(self, stream: Stream) -> None:
        """Let the memory's next user wait for what is in a stream when the memory is let go of."""
        self.block.used_in.append(stream)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: object) -> None:
        raise AssertionError(f"{func} in a thread that has not named the device")


class Dispatch(TorchDispatchMode):
    """Queues what concerns the device in the current stream of the thread."""

    def __init__(self, device: Device, pinned: PinnedMemory) -> None:
        super().__init__()
        self._device = device
        self._pinned = pinned
        self._free: dict[
            Any, list[Tensor]
        ] = {}  # memory that was let go of, by its stream and kind

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            return self._pinned.allocate(args[0], kwargs["dtype"])
        if not any(map(_is_of_the_device, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if func in self._special:
            return self._special[func](self, *args, **kwargs)
        results = func._schema.returns
        if all(result.alias_info is None for result in results):
            return self._compute(func, args, kwargs)
        if _is_composite(func):  # of which only the parts say what is a view and what a copy
            with self:
                return func.decompose(*args, **kwargs)
        assert not any(result.alias_info.is_write for result in results), func
        return self._view(func, *args, **kwargs)

    def _view(self, func: Any, of: DeviceTensor, *args: Any, **kwargs: Any) -> Any:
        """Do at once what only describes memory in another way."""
        with torch.inference_mode(of.is_inference()):  # a view is to be as its base
            views = func(of.memory, *args, **kwargs)
            return tree_map_only(Tensor, lambda view: DeviceTensor(view, of.block), views)

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Queue an operation that gives new tensors."""
        results = tree_map(self._allocate, _results_like(func, args, kwargs))
        targets = [result.memory for result in tree_leaves(results)]
        args, kwargs = _memory(args), _memory(kwargs)

        def run() -> None:
            values = tree_leaves(func(*args, **kwargs))
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)

        self._queue(str(func), run)
        return results

    def _empty(self, shape: torch.Size, *, dtype: torch.dtype, **_: object) -> Tensor:
        return self._allocate(torch.empty(shape, dtype=dtype))

    def _to_copy(
        self,
        source: Tensor,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        **_: object,
    ) -> Tensor:
        like = torch.empty_like(_memory(source), dtype=dtype)
        stays = (device or source.device) == PLACE
        target = self._allocate(like) if stays else unwritten(like)
        return self._copy(target, source, non_blocking)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        into, of = _memory(target), _memory(source)
        name = f"copy {source.device.type} to {target.device.type}"
        on_host = [each for each in (target, source) if not isinstance(each, DeviceTensor)]
        queued = bool(on_host) and non_blocking and on_host[0] in self._pinned
        if queued:
            for_one_memcpy = into.dtype == of.dtype and into.is_contiguous() and of.is_contiguous()
            assert for_one_memcpy, "torch would copy by way of a temporary"

        def run() -> None:
            assert not queued or on_host[0] in self._pinned, "it was unregistered before its copy"
            into.copy_(of)

        task = self._queue(name, run)
        if on_host and not queued:
            self._device.finish(task)
        return target

    def _allocate(self, like: Tensor) -> DeviceTensor:
        stream, graph = self._device.current_stream(), self._device.recording
        kind = (stream.number, like.dtype, like.shape, like.stride())
        free = [] if graph else self._free.setdefault(kind, [])
        memory, block = free.pop() if free else unwritten(like), _Block()
        self._device.allocations += not graph
        queue, used_in = (graph or stream).queue, block.used_in

        def let_go() -> None:
            # No more than queued: garbage may be collected in the middle of anything.
            for other in used_in:
                other.queue.append(mark := Task(other))
                queue.append(Task(stream, after=mark))
            queue.append(Task(stream, partial(unwrite, memory), name="let go"))
            free.append(memory)

        weakref.finalize(block, let_go).atexit = False
        return DeviceTensor(memory, block)

    def _queue(self, name: str, run: Callable[[], object]) -> Task:
        return self._device.submit(Task(self._device.current_stream(), run, name=name))

    _special: ClassVar[dict[Any, Callable[..., Any]]] = {
        _aten.empty.memory_format: _empty,
        _aten._to_copy.default: _to_copy,
        _aten.copy_.default: _copy,
    }


def _is_of_the_device(leaf: object) -> bool:
    return isinstance(leaf, DeviceTensor) or (isinstance(leaf, torch.device) and leaf == PLACE)


def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _memory(tree: Any) -> Any:
    return tree_map_only(DeviceTensor, lambda tensor: tensor.memory, tree)


def _results_like(func: Any, args: Any, kwargs: Any) -> Any:
    """Return tensors of the shapes and dtypes that an operation gives: those it gives for zeros."""

    def describe(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, tensor.stride()

    key = str((func, tree_map_only(Tensor, describe, (args, kwargs))))
    if key not in _known_results:
        args, kwargs = tree_map_only(Tensor, torch.zeros_like, _memory((args, kwargs)))
        _known_results[key] = func(*args, **kwargs)
    return _known_results[key]
