"""The page of a dataset on the hub that holds a dump: what it is, and how to read it."""

from dump_activations.errors import printable, shape_text
from dump_activations.storage.writing.work import Work

_PAGE = """---
tags:
- dump-activations
---

# Activations of a 2048 transformer

```python
from dump_activations import ActivationsFile

acts = ActivationsFile("{url}")
```

{facts}

| tensor | dtype | shape per board |
| --- | --- | --- |
{tensors}
"""
_FACTS = (
    *("checkpoint", "hub_commit", "random_init", "layers", "dataset", "dataset_rows"),
    *("n_samples", "sampling", "seed", "where", "steps", "precision", "stats"),
    "dump_activations_version",
)


def card(work: Work, url: str) -> str:
    """Describe the dump at a URL, in Markdown, by its metadata."""
    facts = [f"* {name}: {_code(work.metadata[name])}" for name in _FACTS if name in work.metadata]
    tensors = [
        f"| {_code(spec.name)} | {spec.dtype} | {shape_text(spec.shape[1:])} |"
        for spec in work.specs
        if spec.name in work.batched
    ]
    return _PAGE.format(url=url, facts="\n".join(facts), tensors="\n".join(tensors))


def _code(text: str) -> str:
    return f"`{printable(text).replace('`', chr(39))}`"
