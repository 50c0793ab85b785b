"""How many assignments an expert's capacity drops: counted on each rank by itself, or on all ranks together.

    python benchmarks/capacity.py [--ranks 8] [--tokens 4096] [--json FILE]

Counted, not timed, on any machine. Router logits are normal, plus a preference for some experts that all ranks share
(``common``), or that each rank has of its own, as it does when ranks read different kinds of documents (``by rank``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from minimax_train.kernels.experts import drop_over_capacity, route

EXPERTS, TOP_K = 32, 2  # MiniMax-01


def preferences(skew: str, ranks: int, strength: float) -> Tensor:
    """Added to the logits of each rank's tokens, ``[ranks, E]``."""
    different = {"none": 0, "common": 1, "by rank": ranks}[skew]
    added = strength * torch.randn(different, EXPERTS)
    return added.expand(ranks, EXPERTS) if different else torch.zeros(ranks, EXPERTS)


def dropped(
    experts_TK: Tensor, rank_T: Tensor, tokens_per_expert_RE: Tensor, factor: float, *, together: bool
) -> float:
    """Fraction of assignments dropped."""
    ranks, tokens = len(tokens_per_expert_RE), len(rank_T)
    capacity = int(factor * TOP_K * tokens / EXPERTS / (1 if together else ranks))
    taken_RE = (
        tokens_per_expert_RE.cumsum(0) - tokens_per_expert_RE if together else torch.zeros_like(tokens_per_expert_RE)
    )
    kept_TK = drop_over_capacity(experts_TK, rank_T, tokens_per_expert_RE, taken_RE, capacity)
    return float((kept_TK < 0).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank")
    parser.add_argument("--strength", type=float, default=0.5, help="of a preference, beside logits of variance 1")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rank_T = torch.arange(options.ranks).repeat_interleave(options.tokens)
    rows = []
    print(f"{options.ranks} ranks of {options.tokens} tokens, {EXPERTS} experts, top-{TOP_K}; assignments dropped")
    print("| preference | capacity factor | each rank by itself | all together |\n| --- | --- | --- | --- |")
    for skew in ("none", "by rank", "common"):
        logits_TE = torch.randn(len(rank_T), EXPERTS) + preferences(skew, options.ranks, options.strength)[rank_T]
        _, experts_TK, tokens_per_expert_RE, *_ = route(logits_TE, TOP_K, rank_T, options.ranks)
        for factor in (1.0, 1.25, 1.5):
            alone, together = (
                dropped(experts_TK, rank_T, tokens_per_expert_RE, factor, together=t) for t in (False, True)
            )
            rows.append({"skew": skew, "factor": factor, "rank": alone, "global": together})
            print(f"| {skew} | {factor} | {alone:.2%} | {together:.2%} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
