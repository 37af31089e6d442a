"""A wire in closed form is the text itself where nothing is lost, and the best of its size where something is."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentwire import exports
from latentwire.closed_form import begin, gather, ranking
from latentwire.closed_form.moments import ClosedFormError, Moments
from latentwire.closed_form.regression import decoder_for, solve
from latentwire.config import RunConfig, SweepConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import calibrations, shards
from latentwire.data.shards import shard_path
from latentwire.distributed import calibrations as distributed
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.own_heads import heads_of, own_entries
from latentwire.evaluation.scoring import check_receivers
from latentwire.exports import CheckpointError
from latentwire.model import LatentWire
from latentwire.models.senders import joined_row, parted_row
from latentwire.planning.variants import calibration_runs
from latentwire.reports import heads
from latentwire.training import checkpoints
from latentwire.training.loop import Trainer
from tests.conftest import HEADS, choose_some_heads, shard_table, wire_of

WHOLE: dict[str, Any] = HEADS | {
    "encoder.tokens_per_latent": 1,
    "encoder.d_z": 512,
    "encoder.depths": [0.0, 0.25, 0.5, 0.75],  # what each of four layers reads
    "encoder.code_blocks": 0,
    "adapter": {"kind": "heads", "cache_share": 1.0, "unfold_blocks": 0},
    "closed_form": {},
}


def alone(run: RunConfig, receiver: str, values: dict[str, Any]) -> LatentWire:
    """A wire of one receiver, whose sender reads as the receiver does: behind the prompt's head."""
    kept = [one.model_dump() for one in run.receivers if one.name == receiver]
    wire = wire_of(with_values(run, values | {"receivers": kept}, "receivers"))
    encoder: Any = wire.interlingua.encoder
    encoder.states.senders[0].prefix = list(wire.builders[receiver].head_ids)
    return wire


def rows_of(wire: LatentWire, count: int, questions: int = 1, seed: int = 7) -> pa.Table:
    """Toy rows with the senders' ids, as shards hold them."""
    table = shard_table(wire.run, count, seed=seed, questions=questions)
    encoder: Any = wire.interlingua.encoder
    ids = encoder.token_ids(table["context"].to_pylist())
    return table.append_column("encoder_ids", pa.array(ids))


def gathered(wire: LatentWire, texts: int, gradients: int = 0) -> Moments:
    moments = gather.empty_moments(wire)
    gather.add_tokens(moments, wire, rows_of(wire, texts))
    if gradients:
        gather.add_gradients(moments, wire, rows_of(wire, gradients, questions=2, seed=11))
    return moments


@pytest.mark.parametrize(("receiver", "entries"), [("llama", 512), ("qwen", 448)])
def test_where_nothing_is_lost_the_message_is_the_text(
    run: RunConfig, receiver: str, entries: int
) -> None:
    """Keys and values are linear in what their layers read, so full rank in every head loses nothing."""
    wire = choose_some_heads(alone(run, receiver, WHOLE | {"encoder.d_z": entries}))
    begin.fill(wire, solve(gathered(wire, 256), entries, ridge=1e-7, metric="plain"))
    table = rows_of(wire, 24, seed=5)
    read = list(predict(wire, table, Condition("latent")))
    expected = list(predict(wire, table, Condition("text")))
    assert [one.text for one in read] == [one.text for one in expected]
    assert len({one.text for one in read}) > 3
    for one, other in zip(read, expected, strict=True):
        assert one.nll == pytest.approx(other.nll, abs=2e-2)
        assert one.message_positions == other.message_positions


SENDER_HEADS: dict[str, Any] = HEADS | {
    "encoder.sender_heads": True,
    "encoder.depths": [0.5],
    "closed_form": {},
}


@pytest.mark.parametrize("receiver", ["llama", "qwen"])
def test_a_senders_keys_and_values_are_those_of_the_receiver(run: RunConfig, receiver: str) -> None:
    """Where both read a text behind the same tokens: in the chosen heads, head by head."""
    wire = choose_some_heads(alone(run, receiver, SENDER_HEADS))
    table = rows_of(wire, 3)
    encoder: Any = wire.interlingua.encoder
    tokens = encoder.tokens_of(table["encoder_ids"].to_pylist())
    x_BTM = encoder.states(**tokens.tensors, length_B=tokens.length_B)
    entries = wire.interlingua.adapters[receiver].linear.out_features  # type: ignore[union-attr]
    assert encoder.states.entries == entries and x_BTM.shape[2] == encoder.states.width
    texts = table[f"{receiver}_context_ids"].to_pylist()
    own = own_entries(wire, receiver, texts, heads_of(wire)[receiver])
    for x_TM, entry_TE in zip(x_BTM, own, strict=True):
        torch.testing.assert_close(x_TM[: len(entry_TE), -entries:], entry_TE, atol=1e-4, rtol=1e-3)


