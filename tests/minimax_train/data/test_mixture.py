"""Mixtures: which document comes next, what is held out, and that nothing depends on ranks, restarts or lookahead."""

import itertools
import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_train.data import DataConfig, build_train_loader, build_validation_sequences, merge_states
from minimax_train.data.config import MixtureSourceConfig
from minimax_train.data.held_out import is_in_share
from minimax_train.data.mixture import MixtureStream
from minimax_train.data.packing import SequencePacker
from minimax_train.data.streams import DocumentStream, Lengths
from minimax_train.errors import ConfigError
from support.data import ListSource, WordTokenizer, next_micro_batches, rows_of, write_shards

MEDIUM, LONG = 12, 30
LENGTH_OF = Lengths(MEDIUM, LONG)
NAMES = ("books", "code", "web")


def texts_of(source, lengths):
    """Documents whose ids tell source, document and place: 1 000 000 s + 1000 d + place."""
    return [
        " ".join(str(1_000_000 * source + 1000 * d + i) for i in range(1, length + 1))
        for d, length in enumerate(lengths, 1)
    ]


def packer(sources, policy="split", **options):
    """Over lists of documents by name, in their order."""
    settings = {"stream": 0, "num_streams": 1, "seed": 0, "shuffle_documents": 1, "lengths": LENGTH_OF} | options
    tokenizer = settings.pop("tokenizer", None) or WordTokenizer()

    def open_cursor(name, only):
        path = f"data.sources.{name}"
        return DocumentStream(ListSource([sources[name]]), tokenizer, only=only, path=path, **settings)

    return SequencePacker(MixtureStream(list(sources), open_cursor), policy)


def reference(sources, steps):
    """The next document is of the component that lacks the most tokens; what does not fit goes on in the next row."""
    following = {}

    def documents_of(component):
        name, _, length = component.partition("/")
        for text in itertools.cycle(sources[name]):
            ids = [*map(int, text.split()), 0]
            kind = "short" if len(ids) < MEDIUM else "long" if len(ids) >= LONG else "medium"
            if length in ("", kind):
                yield ids

    asked, served = defaultdict(float), Counter()
    left, component = [], None
    for length, weights in steps:
        for name in weights:
            asked[name] += weights[name] * length
        row = []
        while len(row) < length:
            if not left:
                able = sorted(name for name in weights if weights[name] > 0)
                component = max(able, key=lambda name: asked[name] - served[name])
                left = next(following.setdefault(component, documents_of(component)))
            taken, left = left[: length - len(row)], left[length - len(row) :]
            served[component] += len(taken)
            row += taken
        yield row


def random_weights(rng):
    weights = [rng.choice([0, 1, rng.random()]) for _ in NAMES]
    return dict(zip(NAMES, [w / sum(weights) for w in weights], strict=True)) if sum(weights) else {"web": 1.0}


