"""Pickles of honest bundles pass; small ones that would take for ever are refused unloaded."""

import io
import pickle
import zipfile
from collections import Counter

import pytest
import torch

from dump_activations.pickles import check_pickle
from reference.checkpoints import BASE, bundle, config_json, random_state_dict


def saved_pickle(content):
    file = io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name)


def training_state():
    """Return what a training run keeps: an optimizer's state, and values of every kind."""
    shared = {"path": "/data/" + "dataset/" * 200, "splits": [(0, 1), (1, 2)]}
    moments = {"step": torch.tensor(7.0), "exp_avg": torch.ones(4, 4), "exp_avg_sq": torch.ones(4)}
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "fused": None, "params": list(range(500))}
    return {
        "optimizer": {"state": {i: dict(moments) for i in range(500)}, "param_groups": [group]},
        "generator": torch.get_rng_state(),
        "dataset": [shared] * 1000,
        "seen": list(range(5000)),
        "by_move": {(move, step): 10**40 for move in range(4) for step in range(50)},
        "values": [b"\x00\xff", bytearray(b"ab"), {1, 2}, 1j, Counter("abb"), None, True, 0.5],
        "torch": [torch.device("cpu"), torch.bfloat16, torch.Size([2, 3])],
        "parameter": torch.nn.Parameter(torch.zeros(2)),
        "strided": torch.zeros(4, 6).t()[1:, ::2],
        "module": torch.nn.Linear(2, 2).state_dict(),
    }


@pytest.mark.parametrize("place", ["new", "encoder"])
def test_what_training_saves_passes(place):
    content = bundle(random_state_dict(BASE), config_json(BASE), place=place)
    check_pickle(saved_pickle(content | training_state()))


def folded(levels, value=()):
    for _ in range(levels):
        value = (value, value)
    return value


def nested(levels):
    value = ()
    for _ in range(levels):
        value = (value,)
    return value


def calls(function, arguments, times=1):
    """Pickle a list of one call, made again and again with the same arguments."""
    module, name = function.split()
    once = b"c" + f"{module}\n{name}\n".encode() + b"h\x00R"
    return b"\x80\x02" + pickle.dumps(arguments, 2)[2:-1] + b"q\x00](" + once * times + b"e."


HOSTILE = {
    "folded-key": b"\x80\x02}" + pickle.dumps(folded(60), 2)[2:-1] + b"K\x01s.",
    "folded-value": pickle.dumps([folded(60)], 2),
    "folded-through-lists": pickle.dumps(folded(60, [1]), 2),
    "nested-key": b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.",
    "keys-again-and-again": b"\x80\x02"
    + pickle.dumps(folded(17), 2)[2:-1]
    + b"r\x00\x00\x00\x00}("
    + b"j\x00\x00\x00\x00N" * 5000
    + b"u.",
    "sets-again-and-again": calls("builtins set", ([str(i) for i in range(10_000)],), 10_000),
    "bytes-of-a-number": calls("builtins bytearray", (2**31 - 1,)),
    "text-of-a-code": calls("_codecs encode", ("a", "hex")),
    "call-of-a-list": b"\x80\x02])R.",
    "memo": b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "memo-unset": b"\x80\x02h\x01.",
    "stack-empty": b"\x80\x02\x86.",
    "mark-missing": b"\x80\x02t.",
    "text-cut": b"\x80\x02X\xff\xff\xff\xffabc.",
    "no-end": b"\x80\x02K\x01",
    "empty": b"",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fK\x01.",
    "long-integer": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "opcode": b"\x80\x02\x00.",
    "into-a-number": b"\x80\x02K\x01K\x02a.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_would_take_for_ever_is_refused(case):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        check_pickle(HOSTILE[case])


def test_a_refusal_leaves_nothing_behind():
    """What one pickle fills is not what the next one has."""
    for _ in range(3):
        check_pickle(b"\x80\x02](K\x01K\x02K\x03e.")
    with pytest.raises(ValueError, match="holds no others"):
        check_pickle(HOSTILE["into-a-number"])
