"""What a run was made of: the metadata of its file, and what determines every byte of it.

docs/file-format.md says what each entry means and how each digest is computed.
"""

import hashlib
import json
from importlib.metadata import version

import torch

from dump_activations.dataset.expressions import Expression
from dump_activations.dataset.sampling import StepIndices
from dump_activations.model.encoder import Encoder
from dump_activations.pipeline.device import device_name
from dump_activations.pipeline.plan import Plan

# Indices that are digested at once.
_PIECE = 1 << 20

_FORMAT_VERSION = "1"


def metadata(plan: Plan) -> dict[str, str]:
    """Describe a run for its output file, string to string; what does not apply is left out."""
    options = plan.options
    return {
        **_model_metadata(plan.model),
        "n_samples": str(len(plan.indices)),
        "seed": str(options.seed),
        "dtype": options.dtype,
        "outputs": ",".join(sorted(each.key for each in plan.activations)),
        "layers": ",".join(map(str, plan.layers)),
        "precision": options.precision,
        "compile": str(options.compile).lower(),
        "format_version": _FORMAT_VERSION,
        "dump_activations_version": version("dump-activations"),
        "torch_version": torch.__version__,
        "device": device_name(plan.device),
        "batch_size": str(options.batch_size),
        "dataset": str(plan.dataset.path),
        "dataset_rows": str(len(plan.dataset)),
        "dataset_layout_sha256": plan.dataset.layout_sha256,
        "indices_from": plan.indices_from,
        **_selection_metadata(plan),
        **({"stats": "true"} if plan.has_statistics else {}),
    }


def _model_metadata(model: Encoder) -> dict[str, str]:
    config = model.config
    said = {
        "checkpoint": model.checkpoint,
        "hub_commit": model.hub_commit,
        "hidden_size": str(config.hidden_size),
        "num_layers": str(config.num_hidden_layers),
        "head_type": config.head_type,
        "n_bins": None if config.head_type == "none" else str(config.logits_shape[-1]),
        "random_init": str(model.random_init).lower(),
        "tokenizer": model.tokenizer,
        "weights_dtype": _other_dtypes(model),
        "weights_sha256": _weights_sha256(model),
    }
    return _that_apply(said)


def _other_dtypes(model: Encoder) -> str | None:
    """Name the dtypes of a model's parameters where they are not all fp32."""
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}
    return None if dtypes == {"float32"} else ",".join(sorted(dtypes))


def fingerprint(plan: Plan) -> dict[str, str]:
    """Name everything that determines the bytes of a run's tensors, beside what its metadata says.

    Of the dataset it takes the shards' names, sizes and rows' layout, not their rows.
    """
    threads = str(torch.get_num_threads()) if plan.device.type == "cpu" else "any"
    return {
        "config": repr(plan.model.config),
        "indices": _indices_sha256(plan.indices),
        "threads": threads,
    }


def _selection_metadata(plan: Plan) -> dict[str, str]:
    """Say which steps and labels were asked for, where they were."""
    where, steps = plan.options.where, plan.options.steps
    said = {
        "labels": None if plan.labels is None else ",".join(plan.labels.dtypes),
        "where": where.text if isinstance(where, Expression) else None,
        "steps": None if steps is None else plan.indices_from.removeprefix("steps "),
    }
    return _that_apply(said)


def _that_apply(said: dict[str, str | None]) -> dict[str, str]:
    return {key: text for key, text in said.items() if text is not None}


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
