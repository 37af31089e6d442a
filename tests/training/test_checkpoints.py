"""Checkpoints hold what was trained and nothing else, load into the same wire, or say why not."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save

from latentwire import exports, loading, storage
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.summary import summarise
from latentwire.exports import CheckpointError
from latentwire.features.registry import FEATURES
from latentwire.model import LatentWire, load_wire
from latentwire.training import checkpoints
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from tests.conftest import untimed, wire_of
from tests.models.test_memory import HANDED

TEXTS = ["Ada lives in Oslo.", "Ben eats rice. Cleo owns a goat."]


@pytest.fixture
def saved(wire: LatentWire, tmp_path: Path) -> Path:
    pins = {"receivers": wire.fingerprints()}
    return checkpoints.save(tmp_path / "checkpoint", wire, {"dev_f1": 0.5}, pins, Trainer(wire, 4))


def test_exact_set_of_files_and_keys(saved: Path, wire: LatentWire) -> None:
    assert {str(f.relative_to(saved)) for f in saved.rglob("*") if f.is_file()} == {
        "config.json", "manifest.json", "interlingua.safetensors", "adapters/llama.safetensors",
        "adapters/qwen.safetensors", "training_state.safetensors", "training_state.json", "trained_on.safetensors",
        "README.md",
    }  # fmt: skip
    adapter = {
        "norm.weight",
        "norm.bias",
        "skip.weight",
        "up.weight",
        "up.bias",
        "down.weight",
        "down.bias",
        "gain",
    }
    for name in ("llama", "qwen"):
        assert set(load_file(saved / f"adapters/{name}.safetensors")) == adapter | {"control_CD"}
    block = [
        "norm.weight",
        "norm.bias",
        "query_key_value.weight",
        "query_key_value.bias",
        "out.weight",
        "out.bias",
    ]
    mlp = ["mlp.0.weight", "mlp.0.bias", "mlp.1.weight", "mlp.1.bias", "mlp.3.weight", "mlp.3.bias"]
    attention = [
        "norm.weight",
        "norm.bias",
        "key_value.weight",
        "key_value.bias",
        "out.weight",
        "out.bias",
    ]
    pool = ["query", "sharpness", *attention]
    joined = ["join.0.weight", "join.0.bias", "join.2.weight", "join.2.bias"]
    assert set(load_file(saved / "interlingua.safetensors")) == {
        "norm.weight", "norm.bias", "project.weight", "project.bias", "states.embed.weight",
        *(f"states.{key}" for key in joined), *(f"states.blocks.0.{key}" for key in block + mlp),
        *(f"pool.{key}" for key in pool + mlp),
    }  # fmt: skip
    trained = sum(p.numel() for p in wire.interlingua.parameters())
    assert sum(json.loads((saved / "manifest.json").read_text())["parameters"].values()) == trained


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_that_the_umask_allows(
    wire: LatentWire, tmp_path: Path, umask: int
) -> None:
    """A group that shares a directory can read its weights."""
    before = os.umask(umask)
    try:
        path = checkpoints.save(tmp_path / "checkpoint", wire, {}, {}, Trainer(wire, 4))
        storage.write_text(path / "note.txt", "x")
    finally:
        os.umask(before)
    modes = {
        str(file.relative_to(path)): file.stat().st_mode & 0o777
        for file in path.rglob("*")
        if file.is_file()
    }
    assert set(modes.values()) == {0o666 & ~umask}, modes
    assert "interlingua.safetensors" in modes and path.stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_export_has_no_training_state(wire: LatentWire, tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path / "best", wire, {}, {})
    assert not list(path.glob("training_state*"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_that_numbers_its_parameters_goes_on_too(
    run: RunConfig, table: pa.Table, tmp_path: Path, optimizer: str
) -> None:
    """Earlier versions told parameters by their place in groups where every table of vectors decayed."""
    run = with_values(
        run, {"training.optimizer": optimizer, "training.epochs": 2, "features.coprocessor": {}}
    )
    trainer = Trainer(wire_of(run), 4)
    batches = list(table_epochs(run.training, table)(0))
    for rows in batches[:2]:
        trainer.step(rows)
    path = checkpoints.save(tmp_path / "two", trainer.wire, {}, {}, trainer)
    shapes = {name: p.shape for name, p in trainer.wire.interlingua.named_parameters()}
    order: list[str] = []
    for part in ("encoder", "adapters", "features"):
        own = [name for name in shapes if name.startswith(part)]
        former = [name for name in own if len(shapes[name]) >= 2 and "embed" not in name]
        order += [*former, *(name for name in own if name not in former)]
    if optimizer == "muon":
        first = [
            n for n in order if len(shapes[n]) == 2 and n.endswith(".weight") and "embed" not in n
        ]
        order = [*first, *(name for name in order if name not in first)]
    tensors = {}
    for key, tensor in load_file(path / "training_state.safetensors").items():
        name, _, slot = key.removeprefix("optimizer.").rpartition(".")
        tensors[f"optimizer.{order.index(name)}.{slot}"] = tensor
    assert len(tensors) > 100
    document = {
        "progress": asdict(trainer.progress),
        "optimizer_groups": [{"lr": 0.0}],
        "scheduler": {"last_epoch": 2},
    }
    resealed(path, "training_state.safetensors", save(tensors))
    resealed(path, "training_state.json", json.dumps(document).encode())
    resumed = Trainer(wire_of(run), 4)
    checkpoints.load_training(path, resumed)
    for one in (trainer, resumed):
        one.step(batches[2])
    for (name, expected), found in zip(
        trainer.wire.interlingua.state_dict().items(),
        resumed.wire.interlingua.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(expected, found), name
    resealed(
        path,
        "training_state.safetensors",
        save({"optimizer.encoder.nobody.exp_avg": torch.zeros(1)}),
    )
    with pytest.raises(
        CheckpointError,
        match=r"must hold the optimiser state of this wire, got one of encoder\.nobody",
    ):
        checkpoints.load_training(path, resumed)


VARIANTS: dict[str, dict] = {
    "-".join(names) or "none": {f"features.{name}": {} for name in names}
    for count in range(len(FEATURES) + 1)
    for names in itertools.combinations(FEATURES, count)
} | {
    "lm": {"encoder.kind": "lm", "encoder.model": "receiver:llama", "encoder.model_layers": 2},
    "lm-lora": {"encoder.kind": "lm", "encoder.model": "toy-qwen", "encoder.tune": "lora"},
    "ratio": {
        "encoder.pooling": "spans",
        "encoder.tokens_per_latent": 3,
        "adapter.calibration": "embed_rms",
    },
    "private": {"encoder.private_len": 2, "adapter.slot_positions": True},
    "memory": {
        "encoder.kind": "lm",
        "encoder.model": "toy-qwen",
        "encoder.tune": "lora",
        "encoder.attention": "causal",
        "encoder.pooling": "memory",
        "adapter.kind": "linear",
    },
    "keys-values": HANDED,
}
RELOAD = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq, torch
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.summary import summarise
from latentwire.model import load_wire
torch.set_num_threads(1)
root = Path(sys.argv[1])
for path in sorted(root.glob("*/checkpoint")):
    wire, _ = load_wire(path)
    torch.save(wire.encode(json.loads((root / "texts.json").read_text())).z_BLZ, path.parent / "z.pt")
    scores = summarise(list(predict(wire, pq.read_table(root / "rows.parquet"), "latent")))
    (path.parent / "scores.json").write_text(json.dumps(scores))
"""


