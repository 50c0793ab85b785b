"""What is said of a key of the configuration that is not there: which one may be meant."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable

from minimax_train.engines import ENGINES
from minimax_train.engines.engine import EngineConfig
from minimax_train.fields import fields_of

# Refused on the command line and in configuration files, naming the new; translated in what a run has saved.
RENAMED_KEYS = {"recipe.eval_rows": "recipe.eval_sequences"}
OTHER_NAMES = {
    "parallel.tp": "tensor_model_parallel_size tensor_parallel_degree tensor_parallel_size tp_size",
    "parallel.cp": "context_parallel_size context_parallel_degree sequence_parallel_size",
    "parallel.ep": "expert_model_parallel_size expert_parallel_degree ep_size",
    "parallel.etp": "expert_tensor_parallel_size expert_tensor_parallel_degree",
    "parallel.pp": "pipeline_model_parallel_size pipeline_parallel_degree",
    "parallel.pp_schedule": "pipeline_parallel_schedule",
    "data.sequence_length": "seq_len max_seq_len max_position_embeddings",
    "data.train_files": "data_path",
    "model.num_layers": "num_hidden_layers n_layers",
    "model.num_heads": "num_attention_heads n_heads",
    "model.num_kv_heads": "num_query_groups num_key_value_heads n_kv_heads",
    "model.head_dim": "kv_channels",
    "model.expert_hidden_size": "moe_ffn_hidden_size ffn_hidden_size intermediate_size",
    "model.num_experts": "num_local_experts n_routed_experts",
    "model.experts_per_token": "moe_router_topk num_experts_per_tok top_k",
    "model.aux_loss_coefficient": "moe_aux_loss_coeff router_aux_loss_coef",
    "model.capacity_factor": "moe_expert_capacity_factor",
    "model.rope_base": "rotary_base rope_theta",
    "recipe.steps": "train_iters max_steps num_train_steps",
    "recipe.learning_rate": "lr",
    "recipe.min_learning_rate": "min_lr",
    "recipe.warmup_steps": "lr_warmup_iters",
    "recipe.gradient_clip": "clip_grad max_norm max_grad_norm gradient_clipping",
    "recipe.micro_batch_size": "local_batch_size train_micro_batch_size_per_gpu per_device_train_batch_size",
    "recipe.global_batch_size": "train_batch_size",
    "recipe.activation_checkpointing": "recompute_granularity gradient_checkpointing activation_checkpoint",
    "checkpoint.interval": "save_interval save_steps",
    "logging.interval": "log_interval log_freq logging_steps",
}
"""Key to its names in Megatron-LM, torchtitan, DeepSpeed and transformers, where these are spelled unlike it."""


def unknown_key(kind: type, key: str, given: str, fields: Iterable[str]) -> str:
    """What is wrong with a key, and which may be meant.

    Args:
        kind: the dataclass of the whole configuration.
        given: the override, or the key, as the user has it.
        fields: those that there are beside the key.
    """
    parent, _, name = key.rpartition(".")
    if key in RENAMED_KEYS:
        return f"{given}: renamed: use {RENAMED_KEYS[key]}"
    leaf = given.partition("=")[0].rpartition(".")[2]  # of a group that is not there
    meant = _elsewhere(kind).get(leaf) if leaf != name else None
    meant = meant or _meant(kind, parent, name, fields) or _meant(kind, parent, leaf, ())
    hint = f" Did you mean {meant}?" if meant else ""
    return f"{given}: there is no key {name!r} in {parent or 'the configuration'}.{hint} Accepted: {', '.join(fields)}"


def meant_by_option(kind: type, option: str) -> str | None:
    """The key that a command-line option of another framework (``--tensor-model-parallel-size``) is for."""
    return _elsewhere(kind).get(option.lstrip("-").partition("=")[0].replace("-", "_"))


def _elsewhere(kind: type) -> dict[str, str]:
    """What may be meant by the name of a key of some group, or by another framework's name for one."""
    elsewhere: dict[str, list[str]] = {}
    for group, what in fields_of(kind).items():
        if not dataclasses.is_dataclass(what.kind):
            continue
        for key in fields_of(what.kind):
            elsewhere.setdefault(key, []).append(f"{group}.{key}")
    for engine, config in ENGINES.items():
        for key in fields_of(config.config_type).keys() - fields_of(EngineConfig).keys():
            elsewhere.setdefault(key, []).append(f"engine.{key} with engine={engine}")
    for key, names in OTHER_NAMES.items():
        for other in names.split():
            elsewhere.setdefault(other, [key])
    return {name: " or ".join(keys) for name, keys in elsewhere.items()}


def _meant(kind: type, parent: str, name: str, fields: Iterable[str]) -> str | None:
    """The key of the same name in another group, another framework's name for one, or one that is spelled alike."""
    elsewhere = _elsewhere(kind)
    if name in elsewhere:
        return elsewhere[name]
    if close := difflib.get_close_matches(name, fields, n=1):
        return f"{parent}.{close[0]}".lstrip(".")
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75)
    return elsewhere[close[0]] if close else None
