"""Photos as a training pipeline draws them, by name, for their token curves."""

import hashlib
from typing import NamedTuple

from torch import Tensor

from calibration.tokens_after_each_transform import draw_until_made, last_image
from calibration.training_pipeline import Task


class DrawnPhotos(NamedTuple):
    """Draws of photos; each follows from the seed, the photo's number and the draw's, as in the table of steps.

    Args:
        numbers: number of the photo and of the draw, by name.
    """

    task: Task
    seed: int
    numbers: dict[str, tuple[int, int]]

    def image(self, name: str) -> Tensor:
        """What the model sees in training, (1, C, H, W) normalised and padded. Raises ValueError, OSError."""
        number, draw = self.numbers[name]
        return draw_until_made(last_image, self.task.pipeline, self.task.photos[number], (self.seed, number, draw))[0]

    def describe(self) -> str:
        """Text that differs where the draws do."""
        steps = hashlib.sha256(self.task.settings.encode()).hexdigest()[:12]
        return f"seed {self.seed}, steps {steps}"


def draw_photos(task: Task, draws: int, seed: int) -> DrawnPhotos:
    """Name so many draws of each photo of a task."""
    names = {
        f"{photo['img_path']}, draw {draw + 1}": (number, draw)
        for number, photo in enumerate(task.photos)
        for draw in range(draws)
    }
    return DrawnPhotos(task, seed, names)
