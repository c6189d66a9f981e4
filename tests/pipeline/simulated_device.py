"""A CUDA device without a GPU, whose work runs as late or as early as the rules allow.

What a program gives a stream is not executed but queued, at torch's dispatcher, so that the program
runs as it is. A policy decides how far each queue runs at each call of the program; whatever it
chooses, a GPU might have done. Memory that nothing has written is all 0xFF bytes. So a wait that is
missing shows as wrong bytes, and no clock decides whether.

The rules, and where they are from:

* A stream runs its work in the order in which it was given. Nothing else orders two streams, the
  default one neither: torch creates the others with `cudaStreamNonBlocking`. (CUDA C++ Programming
  Guide, "Streams"; torch's c10/cuda/CUDAStream.cpp.)
* An event stands for the place in a stream where it was last recorded. To wait for it, on the host
  or in a stream, is to wait for the record that was its last when the wait was asked for; one that
  was never recorded waits for nothing. (CUDA Runtime API: `cudaEventRecord`, `cudaStreamWaitEvent`,
  `cudaEventSynchronize`.)
* A copy between pinned memory and the device with `non_blocking` is queued, and touches host memory
  when it runs. Any other copy to or from the host has ended when the call returns, and with it all
  that was in its stream. (CUDA Runtime API, "API synchronization behavior"; torch's
  ATen/native/cuda/Copy.cu.)
* Pinned memory that the program has let go of is handed out again, but not before the copies from
  and to it ran. (torch's CachingHostAllocator.)
* Memory of its own that the program has registered with `cudaHostRegister` is pinned until it is
  unregistered, which must not be before the copies from and to it ran. (CUDA Runtime API.)
* Device memory that the program has let go of is overwritten by what is queued next in the stream
  in which it was allocated, and handed out again there at once, whatever other streams still do
  with it, unless `Tensor.record_stream` has named these. (torch's CUDACachingAllocator.)
* What a thread records in a graph is not run, and not waited for. Meanwhile no thread may wait for
  the whole device. A replay queues all of it in the current stream, on the memory that was there at
  the recording. (CUDA C++ Programming Guide, "CUDA Graphs".)
* A thread has to name the device, with `torch.cuda.device`, before it uses it or pins memory: else
  torch would set up a context on the first device. The thread of the test has named it.

There is one device, and its kernels are the CPU's, so results have the bits that the CPU gives.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from simulated.memory import PinnedMemory
from simulated.streams import Device, Event, Graph, Stream
from simulated.tensors import PLACE, Dispatch

_PROPERTIES = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)


class _Runtime:
    """Stands in for `torch.cuda.cudart()`."""

    def __init__(self, device: Device, pinned: PinnedMemory) -> None:
        assert threading.get_ident() in device.threads, "this thread has not named the device"
        self._pinned = pinned

    def cudaHostRegister(self, address: int, nbytes: int, _flags: int) -> int:  # noqa: N802
        return self._pinned.register(address, nbytes)

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self._pinned.unregister(address)
        return 0

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return f"code {code}"


@contextmanager
def simulated(
    policy: Callable[[Device], None], pinned: PinnedMemory | None = None
) -> Iterator[Device]:
    """Let torch find the simulated device in place of any other."""
    if torch.cuda.is_available():
        torch.cuda.init()  # which the stand-in must not keep it from
    device, pinned = Device(policy), pinned or PinnedMemory()

    @contextmanager
    def named(place: object = PLACE) -> Iterator[None]:
        assert place == PLACE
        thread = threading.get_ident()
        if thread in device.threads:
            yield
            return
        device.threads.add(thread)
        try:
            with Dispatch(device, pinned):
                yield
        finally:
            device.threads.remove(thread)

    stand_ins = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda _: "simulated",
        "get_device_properties": lambda _: _PROPERTIES,
        "_lazy_init": lambda: None,
        "Stream": partial(Stream, device),
        "Event": partial(Event, device),
        "current_stream": device.current_stream,
        "stream": device.stream,
        "device": named,
        "synchronize": device.synchronize,
        "CUDAGraph": partial(Graph, device),
        "graph": device.record,
        "cudart": lambda: _Runtime(device, pinned),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        # Parameters that are moved become others: their class is another.
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        with named():
            yield device
