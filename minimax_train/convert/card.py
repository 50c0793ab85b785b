"""The model card of an export: ``README.md``, and ``loss.png`` where a run has metrics."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from minimax_train.checkpoint.store import PROGRESS
from minimax_train.convert.checkpoint import Origin, read_yaml
from minimax_train.errors import ConfigError
from minimax_train.files import CONFIG, METRICS, PICTURE
from minimax_train.metrics.log import read_records
from minimax_train.metrics.plot import plot_loss
from minimax_train.model import ModelConfig
from minimax_train.model.config import count_parameters

CARD = "README.md"
_LOADING = {
    True: """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")""",
    False: """import vllm

model = vllm.LLM("PATH", trust_remote_code=True)  # for the class of its configuration""",
}
_PATHS = {"train_files", "validation_files", "tokenizer", "run_dir", "initial_weights"}


def write_card(
    checkpoint: Path,
    run: Path | None,
    model: ModelConfig,
    origin: Origin | None,
    dtype: str,
    in_transformers: bool,
    draft: Path,
) -> None:
    """Write the card from what lies beside the checkpoint: configuration, progress and the run's metrics.

    Paths of the machine that trained are cut to their last part.

    Raises:
        ConfigError: when one of these is damaged.
    """
    total, active = (getattr(count_parameters(model), name) for name in ("total", "active"))
    front = ["library_name: " + ("transformers" if in_transformers else "vllm"), "pipeline_tag: text-generation"]
    tags = ["minimax", "mixture-of-experts", "linear-attention"]
    lines = ["---", *front, "tags:", *(f"- {tag}" for tag in tags), "---", "", "# Model card", ""]
    attentions = " and ".join(f"{kind.name} attention ({kind.letter})" for kind in dict.fromkeys(model.attentions))
    lines += [
        f"A language model with {total:,} parameters, {active:,} of them active per token: {attentions} in the pattern "
        f"{model.layer_pattern}, a mixture of experts in every layer. Weights are {dtype}.",
        "",
        "## How to load it",
        "",
        *("```python", _LOADING[in_transformers], "```", ""),
        "## Model",
        "",
        *("| field | value |", "| --- | --- |"),
        *(f"| `{name}` | {value} |" for name, value in dataclasses.asdict(model).items()),
        "",
        "## Training",
        "",
    ]
    if origin is None:
        lines += _training(checkpoint, run, draft)
    else:
        kind = (origin.config.get("architectures") or [origin.config.get("model_type")])[0]
        lines += [f"These weights were converted from a Hugging Face folder of {kind} and not trained here.", ""]
    lines += [
        "## Not in this folder",
        "",
        "The optimizer's state and the position in the training data: training goes on from the checkpoint, or from "
        "these weights alone.",
        "",
        "## Versions",
        "",
        f"Written by minimax-convert with torch {torch.__version__}" + _transformers() + ".",
    ]
    (draft / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _training(checkpoint: Path, run: Path | None, draft: Path) -> list[str]:
    lines, progress = [], _progress(checkpoint)
    tree: Any = OmegaConf.to_container(read_yaml(checkpoint / CONFIG))
    if progress is not None:
        lines += [f"{progress['step']:,} steps, {progress['tokens']:,} tokens.", ""]
    if progress is not None and run is not None and (run / METRICS).is_file():
        records = [record for record in read_records(run / METRICS) if record["step"] <= progress["step"]]
        for key, name in (("loss", "training loss"), ("validation_loss", "held-out loss")):
            found = [record for record in records if key in record]
            if found:
                lines += [f"* {name} at step {found[-1]['step']:,}: {found[-1][key]:.4f} nats per token"]
        if any("loss" in record for record in records):
            plot_loss(records, draft / PICTURE)
            lines += ["", f"![loss over steps]({PICTURE})"]
        lines += [""]
    weights = (tree.get("checkpoint") or {}).get("initial_weights")
    if weights:
        lines += [f"The run started from the weights of `{Path(weights).name}`.", ""]
    given = {name: _public(tree[name]) for name in ("recipe", "data", "parallel", "engine", "seed") if name in tree}
    return [*lines, "```yaml", OmegaConf.to_yaml(OmegaConf.create(given)).rstrip(), "```", ""]


def _progress(checkpoint: Path) -> dict[str, int] | None:
    file = checkpoint / PROGRESS
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        return {name: int(content[name]) for name in ("step", "tokens")}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file}: damaged: not the progress of a run: {error}") from error


def _public(value: Any, name: str = "") -> Any:
    """Without null, and without folders of the machine."""
    if isinstance(value, dict):
        return {key: _public(item, key) for key, item in value.items() if item not in (None, [], {})}
    if isinstance(value, list):
        return [_public(item, name) for item in value]
    return Path(value).name if name in _PATHS and isinstance(value, str) else value


def _transformers() -> str:
    import transformers

    return f" and transformers {transformers.__version__}"
