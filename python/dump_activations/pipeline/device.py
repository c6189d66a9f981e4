"""The device of a run: found, its arithmetic, its share of the host, and what can run out."""

import mmap
import os
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from dump_activations.errors import DeviceError, DumpActivationsError, option, switch
from dump_activations.model.encoder import Encoder, replicate

_MEMBERSHIPS = Path("/proc/self/cgroup")  # lines of ID:CONTROLLERS:PATH
_GROUPS = Path("/sys/fs/cgroup")
_PCI = Path("/sys/bus/pci/devices")

# Page-locked memory is lost to others, and to the page cache that writers fill.
_LARGEST_SHARE = 0.5

# Kernels of the attention, in the order of preference, and torch's names of their switches. Without
# cuDNN's, which plans each shape for 0.4 s and raises where it has no plan.
_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_ENABLED = {"flash": True, "mem_efficient": True, "math": True, "cudnn": False}

# Words of torch's reasons for not using CUDA, and what else to do than to run on the CPU.
_CURES = {
    "too old": "install a newer driver, or a torch for this one; ",
    "not compiled": "install a torch with CUDA; ",
    "fork": "start processes with spawn; ",
}

# Settings of torch that `torch.set_float32_matmul_precision` changes.
_MATMULS = (("cuda", "matmul"), ("mkldnn", "matmul"))

_THREADS = "threads"
_RESOURCES = {
    _THREADS: "can't start new thread",
    "device memory for the workspace of cuBLAS": "CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)",
    "device memory for the workspace of cuDNN": "CUDNN_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)",
    "device memory": "CUDA.*out of memory",
    "host memory": "out of memory|can't allocate memory",
}


def find_device(name: str) -> torch.device:
    """Return the device of that name: `cuda`, the thread's current CUDA device, `cuda:N` or `cpu`.

    Raises:
        DeviceError: the machine has no such CUDA device.
    """
    kind, _, number = name.partition(":")
    if kind != "cuda":
        return torch.device(name)
    if reason := lack_of_cuda():
        cure = next((cure for word, cure in _CURES.items() if word in reason), "")
        raise DeviceError(
            f"{option('device')}: no CUDA device for {name!r} ({reason}); {cure}"
            f"{switch('allow_cpu')} runs on the CPU"
        )
    if not number:
        return torch.device("cuda", torch.cuda.current_device())
    # Compared here: torch keeps only the low byte of a larger number.
    if int(number) >= (count := torch.cuda.device_count()):
        raise DeviceError(f"{option('device')}: no cuda:{number}; the last one is cuda:{count - 1}")
    return torch.device("cuda", int(number))


def lack_of_cuda() -> str:
    """Return the reason why torch has no CUDA device here, such as a driver that is too old."""
    try:
        torch.cuda.init()
    except Exception as error:  # torch raises several kinds, each with the reason in its text
        return first_sentence(error)
    return "" if torch.cuda.device_count() else "torch finds none"


def first_sentence(error: BaseException) -> str:
    """Cut an error to its first sentence: CUDA's go on with advice for developers."""
    line = str(error).strip().partition("\n")[0]
    return re.split(r"\.\s", line, maxsplit=1)[0].rstrip(".") or type(error).__name__