def test_every_combination_of_features_reloads_bit_equal_in_a_new_process(
    run: RunConfig, table: pa.Table, tmp_path: Path
) -> None:
    rows = table.slice(0, 4)
    pq.write_table(rows, tmp_path / "rows.parquet")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    expected = {}
    for name, values in VARIANTS.items():
        wire = wire_of(with_values(run, values))
        generator = torch.Generator().manual_seed(5)
        for parameter in wire.interlingua.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        checkpoints.save(tmp_path / name / "checkpoint", wire, {}, {})
        expected[name] = wire.encode(TEXTS).z_BLZ, summarise(list(predict(wire, rows, "latent")))
    assert len(expected) == 2 ** len(FEATURES) + 6
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True)
    for name, (z_BLZ, scores) in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "z.pt", weights_only=True), z_BLZ), name
        assert untimed(json.loads((tmp_path / name / "scores.json").read_text())) == untimed(
            scores
        ), name


def test_a_backbone_that_is_not_trained_is_pinned_and_not_saved(
    run: RunConfig, tmp_path: Path
) -> None:
    values = {"encoder.kind": "lm", "encoder.model": "toy-qwen", "encoder.tune": "lora"}
    wire = wire_of(with_values(run, values))
    path = checkpoints.save(tmp_path / "best", wire, {}, {})
    keys = set(load_file(path / "interlingua.safetensors"))
    assert not [key for key in keys if "backbone" in key] and any("updates" in key for key in keys)
    wire.interlingua.encoder.states.backbone.norm.weight.data += 1
    with pytest.raises(CheckpointError, match="reads by models that hash to"):
        loading.load_weights(path, wire, exports.read_manifest(path))


