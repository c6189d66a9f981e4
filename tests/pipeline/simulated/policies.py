"""How far the streams run whenever the program calls: as late or as early as the rules allow."""

import random
from collections.abc import Callable

from simulated.streams import Device


def lazy(_device: Device) -> None:
    """Run only what the program waits for."""


def greedy(device: Device) -> None:
    """Run everything at once."""
    for stream in device.streams:
        device.drain(stream)


def first(number: int) -> Callable[[Device], None]:
    """Run one stream, and what it waits for, at once; others only where they are waited for."""

    def policy(device: Device) -> None:
        if number < len(device.streams):
            device.drain(device.streams[number])

    return policy


def at_random(seed: int) -> Callable[[Device], None]:
    """Run as much of each stream as a generator says, which has favourites."""
    generator = random.Random(seed)
    haste = [generator.random() for _ in range(4)]

    def policy(device: Device) -> None:
        for stream, probability in zip(device.streams, haste, strict=False):
            while stream.queue and generator.random() < probability:
                device.step(stream)

    return policy