def current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which the device is the thread's current one.

    A thread that names no CUDA device sets up a context of some 500 MB on the first one, whichever
    device the run uses.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def cores_of(processes: int) -> int:
    """Return the cores of one of a machine's or container's processes.

    They are divided where the process may run on all of them. Fewer are its own: a launcher has
    bound it to them.
    """
    own = len(os.sched_getaffinity(0))
    groups = group_values("cpuset", "cpuset.effective_cpus", "cpuset.cpus.effective")
    machine = next(groups, None)
    whole = os.cpu_count() if machine is None else len(_numbers(machine))
    return own if own != whole else max(own // processes, 1)


def share_cores(processes: int) -> None:
    """Let torch use this process's share of the cores, among so many processes.

    torchrun sets OMP_NUM_THREADS to 1 where the user has not set it. Any other number is the
    user's, and stays.
    """
    if processes > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(cores_of(processes))


def pinned_share(processes: int) -> int:
    """Return the bytes that each of a machine's or container's processes may page-lock."""
    limits = [os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE]
    # Beyond the limit of a control group the kernel kills, without an error.
    for text in group_values("memory", "memory.limit_in_bytes", "memory.max"):
        with suppress(ValueError):  # `max`
            limits.append(int(text))
    return int(min(limits) * _LARGEST_SHARE) // processes


def group_values(controller: str, v1_name: str, v2_name: str) -> Iterator[str]:
    """Yield a setting of this process's control groups, v1 or v2, the innermost group first."""
    with suppress(OSError):
        for line in _MEMBERSHIPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root, name = (_GROUPS / controller, v1_name) if controllers else (_GROUPS, v2_name)
            group = root / path.strip("/")  # In a container there may be only the root.
            for directory in (group, *group.parents):
                if directory.is_relative_to(root) and (directory / name).is_file():
                    yield (directory / name).read_text()


def run_near(device: torch.device) -> None:
    """Have this thread run on the device's node: memory that it touches first will be there."""
    at: Any = torch.cuda.get_device_properties(device)
    address = f"{at.pci_domain_id:04x}:{at.pci_bus_id:02x}:{at.pci_device_id:02x}.0"
    with suppress(OSError, ValueError):  # A virtual machine may not tell, or allow none of them.
        near = _numbers((_PCI / address / "local_cpulist").read_text())
        os.sched_setaffinity(0, near & os.sched_getaffinity(0))


def _numbers(text: str) -> set[int]:
    """Read a kernel's list of cores: `0-3,8`."""
    ranges = (each.partition("-") for each in text.strip().split(","))
    return {n for first, _, last in ranges for n in range(int(first), int(last or first) + 1)}


def in_precision(model: Encoder, precision: str, device: torch.device) -> Encoder:
    """Return the model with its weights cast as a precision needs them, once per run.

    `bf16` rounds the factors of matrix products to bf16 and keeps norms, embeddings and the
    residual stream in fp32. `bf16-true` has everything in bf16, as a served model has. The others
    run the model as it is. The caller's model is never changed.
    """
    narrow = {"bf16": nn.Linear, "bf16-true": nn.Module}.get(precision)
    if narrow is None:
        return model
    return replicate(
        model, device, lambda module: torch.bfloat16 if isinstance(module, narrow) else None
    )


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Run a forward pass inside the context with its own settings, not the caller's.

    fp32 values are computed with in IEEE single precision, but for `tf32`, where CUDA rounds the
    factors of matrix products to 10 bits of mantissa.
    """
    fp32 = "high" if precision == "tf32" else "highest"
    with torch.autocast(device.type, enabled=False), _settings.held(fp32):
        yield


class _Settings:
    """Changes settings of the whole process while any thread is inside, and puts them back.

    Threads with the same settings share them. A thread with others waits until these have left.
    """

    def __init__(self) -> None:
        self._left = threading.Condition()
        self._inside = 0
        self._fp32 = ""
        self._exits = ExitStack()

    @contextmanager
    def held(self, fp32: str) -> Iterator[None]:
        with self._left:
            self._left.wait_for(lambda: self._inside == 0 or self._fp32 == fp32)
            if self._inside == 0:
                self._fp32 = fp32
                self._change(fp32)
            self._inside += 1
        try:
            yield
        finally:
            with self._left:
                self._inside -= 1
                if self._inside == 0:
                    self._exits.close()
                    self._left.notify_all()

    def _change(self, fp32: str) -> None:
        """Set the precision of fp32 products, and the kernels of the attention in their order.

        `sdpa_kernel` cannot be left in another thread than the one that entered it, and does not
        put back the order of kernels that the caller has turned off.
        """
        get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
        for backend, operation in _MATMULS:
            before = get(backend, operation)
            if before == get(backend, "all"):
                before = "none"  # Read as inherited, so that it goes on to follow its backend.
            self._exits.callback(put, backend, operation, before)
        try:
            precision = torch.get_float32_matmul_precision()
        except RuntimeError:  # The process set its backends one by one.
            precision = "highest"
        self._exits.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision(fp32)
        order = torch._C._get_sdp_priority_order()
        wanted = [kernel.value for kernel in _ATTENTION]
        self._exits.callback(torch._C._set_sdp_priority_order, order)
        torch._C._set_sdp_priority_order([*wanted, *(each for each in order if each not in wanted)])
        for name, enabled in _ENABLED.items():
            enable = getattr(torch.backends.cuda, f"enable_{name}_sdp")
            self._exits.callback(enable, getattr(torch.backends.cuda, f"{name}_sdp_enabled")())
            enable(enabled)


_settings = _Settings()


def out_of(error: BaseException | None) -> str | None:
    """Name the resource that ran out; None for any other error."""
    if isinstance(error, MemoryError):
        return f"host memory ({error})" if str(error) else "host memory"
    if not isinstance(error, RuntimeError) or isinstance(error, DumpActivationsError):
        return None
    text = str(error)
    return next((name for name, pattern in _RESOURCES.items() if re.search(pattern, text)), None)


def is_of_cuda(error: BaseException) -> bool:
    """Return True for an error that a CUDA device or its libraries raise."""
    is_torchs = isinstance(error, RuntimeError) and not isinstance(error, DumpActivationsError)
    return is_torchs and bool(re.search("CUDA|CUBLAS|cuDNN|CUDNN", str(error)))


class DeviceAdvice(AbstractContextManager[None]):
    """Raises a DeviceError for an error of CUDA, or one that means that something ran out.

    The caller may try again in its handler, so nothing here keeps the frames of what failed, and
    the memory that they hold. A generator with `contextmanager` would keep them.

    Args:
        batch_size: the run's, to advise a smaller one.
        model_on: device of a model that is loaded inside the context, and does not fit.
    """

    def __init__(
        self, *, batch_size: int | None = None, model_on: torch.device | None = None
    ) -> None:
        self._batch_size, self._model_on = batch_size, model_on

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        del traceback
        name = out_of(error)
        if error is None or (name is None and not is_of_cuda(error)):
            return
        notes = getattr(error, "__notes__", [])
        if name is None:
            text = f"the device failed: {first_sentence(error)}"
        elif name == _THREADS:
            text = "no more threads can be started; end other programs, or raise `ulimit -u`"
        elif self._batch_size is None:
            text = f"out of {name}: the model does not fit on {self._model_on}; "
            text += "free some, or choose another device"
        else:
            text = f"out of {name} at {option('batch_size', self._batch_size)}; free some, or try "
            text += option("batch_size", max(self._batch_size // 2, 1))
            if notes:  # A partial file of this batch size is kept.
                text += f" and {switch('overwrite')}"
        named = DeviceError(text)
        for note in notes:
            named.add_note(note)
        cause: BaseException | None = error
        while cause is not None:
            cause.__traceback__ = None
            cause = cause.__cause__ or cause.__context__
        raise named from error
