"""The order of the training images."""

from collections.abc import Iterator

import numpy as np


class Batches:
    """The batches of an epoch, from any step on, as lists of (epoch, index of an image).

    Only ``seed`` and the epoch determine the order. A batch is the same however many processes
    share it: process ``rank`` of ``world`` takes every ``world``-th image. Every batch is full: the
    rest of an epoch is dropped, different images each time.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world = rank, world
        self.epoch = self.step = 0  # where the next pass begins

    def __len__(self) -> int:
        """The number of batches in a whole epoch."""
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        for step in range(self.step, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in batch[self.rank :: self.world].tolist()]
