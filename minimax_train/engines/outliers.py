"""Steps whose loss or gradient norm lies far above those of the steps before, found on the device.

As the skip-step optimizer of OLMo-core (``olmo_core/optim/skip_step_optimizer.py``) has it: 6 standard deviations above
the mean of the last 128 steps, once half as many are known.

Shape legend: 2 loss and gradient norm, W steps of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Outliers:
    """The losses and gradient norms of the last steps.

    Those of outliers are among them: where a run has come to another level for good, its steps are outliers for a while
    only.

    Args:
        window: how many steps.
        sigmas: by how many standard deviations above the mean an outlier is.
    """

    def __init__(self, window: int, sigmas: float, device: torch.device) -> None:
        self._values_2W = torch.zeros(2, window, dtype=torch.float64, device=device)  # the newest at the end
        self._sigmas, self._known = sigmas, 0

    def is_next(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Whether the step that these are of is one, a bool scalar on the device; the host does not wait.

        Args:
            loss, gradient_norm: scalars, the same on all ranks. With one that is not finite the step is no outlier,
                and the window gets what the step before had (0, if it is the first).
        """
        values_2, window = torch.stack([loss.double(), gradient_norm.double()]), self._values_2W.shape[1]
        known_2W = self._values_2W[:, window - self._known :]
        found, finite = torch.zeros((), dtype=torch.bool, device=values_2.device), values_2.isfinite().all()
        if 2 * self._known >= window:
            deviation_2, mean_2 = torch.std_mean(known_2W, dim=1)
            found = (values_2 - mean_2 > self._sigmas * deviation_2).any() & finite
        newest_2 = values_2.where(finite, self._values_2W[:, -1])
        self._values_2W = torch.cat([self._values_2W[:, 1:], newest_2[:, None]], dim=1)
        self._known = min(self._known + 1, window)
        return found

    def forget(self, steps: int) -> None:
        """Of the last so many: they did not happen."""
        steps = min(steps, self._known)
        self._values_2W = self._values_2W.roll(steps, dims=1)
        self._known -= steps
