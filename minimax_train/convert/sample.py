"""Open an export in transformers and let it continue a text.

python -P -m minimax_train.convert.sample DIR PROMPT
"""

from __future__ import annotations

import argparse
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser("minimax_train.convert.sample", description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="a folder written by minimax-convert to-hf")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=60, help="how many to add")
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(options.directory)
    model: Any = AutoModelForCausalLM.from_pretrained(options.directory)
    torch.manual_seed(0)
    ids = model.generate(
        **tokenizer(options.prompt, return_tensors="pt"), max_new_tokens=options.tokens, do_sample=True, top_k=20
    )
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, continues:\n{tokenizer.decode(ids[0])}")


if __name__ == "__main__":
    main()
