"""The recipe's schedules: the report's numbers, closed forms against step after step, and what contradicts itself."""

import copy
import functools
import math
import os
import random

import pytest

from minimax_train import compose
from minimax_train.checkpoint.store import CheckpointStore
from minimax_train.config import config_at, load_config
from minimax_train.errors import ConfigError
from minimax_train.recipe import Progress, Recipe
from minimax_train.run_dir import on_grid_of_stage

SIZES = ["data.sequence_length=20", "recipe.micro_batch_size=1", "recipe.global_batch_size=4"]  # 80 tokens a step
FLAT = ["recipe.steps=null", "recipe.decay_steps=0", "recipe.warmup_steps=0", *SIZES]
STAGED = [*FLAT, "recipe.decay_steps=null", "recipe.min_learning_rate=null"]
SOURCES = [f"data.sources.{name}.train_files=[{name}.txt]" for name in ("web", "code", "qa")]


@pytest.fixture(autouse=True, scope="module")
def files_once():
    """Hydra merges the same files for most cases: once is enough."""
    with pytest.MonkeyPatch.context() as patch:
        merge = functools.cache(compose._files)
        patch.setattr(compose, "_files", lambda *names: copy.deepcopy(merge(*map(tuple, names))))
        yield


def recipe(*overrides):
    return Recipe(load_config(overrides))


def walk(made, state=(), most=100_000):
    """Every step's progress and plan, one after the other, as the trainer takes them."""
    progress, policy = Progress(), dict(state)
    while not made.is_over(progress, policy):
        policy = made.enter(progress, policy)
        plan = made.within(progress, policy)
        yield progress, plan
        progress = Progress(progress.step + 1, progress.tokens + plan.tokens)
        assert progress.step < most


# FACTS of the report (arXiv 2501.08313), typed from it: after so many tokens (in 1e9), what a step has.
REPORT = [
    # tokens, batch in 2^20 tokens, rate, sequence length, RoPE base, shares of short, medium, long documents
    (60, 16, 2e-4, 2**13, 1e4, None),
    (70, 32, 2e-4, 2**13, 1e4, None),
    (789, 32, 2e-4, 2**13, 1e4, None),
    (791, 64, 2e-4, 2**13, 1e4, None),
    (4699, 64, 2e-4, 2**13, 1e4, None),
    (4701, 128, 2e-4, 2**13, 1e4, None),
    (7199, 128, 2e-4, 2**13, 1e4, None),
    (7201, 128, 1.3e-4, 2**13, 1e4, None),
    (10399, 128, 1.3e-4, 2**13, 1e4, None),
    (10900, 128, (1.3e-4 * 3e-5) ** 0.5, 2**13, 1e4, None),
    (11399, 128, 3e-5, 2**13, 1e4, None),
    (11401, 128, 3e-5, 2**17, 5e6, (0.3, 0.7, 0)),
    (11699, 128, 3e-5, 2**17, 5e6, (0.3, 0.7, 0)),
    (11701, 128, 3e-5, 2**19, 1e7, (0.35, 0.35, 0.3)),
    (11731, 128, 3e-5, 2**19, 1e7, (0.35, 0.35, 0.3)),
    (11733, 128, 3e-5, 2**20, 1e7, (0.3, 0.3, 0.4)),
    (11757, 128, 3e-5, 2**20, 1e7, (0.3, 0.3, 0.4)),
]


@pytest.fixture(scope="module")
def report(files_once):
    """Every step of the report's schedule, with its questions and answers."""
    qa = [*SOURCES, "data.sources.qa.weight=0", "data.sources.code.weight=3", "recipe.late_source=qa"]
    return list(walk(recipe("recipe=minimax-01", *qa), most=200_000))


