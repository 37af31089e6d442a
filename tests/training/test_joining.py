"""A further receiver joins a trained wire: it learns to read, and what was there stays to the last bit."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from experiments.third_receiver import from_scratch, spent
from latentwire.cli.flags import read_config
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.summary import summarise
from latentwire.exports import CheckpointError
from latentwire.features.registry import FEATURES
from latentwire.model import LatentWire
from latentwire.models.interlingua import owner
from latentwire.training import checkpoints
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from tests.conftest import flags_of, shard_table
from tests.training.test_loop import EVERYTHING

PHI = {"name": "phi", "model": "toy-phi"}
LEARNING = {
    "training.epochs": 120,
    "training.encoder_lr": 5e-3,
    "training.adapter_lr": 5e-3,
    "training.batch_size": 8,
    "training.evaluate_every": 1000,
    "training.log_every": 1000,
}


@pytest.fixture(scope="module")
def table(run: RunConfig) -> pa.Table:
    """Sixteen toy rows with columns for the old receiver and the new one."""
    return shard_table(with_values(run, {"receivers": [run.receivers[0].model_dump(), PHI]}), 16)


def saved(run: RunConfig, folder: Path, table: pa.Table | None = None) -> Path:
    """A wire for llama alone, trained on the rows, as an export."""
    run = with_values(run, {"receivers": [run.receivers[0].model_dump()]})
    wire = LatentWire(run)
    if table is not None:
        Trainer(wire, 1).train(table_epochs(run.training, table), lambda: None)
    pins = {"receivers": wire.fingerprints()}
    return checkpoints.save(folder / "base", wire, {}, pins)


def begun(base: Path, *flags: str) -> RunConfig:
    """The run of ``--from`` with flags."""
    given, start = flags_of("--from", str(base), *flags)
    return read_config(given, start=start).run


def joined(base: Path, *flags: str) -> RunConfig:
    """The same with ``--add_receiver``."""
    return begun(base, "--add_receiver", "phi=toy-phi", *flags)


def training(run: RunConfig, rows: int) -> Trainer:
    trainer = Trainer(LatentWire(run), max(1, rows // run.training.batch_size))
    checkpoints.initialise(Path(str(run.training.init_from)), trainer.wire)
    return trainer


def test_the_new_receiver_learns_and_the_old_parts_stay_bit_equal(
    run: RunConfig, table: pa.Table, tmp_path: Path
) -> None:
    run = with_values(run, LEARNING)
    eight = table.slice(0, 8)
    base = saved(run, tmp_path, eight)
    trainer = training(joined(base, "--epochs=240"), 8)
    before = summarise(list(predict(trainer.wire, eight, "latent")))
    assert before["llama"]["em"] == 1 and before["phi"]["em"] < 0.5
    trainer.train(table_epochs(trainer.config, eight), lambda: None)
    after = summarise(list(predict(trainer.wire, eight, "latent")))
    assert after["phi"]["em"] == 1 and after["llama"]["nll"] == pytest.approx(
        before["llama"]["nll"], abs=1e-6
    )
    export = checkpoints.save(tmp_path / "joined", trainer.wire, {}, {})
    for name in ("interlingua.safetensors", "adapters/llama.safetensors"):
        assert (export / name).read_bytes() == (base / name).read_bytes()
    assert "only phi trained" in (export / "README.md").read_text()
    # What the first wire packed, the joined one reads, with either receiver.
    packet = LatentWire.from_pretrained(base).encode(eight["context"].to_pylist()).to_bytes(8)
    both = LatentWire.from_pretrained(export)
    answers = both.answer(packet, eight["question"].to_pylist(), "phi")
    assert sum(a in g for a, g in zip(answers, eight["answers"].to_pylist(), strict=True)) >= 7


VARIANTS: dict[str, dict] = {
    "everything": EVERYTHING,
    "sequential": EVERYTHING | {"training.sequential_models": True, "training.accumulation": 2},
    "checkpointing": EVERYTHING | {"training.gradient_checkpointing": True},
    "aligned": {"training.alignment_steps": 2, "encoder.pooling": "spans"},
    "lora": {"encoder.kind": "lm", "encoder.model": "toy-llama", "encoder.tune": "lora"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_new_receivers_part_changes(
    run: RunConfig, table: pa.Table, tmp_path: Path, variant: str
) -> None:
    base = saved(with_values(run, VARIANTS[variant]), tmp_path)
    trainer = training(joined(base, "--set", "training.warmup_steps=0"), 16)
    before = {name: t.clone() for name, t in trainer.wire.interlingua.state_dict().items()}
    trainer.train(table_epochs(trainer.config, table), lambda: None)
    changed = {
        name
        for name, t in trainer.wire.interlingua.state_dict().items()
        if not torch.equal(t, before[name])
    }
    assert changed and all("phi" in name.split(".") for name in changed)
    own = {name for name, p in trainer.wire.interlingua.named_parameters() if p.requires_grad}
    assert all("phi" in name.split(".") for name in own)
    for name in FEATURES if variant == "everything" else ():
        parts = trainer.wire.interlingua.features[name].named_parameters()
        if any(
            "phi" in key.split(".") for key, _ in parts
        ):  # what refines the message is no receiver's
            assert any(key.startswith(f"features.{name}.") for key in changed), name
    export = checkpoints.save(tmp_path / "joined", trainer.wire, {}, {})
    for file in base.rglob("*.safetensors"):
        both, old = load_file(export / file.relative_to(base)), load_file(file)
        assert all(torch.equal(both[key], old[key]) for key in old), file
    assert (
        LatentWire.from_pretrained(export).encoder_id == LatentWire.from_pretrained(base).encoder_id
    )


def test_encoder_and_one_receiver_can_be_trained_while_another_stays(
    run: RunConfig, table: pa.Table, tmp_path: Path
) -> None:
    base = saved(run, tmp_path)
    trainer = training(joined(base, "--set", "training.train_only=[phi, encoder]"), 16)
    before = {name: t.clone() for name, t in trainer.wire.interlingua.state_dict().items()}
    trainer.train(table_epochs(trainer.config, table), lambda: None)
    same = {
        name
        for name, t in trainer.wire.interlingua.state_dict().items()
        if torch.equal(t, before[name])
    }
    assert {name for name in before if name.startswith("adapters.llama")} <= same
    assert "encoder.project.weight" not in same and "adapters.phi.down.weight" not in same


def test_what_cannot_join_is_refused(run: RunConfig, tmp_path: Path) -> None:
    base = saved(run, tmp_path)
    for flags, rule in [
        (
            ("--set", "training.train_only=[gpt]"),
            r"train_only must name receivers \(llama, phi\) or encoder, got gpt",
        ),
        (
            ("--set", "training.init_from=null"),
            "keeps the other parts as they are, got init_from null",
        ),
        (
            ("--set", "training.log_gradient_norms=true"),
            "log_gradient_norms needs an encoder that learns, got train_only phi",
        ),
        (
            ("--config", "toy"),
            r"--from keeps the configuration of its wire, got --config toy .*training\.init_from=",
        ),
        (("--add_receiver", "toy-phi"), "--add_receiver takes NAME=MODEL, got toy-phi"),
        (("--add_receiver", "llama=toy-phi"), "receiver names must differ"),
    ]:
        with pytest.raises(ConfigError, match=rule):
            joined(base, *flags)
    with pytest.raises(CheckpointError, match=r"must hold manifest\.json, .* does not"):
        joined(tmp_path)
    with pytest.raises(CheckpointError, match=r"must hold manifest\.json, .* is not there"):
        joined(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"joins a receiver to a trained wire, got no --from"):
        flags, start = flags_of("--add_receiver", "phi=toy-phi")
        read_config(flags, start=start)
    private = saved(with_values(run, {"encoder.private_len": 2}), tmp_path / "private")
    with pytest.raises(ConfigError, match=r"without private latents, got encoder\.private_len 2"):
        joined(private)
    missing = joined(base, "--set", "features.refiner={}")
    with pytest.raises(
        CheckpointError, match=r"keeps as it is, .* has no features/refiner\.safetensors"
    ):
        training(missing, 16)


def test_a_further_stage_keeps_the_configuration_and_begins_with_the_weights(
    run: RunConfig, tmp_path: Path
) -> None:
    base = saved(with_values(run, {"training.alignment_steps": 7}), tmp_path)
    stage = begun(base, "--set", "losses.bundle=autoencode", "--epochs=3")
    assert stage.losses.reconstruction_ce_weight == 1 and stage.training.epochs == 3
    assert (
        stage.encoder == run.encoder
        and stage.training.alignment_steps == 0
        and not stage.training.train_only
    )
    assert begun(base, "--set", "training.alignment_steps=2").training.alignment_steps == 2
    trainer, before = training(stage, 16), load_file(base / "adapters" / "llama.safetensors")
    assert all(
        torch.equal(before[name], t)
        for name, t in trainer.wire.interlingua.adapters["llama"].state_dict().items()
    )


def test_joined_and_from_scratch_spend_the_same_shares_of_their_steps(run: RunConfig) -> None:
    parts = {
        "training.alignment_steps": 40,
        "training.coarsening_steps": 20,
        "training.warmup_steps": 10,
    }
    borrowed = {"encoder.kind": "lm", "encoder.model": "receiver:llama"}
    base = with_values(run, parts | borrowed | {"training.max_steps": 100})
    joining = {"receivers": [*(r.model_dump() for r in base.receivers), PHI]}
    joined = with_values(
        base, joining | {"training.init_from": "best", "training.train_only": ["phi"]}
    )
    scratch = from_scratch(joined, "phi", ["training.warmup_steps=50"])
    assert [receiver.name for receiver in scratch.receivers] == [
        "phi"
    ] and scratch.encoder.model == "toy-llama"
    assert scratch.training.init_from is None and not scratch.training.train_only

    def told(config: RunConfig) -> tuple[int | None, int, int, int]:
        training = spent(config, base, 50).training
        return (
            training.max_steps,
            training.alignment_steps,
            training.coarsening_steps,
            training.warmup_steps,
        )

    assert told(joined) == (50, 20, 10, 5) and told(scratch) == (50, 20, 10, 25)


def test_a_parameter_knows_its_receiver_by_the_name_it_lies_under() -> None:
    feature = torch.nn.Module()
    feature.maps = torch.nn.ModuleDict({"phi": torch.nn.Linear(2, 2)})
    feature.gates = torch.nn.ParameterDict({"phi": torch.zeros(2)})
    feature.shared = torch.nn.Linear(2, 2)
    found = {name: owner(feature, name) for name, _ in feature.named_parameters()}
    assert found == {
        "maps.phi.weight": "phi", "maps.phi.bias": "phi", "gates.phi": "phi", "shared.weight": None, "shared.bias": None,
    }  # fmt: skip
