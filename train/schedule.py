"""The learning rate, computed on the host in float64 and handed to the compiled step as a number.

optax evaluates its schedules inside the compiled step, in float32: up to 2e-5 relative error in the rate, enough to part a float64 run from PyTorch's. Its
``warmup_cosine_decay_schedule`` also counts otherwise: ``init_value`` is a rate (here: a share of the peak), and past the end it stays at ``end_value`` where
torch's cosine climbs again. This one is defined on the run's steps only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    r"""Linear warm-up, then half a cosine down to 0: torch's ``SequentialLR([LinearLR, CosineAnnealingLR], milestones=[warmup_steps])``.

    With peak :math:`\eta`, warm-up share :math:`f`, :math:`w` warm-up steps of :math:`T`:

    .. math::
        \eta_t = \eta (f + (1 - f) t / w) \quad (t < w), \qquad
        \eta_t = \tfrac{1}{2} \eta (1 + \cos(\pi (t - w) / (T - w))) \quad (w \le t \le T)

    torch computes each rate from the previous one; this closed form differs from that by rounding only (float64).

    Attributes:
      peak: Highest learning rate.
      warmup_steps: 0: no warm-up.
      total_steps: Steps of the run.
      warmup_factor: In (0, 1].
    Raises:
      ValueError: Numbers that make no schedule.
    Reference: Loshchilov & Hutter 2017, arXiv:1608.03983; Goyal et al. 2017, arXiv:1706.02677.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    warmup_factor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be at least 0 and below total_steps={self.total_steps}.")
        if not 0 < self.warmup_factor <= 1:
            raise ValueError(f"warmup_factor={self.warmup_factor} must be above 0 and at most 1.")

    def __call__(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0.

        Raises:
          ValueError: A step outside ``0..total_steps``.
        """
        if not 0 <= step <= self.total_steps:
            raise ValueError(f"step {step} is outside the schedule's 0..{self.total_steps}.")
        if step < self.warmup_steps:
            return self.peak * (self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps)
        return self.peak * (1 + math.cos(math.pi * (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))) / 2
