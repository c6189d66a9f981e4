"""Fuzzes a reader with atheris: `fuzz.py TARGET [OPTIONS OF LIBFUZZER]`.

New inputs are kept in target/fuzz/TARGET, for the next run. An input that breaks a reader is kept
in the current directory, as crash-HASH.
"""

import random
import re
import sys
import warnings
from pathlib import Path

import atheris

NUMBER = re.compile(rb"\d+")
EXTREMES = [
    *[b"0", b"-1", b"4294967296", b"9223372036854775808", b"9" * 5000, b"1e999", b"NaN", b"-0.5"],
    *[b"true", b"null", b'"x"', b"[]", b"{}", b"[" * 5000],
]

ROOT = Path(__file__).resolve().parents[2]

INSTRUMENTED = ["dump_activations", "dataset_targets", "zipfile", "pickletools"]
with atheris.instrument_imports(include=INSTRUMENTED):
    from targets import TARGETS, measured


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    """Put an extreme in the place of a number in text, or do what libFuzzer does to bytes."""
    rng = random.Random(seed)
    numbers = list(NUMBER.finditer(data))
    if not numbers or rng.random() < 0.5:
        return atheris.Mutate(data, longest)
    number = rng.choice(numbers)
    return (data[: number.start()] + rng.choice(EXTREMES) + data[number.end() :])[:longest]


def main() -> None:
    """Run one target until the options end it."""
    _, name, *options = sys.argv
    warnings.simplefilter("ignore")
    run = TARGETS[name]
    found = ROOT / "target" / "fuzz" / name
    found.mkdir(parents=True, exist_ok=True)
    seeds = ROOT / "fuzz" / "python" / "corpus" / name
    for seed in sorted(seeds.iterdir()):
        run(seed.read_bytes())  # what is imported and allocated once
    defaults = ["-max_len=65536", "-timeout=60", "-rss_limit_mb=4096"]
    arguments = [sys.argv[0], *defaults, *options, str(found), str(seeds)]
    atheris.Setup(arguments, measured(run), custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
