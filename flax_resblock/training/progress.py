"""The progress bar of a run."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Speed(ProgressColumn):
    """Images per second over the last moments."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} images/s")


class TrainingProgress:
    """A bar with epoch, loss, accuracy and images per second; a context manager. Outside a terminal
    only the end is printed.

    Args:
      images: Number of images in all remaining steps.
    """

    def __init__(self, images: int, epochs: int, *, shown: bool) -> None:
        epoch, metrics = TextColumn("{task.description}"), TextColumn("{task.fields[metrics]}")
        columns = (epoch, BarColumn(), metrics, _Speed(), TimeRemainingColumn())
        self._progress = Progress(*columns, disable=not shown)
        self._epochs = epochs
        self._task = self._progress.add_task("compiling", total=images, metrics="")

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, images: int, *, epoch: int, loss: float, accuracy: float) -> None:
        """Advances by one batch of ``images`` images with its loss and accuracy."""
        metrics = f"batch loss {loss:.4f}, accuracy {accuracy:.1%}"
        description = f"epoch {epoch + 1}/{self._epochs}"
        self._progress.update(self._task, advance=images, description=description, metrics=metrics)