def test_codes_of_keys_and_values_begin_as_the_closed_form(run: RunConfig, tmp_path: Path) -> None:
    """They are read standardised, and give what the solved map gives; one who loads the wire gets the same."""
    wire = choose_some_heads(wire_of(with_values(run, SENDER_HEADS)))
    moments = gathered(wire, 96, 24)
    start = solve(moments, 16)
    begin.fill(wire, start)
    encoder: Any = wire.interlingua.encoder
    codes = encoder.codes
    tokens = encoder.tokens_of(rows_of(wire, 3, seed=5)["encoder_ids"].to_pylist())
    x_BTM = encoder.states(**tokens.tensors, length_B=tokens.length_B)
    expected_BTK = x_BTM @ start.encoder_MK + start.encoder_bias_K
    code_BTK = codes.linear(codes._standardised(x_BTM))
    torch.testing.assert_close(code_BTK, expected_BTK, atol=1e-3, rtol=1e-3)
    entry_NE = codes._standardised(x_BTM[0, : int(tokens.length_B[0])])[:, codes.seen :]
    assert entry_NE.abs().mean() < 2 and 0.5 < entry_NE.std() < 2
    encoder_MK, bias_K = codes.raw_map()
    torch.testing.assert_close(encoder_MK, start.encoder_MK, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bias_K, start.encoder_bias_K, atol=1e-3, rtol=1e-3)
    # The blocks read states alone.
    assert codes.into.in_features == codes.seen == encoder.states.width - encoder.states.entries
    exports.save(tmp_path / "wire", wire, {}, {})
    again = LatentWire.from_pretrained(str(tmp_path / "wire"))
    text = "Ada lives in Oslo. Ben works as baker."
    one, other = wire.encode(text), again.encode(text)
    assert one.encoder == other.encoder and torch.equal(one.z_BLZ, other.z_BLZ)
    encoder.states.senders[0].head_J2[0] = torch.tensor([3, 1])
    assert wire.encoder_id != one.encoder, "other heads make another encoder"


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"closed_form": None}, "encoder.sender_heads needs closed_form"),
        ({"encoder.senders": ["toy-llama"]}, "senders that are receivers .* got toy-llama"),
        ({"encoder.kind": "lm", "encoder.model": "toy-llama"}, "needs kind senders and pooling"),
    ],
)
def test_heads_of_senders_need_receivers_and_their_sizes(
    run: RunConfig, values: dict[str, Any], error: str
) -> None:
    with pytest.raises(ConfigError, match=error):
        with_values(run, SENDER_HEADS | values)


