"""An order of images in which the processes of a training have nearly equally many tokens in each step.

The processes of a step wait for the one with the most tokens. Here each process gets images of about the same number of
tokens as the others: images are sorted by their tokens, neighbours make a group of one image per process, and a step
takes as many random groups as a process has images. Since the images of a group are nearly alike, so are any costs that
grow with their tokens, such as attention's squares.

Only pools of a random part of the images are sorted, so that the images of a step meet others in each epoch.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

POOL_STEPS = 64


class BalancedOrder:
    """An endless order of images for all processes, the same in all of them.

        order = BalancedOrder(tokens, ranks=2, batch_size=4, seed=0)
        for step in order.steps():  # (2, 4): the images of each process

    As with MMEngine's InfiniteSampler and Detectron2's TrainingSampler, epochs follow each other without a break, and
    nothing is dropped or repeated to fill a step: one that an epoch leaves incomplete is filled with images of the
    next. After any number of steps, each image has been seen as often as any other, or once more.

    Augmentation changes the tokens of an image. Where each image has some draws of it, of which each epoch takes the
    next, ``tokens`` holds those of all images in the first draw, then in the second, and so on, and steps hold the
    places in that list: ``draw, image = divmod(place, number of images)``.

    Args:
        tokens: of each image, in each draw, at least 0.
        ranks: number of processes.
        batch_size: images per process and step.
        seed: of the order; epochs differ.
        pool_steps: steps whose images are sorted together. More balance better, fewer mix better.
        draws: of augmentation that ``tokens`` holds.

    Raises:
        ValueError: for no images, tokens that are not finite numbers from 0 on, and other numbers below 1.
    """

    def __init__(
        self,
        tokens: Sequence[float],
        ranks: int,
        batch_size: int,
        seed: int,
        pool_steps: int = POOL_STEPS,
        draws: int = 1,
    ) -> None:
        self.tokens = np.asarray(tokens, dtype=np.float64)
        if self.tokens.ndim != 1 or not len(self.tokens) or not (np.isfinite(self.tokens) & (self.tokens >= 0)).all():
            raise ValueError("tokens: expected a finite number from 0 on for each of one or more images")
        numbers = {"ranks": ranks, "batch_size": batch_size, "pool_steps": pool_steps, "draws": draws}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if len(self.tokens) % draws:
            raise ValueError(f"draws={draws}: expected as many tokens for each of them, not {len(self.tokens)} in all")
        self.draws, self.images = draws, len(self.tokens) // draws
        self.ranks, self.batch_size, self.seed, self.pool_steps = ranks, batch_size, seed, pool_steps

    @property
    def step_size(self) -> int:
        """Images per step, of all processes."""
        return self.ranks * self.batch_size

    def steps(self) -> Iterator[np.ndarray]:
        """The images of each step: (ranks, batch_size) int64."""
        carried = np.empty(0, dtype=np.int64)  # images of the last epoch that did not fill a step
        for epoch in count():
            random = np.random.default_rng((self.seed, epoch))
            left = self._sorted(random.permutation(self.images) + epoch % self.draws * self.images)
            missing = -len(carried) % self.step_size
            if missing and missing < len(left):
                filling, left = _taken(left, self._nearest(left, carried, missing), missing)
                yield from self._dealt(np.concatenate([carried, filling])[None], random)
                carried = carried[:0]
            elif missing:
                carried, left = np.concatenate([carried, left]), left[:0]
            if len(carried) == self.step_size:
                yield from self._dealt(carried[None], random)
                carried = carried[:0]
            if len(left):
                over = len(left) % self.step_size
                carried, left = _taken(left, random.integers(len(left) - over + 1), over)
                yield from self._full_steps(left, random)

    def images_of(self, rank: int) -> Iterator[int]:
        """The images of one process, one after the other."""
        for step in self.steps():
            yield from step[rank].tolist()

    def _sorted(self, images: np.ndarray) -> np.ndarray:
        """Sort images (N,) by their tokens; equal ones keep their order."""
        return images[np.argsort(self.tokens[images], kind="stable")]

    def _nearest(self, images: np.ndarray, others: np.ndarray, number: int) -> int:
        """Where the neighbours among sorted images begin that have about as many tokens as others."""
        middle = np.searchsorted(self.tokens[images], np.median(self.tokens[others]))
        return int(np.clip(middle - number // 2, 0, len(images) - number))

    def _full_steps(self, images: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
        """Make steps of images, as many as fill them, by pools."""
        steps = random.permutation(images).reshape(-1, self.step_size)
        for start in range(0, len(steps), self.pool_steps):
            yield from self._dealt(steps[start : start + self.pool_steps], random)

    def _dealt(self, pool: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Make steps (S, ranks, batch_size) of the images of a pool (S, ranks * batch_size)."""
        groups = random.permutation(self._sorted(pool.ravel()).reshape(-1, self.ranks))
        groups = groups.reshape(len(pool), self.batch_size, self.ranks)
        tokens = self.tokens[groups]
        # The most uneven group of a step first, so that the others can make up for it.
        by_range = np.argsort(tokens[..., 0] - tokens[..., -1], axis=1, kind="stable")
        groups = np.take_along_axis(groups, by_range[..., None], axis=1)
        dealt, loads = np.empty_like(groups), np.zeros((len(pool), self.ranks))
        for number in range(self.batch_size):
            heaviest_first = np.argsort(-loads, axis=1, kind="stable")
            np.put_along_axis(dealt[:, number], heaviest_first, groups[:, number], axis=1)
            loads += self.tokens[dealt[:, number]]
        places = np.argsort(random.random((len(pool), 1, self.ranks)), axis=2)  # no process always has the fewest
        return np.take_along_axis(dealt, places, axis=2).transpose(0, 2, 1)


def _taken(images: np.ndarray, start: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours among images, and the others."""
    return images[start : start + number], np.delete(images, slice(start, start + number))


def tokens_waited(loads: np.ndarray) -> np.ndarray:
    """Tokens that the other processes of each step could have computed while they wait: (S,), of loads (S, ranks)."""
    return loads.max(1) * loads.shape[1] - loads.sum(1)
