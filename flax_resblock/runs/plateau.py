"""``ReduceLROnPlateau``, which is stepped by what was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flax_resblock.runs.schedules import Options, Schedule


@dataclass(frozen=True)
class ReduceLROnPlateau(Schedule):
    """Reduces the rates when a metric has not improved for a while.

    The fields are the entries of torch's state dict. Its ``last_epoch`` counts the metrics seen.
    """

    mode: str
    factor: float
    patience: int
    threshold: float
    threshold_mode: str
    cooldown: int
    min_lrs: tuple[float, ...]
    default_min_lr: float | None
    eps: float
    mode_worse: float
    best: float
    cooldown_counter: int
    num_bad_epochs: int

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        return float(group["lr"])

    def _better(self, metric: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        if self.threshold_mode == "rel":
            bound = self.best * (1.0 + sign * self.threshold)
        else:
            bound = self.best + sign * self.threshold
        return metric > bound if self.mode == "max" else metric < bound

    def seen(self, metric: float) -> tuple[ReduceLROnPlateau, bool]:
        """The schedule after another metric, and whether the rates are reduced now."""
        best, bad = (metric, 0) if self._better(metric) else (self.best, self.num_bad_epochs + 1)
        wait = self.cooldown_counter
        if wait > 0:
            wait, bad = wait - 1, 0
        reduced = bad > self.patience
        if reduced:
            wait, bad = self.cooldown, 0
        return replace(self, best=best, num_bad_epochs=bad, cooldown_counter=wait), reduced

    def reduced(self, rate: float, number: int) -> float:
        """The reduced rate of a param group."""
        lower = max(rate * self.factor, self.min_lrs[number])
        return lower if rate - lower > self.eps else rate
