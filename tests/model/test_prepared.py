"""Models that a caller hands in: unwrapped, checked, copied for the run, and left as they were."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import prune

from dump_activations import Encoder, InvalidArgumentError, dump, load_encoder, stream
from dump_activations.errors import ActivationUnavailableError
from dump_activations.model.checkpoint import prepare_model, unwrap_model
from dump_activations.model.encoder import replicate
from reference.checkpoints import VARIANTS
from reference.dumps import read_dump

BOARDS = torch.arange(32, dtype=torch.uint8).view(2, 16) % 12
CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    model = load_encoder(VARIANTS["sinks-gqa-6-2"](tmp_path).init)
    return model.train().requires_grad_()


@pytest.fixture
def process_group():
    from torch import distributed

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


def test_only_mode_and_hooks_are_its_own(model):
    seen = []
    model.blocks[0].register_forward_hook(lambda *_: seen.append("before"))
    replica = replicate(model, CPU)
    replica.blocks[0].register_forward_hook(lambda *_: seen.append("replica"))
    assert not any(module.training for module in replica.modules())
    assert all(module.training for module in model.modules())
    assert not {*model.modules()} & {*replica.modules()}
    pairs = zip(model.named_parameters(), replica.named_parameters(), strict=True)
    assert all(ours[0] == its[0] and ours[1] is its[1] for ours, its in pairs)
    assert torch.equal(replica(BOARDS)[0], model(BOARDS)[0])
    assert seen == ["before", "replica", "before"]


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average


WRAPPERS = {
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "AveragedModel": averaged,
    "several": lambda model: nn.DataParallel(torch.compile(averaged(model))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_gives_the_same_dump(wrap, model, demo_dataset, tmp_path, process_group):
    dumps = []
    for name, init in (("plain", copy.deepcopy(model)), ("wrapped", wrap(model))):
        path = tmp_path / f"{name}.safetensors"
        dump(init, demo_dataset, path, n_samples=5, outputs="*", device="cpu", allow_cpu=True)
        dumps.append(read_dump(path))
    plain, wrapped = dumps
    assert wrapped.metadata["weights_sha256"] == plain.metadata["weights_sha256"]
    for name, tensor in plain.tensors.items():
        assert torch.equal(wrapped.tensors[name], tensor), name


def test_a_model_that_compiles_itself_is_captured(model):
    """`model.compile()` leaves the class as it is, and runs what it compiled of the original."""
    expected = copy.deepcopy(model)(BOARDS)[0]
    model.compile(backend="eager")
    replica, seen = replicate(model, CPU), []
    replica.final_ln.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    replica(BOARDS)
    assert torch.equal(seen[0], expected)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def changed(change):
    """Return what changes a model and returns it."""
    return lambda model: (change(model), model)[1]


REFUSED = {
    "a state dict": (lambda model: model.state_dict(), "is a OrderedDict"),
    "a number": (lambda _: 3, "is a int"),
    "another module": (lambda model: model.blocks[0], "is a Block"),
    "peft": (nn.Sequential, "is a Sequential"),
    "traced": (
        lambda model: torch.jit.trace(model, BOARDS, check_trace=False),
        "is a TopLevelTracedModule",
    ),
    "FSDP2": (sharded, "tok_emb.weight must be a plain tensor with values; got a DTensor"),
    "meta": (lambda model: model.to("meta"), "got a Parameter on meta"),
    "quantised": (
        lambda model: quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8),
        "blocks.0.attn.wq",
    ),
    "pruned": (
        changed(lambda model: prune.l1_unstructured(model.blocks[0].mlp.w_up, "weight", 0.5)),
        "missing blocks.0.mlp.w_up.weight",
    ),
    "one block": (changed(lambda model: model.blocks.__delitem__(slice(1, None))), "blocks.1."),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_cannot_be_run_is_refused_in_one_line(make, words, model, process_group):
    with pytest.raises(InvalidArgumentError) as caught:
        unwrap_model(make(model))
    text = str(caught.value)
    assert words in text
    assert "give a checkpoint's path, or an Encoder" in text
    assert "\n" not in text


def test_a_subclass_may_have_modules_of_its_own(model):
    model.register_buffer("steering", torch.zeros(3))
    assert unwrap_model(model) is model


def test_random_init_is_for_checkpoints(model):
    with pytest.raises(InvalidArgumentError, match="random_init"):
        prepare_model(model, CPU, random_init=True)


class WithoutBlock1(Encoder):
    def forward(self, tokens_BS):
        x_BSH = self.final_ln(self.blocks[0](self.tok_emb(tokens_BS.long()) + self.pos_emb()))
        return x_BSH, self._head_logits(x_BSH.mean(1))


class TwiceInBlock1(Encoder):
    """The last module that runs is the one that runs again."""

    def forward(self, tokens_BS):
        _, logits = super().forward(tokens_BS)
        self.blocks[1].mlp(torch.zeros(len(tokens_BS), 16, self.config.hidden_size))
        return _, logits


class OneByOne(Encoder):
    """Runs blocks without their hooks."""

    def forward(self, tokens_BS):
        x_BSH = self.tok_emb(tokens_BS.long()) + self.pos_emb()
        for block in self.blocks:
            x_BSH = block.forward(x_BSH)
        return x_BSH, self._head_logits(x_BSH.mean(1))


@pytest.mark.parametrize(
    ("kind", "key", "words"),
    [
        (WithoutBlock1, "layer_outputs", "blocks.1 does not run"),
        (TwiceInBlock1, "mlp_out", "blocks.1.mlp runs more than once"),
        (OneByOne, "resid_pre", "blocks.0 does not run"),
        (OneByOne, "final_hidden", "final_ln does not run"),
    ],
)
def test_a_module_that_does_not_run_once_is_named(kind, key, words, model, demo_dataset):
    model.__class__ = kind
    options = {"outputs": key, "n_samples": 40, "device": "cpu", "allow_cpu": True}
    for compiled in (False, True):
        with pytest.raises(ActivationUnavailableError, match=words):
            list(stream(model, demo_dataset, compile=compiled, **options))


@pytest.mark.parametrize("key", ["attn_out", "head_logits"])
def test_a_module_that_does_not_run_may_be_left_out(key, model, demo_dataset, tmp_path):
    model.__class__ = WithoutBlock1
    options = {"n_samples": 40, "device": "cpu", "allow_cpu": True}
    layers = {} if key == "head_logits" else {"layers": [0]}
    dump(model, demo_dataset, tmp_path / "a.npz", outputs=key, **options, **layers)
    found = read_dump(tmp_path / "a.npz")
    plain = Encoder(replace(model.config, num_hidden_layers=1))
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    dump(plain, demo_dataset, tmp_path / "b.npz", outputs=key, **options)
    np.testing.assert_array_equal(found.numpy(key), read_dump(tmp_path / "b.npz").numpy(key))
