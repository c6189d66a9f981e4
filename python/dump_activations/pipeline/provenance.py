"""What a run was made of: the metadata of its file, and what determines every byte of it.

docs/file-format.md says what each entry means and how each digest is computed.
"""

import hashlib
import json
from importlib.metadata import version

import torch

from dump_activations.model.encoder import Encoder
from dump_activations.pipeline.device import device_name
from dump_activations.pipeline.plan import Plan
from dump_activations.pool.expressions import Expression
from dump_activations.pool.matches import StepIndices

# Indices that are digested at once.
_PIECE = 1 << 20

_FORMAT_VERSION = "1"


def metadata(plan: Plan) -> dict[str, str]:
    """Describe a run for its output file, string to string."""
    model, options = plan.model, plan.options
    config = model.config
    return {
        "checkpoint": model.checkpoint,
        "hidden_size": str(config.hidden_size),
        "num_layers": str(config.num_hidden_layers),
        "head_type": config.head_type,
        "n_bins": str(config.logits_shape[-1]),
        "n_samples": str(len(plan.indices)),
        "seed": str(options.seed),
        "dtype": options.dtype,
        "outputs": ",".join(sorted(set(options.outputs))),
        "precision": options.precision,
        "compile": str(options.compile).lower(),
        "random_init": str(model.random_init).lower(),
        "format_version": _FORMAT_VERSION,
        "dump_activations_version": version("dump-activations"),
        "torch_version": torch.__version__,
        "device": device_name(plan.device),
        "batch_size": str(options.batch_size),
        "dataset": str(plan.pool.path),
        "dataset_rows": str(len(plan.pool)),
        "dataset_sha256": plan.pool.sha256,
        "indices_from": plan.indices_from,
        "weights_sha256": _weights_sha256(model),
        **_selection(plan),
    }


def fingerprint(plan: Plan) -> dict[str, str]:
    """Name everything that determines the bytes of a run's tensors, beside what its metadata says.

    Of the pool it takes the shards' names, sizes and rows' layout, not their rows.
    """
    threads = str(torch.get_num_threads()) if plan.device.type == "cpu" else "any"
    return {
        "config": repr(plan.model.config),
        "indices": _indices_sha256(plan.indices),
        "threads": threads,
    }


def _selection(plan: Plan) -> dict[str, str]:
    """Say which steps and labels were asked for, where they were."""
    options = plan.options
    selection = {}
    if plan.labels is not None:
        selection["labels"] = ",".join(plan.labels.dtypes)
    if isinstance(options.where, Expression):
        selection["where"] = options.where.text
    if options.steps is not None:
        selection["steps"] = plan.indices_from.removeprefix("steps ")
    return selection


def _indices_sha256(indices: StepIndices) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(indices), _PIECE):
        digest.update(indices[start : start + _PIECE].data)
    return digest.hexdigest()


def _weights_sha256(model: Encoder) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
