"""One process that loads checkpoints for test_hub: JSON requests in, JSON answers out.

The huggingface-hub client reads HF_ENDPOINT and HF_HOME when it is imported, so they must be set
before this starts.
"""

import json
import os
import sys
import warnings


class _Told:
    """A reporter that keeps the names of all phases."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __setattr__(self, name: str, value: object) -> None:
        if name == "phase":
            self._names.append(value.name)  # type: ignore[attr-defined]
        super().__setattr__(name, value)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import torch
    from huggingface_hub import constants

    from dump_activations import load_encoder, progress

    for line in sys.stdin:
        request, phases = json.loads(line), []
        told = _Told(phases)
        constants.HF_HUB_ETAG_TIMEOUT = request["timeout"]
        try:
            with progress.reported_to(told), warnings.catch_warnings(record=True) as caught:
                model = load_encoder(request["init"])
            with torch.no_grad():
                _, logits = model(torch.tensor(request["boards"]))
            answer = {
                "logits": logits.tolist(),
                "commit": model.hub_commit,
                "tokenizer": model.tokenizer,
                "phases": phases,
                "warnings": [str(each.message) for each in caught],
            }
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"error": str(error), "kinds": kinds}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


main()
