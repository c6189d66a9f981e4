"""The metadata of a run's file, and the fingerprint of the work.

docs/file-format.md explains each entry and how each digest is computed.
"""

import hashlib
from importlib.metadata import version

import torch

from dump_activations.dataset.expressions import Expression
from dump_activations.pipeline.device import device_name
from dump_activations.pipeline.plan import Plan
from dump_activations.remote.mirror import url_of

_FORMAT_VERSION = "1"
_DIGESTED_AT_ONCE = 1 << 20


def metadata(plan: Plan) -> dict[str, str]:
    """Describe a run for its output file, but for `computed_by`. Entries of no use are left out."""
    options, model, config = plan.options, plan.model, plan.model.config
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}
    entries = {
        "checkpoint": model.checkpoint,
        "hub_commit": model.hub_commit,
        "hidden_size": str(config.hidden_size),
        "num_layers": str(config.num_hidden_layers),
        "head_type": config.head_type,
        "n_bins": None if config.head_type == "none" else str(config.logits_shape[-1]),
        "random_init": str(model.random_init).lower(),
        "tokenizer": model.tokenizer,
        "weights_dtype": None if dtypes == {"float32"} else ",".join(sorted(dtypes)),
        **_asked(plan),
        "seed": str(options.seed),
        "dataset": url_of(plan.dataset.path) or str(plan.dataset.path),
        "dataset_rows": str(len(plan.dataset)),
        "sampling": plan.sampling,
        "where": options.where.text if isinstance(options.where, Expression) else None,
        "steps": plan.sampling.removeprefix("steps ") if options.steps is not None else None,
    }
    return {name: text for name, text in entries.items() if text is not None}


def fingerprint(plan: Plan) -> dict[str, str]:
    """Name everything that determines the values of a run's tensors, and nothing else.

    It is the same in all processes and on all machines: without paths, devices or threads. The
    dataset counts by the names, sizes and layouts of its shards, not by their rows.
    """
    digest = hashlib.sha256()
    for start in range(0, len(plan.indices), _DIGESTED_AT_ONCE):
        digest.update(plan.indices[start : start + _DIGESTED_AT_ONCE].data)
    split = {"split_layers": "true"} if plan.options.split_layers else {}
    asked = {name: text for name, text in _asked(plan).items() if text is not None}
    return {
        **asked,
        **split,
        "config": repr(plan.model.config),
        "indices": digest.hexdigest(),
    }


def computed_by(plan: Plan) -> dict[str, str]:
    """Name what may change the last bits of a result: the device, and threads on a CPU."""
    threads = {} if plan.device.type == "cuda" else {"threads": str(torch.get_num_threads())}
    return {"device": device_name(plan.device), **threads}


def _asked(plan: Plan) -> dict[str, str | None]:
    """Return the entries that are part of both the metadata and the fingerprint."""
    options = plan.options
    return {
        "weights_sha256": plan.model.weights_sha256,
        "dataset_layout_sha256": plan.dataset.layout_sha256,
        "n_samples": str(len(plan.indices)),
        "outputs": ",".join(sorted(each.key for each in plan.activations)),
        "layers": ",".join(map(str, plan.layers)),
        "labels": None if plan.labels is None else ",".join(plan.labels.dtypes),
        "dtype": options.dtype,
        "precision": options.precision,
        "compile": str(options.compile).lower(),
        "batch_size": str(options.batch_size),
        "format_version": _FORMAT_VERSION,
        "dump_activations_version": version("dump-activations"),
        "torch_version": torch.__version__,
    }
