"""The arithmetic of a forward pass is its own, and the caller's settings are as before."""

import copy
import threading
from collections import Counter
from concurrent.futures import Executor, Future
from contextlib import nullcontext

import pytest
import torch
from simulated.policies import greedy
from simulated_device import simulated
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dump_activations import dump, load_encoder, stream
from dump_activations.pipeline.device import arithmetic
from reference.checkpoints import VARIANTS
from reference.dumps import read_dump

CPU = {"device": "cpu", "allow_cpu": True}
OPTIONS = {"outputs": ["layer_outputs"], "n_samples": 12, "batch_size": 5} | CPU


class InThisThread(Executor):
    """Runs work when it is submitted, in the thread that submits it."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, work, /, *arguments, **options) -> Future:
        future = Future()
        future.set_result(work(*arguments, **options))
        return future


@pytest.fixture
def model(demo_checkpoint):
    return load_encoder(demo_checkpoint)


def streamed(model, dataset, **options):
    batches = stream(model, dataset, **OPTIONS, **options)
    return torch.cat([batch["layer_outputs"] for batch in batches])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_autocast_changes_nothing(precision, model, demo_dataset, tmp_path):
    expected = streamed(model, demo_dataset, precision=precision)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(streamed(model, demo_dataset, precision=precision), expected)
        dump(model, demo_dataset, tmp_path / "a.pt", precision=precision, **OPTIONS)
    assert torch.equal(read_dump(tmp_path / "a.pt").tensors["layer_outputs"], expected)


SETTINGS = [("generic", "all"), *[(b, op) for b in ("cuda", "mkldnn") for op in ("all", "matmul")]]


def matmul_precision():
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # It was set for one backend alone.
        return "mixed"


def settings():
    """Return the settings of the process and the thread that a run might change."""
    attention = torch.backends.cuda
    return {
        "fp32": [torch._C._get_fp32_precision_getter(*each) for each in SETTINGS],
        "matmul": matmul_precision(),
        "kernels": (
            attention.flash_sdp_enabled(),
            attention.mem_efficient_sdp_enabled(),
            attention.math_sdp_enabled(),
            attention.cudnn_sdp_enabled(),
            torch._C._get_sdp_priority_order(),
        ),
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "thread": (
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        ),
    }


def put_back():
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for each in SETTINGS:
        torch._C._set_fp32_precision_setter(*each, "none")
    torch.backends.cuda.enable_flash_sdp(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def set_fp32_precision(of, value):
    of.fp32_precision = value


CALLERS = {
    "defaults": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "all backends": lambda: set_fp32_precision(torch.backends, "tf32"),
    "one backend": lambda: set_fp32_precision(torch.backends.cuda.matmul, "tf32"),
    "no flash attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
}


@pytest.fixture
def own_settings():
    yield
    put_back()


@pytest.mark.usefixtures("own_settings")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("caller", CALLERS)
def test_a_callers_settings_are_not_taken_and_are_as_before(
    caller, precision, demo_checkpoint, demo_dataset
):
    def run(seen):
        model = load_encoder(demo_checkpoint)
        model.final_ln.register_forward_hook(lambda *_: seen.append(settings()))
        tensors = []
        for batch in stream(model, demo_dataset, precision=precision, **options):
            tensors.append(batch["final_hidden"])
            between.append(settings())
        return torch.cat(tensors)

    between = []
    options = {"n_samples": 12, "batch_size": 5}
    on_cpu = precision != "tf32"
    if on_cpu:
        options |= CPU
    with nullcontext() if on_cpu else simulated(greedy):
        expected = run([])
        CALLERS[caller]()
        before, between = settings(), []
        seen = []
        found = run(seen)
        assert settings() == before
    assert torch.equal(found, expected)
    assert between == [before] * 3
    _, _, cuda, _, mkldnn = seen[-1]["fp32"]
    assert (cuda, mkldnn) == (("ieee", "ieee") if on_cpu else ("tf32", "tf32"))
    assert seen[-1]["kernels"] == (True, True, True, False, [1, 2, 0, 3, 4])
    # Settings that were inherited still are.
    torch.backends.fp32_precision = "ieee"
    inherited = caller in ("high", "medium", "one backend")
    assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == inherited


def test_threads_with_other_settings_wait(model, demo_dataset):
    """Runs in several precisions at once: each computes in its own, and nothing is left behind."""
    before, seen = settings(), {"highest": set(), "high": set()}

    def work(fp32):
        for _ in range(200):
            device = torch.device("cpu" if fp32 == "highest" else "cuda")
            with arithmetic("tf32" if fp32 == "high" else "fp32", device):
                seen[fp32].add(torch.get_float32_matmul_precision())

    threads = [threading.Thread(target=work, args=(fp32,)) for fp32 in [*seen, *seen]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"highest": {"highest"}, "high": {"high"}}
    assert settings() == before


@pytest.fixture(params=["gqa-4-2", "qk-norm-sinks-policy"])
def wide(request, tmp_path):
    return load_encoder(VARIANTS[request.param](tmp_path / "checkpoint").init)


def plainly(model, boards):
    """Return the model's own final states and logits."""
    with torch.inference_mode():
        hidden, logits = model(boards)
    return {"final_hidden": hidden.float(), "head_logits": logits.float()}


def only_batch(model, dataset, **options):
    keys = "final_hidden,head_logits"
    (batch,) = stream(model, dataset, outputs=keys, n_samples=12, **CPU, **options)
    return batch.boards, batch.tensors


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of the norms in autocast's own forward
def test_bf16_is_autocast(wide, demo_dataset):
    boards, found = only_batch(wide, demo_dataset, precision="bf16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(found, plainly(wide, boards))


def test_bf16_true_is_the_model_in_bf16(wide, demo_dataset):
    before = {name: (id(weight), weight.dtype) for name, weight in wide.named_parameters()}
    boards, found = only_batch(wide, demo_dataset, precision="bf16-true")
    assert {name: (id(w), w.dtype) for name, w in wide.named_parameters()} == before
    narrow = copy.deepcopy(wide).to(torch.bfloat16)
    assert_equal(found, plainly(narrow, boards))
    # A model that comes in bf16 is run as it is.
    assert_equal(only_batch(narrow, demo_dataset)[1], found)


class Casts(TorchDispatchMode):
    """Counts what is cast from fp32 to bf16, by its shape."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy):
            before, after = args[0].dtype, result.dtype
            if (before, after) == (torch.float32, torch.bfloat16):
                self.of[tuple(result.shape)] += 1
        return result


def test_bf16_casts_each_weight_once_a_run_and_each_norm_once_a_batch(
    wide, demo_dataset, monkeypatch
):
    # Casts are counted in this thread, so the forward has to run in it.
    monkeypatch.setattr("dump_activations.pipeline.run.ThreadPoolExecutor", InThisThread)
    options = {"outputs": "layer_outputs", "n_samples": 12, "batch_size": 3} | CPU
    with Casts() as casts:
        batches = len([*stream(wide, demo_dataset, precision="bf16", **options)])
    linears = [module for module in wide.modules() if isinstance(module, nn.Linear)]
    weights = Counter(tuple(weight.shape) for each in linears for weight in each.parameters())
    activations = casts.of - weights
    assert casts.of == weights + activations
    into_products = (3, 16, wide.config.hidden_size)
    norms = 2 * wide.config.num_hidden_layers * batches
    assert activations.pop(into_products) == norms
    # The head runs in the first pass alone.
    assert activations.pop((3, wide.config.hidden_size)) == 1
    assert all(len(shape) != 2 for shape in activations)