def test_a_receivers_own_keys_and_values_are_the_most_a_message_can_be(run: RunConfig) -> None:
    """In every head they are the text; in some, what a message there is held against."""
    wire = choose_some_heads(alone(run, "llama", WHOLE | {"prefix": {"tokens": 3}}))
    table = rows_of(wire, 24, seed=5)
    read = list(predict(wire, table, Condition("own_heads")))
    wire.run = with_values(wire.run, {"prompt.reads": "text", "closed_form": None})
    text = list(predict(wire, table, Condition("text", tuned=True)))
    assert [one.text for one in read] == [one.text for one in text]
    for one, other in zip(read, text, strict=True):
        assert one.nll == pytest.approx(other.nll, abs=1e-3)
        assert one.message_positions == other.message_positions
        assert one.bytes == 2 * 512 * other.message_positions
    few = choose_some_heads(alone(run, "llama", with_adapter(WHOLE, 0.25)))
    cut = list(predict(few, table, Condition("own_heads")))
    for one, other in zip(cut, read, strict=True):
        assert one.message_positions == -(-other.message_positions // 4)
    assert sum(one.nll for one in cut) > sum(one.nll for one in read)


def test_other_wires_have_no_heads_of_their_own(run: RunConfig) -> None:
    with pytest.raises(ConfigError, match="leave own_heads out"):
        check_receivers(run, [Condition("own_heads")])


def test_a_closed_form_reads_without_a_step_of_training(run: RunConfig) -> None:
    """In few numbers a token: far better than another row's message, and better than a random start."""
    values = WHOLE | {"encoder.d_z": 48, "adapter.cache_share": 0.5}
    wire = alone(run, "llama", with_adapter(values, 0.5))
    begin_ranked(wire)
    table = rows_of(wire, 32, seed=5)
    random = mean_nll(wire, table, "latent")
    begin.fill(wire, solve(gathered(wire, 192, 48), 48))
    own, others = mean_nll(wire, table, "latent"), mean_nll(wire, table, "shuffled")
    assert own < others - 0.5
    assert own < random - 0.5


def test_the_gradients_are_those_of_the_answers_by_the_entries(run: RunConfig) -> None:
    """Their second moment against a second way: one entry at a time, by central differences."""
    wire = choose_some_heads(alone(run, "llama", with_adapter(WHOLE, 0.3)))
    table = rows_of(wire, 2, questions=2)
    moments = gather.empty_moments(wire)
    gather.add_gradients(moments, wire, table)
    receiver = moments.receivers["llama"]
    heads = heads_of(wire)["llama"]
    (rows,) = gather.texts_of(table, with_questions=True)
    lm, batch = wire.local_receiver("llama"), gather.asked(wire, "llama", rows)
    kv_NE = torch.cat(own_entries(wire, "llama", rows["texts"]["llama"], heads))
    assert receiver.gradients == len(kv_NE)

    def loss_of(entry_NE: torch.Tensor) -> float:
        with torch.no_grad():
            return float(gather.answers_loss(wire, lm, batch, entry_NE, heads))

    step, total = 0.02, torch.zeros(8, dtype=torch.float64)
    for token in range(len(kv_NE)):
        for entry in range(8):
            change = torch.zeros_like(kv_NE)
            change[token, entry] = step
            slope = (loss_of(kv_NE + change) - loss_of(kv_NE - change)) / (2 * step)
            total[entry] += slope**2
    torch.testing.assert_close(receiver.gradient_EE.diagonal()[:8], total, rtol=0.05, atol=1e-6)


def test_targets_of_another_tokenizer_stand_where_the_rulers_tokens_end(run: RunConfig) -> None:
    """The toy pair's receivers cut texts differently: each token meets what ends there or later."""
    wire = choose_some_heads(wire_of(with_values(run, HEADS)))
    table = rows_of(wire, 4)
    encoder: Any = wire.interlingua.encoder
    assert table["encoder_ids"].to_pylist()[0][0] == joined_row(
        [
            tokenizer(table["context"][0].as_py(), add_special_tokens=False).input_ids
            for tokenizer in encoder.states.tokenizers
        ]
    )
    moments = gather.empty_moments(wire)
    gather.add_tokens(moments, wire, table)
    heads = heads_of(wire)["qwen"]
    ruler, other = (wire.local_receiver(name) for name in ("llama", "qwen"))
    total = torch.zeros_like(moments.receivers["qwen"].y_E)
    seen = 0
    for text in dict.fromkeys(table["context"].to_pylist()):
        ids = [lm.tokenizer(text, add_special_tokens=False).input_ids for lm in (ruler, other)]
        (entry_TE,) = own_entries(wire, "qwen", [ids[1]], heads)
        ends = [
            [len(lm.tokenizer.decode(row[: n + 1]).encode()) for n in range(len(row))]
            for lm, row in zip((ruler, other), ids, strict=True)
        ]
        for end in ends[0]:
            place = next((n for n, own in enumerate(ends[1]) if own >= end), len(ids[1]) - 1)
            total += entry_TE[place].double()
            seen += 1
    assert moments.count == seen
    torch.testing.assert_close(moments.receivers["qwen"].y_E, total, atol=1e-3, rtol=1e-4)


def test_a_receiver_that_joins_reads_the_messages_that_are_there(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its map is solved for the encoder as it is; what the others have stays as it is."""
    values = with_adapter(HEADS | {"encoder.d_z": 192}, 0.5) | {"closed_form": {}}
    wire = choose_some_heads(wire_of(with_values(run, values)))
    moments = gathered(wire, 192, 24)
    begin.fill(wire, solve(moments, 48))
    adapters: Any = wire.interlingua.adapters
    before = adapters["llama"].linear.weight.clone()
    table = rows_of(wire, 24, seed=5)
    expected = mean_nll(wire, table, "latent")
    torch.nn.init.normal_(adapters["qwen"].linear.weight)
    adapters["qwen"].head_J2.fill_(-1)
    monkeypatch.setattr(begin, "choose_heads", lambda wire, *_, **__: choose_some_heads(wire))
    monkeypatch.setattr(begin.calibrations, "moments_path", lambda *_: Path("moments"))
    monkeypatch.setattr(begin.Moments, "load", lambda _: moments)
    begin.begin(wire, Path("train"), ["adapters/qwen.safetensors"])
    assert torch.equal(adapters["llama"].linear.weight, before)
    assert mean_nll(wire, table, "latent") == pytest.approx(expected, abs=0.1)


def test_a_closed_form_is_solved_once_and_read_by_all_who_begin_from_it(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other workers, restarts, trials of the same values and the pictures: none solves it again."""
    train = shards_at(tmp_path)
    run = with_values(run, with_adapter(HEADS, 0.5) | {"closed_form": {}})
    wires = [choose_some_heads(wire_of(run)) for _ in range(3)]
    gathered(wires[0], 96, 24).save(calibrations.moments_path(run, train))
    solutions: list[int] = []

    def counted(moments: Moments, codes: int, **knobs: Any) -> Any:
        solutions.append(codes)
        return solve(moments, codes, **knobs)

    monkeypatch.setattr(begin, "solve", counted)
    monkeypatch.setattr(begin, "choose_heads", lambda wire, *_, **__: choose_some_heads(wire))
    with ThreadPoolExecutor(3) as pool:  # as workers, at the same moment
        for task in [pool.submit(begin.begin, wire, train) for wire in wires]:
            task.result()
    first, *others = (wire.interlingua.state_dict() for wire in wires)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert solutions == [16]
    adapters: Any = wires[0].interlingua.adapters
    expected = solve(Moments.load(calibrations.moments_path(run, train)), 16)
    for name, decoder in expected.decoders.items():
        assert torch.equal(adapters[name].linear.weight, decoder.decoder_KE.T)
    exports.save(tmp_path / "best", wires[0], {}, {})
    pages = heads.write_pictures(run, tmp_path / "best", tmp_path, train)
    assert [page.name for page in pages] == ["heads.html", "energy.html"] and solutions == [16]
    for changed, codes in ({"closed_form.ridge": 0.1}, 16), ({"encoder.d_z": 32}, 8):
        other = with_values(run, changed)
        assert begin.solved(other, train).encoder_MK.shape[1] == codes
        assert begin.solved(other, train).unexplained.keys() == {"llama", "qwen"}
    assert solutions == [16, 16, 8]


def test_a_file_that_is_no_solution_is_named(run: RunConfig, tmp_path: Path) -> None:
    train = shards_at(tmp_path)
    run = with_values(run, HEADS | {"closed_form": {}})
    path = Path(str(calibrations.solution_path(run, train)))
    Moments.empty(2, {"llama": 2}).save(path)
    with pytest.raises(
        ClosedFormError, match="must be a latentwire-solution-2 file, got latentwire-moments"
    ):
        begin.solved(run, train)
    path.write_bytes(b"nothing")
    with pytest.raises(ClosedFormError, match=r"must be a file of Start\.save.*delete it"):
        begin.solved(run, train)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calibrate in this process, and note every pass over texts."""
    noted: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def run_it(*arguments: Any) -> Any:
            noted.append(name)
            return function(*arguments)

        return run_it

    def ranked(_: RunConfig, __: float, function: Any, *arguments: Any) -> Any:
        noted.append(f"ranking of {arguments[1]}")
        return function(*arguments)

    monkeypatch.setattr(distributed, "on_cluster", ranked)
    whole = lambda run, train, _: distributed.gather_part(run, train, 0, 1)  # noqa: E731
    monkeypatch.setattr(distributed, "gather_on_cluster", whole)
    for name in ("add_tokens", "add_gradients"):
        monkeypatch.setattr(gather, name, counted(name, getattr(gather, name)))
    monkeypatch.setattr(shards, "read_table", counted("read", shards.read_table))
    return noted


def test_what_an_earlier_wire_brings_is_not_calibrated_again(
    run: RunConfig, tmp_path: Path, passes: list[str]
) -> None:
    """A stage that loads all begins without a pass; a receiver that joins is calibrated alone."""
    values = with_adapter(HEADS, 0.5) | {
        "closed_form": {"texts": 48, "gradient_texts": 8},
        "data.shard_dir": str(tmp_path),
        "training.train_only": [],
    }
    values["adapter"] = values["adapter"] | {"ranking_texts": 4}
    run = with_values(run, values)
    train = Path(str(shard_path(run, "train")))
    train.mkdir()
    pq.write_table(rows_of(wire_of(run), 96), train / "0.parquet")
    (train / "manifest.json").write_text('{"key": "some", "rows": 96, "files": ["0.parquet"]}')

    def calibrated(run: RunConfig) -> list[str]:
        passes.clear()
        assert calibrations.complete(run, train) == (not calibrations.paths(run, train))
        distributed.ensure_calibrations(run, train)
        assert calibrations.complete(run, train)
        return list(passes)

    def begun(run: RunConfig) -> LatentWire:
        trainer = Trainer(wire_of(run), 4, train=train)
        checkpoints.restore(trainer, None)
        return trainer.wire

    one = [receiver.model_dump() for receiver in run.receivers if receiver.name == "llama"]
    senders = {"encoder.senders": ["receiver:llama"]}
    # Its shards have other columns; one table holds them all.
    single = with_values(run, senders | {"receivers": one, "encoder.d_z": 192})
    llama = distributed.first_texts(shards.read_table(train), 0, 48)
    ruler = [
        [row[0] for row in map(parted_row, lines)] for lines in llama["encoder_ids"].to_pylist()
    ]
    table = llama.set_column(
        llama.column_names.index("encoder_ids"), "encoder_ids", pa.array(ruler)
    )
    pq.write_table(table, train / "0.parquet")
    assert calibrated(single) == ["ranking of llama", "read", "read", "add_tokens", "add_gradients"]
    wire = begun(single)
    exports.save(tmp_path / "single", wire, {}, {"receivers": wire.fingerprints()})

    # Trained on: nothing is made, nothing is overwritten.
    further = {"training.init_from": str(tmp_path / "single")}
    other = {"closed_form.texts": 40, "adapter.ranking_texts": 3}
    assert calibrated(with_values(single, further | other)) == []
    again = begun(with_values(single, further | other))
    assert again.encoder_id == wire.encoder_id

    # Joined: its own ranking and states, no gradient that nobody weighs by.
    joining = with_values(run, senders | further | {"encoder.d_z": 192})
    assert calibrated(joining) == ["ranking of qwen", "read", "read", "add_tokens"]
    path = calibrations.moments_path(joining, train)
    assert [*Moments.load(path).receivers] == ["qwen"]
    joined = begun(joining)
    adapters: Any = joined.interlingua.adapters
    decoder = decoder_of(joined, Moments.load(path))
    assert torch.equal(adapters["qwen"].linear.weight, decoder.decoder_KE.T)
    before: Any = wire.interlingua.adapters["llama"]
    assert torch.equal(adapters["llama"].linear.weight, before.linear.weight)
    exports.save(tmp_path / "joined", joined, {}, {})
    pages = heads.write_pictures(joining, tmp_path / "joined", tmp_path, train)
    assert [page.name for page in pages] == ["heads.html"]

    # One that is not there yet brings nothing.
    gone = with_values(joining, {"training.init_from": str(tmp_path / "gone")})
    assert len(calibrations.paths(gone, train)) == 3
    assert calibrated(gone) == ["read", "add_tokens", "add_gradients"]  # both are ranked already


def decoder_of(wire: LatentWire, moments: Moments) -> Any:
    encoder: Any = wire.interlingua.encoder
    linear = encoder.codes.linear
    return decoder_for(moments, "qwen", linear.weight.detach().T, linear.bias.detach())


def test_a_sweep_calibrates_for_each_wire_that_its_trials_may_begin_with(run: RunConfig) -> None:
    base = with_values(run, HEADS | {"closed_form": {}})
    search = {"training.init_from": {"type": "categorical", "choices": ["one", "other"]}}
    space = SweepConfig.model_validate({"run": base.model_dump(), "search": search})
    begun = [one.training.init_from for one in calibration_runs(space, space.run)]
    assert begun == ["one", "other"]


def test_heads_that_nobody_chose_are_refused(run: RunConfig) -> None:
    wire = wire_of(with_values(run, HEADS))
    with pytest.raises(Exception, match="got none chosen"):
        wire.answer(wire.encode("Ada lives in Oslo."), "Where?", "llama")


def test_a_calibration_that_is_not_there_is_named(run: RunConfig, tmp_path: Path) -> None:
    train = shards_at(tmp_path)
    wire = wire_of(with_values(run, HEADS))
    with pytest.raises(CheckpointError, match="ranking of the heads of llama"):
        begin.begin(wire, train)
    assert not calibrations.complete(wire.run, train)
    assert len(calibrations.paths(wire.run, train)) == 2
    assert calibrations.paths(run, train) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"encoder.pooling": "spans"}, "go together"),
        (
            {"encoder.kind": "byte", "encoder.senders": [], "closed_form": {}},
            "states that are not trained",
        ),
        ({"closed_form": {"weights": {"other": 1.0}}}, "must name receivers"),
        ({"training.alignment_steps": 3}, r"no slots .* got training\.alignment_steps"),
        ({"prefix": {"layers": True}}, r"no slots .* got prefix\.layers"),
        ({"data.send": "prompt", "closed_form": {}}, "got data.send prompt"),
        (
            {"data.dataset": "text", "losses.bundle": "pretrain", "closed_form": {}},
            "dataset text has none",
        ),
        ({"features.refiner": {}}, r"got features\.refiner"),
        ({"adapter.unfold_width": 30}, r"multiple of 2 × encoder\.heads"),
        ({"prefix": {"begin": "reader"}}, "set tuned_text with the same tokens"),
    ],
)
def test_what_only_soft_prompts_have_is_refused(
    run: RunConfig, values: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        with_values(with_values(run, HEADS), values)


def test_moments_hang_on_what_they_are_made_of_and_on_no_width(
    run: RunConfig, tmp_path: Path
) -> None:
    train = shards_at(tmp_path)
    whole = with_values(run, HEADS | {"closed_form": {}})
    names = {calibrations.moments_path(whole, train).name}
    for same in ({"encoder.d_z": 128}, {"closed_form.metric": "plain"}, {"encoder.code_blocks": 2}):
        names.add(calibrations.moments_path(with_values(whole, same), train).name)
    assert len(names) == 1
    for other in (
        {"adapter.cache_share": 0.2},
        {"encoder.depths": [0.0]},
        {"encoder.lead": ""},
        {"closed_form.texts": 7},
        {"adapter.ranking_texts": 7},
        {"prefix": {"tokens": 3}},
    ):
        names.add(calibrations.moments_path(with_values(whole, other), train).name)
    assert len(names) == 7


def test_moments_of_one_that_joins_hang_on_the_heads_of_the_wires_senders(
    run: RunConfig, tmp_path: Path
) -> None:
    """Which heads give keys and values is the earlier wire's choice; states are the same for all."""
    train = shards_at(tmp_path)
    senders = {"encoder.senders": ["receiver:llama"]}
    with_heads = with_values(run, SENDER_HEADS | senders)
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for wire in ("one", "other"):
        files = {"interlingua.safetensors": wire, "adapters/llama.safetensors": "same"}
        (tmp_path / wire).mkdir()
        (tmp_path / wire / "manifest.json").write_text(json.dumps({"files": files}))
        for given in names:
            values = {"encoder.sender_heads": given, "training.init_from": str(tmp_path / wire)}
            path = calibrations.moments_path(with_values(with_heads, values), train)
            names[given].add(path.name)
    assert len(names[True]) == 2 and len(names[False]) == 1


def shards_at(folder: Path) -> Path:
    """Return a directory of shards that name calibrations."""
    train = folder / "train"
    train.mkdir()
    (train / "manifest.json").write_text('{"key": "some", "rows": 4, "files": []}')
    return train


def with_adapter(values: dict[str, Any], share: float) -> dict[str, Any]:
    adapter = values["adapter"] | {"cache_share": share}
    return {path: value for path, value in values.items() if path != "adapter.cache_share"} | {
        "adapter": adapter
    }


def begin_ranked(wire: LatentWire) -> None:
    """Choose the heads that recitals of a few texts rank best."""
    for name in wire.receivers:
        table = rows_of(wire, 8)
        scores = ranking.rank(
            wire.local_receiver(name),
            wire.builders[name],
            table[f"{name}_context_ids"].to_pylist(),
            lambda recitals, name=name: wire.reading(name, recitals, None),  # type: ignore[misc]
        )
        adapter: Any = wire.interlingua.adapters[name]
        adapter.choose(ranking.choose(scores, len(adapter.head_J2)), scores.score_LH)


def mean_nll(wire: LatentWire, table: pa.Table, mode: Any) -> float:
    read = [one.nll for one in predict(wire, table, Condition(mode))]
    return sum(read) / len(read)