def test_a_wire_starts_from_what_an_earlier_one_has_in_common(
    saved: Path, wire: LatentWire, run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    later = with_values(
        run,
        {"training.seed": 7, "features.refiner": {}, "receivers": [run.receivers[1].model_dump()]},
    )
    fresh = wire_of(later)
    checkpoints.initialise(saved, fresh)
    assert torch.equal(fresh.encode(TEXTS).z_BLZ, wire.encode(TEXTS).z_BLZ)
    assert torch.equal(
        fresh.interlingua.adapters["qwen"].skip.weight,
        wire.interlingua.adapters["qwen"].skip.weight,
    )
    assert "fresh: features/refiner.safetensors" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="must fit the configuration"):
        checkpoints.initialise(saved, wire_of(with_values(run, {"encoder.d_z": 8})))
    with pytest.raises(CheckpointError, match=r"must hold manifest\.json"):
        checkpoints.initialise(saved / "adapters", fresh)


def test_an_encoder_that_read_by_other_senders_starts_no_wire(
    run: RunConfig, tmp_path: Path
) -> None:
    values = {"encoder.kind": "senders", "encoder.depths": [0.5], "encoder.pooling": "spans"}
    senders = ["receiver:llama", "receiver:qwen"]
    first = wire_of(with_values(run, values | {"encoder.senders": senders}))
    exports.save(tmp_path / "first", first, {}, {})
    again = wire_of(with_values(run, values | {"encoder.senders": senders}))
    assert checkpoints.initialise(tmp_path / "first", again) == []
    # Of the same shapes, but each state stands where the other's stood.
    swapped = wire_of(with_values(run, values | {"encoder.senders": senders[::-1]}))
    with pytest.raises(CheckpointError, match="receiver:qwen, receiver:llama"):
        checkpoints.initialise(tmp_path / "first", swapped)


def test_the_first_of_several_workers_says_how_a_run_begins(
    saved: Path, run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(wire_of(with_values(run, {"training.init_from": str(saved)})), 5)
    checkpoints.restore(trainer, None)
    assert capsys.readouterr().out.startswith(f"started from {saved}: ")
    trainer.workers.rank = 1
    checkpoints.restore(trainer, None)
    assert capsys.readouterr().out == ""


def test_a_changed_file_is_refused(saved: Path) -> None:
    file = saved / "adapters" / "qwen.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"qwen\.safetensors must hash to .* it was changed or cut off"
    ):
        load_wire(saved)


