"""The arithmetic of a forward pass is its own, and the caller's settings are as before."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from simulated.policies import greedy
from simulated_device import simulated

from dump_activations import dump, load_encoder, stream
from dump_activations.pipeline.device import arithmetic
from reference.checkpoints import VARIANTS
from reference.dumps import read_dump

CPU = {"device": "cpu", "allow_cpu": True}
OPTIONS = {"outputs": ["layer_outputs"], "n_samples": 12, "batch_size": 5} | CPU


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


FP32 = [("generic", "all"), *[(b, op) for b in ("cuda", "mkldnn") for op in ("all", "matmul")]]
CUDA = torch.backends.cuda


def settings():
    """Return the settings of the process and the thread that a run might change."""
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # It was set for one backend alone.
        matmul = "mixed"
    enabled = (CUDA.flash_sdp_enabled, CUDA.mem_efficient_sdp_enabled, CUDA.math_sdp_enabled)
    return {
        "fp32": [*[torch._C._get_fp32_precision_getter(*each) for each in FP32], matmul],
        "kernels": [*[each() for each in enabled], CUDA.cudnn_sdp_enabled()],
        "order": torch._C._get_sdp_priority_order(),
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "thread": (torch.get_num_threads(), torch.is_grad_enabled()),
        "inference": torch.is_inference_mode_enabled(),
    }


CALLERS = {
    "defaults": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "all backends": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "one backend": lambda: setattr(CUDA.matmul, "fp32_precision", "tf32"),
    "no flash attention": lambda: CUDA.enable_flash_sdp(False),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
}


@pytest.fixture
def own_settings():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for each in FP32:
        torch._C._set_fp32_precision_setter(*each, "none")
    CUDA.enable_flash_sdp(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.usefixtures("own_settings")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("caller", CALLERS)
def test_a_callers_settings_are_not_taken_and_are_as_before(
    caller, precision, demo_checkpoint, demo_dataset
):
    def run():
        model = load_encoder(demo_checkpoint)
        model.final_ln.register_forward_hook(lambda *_: inside.append(settings()))
        batches = stream(model, demo_dataset, precision=precision, **options)
        return torch.cat(
            [(batch["final_hidden"], between.append(settings()))[0] for batch in batches]
        )

    on_cpu = precision != "tf32"
    options = {"n_samples": 12, "batch_size": 5} | (CPU if on_cpu else {})
    inside, between = [], []
    with nullcontext() if on_cpu else simulated(greedy):
        expected = run()
        CALLERS[caller]()
        before = settings()
        assert torch.equal(run(), expected)
        assert settings() == before
    assert between[3:] == [before] * 3
    assert inside[-1]["fp32"][2] == inside[-1]["fp32"][4] == ("ieee" if on_cpu else "tf32")
    assert inside[-1]["kernels"] == [True, True, True, False]
    assert inside[-1]["order"] == [1, 2, 0, 3, 4]
    # Settings that were inherited still are.
    torch.backends.fp32_precision = "ieee"
    inherited = caller in ("high", "medium", "one backend")
    assert (CUDA.matmul.fp32_precision == "tf32") == inherited


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
