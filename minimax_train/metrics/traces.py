"""Profiler traces of chosen steps, on chosen ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from minimax_train.files import TRACES
from minimax_train.metrics.config import LoggingConfig
from minimax_train.metrics.console import note


class Tracer:
    """Writes ``traces/step-NNNNNNNN-rank-R.json.gz`` into the run's folder, for Perfetto (ui.perfetto.dev) or
    ``chrome://tracing``; the phases of a step have their names in it."""

    def __init__(self, config: LoggingConfig, run_dir: Path, device: torch.device) -> None:
        self._rank, self._folder, self._device = dist.get_rank(), run_dir / TRACES, device
        self._steps = set(map(int, config.profile_steps)) if str(self._rank) in config.profile_ranks else set()

    def beyond(self, steps: int) -> list[str]:
        """What there is to say of steps to be traced that a run of so many does not have."""
        late = sorted(step for step in self._steps if step > steps)
        return [f"logging.profile_steps={late}: no trace, the run ends after step {steps}"] if late else []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step. Where it is traced, the host waits for the device at its end."""
        if number not in self._steps:
            yield
            return
        on_gpu = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        if on_gpu:
            torch.cuda.synchronize()  # what earlier steps have left over
        with profile(activities=activities, record_shapes=True) as profiler:
            yield
            if on_gpu:
                torch.cuda.synchronize()
        path = self._folder / f"step-{number:08d}-rank-{self._rank}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            note(f"{path}: the trace was not written: {error}")