def test_a_missing_file_is_refused(saved: Path) -> None:
    (saved / "interlingua.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"must hold interlingua\.safetensors"):
        load_wire(saved)


def test_a_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must hold manifest\.json"):
        load_wire(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format_version": 99}, "format_version must be 1, got 99"),
        (lambda m: {"files": {}}, "must be the JSON that latentwire writes"),
        (lambda m: m | {"files": {"../../secret": "0"}}, "files must lie inside the checkpoint"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(saved: Path, change: object, message: str) -> None:
    file = saved / "manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError, match=message):
        exports.read_manifest(saved)


def test_another_receiver_is_refused(saved: Path, run: RunConfig) -> None:
    swapped = with_values(run, {"receivers.0.dtype": "bfloat16"})
    with pytest.raises(CheckpointError, match="receiver llama must hash to"):
        loading.load_weights(saved, wire_of(swapped), exports.read_manifest(saved))


def resealed(folder: Path, name: str, content: bytes) -> None:
    """Change a file, and the manifest's hash of it."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_file_that_is_not_what_it_should_be_is_refused(
    saved: Path, wire: LatentWire, run: RunConfig
) -> None:
    with pytest.raises(
        CheckpointError, match=r"must hold features/refiner\.safetensors for this configuration"
    ):
        refined = wire_of(with_values(run, {"features.refiner": {}}))
        loading.load_weights(saved, refined, exports.read_manifest(saved))
    resealed(saved, "adapters/qwen.safetensors", save({"other": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"it differs in control_CD, "):
        loading.load_weights(saved, wire, exports.read_manifest(saved))
    resealed(saved, "adapters/qwen.safetensors", b"nothing")
    with pytest.raises(CheckpointError, match=r"qwen\.safetensors must be readable safetensors"):
        loading.load_weights(saved, wire, exports.read_manifest(saved))
    resealed(saved, "config.json", b"{")
    with pytest.raises(CheckpointError, match=r"config\.json must be readable JSON"):
        exports.read_run(saved)


def test_nothing_in_common_is_nothing_to_start_from(saved: Path, run: RunConfig) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    with pytest.raises(CheckpointError, match="init_from must hold a part of this wire"):
        checkpoints.initialise(saved, wire_of(run))


def test_another_shape_is_refused(saved: Path, run: RunConfig) -> None:
    with pytest.raises(CheckpointError, match="must fit the configuration"):
        loading.load_weights(
            saved, wire_of(with_values(run, {"encoder.d_z": 8})), exports.read_manifest(saved)
        )


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    saved: Path, wire: LatentWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="must not overwrite"):
        checkpoints.save(saved, wire, {}, {})

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(exports, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.save(saved.parent / "other", wire, {}, {})
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_no_receiver_weight_is_written(saved: Path, wire: LatentWire) -> None:
    shapes = {
        tuple(t.shape)
        for lm in wire.receivers.values()
        for t in lm.lm.state_dict().values()
        if t.ndim == 2
    }
    for file in saved.rglob("*.safetensors"):
        assert not [
            name for name, tensor in load_file(file).items() if tuple(tensor.shape) in shapes
        ], file


def test_the_table_fixture_matches_what_training_reads(table: pa.Table, run: RunConfig) -> None:
    assert {
        f"{r.name}_{piece}_ids"
        for r in run.receivers
        for piece in ("context", "question", "answer")
    } <= set(table.column_names)


def test_a_wire_is_saved_where_a_package_is_not_installed() -> None:
    assert set(exports.installed(("torch", "no-such-package"))) == {"torch"}


def test_a_receiver_that_changed_is_told(wire: LatentWire) -> None:
    before = wire.fingerprints()
    checkpoints.check_frozen(wire, before)
    with pytest.raises(RuntimeError, match="frozen receivers must not change, qwen did"):
        checkpoints.check_frozen(wire, before | {"qwen": "0" * 64})