@settings(deadline=None, max_examples=60)
@given(st.randoms(use_true_random=False))
def test_the_next_document_is_of_the_component_that_lacks_the_most(rng):
    sources = {
        name: texts_of(s, [rng.randint(1, 40) for _ in range(rng.randint(1, 9))]) for s, name in enumerate(NAMES)
    }
    steps = [(rng.choice([7, 17, 23]), random_weights(rng)) for _ in range(60)]
    rows = packer(sources)
    got = [rows.next_sequence(length, weights) for length, weights in steps]
    assert [row.tokens_S.tolist() for row in got] == list(reference(sources, steps))
    for row in got:
        starts = itertools.accumulate([0, *row.lengths[:-1]])
        for start, n, origin in zip(starts, row.lengths, row.origins, strict=True):
            token = int(max(row.tokens_S[start : start + n]))  # 0 where only its end is in this row
            if token:
                source, document = divmod(token, 1_000_000)
                length = len(sources[NAMES[source]][document // 1000 - 1].split()) + 1
                assert origin == source * 3 + LENGTH_OF.of(length)


def test_lengths_are_components_of_their_own():
    rng = random.Random(0)
    sources = {"web": texts_of(1, [rng.randint(1, 45) for _ in range(60)])}
    weights = {"web/short": 0.2, "web/medium": 0.3, "web/long": 0.5}
    rows = packer(sources)
    steps = [(37, weights)] * 200
    assert [rows.next_sequence(*step).tokens_S.tolist() for step in steps] == list(reference(sources, steps))


@pytest.mark.parametrize("policy", ["split", "truncate", "best_fit"])
def test_shares_are_exact_over_tokens_also_while_they_move(policy):
    """To half a percent of all, with documents whose mean lengths differ tenfold between the sources."""
    rng = np.random.default_rng(0)
    means = {"books": 900, "code": 300, "web": 90}
    sources = {name: [np.full(max(2, int(n)), 7) for n in rng.exponential(mean, 500)] for name, mean in means.items()}
    rows, asked, length = packer(sources, policy), Counter(), 2039
    for step in range(1000):
        moving = step / 1000
        weights = {"web": 0.7 - 0.6 * moving, "code": 0.2, "books": 0.1 + 0.6 * moving}
        row = rows.next_sequence(length, weights)
        asked.update({name: share * length for name, share in weights.items()})
        assert sum(row.lengths) == length
    served = rows.documents.served
    assert sum(served.values()) == 1000 * length
    for name in NAMES:
        assert abs(served[name] - asked[name]) < 0.005 * 1000 * length, (name, served, asked)
        if policy != "best_fit":
            assert abs(served[name] - asked[name]) <= max(map(len, sources[name])) + length
        assert rows.documents.asked[name] == pytest.approx(asked[name])


def through_json(rows):
    return json.loads(json.dumps(rows.state_dict()))


@pytest.mark.parametrize("policy", ["split", "truncate", "best_fit"])
def test_resumed_at_any_moment_also_where_components_appear(policy):
    rng = random.Random(3)
    sources = {name: texts_of(s, [rng.randint(1, 45) for _ in range(40)]) for s, name in enumerate(NAMES)}
    stages = [
        {"web": 0.5, "code": 0.5},
        {"web/long": 0.6, "web/short": 0.1, "code": 0.3},
        {"web/long": 0.3, "books/medium": 0.3, "books/short": 0.1, "web": 0.3},
    ]
    steps = [(rng.choice([19, 41]), stages[i // 50]) for i in range(150)]

    def fresh():
        return packer(sources, policy, shuffle_documents=5)

    rows = fresh()
    expected, states = [], [through_json(rows)]
    for step in steps:
        row = rows.next_sequence(*step)
        expected.append((row.tokens_S.tolist(), row.labels_S.tolist(), row.lengths, row.origins))
        states.append(through_json(rows))
    for _ in range(20):
        at = rng.randrange(150)
        rows = fresh()
        rows.load_state_dict(states[at])
        assert through_json(rows) == states[at]
        for i in range(at, min(at + 25, 150)):
            row = rows.next_sequence(*steps[i])
            assert (row.tokens_S.tolist(), row.labels_S.tolist(), row.lengths, row.origins) == expected[i], (at, i)
            assert through_json(rows) == states[i + 1]


class Counting(WordTokenizer):
    def __init__(self):
        self.encoded = Counter()

    def encode_document(self, text):
        self.encoded[text] += 1
        return super().encode_document(text)


def test_a_length_begins_where_the_source_stands_and_encodes_no_document_twice():
    lengths = [5, 40, 3, 41, 13, 42, 2, 43, 14, 44]
    tokenizer = Counting()
    rows = packer({"web": texts_of(1, lengths)}, tokenizer=tokenizer)
    rows.next_sequence(6 + 41, {"web": 1.0})  # the first two
    row = rows.next_sequence(42 + 43, {"web/long": 1.0})
    assert [token // 1000 % 1000 for token in row.tokens_S[[0, 42]].tolist()] == [4, 6]
    tokenizer.encoded.clear()
    again = packer({"web": texts_of(1, lengths)}, tokenizer=tokenizer)
    again.next_sequence(41 + 42 + 43 + 44 + 45, {"web/long": 1.0})
    assert max(tokenizer.encoded.values()) == 1
    encoded = {len(text.split()) for text in tokenizer.encoded}
    assert encoded == {*lengths} - {2, 3}, "a text of less than 28 bytes is known not to be long"


def test_a_length_that_no_document_has():
    rows = packer({"web": texts_of(1, [3, 5, 14])})
    with pytest.raises(ConfigError, match=r"data.sources.web.lengths: stream 0 has read all .* of the length 'long'"):
        rows.next_sequence(64, {"web/long": 1.0})


def test_the_last_epoch_is_said_and_the_next_refused():
    rows = packer({"web": texts_of(1, [9] * 4)}, max_epochs=2)
    for _ in range(3):
        rows.next_sequence(10, {"web": 1.0})
    assert rows.documents.take_notes() == []
    rows.next_sequence(20, {"web": 1.0})
    (note,) = rows.documents.take_notes()
    assert "last epoch (data.sources.web.max_epochs=2); 40 tokens were packed of the one before" in note
    rows.next_sequence(30, {"web": 1.0})
    with pytest.raises(ConfigError, match=r"data.sources.web.max_epochs=2: stream 0 of .* has had its last epoch"):
        rows.next_sequence(1, {"web": 1.0})


# Files and loaders.

WEIGHTS = [
    {"code": 0.25, "web": 0.75},
    {"code": 0.5, "web": 0.5},
    {"code/short": 0.1, "code/medium": 0.2, "web/short": 0.7},
    {"web": 1.0},
]


def config_of(folder, sources, *, num_workers=0, file_format="json", **options):
    """By name, the documents and the fields of each source."""
    named = {}
    for name, (texts, how) in sources.items():
        pattern = write_shards(folder / name, file_format, [texts[i::3] for i in range(3)])
        named[name] = MixtureSourceConfig(format=file_format, train_files=[pattern], **how)
    settings = {"num_streams": 4, "shuffle_documents": 5, "medium_length": MEDIUM, "long_length": LONG} | options
    return DataConfig(sources=named, num_workers=num_workers, **settings)


def loader(config, dp_rank=0, dp_size=1):
    return build_train_loader(config, WordTokenizer(), dp_rank=dp_rank, dp_size=dp_size, seed=7)


def step_of(ranks, step):
    """The global batch of a step, of 8 sequences, by rank in turn."""
    parts = [
        rows_of(next_micro_batches(rank, 1, 8 // len(ranks), length=23, dp_size=len(ranks), weights=moving(step)))
        for rank in ranks
    ]
    return [row for together in zip(*parts, strict=True) for row in together]


def moving(step):
    return WEIGHTS[step // 6] if step % 6 else {"code": 0.5 + step / 100, "web": 0.5 - step / 100}


@pytest.fixture
def mixed(tmp_path):
    rng = random.Random(5)
    sources = {
        "web": (texts_of(1, [rng.randint(1, 20) for _ in range(120)]), {}),
        "code": (texts_of(2, [rng.randint(1, 28) for _ in range(90)]), {"max_epochs": 9}),
    }
    return config_of(tmp_path, sources)


@pytest.mark.parametrize("policy", ["split", "best_fit"])
def test_the_same_batches_on_any_number_of_ranks_and_after_any_restart(mixed, policy):
    mixed.packing = policy
    steps, rng = 24, random.Random(1)
    whole = [loader(mixed)]
    expected = [step_of(whole, step) for step in range(steps)]
    for _ in range(3):
        ranks, step = [loader(mixed, rank, 2) for rank in range(2)], 0
        for size in (4, 1, 2, 4):
            stop = min(steps, step + rng.randint(1, 9))
            assert [step_of(ranks, s) for s in range(step, stop)] == expected[step:stop]
            state = json.loads(json.dumps(merge_states([rank.state_dict() for rank in ranks])))
            ranks, step = [loader(mixed, rank, size) for rank in range(size)], stop
            for rank in ranks:
                rank.load_state_dict(state)


def test_figures_of_a_mixture(mixed):
    rows = loader(mixed)
    for _ in range(9):
        next_micro_batches(rows, 1, 8, length=23, weights={"web": 0.8, "code": 0.2})
    figures = rows.figures()
    assert figures["data_share_asked/web"] == pytest.approx(0.8) == 1 - figures["data_share_asked/code"]
    assert figures["data_share/web"] == pytest.approx(0.8, abs=4 * 30 / (72 * 23))
    assert figures["data_epoch/web"] > figures["data_epoch/code"] == 0
    assert figures["split_documents"] > 0
    served = sum(sum(state["served"].values()) for state in rows.state_dict()["streams"].values())
    assert served == 72 * 23


def test_what_was_packed_ahead_by_other_weights_is_packed_again(mixed):
    rows, again = loader(mixed), loader(mixed)
    step_of([rows], 0)
    again.load_state_dict(rows.state_dict())
    weights = {"code/medium": 1.0}
    got = rows_of(next_micro_batches(rows, 1, 8, length=23, weights=weights))
    assert got == rows_of(next_micro_batches(again, 1, 8, length=23, weights=weights))
    assert {token // 1_000_000 for tokens, _, _ in got for token in tokens[16:] if token} == {2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.sources.pop("code"), "data.sources.code.source: the saved data position reads 'files'"),
        (lambda config: setattr(config, "medium_length", 9), "data.medium_length=9: the saved data position is for 12"),
        (lambda config: setattr(config.sources["web"], "held_out", 0.1), "data.*held_out=.*the saved data position is"),
    ],
)
def test_what_a_saved_position_does_not_survive(mixed, change, message):
    rows = loader(mixed)
    step_of([rows], 0)
    state = rows.state_dict()
    change(mixed)
    with pytest.raises(ConfigError, match=message):
        loader(mixed).load_state_dict(state)


def test_a_source_may_be_added(mixed, tmp_path):
    rows = loader(mixed)
    step_of([rows], 0)
    state = json.loads(json.dumps(rows.state_dict()))
    more = config_of(tmp_path / "more", {"qa": (texts_of(3, [9] * 20), {})})
    mixed.sources["qa"] = more.sources["qa"]
    resumed = loader(mixed)
    resumed.load_state_dict(state)
    assert resumed.take_notes() == ["data: data.sources.qa is not in the saved position: it begins at its start"]
    assert step_of([resumed], 1) == step_of([rows], 1)
    got = rows_of(next_micro_batches(resumed, 1, 8, length=23, weights={"qa": 1.0}))
    assert {token // 1_000_000 for tokens, _, _ in got for token in tokens[-3:] if token} == {3}


def flat(state):
    """A stream's state as the version before saved it."""
    (position,) = state["positions"].values()
    offset = state["drawn"][0][1] if state["drawn"] else 0
    old = {name: value for name, value in position.items() if name not in ("following", "num_files")}
    return {**old, "num_shards": position["num_files"], "offset": offset}


def earlier(state):
    (digests,) = state["shards"].values()
    keep = ("seed", "data.source", "data.num_streams", "data.shuffle_documents", "data.format", "data.text_column")
    identity = {name: state["identity"][name] for name in keep}
    streams = {name: flat(stream) for name, stream in state["streams"].items()}
    return {"identity": identity, "next_row": state["next_row"], "streams": streams, "shards": digests}


def test_a_state_of_the_version_before_goes_on(tmp_path):
    texts = texts_of(1, [random.Random(0).randint(1, 20) for _ in range(90)])
    pattern = write_shards(tmp_path, "json", [texts[i::4] for i in range(4)])
    held_out = write_shards(tmp_path / "held_out", "json", [texts[5:7]])
    options = {"source": "files", "format": "json", "num_workers": 0, "num_streams": 4, "shuffle_documents": 5}
    config = DataConfig(train_files=[pattern], exclude_held_out=False, **options)
    rows = loader(config)
    expected = [rows_of(next_micro_batches(rows, 1, 8, length=23)) for _ in range(3)]
    state, expected = rows.state_dict(), [rows_of(next_micro_batches(rows, 1, 8, length=23)) for _ in range(9)]
    resumed = loader(config)
    resumed.load_state_dict(json.loads(json.dumps(earlier(state))))
    assert len(resumed.take_notes()) == 1  # a file is read again from its start
    assert [rows_of(next_micro_batches(resumed, 1, 8, length=23)) for _ in range(9)] == expected
    excluding = loader(DataConfig(train_files=[pattern], validation_files=[held_out], **options))
    excluding.load_state_dict(json.loads(json.dumps(earlier(state))))
    assert any("from here on, held-out documents are passed over" in note for note in excluding.take_notes())
    # Half packed documents go on.
    assert rows_of(next_micro_batches(excluding, 1, 1, length=3))[0][0] == expected[0][0][0][:3]


def test_a_state_that_dealt_documents_of_a_file_which_is_cut_now(tmp_path):
    texts = texts_of(1, [15] * 4000)
    pattern = write_shards(tmp_path, "json", [texts])
    config = DataConfig(source="files", format="json", train_files=[pattern], num_workers=0, num_streams=4)
    rows = loader(config)
    next_micro_batches(rows, 1, 8, length=23)
    resumed = loader(config)
    resumed.load_state_dict(earlier(rows.state_dict()))
    with pytest.raises(ConfigError, match=r"dealt the documents of fewer files \(1\) than data.num_streams=4 one by"):
        next_micro_batches(resumed, 1, 8, length=23)


# Held-out documents.


def first_tokens(rows, count, **weights):
    """First tokens of all documents in so many sequences of a loader."""
    found = set()
    for tokens, _, lengths in rows_of(next_micro_batches(rows, 1, count, length=23, weights=weights)):
        found |= {tokens[start] for start in itertools.accumulate([0, *lengths[:-1]])}
    return found


def test_documents_held_out_by_files_are_in_no_training_source(tmp_path):
    web, code = texts_of(1, [6] * 50), texts_of(2, [6] * 50)
    held_out = write_shards(tmp_path / "held_out", "json", [[web[3], code[8], "5 5 5"]])
    config = config_of(tmp_path, {"web": (web, {"validation_files": [held_out]}), "code": ([*code, web[3]], {})})
    firsts = {int(text.split()[0]) for text in (web[3], code[8])}
    found = first_tokens(loader(config), 80, web=0.5, code=0.5)
    assert len(found) > 90 and not found & firsts
    config.exclude_held_out = False
    assert firsts <= first_tokens(loader(config), 80, web=0.5, code=0.5)


def test_a_share_is_held_out_of_all_sources_and_is_the_evaluation(tmp_path):
    web, code = texts_of(1, [6] * 200), texts_of(2, [6] * 100)
    config = config_of(tmp_path, {"web": (web, {"held_out": 0.2}), "code": (code + web[:60], {})})
    held_out = [text for text in web if is_in_share(text, 0.2)]
    assert 20 < len(held_out) < 60
    firsts = {int(text.split()[0]) for text in held_out}
    assert not first_tokens(loader(config), 160, web=0.5, code=0.5) & firsts
    every = build_validation_sequences(
        config, WordTokenizer(), num_sequences=1000, sequence_length=21, dp_rank=0, dp_size=1
    )
    assert list(every) == ["web"]
    tokens = {token for row, _, _ in rows_of(every["web"].micro_batches(1)) for token in row if token}
    assert tokens == {int(word) for text in held_out for word in text.split()}


@pytest.mark.parametrize("packing", ["split", "truncate", "best_fit"])
def test_documents_that_are_held_out_from_a_resume_on(tmp_path, packing):
    """Those drawn before are packed to their end, each token once; the others are passed over."""
    texts = texts_of(1, [5 + i % 7 for i in range(120)])
    files = [write_shards(tmp_path / f"held_out_{i}", "json", [held]) for i, held in enumerate((["5 5"], texts[::4]))]
    config = config_of(tmp_path, {"web": (texts, {"validation_files": files[:1]})}, packing=packing, num_streams=1)
    rows = loader(config)
    got = rows_of(next_micro_batches(rows, 1, 12, length=23, weights={"web": 1.0}))
    config = config_of(tmp_path, {"web": (texts, {"validation_files": files})}, packing=packing, num_streams=1)
    resumed = loader(config)
    resumed.load_state_dict(json.loads(json.dumps(rows.state_dict())))
    got += rows_of(next_micro_batches(resumed, 1, 12, length=23, weights={"web": 1.0}))
    counts = Counter(token for tokens, _, _ in got for token in tokens if token)
    assert set(counts.values()) == {1}
    started = {int(text.split()[0]) for text in texts[::4]}
    assert 4 < len(started & set(counts)) < 30


def test_the_last_documents_of_an_epoch_are_packed_before_it_ends(tmp_path):
    texts = texts_of(1, [6] * 20)  # 140 tokens with their ends
    config = config_of(tmp_path, {"web": (texts, {"max_epochs": 1})}, packing="best_fit", num_streams=1)
    rows = loader(config)
    got = rows_of(next_micro_batches(rows, 1, 6, length=23, weights={"web": 1.0}))
    assert len({token for tokens, _, _ in got for token in tokens if token}) > 110
    with pytest.raises(ConfigError, match=r"data.sources.web.max_epochs=1"):
        next_micro_batches(rows, 1, 1, length=23, weights={"web": 1.0})


def test_excluding_may_change_at_a_resume(tmp_path):
    texts = texts_of(1, [6] * 50)
    held_out = write_shards(tmp_path / "held_out", "json", [texts[40:]])
    config = config_of(tmp_path, {"web": (texts, {"validation_files": [held_out]})})
    rows = loader(config)
    next_micro_batches(rows, 1, 4, length=23, weights={"web": 1.0})
    config.exclude_held_out = False
    resumed = loader(config)
    resumed.load_state_dict(rows.state_dict())
    (note,) = resumed.take_notes()
    assert "from here on, held-out documents are trained on as well" in note


def test_where_everything_is_held_out(tmp_path):
    pattern = write_shards(tmp_path, "json", [texts_of(1, [9] * 30)])
    config = DataConfig(source="files", format="json", train_files=[pattern], validation_files=[pattern], num_workers=0)
    with pytest.raises(ConfigError, match=r"data.exclude_held_out, .*found no document that is not held out"):
        next_micro_batches(loader(config), 1, 8, length=23)


def test_two_ways_to_hold_out(tmp_path):
    with pytest.raises(ConfigError, match=r"data.held_out=0.1: must be 0 beside data.validation_files"):
        DataConfig(source="files", train_files=["a"], validation_files=["b"], held_out=0.1)
