"""A workspace of Weights & Biases: the metrics of all runs of a project, laid out in sections of line plots.

Every panel names its own x axis. W&B's ``Step`` counts records, those of evaluations included; the training step is the
metric ``step``, which has every record like ``tokens`` (``metrics/log.py``).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from minimax_train.errors import ConfigError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "minimax-train"
_COLUMNS = 3
# By section: the x axis, and metrics by the panel's title. A name that ends in a slash stands for all that begin so.
_SECTIONS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "Loss": (
        "tokens",
        {
            "loss": ("loss",),
            "validation loss": ("validation_loss", "unigram_loss"),
            "validation loss by source": ("validation_loss/",),
            "loss by source": ("loss_by_source/",),
            "loss by length of the document": ("loss_by_length/",),
        },
    ),
    "Norms": (
        "tokens",
        {
            "gradient norm": ("grad_norm",),
            "gradient norm by group": ("grad_norm/",),
            "weight norm by group": ("weight_norm/",),
            "outliers since the last record": ("outliers",),
            "times gone back to a checkpoint": ("rollbacks",),
        },
    ),
    "Routing": (
        "tokens",
        {
            "busiest expert (1: an equal share)": ("expert_load_max",),
            "idlest expert (1: an equal share)": ("expert_load_min",),
            "router entropy (nats)": ("router_entropy",),
            "share of assignments dropped": ("dropped_fraction",),
            "load-balancing loss": ("aux_loss",),
            "busiest expert by layer": ("expert_load_max/",),
            "idlest expert by layer": ("expert_load_min/",),
            "router entropy by layer (nats)": ("router_entropy/",),
            "share of assignments dropped by layer": ("dropped_fraction/",),
        },
    ),
    "Recipe": (
        "tokens",
        {
            "learning rate": ("learning_rate",),
            "tokens of a step": ("batch_tokens",),
            "sequence length (tokens)": ("sequence_length",),
            "RoPE base": ("rope_base",),
        },
    ),
    "Speed": (
        "step",
        {
            "tokens per second": ("tokens_per_second",),
            "MFU": ("mfu",),
            "TFLOP/s per rank": ("tflops_per_rank",),
            "seconds per step": ("seconds",),
            "seconds left": ("seconds_left",),
            "received for data parallelism (GiB per step)": ("data_parallel_gib",),
        },
    ),
    "Phases": (
        "step",
        {
            "host's time by phase (s)": ("seconds/",),
            "device's time by phase (s)": ("device_seconds/",),
            "slowest rank's time by phase (s)": ("slowest_seconds/",),
            "slowest rank by phase": ("slowest_rank/",),
        },
    ),
    "Memory": (
        "step",
        {
            "peak GPU memory of rank 0 (GiB)": ("peak_memory_gib",),
            "GPU memory of rank 0, allocated and reserved (GiB)": ("memory_gib", "reserved_memory_gib"),
            "fullest rank's memory (GiB)": ("fullest_memory_gib",),
            "fullest rank": ("fullest_rank",),
            "host memory of rank 0 (GiB)": ("host_memory_gib",),
        },
    ),
    "Data": (
        "tokens",
        {
            "epochs by source": ("data_epoch/",),
            "share by source, packed and asked for": ("data_share/", "data_share_asked/"),
            "documents cut or passed over": ("split_documents", "skipped_documents"),
            "tokens left out by truncation": ("truncated_tokens",),
        },
    ),
}


def save(place: str) -> str:
    """Save a new workspace where Weights & Biases keeps the project's runs.

    Args:
        place: ``ENTITY/PROJECT``.

    Returns:
        The workspace's URL.

    Raises:
        ConfigError: for a place of another form, without the package or a login, and when the server refuses.
    """
    entity, _, project = place.partition("/")
    if not entity or not project or "/" in project:
        raise ConfigError(f"--wandb={place}: must be ENTITY/PROJECT, such as my-team/minimax-train")
    try:
        import wandb
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        told = f"needs {error.name}, which is not installed (pip install minimax_train[workspace])"
        raise ConfigError(f"--wandb={place}: {told}") from error
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        return str(workspace(entity, project).save().url)
    except (wandb.Error, WandbApiFailedError) as error:
        raise ConfigError(f"--wandb={place}: {error}") from error


def workspace(entity: str, project: str) -> Workspace:
    """The workspace, not saved yet."""
    from wandb_workspaces.reports.v2 import LinePlot
    from wandb_workspaces.workspaces import Section, SectionLayoutSettings, Workspace, WorkspaceSettings

    sections = []
    for name, (axis, panels) in _SECTIONS.items():
        plots = []
        for title, metrics in panels.items():
            families = [re.escape(metric) for metric in metrics if metric.endswith("/")]
            if families:
                plots.append(LinePlot(title=title, x=axis, metric_regex=f"^({'|'.join(families)}).+$"))
            else:
                plots.append(LinePlot(title=title, x=axis, y=list(metrics)))
        layout = SectionLayoutSettings(columns=_COLUMNS, rows=-(-len(plots) // _COLUMNS))
        sections.append(Section(name=name, panels=plots, is_open=True, layout_settings=layout))
    settings = WorkspaceSettings(x_axis="step")  # of panels that users add
    return Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)
