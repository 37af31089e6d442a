"""What a wire into retrieval heads begins from is made once, in parts or in one, and found again."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from latentwire.closed_form import begin
from latentwire.closed_form.moments import Moments
from latentwire.config import RunConfig, SweepConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import calibrations, shards
from latentwire.distributed import calibrations as distributed
from latentwire.distributed.calibrations import first_texts, gather_part
from latentwire.distributed.local_shards import local_shards
from latentwire.evaluation.evaluator import predict
from latentwire.model import LatentWire
from latentwire.planning.calibrations import task_bytes
from latentwire.planning.variants import calibration_runs
from latentwire.training import checkpoints
from latentwire.training.loop import Trainer
from tests.conftest import HEADS, choose_some_heads, shard_table, wire_of

SMALL_HEADS: dict[str, Any] = HEADS | {
    "adapter": HEADS["adapter"] | {"ranking_texts": 6},
    "closed_form": {"texts": 24, "gradient_texts": 6},
    "prefix": {"tokens": 3, "begin": "reader"},
    "evaluation.tuned_text": {"tokens": 3, "steps": 4, "batch_size": 4, "trials": 1},
    "training.questions_together": True,
    "data.toy_questions": 2,
    "data.samples": 80,
    "data.dev_samples": 4,
    "data.validation_samples": 8,
}


@pytest.mark.slow
def test_it_is_made_once_and_the_same_in_parts(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_values(run, SMALL_HEADS | {"data.shard_dir": str(tmp_path)})
    paths = local_shards(run)
    train = paths["train"]
    printed = capsys.readouterr().out
    assert printed.count("its text reader is trained first") == 2
    assert printed.count("ranked in") == 2 and "closed form: " in printed
    assert calibrations.complete(run, train)
    files = {
        path: path.stat().st_mtime_ns
        for path in map(Path, map(str, calibrations.paths(run, train)))
    }
    assert len(files) == 3
    local_shards(run)  # everything is there
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert capsys.readouterr().out == ""

    # A wire that is only read needs none of it, whatever its readers are.
    other = with_values(run, {"adapter.ranking_texts": 5})
    assert not calibrations.complete(other, train)
    local_shards(other, begins=False)
    assert capsys.readouterr().out == ""

    # The cluster's two tasks, one task, three tasks: the same sums, to rounding.
    made = Moments.load(calibrations.moments_path(run, train))
    parts = gather_part(run, train, 0, 3)
    for part in (1, 2):
        parts.merge(gather_part(run, train, part, 3))
    for other in (parts, gather_part(run, train, 0, 1)):
        assert other.count == made.count
        for name, total in made.tensors().items():
            scale = float(total.abs().max())
            torch.testing.assert_close(other.tensors()[name], total, atol=1e-5 * scale, rtol=1e-5)

    # A run begins with it; one that resumes does not begin again.
    trainer = Trainer(wire_of(run), 4, train=train)
    before = trainer.wire.interlingua.prefixes["llama"]().clone()
    checkpoints.restore(trainer, None)
    adapter: Any = trainer.wire.interlingua.adapters["llama"]
    assert adapter.heads == tuple(sorted(adapter.heads)) and float(adapter.score_LH.max()) > 0
    assert not torch.equal(trainer.wire.interlingua.prefixes["llama"](), before)
    solved = begin.solved(run, train)
    assert torch.equal(adapter.linear.weight, solved.decoders["llama"].decoder_KE.T)
    dev = shards.read_table(paths["dev"])
    assert all(one.nll < 20 for one in predict(trainer.wire, dev, "latent"))


@pytest.mark.slow
def test_texts_come_whole_and_each_to_one_part(run: RunConfig, tmp_path: Path) -> None:
    sizes = {"data.samples": 40, "data.toy_questions": 2, "data.shard_dir": str(tmp_path)}
    train = local_shards(with_values(run, sizes), ("train",))["train"]
    table = shards.read_table(train, ["context", "question"])
    everything = first_texts(table, 0, 10).to_pylist()
    texts = [row["context"] for row in everything]
    assert len(set(texts)) == 10 and len(everything) > 10
    parts = [first_texts(table, 0, 10, n, 3).to_pylist() for n in range(3)]
    assert sorted(str(row) for part in parts for row in part) == sorted(map(str, everything))
    sets = [{row["context"] for row in part} for part in parts]
    assert not sets[0] & sets[1] and not sets[1] & sets[2]
    further = {row["context"] for row in first_texts(table, 10, 5).to_pylist()}
    assert not further & set(texts)


def test_a_receiver_that_joins_is_told_what_the_senders_of_the_wire_give(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their heads are the wire's, not those that a ranking would choose for the receiver that joins."""
    values = HEADS | {"encoder.sender_heads": True, "closed_form": {"texts": 6}}
    wire = choose_some_heads(wire_of(with_values(run, values)))
    wire.save_pretrained(tmp_path / "wire")
    third = {"name": "third", "model": "toy-llama"}
    receivers = [*(one.model_dump() for one in run.receivers), third]
    joining = with_values(
        wire.run, {"receivers": receivers, "training.init_from": str(tmp_path / "wire")}
    )
    assert calibrations.fresh(joining, "adapters") == ["third"]
    table = shard_table(joining, 8)
    encoder: Any = wire.interlingua.encoder
    ids = encoder.token_ids(table["context"].to_pylist())
    table = table.append_column("encoder_ids", pa.array(ids))
    monkeypatch.setattr(shards, "read_table", lambda *_: table)

    def choose_last(wire: LatentWire, receiver: str, _: object, *, senders: bool) -> None:
        adapter: Any = wire.interlingua.adapters[receiver]
        heads = torch.tensor([(3, 1), (3, 0), (2, 1)])
        adapter.choose(heads.tolist(), torch.zeros(4, 2))
        assert not senders

    monkeypatch.setattr(begin, "choose_heads", choose_last)
    moments = gather_part(joining, tmp_path, 0, 1)
    texts = list(dict.fromkeys(table["context"].to_pylist()))[:6]
    tokens = encoder.tokenize(texts)
    x_BTM = encoder.states(**tokens.tensors, length_B=tokens.length_B)
    assert moments.count == int(tokens.length_B.sum())
    torch.testing.assert_close(moments.x_M, x_BTM.double().sum((0, 1)), atol=1e-3, rtol=1e-4)


