"""Conversion between this project's checkpoints and Hugging Face folders, both ways.

Two layouts: transformers' ``MiniMaxForCausalLM``, and the original one of MiniMax-Text-01.

names        which tensor of theirs lies where in which parameter of ours
decays       the buffers of lightning attention that transformers keeps beside the weights
hf_config    ModelConfig to and from transformers' MiniMaxConfig
text_01_config  ModelConfig to and from the config.json of MiniMax-Text-01
layouts      what the two layouts differ in
checkpoint   reading and writing checkpoints chunk by chunk; records: boxes of tensors out of their shards
shards       reading and writing safetensors folders one tensor at a time
jobs         work shared out among processes
card         the model card of an export
verify       the logits of both sides
tokenizer    files and special tokens
to_hf from_hf cli
"""

from minimax_train.convert.from_hf import from_hf
from minimax_train.convert.to_hf import to_hf

__all__ = ["from_hf", "to_hf"]