def test_the_reports_schedule(report):
    plans = dict.fromkeys(REPORT)
    for progress, plan in report:
        for row in REPORT:
            if progress.tokens <= row[0] * 1e9:
                plans[row] = plan
    for row, plan in plans.items():
        _, batch, rate, length, base, shares = row
        assert (plan.tokens, plan.sequence_length, plan.rope_base) == (batch * 2**20, length, base), row
        assert plan.learning_rate == pytest.approx(rate, rel=2e-3), row
        lengths = dict.fromkeys(("short", "medium", "long"), 0.0)
        for component, share in plan.data_weights.items():
            lengths[component.partition("/")[2] or "short"] += share
        if shares is not None:
            assert tuple(lengths.values()) == pytest.approx(shares), row
    assert [plan.learning_rate for _, plan in report[:500]] == pytest.approx([2e-4 * n / 500 for n in range(1, 501)])
    assert report[500][1].learning_rate == 2e-4
    last_of_decay = [plan for _, plan in report if plan.stage == "decay"][-1]
    assert last_of_decay.learning_rate == pytest.approx(3e-5, rel=1e-12)
    progress, plan = report[-1]
    assert progress.tokens + plan.tokens == pytest.approx(
        11.758e12, abs=10 * 2**27
    )  # each stage ends with a whole step


def test_questions_and_answers_are_a_tenth_of_the_last_fifth(report):
    for stage, tokens in [("context-128k", 300e9), ("context-512k", 32e9), ("context-1m", 26e9)]:
        steps = [(progress.tokens, plan) for progress, plan in report if plan.stage == stage]
        shares = [sum(v for k, v in plan.data_weights.items() if k.startswith("qa/")) for _, plan in steps]
        late = [at for (at, _), share in zip(steps, shares, strict=True) if share]
        assert {round(share, 12) for share in shares} == {0, 0.1}
        assert late[0] - steps[0][0] == pytest.approx(0.8 * tokens, abs=2**27)
        assert len(late) == sum(at >= late[0] for at, _ in steps), "to the end"
        weights = steps[-1][1].data_weights
        assert weights["code/short"] / weights["web/short"] == pytest.approx(3)
        assert sum(weights.values()) == pytest.approx(1)
    assert not any("qa" in plan.data_weights for _, plan in report)


def test_closed_form_of_the_report(report):
    made = recipe("recipe=minimax-01")
    pieces = list(made.pieces(Progress(), {}))
    assert len(pieces) == 9
    assert sum(piece.steps for piece in pieces) == len(report) == made.total_steps(Progress(), {})
    for piece in pieces:
        progress, plan = report[piece.step]
        assert (progress.tokens, plan.tokens, plan.stage) == (piece.tokens, piece.batch, made.stages[piece.stage].name)
    samples = list(made.samples(20))
    assert 9 * 20 <= len(samples) <= 9 * 23
    taken = {progress.tokens: plan.learning_rate for progress, plan in report}
    assert [taken[tokens] for tokens, _ in samples] == [plan.learning_rate for _, plan in samples]


def _random_overrides(choose):
    given = [*STAGED[:-3], "recipe.decay_steps=null", "recipe.min_learning_rate=null"]
    given += [f"recipe.warmup_steps={choose.randint(0, 3)}"]
    if choose.random() < 0.5:
        edges = sorted(choose.sample(range(1, 4000), 2))
        batches = ", ".join([str(40), f"120 from {edges[0]}", f"200 from {edges[1]}"])
        given = [text for text in given if "global_batch" not in text]
        given += ["recipe.global_batch_size=null", f"recipe.batch_tokens=[{batches}]"]
    for name in ("a", "b", "c")[: choose.randint(1, 3)]:
        key = f"recipe.stages.{name}"
        unit, length = choose.choice([("steps", choose.randint(6, 20)), ("tokens", choose.randint(1000, 3000))])
        given.append(f"{key}.{unit}={length}")
        given.append(f"{key}.min_learning_rate=1e-9")
        given.append(choose.choice([f"{key}.decay_steps=2", f"{key}.decay_tokens=100", f"{key}.decay_shape=cosine"]))
    return given


