"""The configuration class that ``config.json`` of an export in the layout of MiniMax-Text-01 names in ``auto_map``.

``minimax-convert to-hf --layout text-01`` copies this file into the export: transformers has no such class, and readers
ask it for the configuration.
"""

from transformers import PretrainedConfig


class MiniMaxText01Config(PretrainedConfig):
    """The keys of ``config.json`` as attributes."""

    model_type = "minimax_text_01"
