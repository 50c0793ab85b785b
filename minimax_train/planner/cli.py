"""``minimax-plan [overrides] world_size=N``: what a run takes on so many GPUs, without any."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from minimax_train.config import Config, load_config
from minimax_train.engines import ENGINES
from minimax_train.errors import ConfigError, OneLineParser, require
from minimax_train.metrics.console import Output, billions, duration, to_stderr
from minimax_train.metrics.flops import training_flops
from minimax_train.model.config import count_parameters
from minimax_train.parallel.cost import Machine
from minimax_train.planner.cost import DOCUMENT_TOKENS
from minimax_train.planner.dry_run import dry_run
from minimax_train.planner.machine import MACHINES, OVERHEAD_BYTES
from minimax_train.planner.plan import Cluster, RunPlan, plan_run
from minimax_train.planner.search import BEST, engines_with_stages, other_micro_batch, overrides_of, propose
from minimax_train.recipe import Progress, Recipe

_WORLD = "world_size="
_BATCH = ("recipe=", "recipe.global_batch_size=", "recipe.batch", "recipe.stages", "experiment=")
_MICRO_BATCH = "recipe.micro_batch_size="
_ENGINE = ("engine=", "engine.", "experiment=")
_MICRO_BATCHES = 8  # on a rank, where no global batch is given
_EPILOG = """
Overrides are those of minimax-train. With none of parallel.pp, tp, cp, ep and etp among them, grids are proposed, the
fastest first, and the first is shown; without a recipe or a global batch each has 8 micro-batches on a rank, with
pipeline stages times their number; without an engine, those that run pipeline stages are proposed as well. Predicted is
the first step of the recipe. docs/planner.md says how well.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Exit status 0 for a plan that fits, 1 for one that does not, 2 for what cannot run at all."""
    parser = OneLineParser(
        "minimax-plan", description="Memory, speed and traffic of a run, before it has GPUs.", epilog=_EPILOG
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="and world_size=N: how many GPUs (default: 1)")
    parser.add_argument("--config-dir", action="append", default=[], help="as of minimax-train")
    parser.add_argument("--machine", choices=MACHINES, default="h100", help="each GPU (default: %(default)s)")
    parser.add_argument("--gpus-per-node", default="8", metavar="N", help="linked by NVLink (default: %(default)s)")
    parser.add_argument(
        "--document-tokens",
        default=str(DOCUMENT_TOKENS),
        metavar="N",
        help="mean length of documents (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    options = parser.parse_intermixed_args(arguments)
    try:
        worlds = [text.removeprefix(_WORLD) for text in options.overrides if text.startswith(_WORLD)]
        overrides = [text for text in options.overrides if not text.startswith(_WORLD)]
        world_size = _number("world_size", worlds[-1] if worlds else "1", 2**20)
        links = Machine(gpus_per_node=_number("--gpus-per-node", options.gpus_per_node, 2**10))
        cluster = Cluster(world_size, MACHINES[options.machine], links)
        document_tokens = _number("--document-tokens", options.document_tokens, 2**31)
        for text in overrides:
            # No key of a run, so load_config would not name it.
            key = text.partition("=")[0]
            close = get_close_matches(key, ["world_size"], cutoff=0.8)
            require(not close, key, text.partition("=")[2], "there is no such key. Did you mean world_size?")
        chosen = any(text.lstrip("+").startswith(f"parallel.{axis}=") for text in overrides for axis in _AXES)
        batch_is_given = any(text.lstrip("+").startswith(_BATCH) for text in overrides)
        proposes = world_size > 1 and not chosen
        micro = [text.partition("=")[2] for text in overrides if text.lstrip("+").startswith(_MICRO_BATCH)]
        # Every grid gets a batch of its own: this one only has to be whole micro-batches.
        whole = [f"recipe.global_batch_size={micro[-1]}"] if proposes and micro and not batch_is_given else []
        config = load_config([*overrides, *whole], config_dirs=options.config_dir)
        proposed: list[RunPlan] = []
        if not proposes:
            plan = plan_run(config, cluster, document_tokens)
        else:
            number = None if batch_is_given else _MICRO_BATCHES
            others = () if any(text.startswith(_ENGINE) for text in overrides) else engines_with_stages(config)
            proposed = propose(config, cluster, document_tokens, number, others)
            plan = proposed[0]
        other = other_micro_batch(plan)
        built = []
        if ENGINES[plan.config.engine.name].on_meta:
            # Of every stage alike: the first, one in the middle, and the last.
            stages, size = plan.grid.pp, plan.grid.size("dp_cp_tp")
            ranks = sorted({0, stages // 2 * size, world_size - 1}) if stages > 1 else [0]
            built = [(rank, *dry_run(plan.config, world_size, rank)) for rank in ranks]
    except ConfigError as error:
        to_stderr(f"error: {' '.join(str(error).split())}")
        return 2
    output = Output(sys.stdout)
    if options.json:
        output.write(json.dumps(_as_json(plan, proposed, other, config), indent=1) + "\n")
    else:
        lines = [*_proposals(proposed, config), *_report(plan, other, options.machine, batch_is_given)]
        lines += [
            f"{'built':14}rank {rank:,} of {world_size:,} on the meta device in {seconds:.1f} s: "
            f"{num_bytes / 2**30:.2f} GiB of weights, gradients and states"
            for rank, seconds, num_bytes in built
        ]
        output.write("\n".join(lines) + "\n")
    return 0 if plan.fits else 1


_AXES = ("pp", "tp", "cp", "ep", "etp")


def _number(name: str, text: str, greatest: int) -> int:
    fits = text.isascii() and text.isdecimal() and 1 <= int(text) <= greatest
    require(fits, name, text, f"must be a whole number from 1 to {greatest}")
    return int(text)


def _proposals(plans: list[RunPlan], config: Config) -> Iterable[str]:
    if not plans:
        return
    yield f"{'GiB':>8}{'ms':>12}{'tokens/s':>14}{'MFU %':>8}  overrides, the fastest first"
    for plan in plans[:BEST]:
        yield _row(plan, config)
    staged = {plan.grid.pp > 1: plan for plan in reversed(plans)}  # the fastest of each
    if len(staged) == 2:
        yield "the fastest with pipeline stages, and without:"
        yield _row(staged[True], config)
        yield _row(staged[False], config)
    yield ""


def _row(plan: RunPlan, config: Config) -> str:
    return (
        f"{plan.memory_bytes / 2**30:8.1f}{1e3 * plan.cost.seconds:12,.1f}{plan.tokens_per_s:14,.0f}"
        f"{100 * plan.mfu:8.1f}  {overrides_of(plan, config)}"
    )


def _report(plan: RunPlan, other: RunPlan | None, machine: str, batch_is_given: bool) -> Iterable[str]:
    """Of a plan, and of one with another micro-batch that is faster."""
    config, grid, step, rates = plan.config, plan.grid, plan.step, plan.cluster.rates
    count = count_parameters(config.model)
    per_token = training_flops(config.model, 1, (plan.document_tokens + 1) / 2)
    yield (
        f"{'model':14}{billions(count.total)} parameters, {billions(count.active_in_layers)} active in layers, "
        f"{_flops(per_token)} a token (documents of {plan.document_tokens:,.0f})"
    )
    axes = ("dp", "cp", "tp", "edp", "ep", "etp")
    sizes = ", ".join(f"{axis} {grid.size(axis)}" for axis in (("pp", *axes) if grid.pp > 1 else axes))
    yield f"{'grid':14}{grid.world_size:,} x {machine}: {sizes}; engine={config.engine.name}"
    number = step.micro_batches(grid.size("dp"))
    yield (
        f"{'step':14}{step.tokens:,} tokens: {number} micro-batch{'es' * (number > 1)} of "
        f"{step.micro_batch_size} x {step.sequence_length:,} on a data-parallel rank"
    )
    verdict = "fits" if plan.fits else "does not fit"
    free = rates.memory_bytes / 2**30
    of_rank = f" of pipeline rank {plan.fullest}, the fullest," if grid.pp > 1 else ""
    yield (
        f"{'memory':14}{plan.memory_bytes / 2**30:.1f} GiB on a GPU{of_rank} of {free:.1f} less "
        f"{OVERHEAD_BYTES / 2**30:.1f} for CUDA and NCCL: {verdict}"
    )
    for stage in plan.tight_stages if plan.fits else ():
        yield (
            f"{'':14}stage {stage.name} does not fit on this grid, with micro-batches of {stage.micro_batch_size} x "
            f"{stage.sequence_length:,}"
        )
    for what, num_bytes in plan.memory.items():
        yield f"{'':14}{num_bytes / 2**30:10.2f}  {what}"
    for number, rank in enumerate(plan.ranks if grid.pp > 1 else ()):
        held = max(rank.activations.held_layers.values())
        *_, (kept, num_bytes) = rank.memory.items()
        yield (
            f"{f'pipeline {number}':14}{rank.memory_bytes / 2**30:10.2f}  layers {rank.shown_layers}; "
            f"{num_bytes / 2**30:.2f} of up to {held} micro-batches' {kept}"
        )
    longest = f"{plan.largest_sequence:,} tokens" if plan.largest_sequence else "none fits"
    yield f"{'':14}longest packed sequence, alone in a micro-batch, blocks recomputed: {longest}"
    for axis, traffic in plan.cost.traffic.items():
        yield (
            f"{f'traffic {axis}':14}{traffic.num_bytes / 2**30:.2f} GiB received a step, "
            f"{1e3 * traffic.seconds:,.1f} ms added to the step"
        )
    yield (
        f"{'time':14}{1e3 * plan.cost.seconds:,.1f} ms a step, {plan.tokens_per_s:,.0f} tokens/s, "
        f"{100 * plan.mfu:.1f} % MFU"
    )
    if other is not None:
        micro_batch = f"{_MICRO_BATCH}{other.step.micro_batch_size}"
        if not batch_is_given:
            micro_batch += f" recipe.global_batch_size={step.global_batch_size}"
        yield (
            f"{'':14}on this grid, with {micro_batch}: {1e3 * other.cost.seconds:,.1f} ms, "
            f"{other.tokens_per_s:,.0f} tokens/s, {100 * other.mfu:.1f} % MFU, {other.memory_bytes / 2**30:.1f} GiB"
        )
    for what, seconds in plan.cost.compute_s.items():
        if seconds:
            yield f"{'':14}{1e3 * seconds:10,.1f}  {what}"
    yield f"{'':14}{1e3 * plan.cost.gaps_s:10,.1f}  other gaps"
    if plan.memory.get("moments") == 0:
        yield f"{'':14}not counted: the optimizer's update in host memory, and the transfers to and from it"
    if grid.pp > 1:
        waiting = plan.cost.bubble_s
        share = f"{100 * waiting / plan.cost.seconds:.1f} % of the step"
        yield f"{'':14}{1e3 * waiting:10,.1f}  waiting for other pipeline stages, {share}"
    if (tokens := _recipe_tokens(plan)) is not None:
        yield f"{'recipe':14}{tokens:,} tokens, {duration(tokens / plan.tokens_per_s)} at this rate"


def _recipe_tokens(plan: RunPlan) -> int | None:
    """Of the whole run; None where an epoch's length decides, or the grid is another in a later stage."""
    recipe = Recipe(plan.config)
    if recipe.needs_epoch:
        return None
    return sum(piece.steps * piece.batch for piece in recipe.pieces(Progress(), {}))