@pytest.mark.parametrize("seed", range(12))
def test_closed_form_is_step_after_step(seed):
    """Lengths in steps and tokens mixed, batches that change within stages; decays end at the stages' last steps."""
    made = recipe(*_random_overrides(random.Random(seed)))
    taken = list(walk(made))
    steps = [
        (piece.step + i, piece.tokens + i * piece.batch, piece.batch, made.stages[piece.stage].name)
        for piece in made.pieces(Progress(), {})
        for i in range(piece.steps)
    ]
    assert steps == [(progress.step, progress.tokens, plan.tokens, plan.stage) for progress, plan in taken]
    rates = {plan.stage: plan.learning_rate for _, plan in taken}  # the last of each
    assert all(rate == pytest.approx(1e-9) for rate in rates.values())
    for at in (1, len(steps) // 2):  # and from the middle on
        progress = taken[at][0]
        state = {}
        for before, _ in taken[:at]:
            state = made.enter(before, state)
        assert made.total_steps(progress, state) == len(steps)


def test_lengths_may_be_tokens_or_epochs():
    by_steps = [plan for _, plan in walk(recipe(*FLAT, "recipe.steps=13"))]
    assert [plan for _, plan in walk(recipe(*FLAT, "recipe.tokens=961"))] == by_steps  # 12 steps are 960
    made = recipe(*FLAT, "recipe.epochs=1.5")
    assert [plan for _, plan in walk(made, {"epoch_tokens": 641})] == by_steps
    decayed = [*FLAT[:1], *SIZES, "recipe.warmup_steps=0", "recipe.decay_shape=linear", "recipe.min_learning_rate=0"]
    rates = [
        [plan.learning_rate for _, plan in walk(recipe(*decayed, *more), state)]
        for more, state in [
            (["recipe.steps=10", "recipe.decay_steps=5"], {}),
            (["recipe.steps=10", "recipe.decay_steps=null", "recipe.decay_tokens=400"], {}),
            (["recipe.tokens=800", "recipe.decay_steps=5"], {}),
            (["recipe.tokens=800", "recipe.decay_steps=null", "recipe.decay_tokens=400"], {}),
            (["recipe.epochs=2", "recipe.decay_steps=5"], {"epoch_tokens": 400}),
        ]
    ]
    assert rates[0] == pytest.approx([2e-3] * 5 + [2e-3 * (1 - n / 5) for n in range(1, 6)])
    assert all(found == pytest.approx(rates[0]) for found in rates)


def test_weights_move_through_a_transition():
    stages = ["recipe.stages.a.steps=2", "recipe.stages.a.mixture.web=1", "recipe.stages.a.lengths.long=1"]
    stages += ["recipe.stages.b.steps=10", "recipe.stages.b.mixture.web=1", "recipe.stages.b.mixture.code=3"]
    stages += ["recipe.stages.b.lengths.short=1", "recipe.stages.b.lengths.long=1"]
    stages += ["recipe.stages.b.transition_tokens=320"]
    weights = [plan.data_weights for _, plan in walk(recipe(*SOURCES, *STAGED, *stages))]
    assert weights[:2] == [{"web/long": 1.0}] * 2
    for step, part in enumerate([1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1]):  # in the middle of steps of 80 tokens
        web, long = 1 - 0.75 * part, 1 - 0.5 * part
        expected = {"web/long": web * long, "web/short": web * (1 - long)}
        expected |= {"code/long": (1 - web) * long, "code/short": (1 - web) * (1 - long)}
        assert weights[2 + step] == pytest.approx(expected)


def test_a_source_of_few_lengths_keeps_its_share():
    stage = ["recipe.stages.a.steps=2", "recipe.stages.a.mixture.web=1", "recipe.stages.a.mixture.qa=1"]
    stage += [f"recipe.stages.a.lengths.{name}={share}" for name, share in [("short", 1), ("medium", 2), ("long", 1)]]
    (_, plan), _ = walk(recipe(*SOURCES, *STAGED, *stage, "data.sources.qa.lengths=[long,medium]"))
    parts = {"web/short": 1 / 8, "web/medium": 2 / 8, "web/long": 1 / 8, "qa/long": 1 / 6, "qa/medium": 2 / 6}
    assert plan.data_weights == pytest.approx(parts)


def test_batches_follow_the_loss():
    """Kaplan et al.: 2e8 tokens at a loss of 1 nat, by the power -1/0.21."""
    made = recipe(*FLAT, "recipe.steps=2000", "recipe.critical_batch=true")
    progress, policy, smoothed, batches = Progress(), {}, None, []
    for step in range(400):
        policy = made.enter(progress, policy)
        plan = made.at(progress, policy)
        loss = 18 - 0.01 * step
        smoothed = loss if smoothed is None else 0.9 * smoothed + 0.1 * loss
        progress = Progress(progress.step + 1, progress.tokens + plan.tokens)
        policy = made.learn(progress, policy, plan, loss)
        doubles = 2e8 * smoothed ** (-1 / 0.21) >= 2 * plan.tokens
        batches.append((plan.tokens, made.at(progress, policy).tokens // plan.tokens == (2 if doubles else 1)))
    assert all(fits for _, fits in batches)
    assert [*dict.fromkeys(tokens for tokens, _ in batches)] == [80, 160, 320, 640]


def test_a_decay_goes_on_when_the_batch_doubles():
    """In tokens, of which the warm-up takes as many whatever the batch is afterwards."""
    given = [*SIZES, "recipe=cosine", "recipe.steps=null", "recipe.tokens=8000", "recipe.warmup_steps=20"]
    made = recipe(*given, "recipe.critical_batch=true")
    progress, policy, rates = Progress(), {}, []
    while not made.is_over(progress, policy):
        plan = made.at(progress, policy)
        rates.append((plan.learning_rate, progress.tokens, plan.tokens))
        progress = Progress(progress.step + 1, progress.tokens + plan.tokens)
        policy = made.learn(progress, made.enter(progress, policy), plan, 18 - 0.2 * progress.step)
    assert {tokens for _, _, tokens in rates[:20]} == {80} and rates[-1][2] >= 320
    cosine = [(min(1, (at + batch - 1600) / 6400), rate) for rate, at, batch in rates[20:]]
    assert [2e-4 + 1.8e-3 * (0.5 + 0.5 * math.cos(math.pi * part)) for part, _ in cosine] == pytest.approx(
        [rate for _, rate in cosine]
    )


def test_a_checkpoint_of_a_doubled_batch_keeps_the_recipe():
    """64 sequences from the first step on would be at the end before the warm-up is."""
    given = [*SIZES, "recipe=cosine", "recipe.steps=null", "recipe.tokens=8000", "recipe.warmup_steps=20"]
    config = load_config([*given, "recipe.critical_batch=true"])
    plan = Recipe(config).at(Progress(30, 2400), {"batch_doublings": 4})
    assert plan.global_batch_size == 64
    assert config_at(config, plan).recipe == config.recipe


def test_scales_keep_the_shape():
    """A hundredth of the steps, 2^-13 of a batch, 2^-7 of a length."""
    scales = [f"recipe.scale={2**-13 / 100}", f"recipe.batch_scale={2**-13}", f"recipe.length_scale={2**-7}"]
    made = recipe("recipe=minimax-01", *scales)
    steps = list(walk(made))
    assert len(steps) == pytest.approx(1364, abs=6)
    assert {plan.sequence_length for _, plan in steps} == {64, 1024, 4096, 8192}
    assert [*dict.fromkeys(plan.tokens for _, plan in steps)] == [2**11, 2**12, 2**13, 2**14]
    assert [plan.learning_rate for _, plan in steps[:6]] == pytest.approx([2e-4 * min(1, n / 5) for n in range(1, 7)])
    in_stages = [*STAGED, "recipe.stages.a.steps=100", "recipe.stages.a.min_learning_rate=0"]
    in_stages += ["recipe.stages.a.decay_steps=40", "recipe.stages.a.decay_shape=linear", "recipe.scale=0.1"]
    assert [plan.learning_rate for _, plan in walk(recipe(*in_stages))][5:] == pytest.approx(
        [2e-3, 1.5e-3, 1e-3, 5e-4, 0]
    )


ONE, TWO = "recipe.stages.a.steps=10", "recipe.stages.b.steps=3"
NO_BATCH = ["recipe.global_batch_size=null"]
REFUSED = [
    (["recipe.tokens=5"], r"recipe.steps=300: recipe.tokens=5.0 is given as well; null is for none"),
    (["recipe.steps=null"], r"recipe.steps=None: no value given, nor for recipe.tokens or recipe.epochs"),
    (["recipe.batch_tokens=[80]"], r"recipe.global_batch_size=8: recipe.batch_tokens=\['80'\] is given as well"),
    (["recipe.global_batch_size=null"], r"recipe.global_batch_size=None: no value given, nor for recipe.batch_tokens"),
    ([ONE], r"recipe.steps=300: is for a run without recipe.stages"),
    ([*STAGED, ONE, "recipe.stages.a.tokens=80"], r"recipe.stages.a.steps=10: recipe.stages.a.tokens=80.0 is given"),
    ([*STAGED, "recipe.stages.a.rope_base=5"], r"recipe.stages.a.steps=None: no value given"),
    ([*STAGED, ONE, "recipe.stages.a.learning_rate=1"], r"recipe.stages.a.learning_rate=1.0: is recipe.learning_rate"),
    ([*STAGED, ONE, "recipe.stages.a.stps=1"], r"recipe.stages.a.stps=1: .*Did you mean recipe.stages.a.steps\?"),
    (["recipe.scale=0.5"], r"recipe.scale=0.5: is read only with recipe.stages"),
    (["recipe.critical_batch_exponent=2"], r"recipe.critical_batch_exponent=2.0: is read only with recipe.critical_b"),
    ([*FLAT, "recipe.tokens=800", "recipe.warmup_steps=11"], r"recipe.warmup_steps=11: must fit in recipe.tokens=800"),
    (
        [*FLAT, "recipe.tokens=800", "recipe.decay_steps=8", "recipe.warmup_steps=3"],
        r"recipe.decay_steps=8: with recipe.warmup_steps=3 must fit in recipe.tokens=800",
    ),
    (
        [*FLAT, "recipe.tokens=800", "recipe.decay_steps=null", "recipe.decay_tokens=801"],
        r"recipe.decay_tokens=801: must fit in recipe.tokens=800",
    ),
    (
        [*STAGED, ONE, TWO, "recipe.stages.b.min_learning_rate=1e-9", "recipe.stages.b.decay_steps=4"],
        r"recipe.stages.b.decay_steps=4: must fit in recipe.stages.b.steps=3",
    ),
    (
        [*STAGED, ONE, "recipe.stages.b.steps=3", "recipe.stages.b.min_learning_rate=1"],
        r"recipe.stages.b.min_learning_rate=1.0: must be at most recipe.stages.b.learning_rate=0.002",
    ),
    ([*STAGED, ONE, "recipe.stages.a.decay_steps=4"], r"recipe.stages.a.decay_steps=4: is read only with recipe"),
    (
        [*STAGED, ONE, "recipe.stages.b.steps=9", "recipe.stages.b.transition_tokens=721"],
        r"recipe.stages.b.transition_tokens=721: must fit in recipe.stages.b.steps=9",
    ),
    (
        [*FLAT, "recipe.steps=9", "recipe.global_batch_size=null", "recipe.batch_tokens=[80, 150 from 300]"],
        r"recipe.batch_tokens: 150 tokens a step are 7.5 packed sequences of 20; must be a multiple of 1: recipe.micro",
    ),
    ([*NO_BATCH, "recipe.batch_tokens=[80 from 5]"], r"recipe.batch_tokens='80 from 5': the first is from 0"),
    ([*NO_BATCH, "recipe.batch_tokens=[80,90 from x]"], r"recipe.batch_tokens='90 from x': must be the tokens"),
    (
        [*STAGED, ONE, "recipe.stages.b.steps=3", "recipe.stages.b.micro_batch_size=3"],
        r"recipe.stages.b.micro_batch_size=3: must divide recipe.global_batch_size=4; 2 or 4 would do",
    ),
    (
        [*STAGED, ONE, "recipe.stages.b.steps=3", "recipe.stages.b.global_batch_size=6", "recipe.micro_batch_size=4",
         "recipe.stages.a.sequence_length=40"],
        r"recipe.stages.b: recipe.micro_batch_size=4: must divide recipe.stages.b.global_batch_size=6",
    ),
    (
        [*STAGED, ONE, TWO, "recipe.stages.b.sequence_length=67108864", "recipe.stages.b.micro_batch_size=64",
         "recipe.stages.b.global_batch_size=64"],
        r"recipe.stages.b.micro_batch_size=64: times recipe.stages.b.sequence_length=67108864 must be at most",
    ),
    (
        [*STAGED, ONE, "recipe.stages.b.steps=3", "recipe.stages.b.sequence_length=2147483647",
         "recipe.stages.b.global_batch_size=8", "recipe.micro_batch_size=4"],
        r"recipe.stages.b: recipe.micro_batch_size=4: times recipe.stages.b.sequence_length=2147483647 must be",
    ),
    ([*STAGED, ONE, "recipe.stages.a.late_part=0.5"], r"recipe.stages.a.late_part=0.5: is read only with recipe.stag"),
    (
        [*STAGED, ONE, "recipe.stages.a.decay_shape=linear"],
        r"recipe.stages.a.decay_shape='linear': is read only with recipe.stages.a.min_learning_rate",
    ),
    (
        [*STAGED, ONE, "parallel.cp=2", "recipe.stages.b.steps=3", "recipe.stages.b.sequence_length=22"],
        r"recipe.stages.b: .*22",
    ),
    (
        [*STAGED, ONE, "recipe.stages.b.steps=3", "recipe.stages.b.parallel.tp=3", "checkpoint.resume=auto"],
        r"recipe.stages.b: parallel.tp=3: must divide model.num_heads=4",
    ),
    ([*STAGED, ONE, TWO, "recipe.stages.b.parallel.cp=2"], r"checkpoint.resume='never': must be auto"),
    ([*STAGED, ONE, "recipe.stages.a.parallel.dp=2"], r"recipe.stages.a.parallel.dp=2: there is no such axis"),
    ([*STAGED, ONE, "recipe.stages.a.mixture.books=1"], r"recipe.stages.a.mixture.books=1.0: there is no source"),
    ([*STAGED, ONE, "recipe.stages.a.mixture.stdlib=0"], r"recipe.stages.a.mixture=\{'stdlib': 0.0\}: one weight"),
    ([*STAGED, ONE, "recipe.stages.a.mixture.stdlib=-1"], r"recipe.stages.a.mixture.stdlib=-1.0: must be between"),
    ([*STAGED, ONE, "recipe.stages.a.lengths.short=0"], r"recipe.stages.a.lengths=\{'short': 0.0\}: one share"),
    ([*STAGED, ONE, "recipe.stages.a.lengths.huge=1"], r"recipe.stages.a.lengths.huge=1.0: lengths are short"),
    (
        [*SOURCES, *STAGED, ONE, "data.sources.qa.lengths=[long]", "recipe.stages.a.lengths.short=1"],
        r"recipe.stages.a.lengths: only short documents are asked for, and data.sources.qa.lengths=\['long'\] has none",
    ),
    (
        [*STAGED, ONE, "recipe.stages.a.late_weight=0.1", "recipe.late_source=qa"],
        r"recipe.late_source='qa': there is no such source; there are stdlib",
    ),
    ([*SOURCES, *FLAT, "recipe.epochs=2"], r"recipe.epochs=2.0: an epoch is of one source"),
    (
        [*FLAT, "recipe.steps=9", "recipe.critical_batch=true", "recipe.global_batch_size=null",
         "recipe.batch_tokens=[80, 160 from 300]"],
        r"recipe.critical_batch=True: must be false where the batch is planned",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_a_schedule_that_contradicts_itself_is_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        load_config(given)


def test_every_stage_of_a_grid_must_suit_its_ranks():
    stages = [*STAGED, ONE, "recipe.stages.b.steps=3", "recipe.stages.b.global_batch_size=6"]
    load_config(stages).check_world_size(2)
    with pytest.raises(ConfigError, match=r"^recipe.stages.b.global_batch_size=6: must be a multiple of 4"):
        load_config(stages).check_world_size(4)
    other = [*stages, "recipe.stages.b.parallel.cp=2", "checkpoint.resume=auto"]
    load_config(other).check_world_size(4)  # stage b has a number of processes of its own


def test_what_a_checkpoint_cannot_have_come_from(tmp_path):
    stages = [*STAGED, ONE, "recipe.stages.b.tokens=800"]
    made = recipe(*stages)
    made.check_resumed(Progress(), "it")
    made.check_resumed(Progress(14, 1120, policy={"stage": "b", "began": [10, 800]}), "it")
    for policy, message in [
        ({"stage": "c", "began": [10, 800]}, r"recipe.stages=\['a', 'b'\]: it was saved in stage 'c'"),
        ({"stage": "a", "began": [0, 0]}, "recipe.stages.a.steps=10: it has taken 14 steps already"),
        ({"stage": "b", "began": [1, 80]}, "recipe.stages.b.tokens=800: it has trained on 1040 tokens already"),
        ({"stage": "b", "began": [15, 0]}, "it: damaged: no state of a recipe"),
        ({"stage": "b", "began": "x"}, "it: damaged"),
        ({"stage": "b"}, "it: damaged"),
        ({"batch_doublings": -1}, "it: damaged"),
        ({"epoch_tokens": 0}, "it: damaged"),
    ]:
        with pytest.raises(ConfigError, match=f"^{message}"):
            made.check_resumed(Progress(14, 1120, policy=policy), "it")


def test_a_length_in_epochs_is_not_below_what_was_trained():
    made = recipe(*FLAT, "recipe.epochs=0.5")
    for epoch, tokens in [(800, 400), (810, 480), (None, 4000)]:  # steps of 80; unknown until it is counted
        policy = {"stage": "pretraining", "began": [0, 0]} | ({"epoch_tokens": epoch} if epoch else {})
        made.check_resumed(Progress(tokens // 80, tokens, policy=policy), "it")
    policy |= {"epoch_tokens": 800}
    message = "^recipe.epochs=0.5: it has trained on 480 tokens already; must be at least 0.6, of 800 tokens each"
    with pytest.raises(ConfigError, match=message):
        made.check_resumed(Progress(6, 480, policy=policy), "it")


def test_the_grid_to_go_on_with(tmp_path, monkeypatch):
    """Of a stage that was in steps when the checkpoint was saved; of a folder that cannot be searched."""
    stages = [*STAGED, "recipe.stages.a.epochs=0.5", TWO, "recipe.stages.b.parallel.cp=2", "checkpoint.resume=auto"]
    config = load_config([*stages, f"run_dir={tmp_path}"])
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    progress = Progress(4, 320, policy={"stage": "a", "began": [0, 0]})
    monkeypatch.setattr(CheckpointStore, "check", lambda store, path: progress)
    with pytest.raises(ConfigError, match=r"^recipe.stages.a.epochs=0.5: .*step-00000004 does not say .*; give recipe"):
        on_grid_of_stage(config, 1)
    progress.policy["epoch_tokens"] = 640
    assert on_grid_of_stage(config, 2).parallel.cp == 2  # stage a has ended
    monkeypatch.setattr(CheckpointStore, "latest", lambda store: os.listdir(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"^run_dir=.*: must be a folder this run can write: .*missing"):
        on_grid_of_stage(config, 1)


def test_wsd_and_cosine():
    rates = [plan.learning_rate for _, plan in walk(recipe("recipe=wsd"))]
    assert len(rates) == 300 and rates[19:240] == [2e-3] * 221
    assert rates[240:] == pytest.approx([2e-3 - (2e-3 - 2e-5) * n / 60 for n in range(1, 61)])
    rates = [plan.learning_rate for _, plan in walk(recipe("recipe=cosine", "recipe.steps=100"))]
    cosine = [2e-4 + 1.8e-3 * (0.5 + 0.5 * math.cos(math.pi * n / 80)) for n in range(1, 81)]
    assert rates[20:] == pytest.approx(cosine)
