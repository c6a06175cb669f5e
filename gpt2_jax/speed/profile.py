"""What the devices do with their time, read from a profile of JAX."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData

from gpt2_jax.parallel import feed
from gpt2_jax.training.step import TrainState

Interval = tuple[float, float]  # start and end of something, in ns


class CollectiveShares(NamedTuple):
    """The mean over all GPUs: the share of the time in which a collective ran, and ran alone."""

    running: float
    alone: float


def collective_shares(
    train_step: Callable, state: TrainState, batch: feed.Batch, updates: int
) -> CollectiveShares | None:
    """Profiles updates, which use `state` up. None without GPUs or collectives."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(updates):
                state, metrics = train_step(state, batch)
            jax.block_until_ready(metrics)
        profiles = Path(folder).rglob('*.xplane.pb')
        return shares_of(ProfileData.from_file(str(path)) for path in profiles)


def shares_of(profiles: Iterable[ProfileData]) -> CollectiveShares | None:
    """The shares in profiles: a plane for each GPU, with a line for each of its streams.

    A collective is a kernel of NCCL. It also runs while it waits for the other GPUs.
    """
    planes = [plane for profile in profiles for plane in profile.planes]
    shares = []
    for plane in planes:
        if not plane.name.startswith('/device:GPU'):
            continue
        streams = [line for line in plane.lines if line.name.startswith('Stream')]
        events = [
            (event.name.startswith('nccl'), event.start_ns, event.start_ns + event.duration_ns)
            for stream in streams
            for event in stream.events
        ]
        collectives = [(start, end) for collective, start, end in events if collective]
        if not collectives:
            continue
        others = [(start, end) for collective, start, end in events if not collective]
        whole = max(end for _, _, end in events) - min(start for _, start, _ in events)
        both = _covered(collectives + others)
        shares.append((_covered(collectives) / whole, (both - _covered(others)) / whole))
    if not shares:
        return None
    running, alone = zip(*shares, strict=True)
    return CollectiveShares(sum(running) / len(shares), sum(alone) / len(shares))


def _covered(intervals: list[Interval]) -> float:
    """The length of the union of intervals."""
    covered, reached = 0.0, float('-inf')
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