def test_a_pass_is_shared_out_over_as_many_tasks_as_there_is_room_for(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_values(run, SMALL_HEADS)
    asked: list[int] = []
    monkeypatch.setattr(distributed, "started", lambda *task: asked.append(task[-1]))
    monkeypatch.setattr(distributed, "result_of", lambda _: Moments.empty(1, {}))
    each = task_bytes(run, on_gpu=False)
    for cluster, gpus, parts in (
        ({"CPU": 4.0, "memory": 2.5 * each}, 0.0, 2),
        ({"CPU": 3.0, "memory": 100.0 * each}, 0.0, 3),
        ({"CPU": 4.0, "memory": 0.5 * each}, 0.0, 1),
        ({"CPU": 64.0}, 0.0, 6),  # texts whose gradients are taken
        ({"CPU": 1.0, "GPU": 2.0, "memory": each}, 1.0, 2),
    ):
        asked.clear()
        monkeypatch.setattr(ray, "cluster_resources", lambda cluster=cluster: cluster)
        distributed.gather_on_cluster(run, Path("train"), gpus)
        assert asked == [parts] * parts


def test_a_sweep_makes_every_calibration_that_its_trials_need(run: RunConfig) -> None:
    base = with_values(run, HEADS | {"closed_form": {}})
    search: dict[str, Any] = {
        "encoder.tokens_per_latent": {"type": "categorical", "choices": [2, 4]},
        "encoder.d_z": {"type": "categorical", "choices": [64, 128]},
        "training.encoder_lr": {"type": "float", "low": 1e-4, "high": 1e-3},
    }
    space = SweepConfig.model_validate({"run": base.model_dump(), "search": search})
    runs = calibration_runs(space, space.run)
    assert [one.encoder.tokens_per_latent for one in runs] == [2, 4]
    assert calibration_runs(space, run) == []
    reader = with_values(
        run, {"prefix": {"begin": "reader", "tokens": 3}, "evaluation.tuned_text": {"tokens": 3}}
    )
    assert len(calibration_runs(space, reader)) == 2  # a prefix is calibrated for other wires, too
    search["closed_form.texts"] = {
        "type": "categorical",
        "choices": [10, 20],
        "when": {"encoder.tokens_per_latent": [2]},
    }
    space = SweepConfig.model_validate({"run": base.model_dump(), "search": search})
    texts = {one.closed_form.texts for one in calibration_runs(space, space.run) if one.closed_form}
    assert texts == {10, 20, 480}  # the last where the dimension is not drawn
    del search["closed_form.texts"]
    search["adapter.cache_share"] = {"type": "float", "low": 0.1, "high": 0.5}
    space = SweepConfig.model_validate({"run": base.model_dump(), "search": search})
    with pytest.raises(ConfigError, match=r"search\.adapter\.cache_share must be categorical"):
        calibration_runs(space, space.run)