def _flops(count: float) -> str:
    return f"{count / 1e9:,.1f} GFLOP" if count >= 1e9 else f"{count / 1e6:,.1f} MFLOP"


def _as_json(plan: RunPlan, proposed: list[RunPlan], other: RunPlan | None, config: Config) -> dict:
    def one(plan: RunPlan) -> dict:
        return {
            "overrides": overrides_of(plan, config),
            "engine": plan.config.engine.name,
            "parallel": plan.config.parallel.sizes,
            "pp_schedule": plan.config.parallel.pp_schedule,
            "num_streams": plan.config.data.num_streams,
            "micro_batch_size": plan.step.micro_batch_size,
            "global_batch_size": plan.step.global_batch_size,
            "sequence_length": plan.step.sequence_length,
            "fits": plan.fits,
            "stages_that_do_not_fit": [stage.name for stage in plan.tight_stages],
            "memory_bytes": plan.memory,
            "memory_bytes_of_pipeline_ranks": [rank.memory for rank in plan.ranks],
            "recomputation": plan.recomputation,
            "seconds": plan.cost.seconds,
            "compute_s": plan.cost.compute_s,
            "bubble_s": plan.cost.bubble_s,
            "traffic": {axis: vars(part) for axis, part in plan.cost.traffic.items()},
            "tokens_per_s": plan.tokens_per_s,
            "mfu": plan.mfu,
            "largest_sequence": plan.largest_sequence,
        }

    count = count_parameters(plan.config.model)
    return {
        **one(plan),
        "parameters": vars(count),
        "other_micro_batch": None if other is None else one(other),
        "proposals": [one(each) for each in proposed],
    }


if __name__ == "__main__":
    sys.exit(main())
