"""The public API: a wire that is loaded, saved and sent to the Hub."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

import latentwire
from latentwire.card import write as card_of
from latentwire.cli import main
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.dataset.toy import toy_rows
from latentwire.exports import CheckpointError, read_run
from latentwire.model import LatentWire, load_wire
from latentwire.model_addresses import choose_receivers
from latentwire.pretrained.weights import resolve
from latentwire.storage import sha256
from latentwire.training import checkpoints
from tests.conftest import shaken

README = Path(__file__).parent.parent / "README.md"
ROWS = list(toy_rows(5, seed=3))
CONTEXTS = [row["context"] for row in ROWS]
QUESTIONS = [row["question"] for row in ROWS]


@pytest.fixture
def export(wire: LatentWire, tmp_path: Path) -> Path:
    """An export of an untrained wire with scores that somebody could have measured."""
    row = {
        "em": 0.5,
        "em_low": 0.4,
        "em_high": 0.6,
        "f1": 0.625,
        "f1_low": 0.5,
        "f1_high": 0.75,
        "nll": 1.25,
        "bytes": 384,
    }
    scores = {
        "latent": {"llama": row, "qwen": row, "mean": row},
        "latent as int8": {"qwen": row},
        "closed_book": {"llama": row | {"em": 0.0, "em_low": 0.0}},
    }
    metrics = {"development": {"step": 900}, "validation": scores}
    pins = {"receivers": wire.fingerprints()}
    return checkpoints.save(tmp_path / "runs" / "x" / "best", shaken(wire), metrics, pins)


def elsewhere(run: RunConfig, folder: Path, place: str) -> tuple[RunConfig, Path]:
    """The run with its llama in a directory below ``folder``."""
    weights = folder / place / "my-llama"
    shutil.copytree(resolve(run.receivers[0]), weights)
    return with_values(run, {"receivers.0.model": str(weights)}), weights


def test_an_export_finds_its_receivers_from_its_own_place(run: RunConfig, tmp_path: Path) -> None:
    own, weights = elsewhere(run, tmp_path / "one", "models")
    wire = shaken(LatentWire(own))
    pins = {"receivers": wire.fingerprints()}
    export = checkpoints.save(tmp_path / "one" / "runs" / "x" / "best", wire, {}, pins)
    assert read_run(export).receivers[0].model == str(weights)
    for file in (*export.glob("*.json"), export / "README.md"):
        assert str(tmp_path) not in file.read_text(), file
    assert "`my-llama`" in (export / "README.md").read_text()
    (tmp_path / "one").rename(tmp_path / "other")  # the project is moved, or mounted elsewhere
    moved = LatentWire.from_pretrained(tmp_path / "other" / "runs" / "x" / "best")
    assert moved.run.receivers[0].model == str(tmp_path / "other" / "models" / "my-llama")
    assert moved.encoder_id == wire.encoder_id
    moved.save_pretrained(tmp_path / "again")
    assert read_run(tmp_path / "again").receivers[0].model == moved.run.receivers[0].model


def test_receivers_that_are_not_there_are_named_with_the_remedy(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    own, weights = elsewhere(run, tmp_path, "models")
    wire = LatentWire(own)
    export = checkpoints.save(tmp_path / "best", wire, {}, {"receivers": wire.fingerprints()})
    config = json.loads((export / "config.json").read_text())
    assert (
        config["receivers"][0]["model"] == "../models/my-llama"
        and config["receivers"][1]["model"] == "toy-qwen"
    )
    weights.rename(tmp_path / "moved")
    told = r"receiver llama of .*best must be in a directory .*models/my-llama is not there; .*receivers=\{'llama': "
    with pytest.raises(CheckpointError, match=told + r".*or --set receivers\.0\.model="):
        LatentWire.from_pretrained(export)
    with pytest.raises(CheckpointError, match=rf"machine, {weights} is not there; .*--receiver_at"):
        load_wire(export)
    asked = ["ask", str(export), "--question=Where?", "--context=Ada lives in Oslo."]
    assert main(asked) == 2 and re.search(told, capsys.readouterr().err)
    place = f"--receiver_at=llama={tmp_path / 'moved'}"
    for more, both in (([place], True), ([place, "--receiver=llama"], False)):
        assert main([*asked, *more]) == 0
        assert ("qwen" in capsys.readouterr().out) == both
    assert main(["export", str(export), str(tmp_path / "out"), place]) == 0
    assert read_run(tmp_path / "out").receivers[0].model == str(tmp_path / "moved")
    for wrong, rule in (("llama", "takes NAME=PLACE, got llama;"), ("gpt=x", "got gpt; name some")):
        assert main([*asked, f"--receiver_at={wrong}"]) == 2
        assert rule in capsys.readouterr().err
    assert main(["evaluate", "--checkpoint", str(export)]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert LatentWire.from_pretrained(
        export, receivers={"llama": str(tmp_path / "moved"), "qwen": "toy-qwen"}
    ).receivers
    for name in ("qwen", ["qwen"]):
        assert list(LatentWire.from_pretrained(export, receivers=name).receivers) == ["qwen"]
    with pytest.raises(
        CheckpointError, match=r"qwen\.safetensors must fit .*size mismatch .*; name those"
    ) as caught:
        LatentWire.from_pretrained(export, receivers={"qwen": "toy-phi"})
    assert "\n" not in str(caught.value)
    # An export of an earlier version has absolute paths: it loads where they are, and is told alike where they are not.
    for place, there in ((tmp_path / "moved", True), (weights, False)):
        config["receivers"][0]["model"] = str(place)
        manifest = json.loads((export / "manifest.json").read_text())
        (export / "config.json").write_text(json.dumps(config))
        manifest["files"]["config.json"] = sha256(export / "config.json")
        (export / "manifest.json").write_text(json.dumps(manifest))
        if there:
            assert LatentWire.from_pretrained(export).encoder_id == wire.encoder_id
        else:
            with pytest.raises(CheckpointError, match=told):
                LatentWire.from_pretrained(export)


def test_a_backbone_that_is_not_there_is_named(run: RunConfig, tmp_path: Path) -> None:
    own, weights = elsewhere(run, tmp_path, "models")
    own = with_values(
        run, {"encoder.kind": "lm", "encoder.model": own.receivers[0].model, "encoder.tune": "lora"}
    )
    export = checkpoints.save(tmp_path / "best", LatentWire(own), {}, {})
    assert (
        json.loads((export / "config.json").read_text())["encoder"]["model"] == "../models/my-llama"
    )
    assert LatentWire.from_pretrained(export).run.encoder.model == str(weights)
    weights.rename(tmp_path / "moved")
    with pytest.raises(
        CheckpointError,
        match=r"the encoder's backbone of .* must be in a directory .*--set encoder\.model=",
    ):
        LatentWire.from_pretrained(export)


def test_an_export_is_loaded_saved_and_loaded_again(export: Path, tmp_path: Path) -> None:
    wire = LatentWire.from_pretrained(export)
    wire.save_pretrained(tmp_path / "again")
    names = ("config.json", "interlingua.safetensors", "adapters/qwen.safetensors")
    assert all(
        (tmp_path / "again" / name).read_bytes() == (export / name).read_bytes() for name in names
    )
    again = LatentWire.from_pretrained(tmp_path / "again")
    assert (
        again.manifest and wire.manifest and again.manifest["metrics"] == wire.manifest["metrics"]
    )
    with torch.no_grad():
        again.interlingua.adapters["qwen"].gain.add_(1)
    again.save_pretrained(tmp_path / "changed")  # what was measured was another wire
    assert json.loads((tmp_path / "changed" / "manifest.json").read_text())["metrics"] == {}
    with pytest.raises(CheckpointError, match="must not overwrite anything"):
        wire.save_pretrained(export)
    assert (export / "config.json").exists()
    with pytest.raises(
        CheckpointError, match="got runs/none/best, which is not there; name a run's"
    ):
        LatentWire.from_pretrained("runs/none/best")
    with pytest.raises(CheckpointError, match=r"must be a directory or a Hub id, got none/best \("):
        LatentWire.from_pretrained("none/best", local_files_only=True)


def test_a_wire_in_the_users_home_is_found(
    wire: LatentWire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.save_pretrained(tmp_path / "best")
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("~/best", Path("~/best")):
        assert LatentWire.from_pretrained(place).encoder_id == wire.encoder_id


def test_one_receiver_can_be_loaded_alone_and_from_elsewhere(
    run: RunConfig, tmp_path: Path
) -> None:
    featured = shaken(
        LatentWire(with_values(run, {"features.deep_prefix": {}, "features.lora": {}}))
    )
    path = checkpoints.save(tmp_path / "featured", featured, {}, {})
    packet, expected = featured.encode(CONTEXTS).to_bytes(), {}
    for name in featured.receivers:
        expected[name] = featured.answer(packet, QUESTIONS, name)
    alone = LatentWire.from_pretrained(path, receivers=["qwen"])
    assert (
        list(alone.receivers) == ["qwen"]
        and alone.answer(packet, QUESTIONS, "qwen") == expected["qwen"]
    )
    folder = featured.receivers["llama"].lm.config.name_or_path
    moved = LatentWire.from_pretrained(path, receivers={"llama": folder})
    assert (
        moved.run.receivers[0].model == folder
        and moved.answer(packet, QUESTIONS, "llama") == expected["llama"]
    )
    by_path = LatentWire.from_pretrained(path, receivers={"llama": Path(folder)})
    assert by_path.run == moved.run
    joined = with_values(run, {"training.train_only": ["qwen"], "training.init_from": str(path)})
    assert choose_receivers(joined, ["llama"]).training.train_only == ()
    assert choose_receivers(joined, ["qwen"]).training.train_only == ("qwen",)
    with pytest.raises(ConfigError, match="receivers must be among llama, qwen, got gpt"):
        LatentWire.from_pretrained(path, receivers=["gpt"])
    with pytest.raises(
        ConfigError, match=r"private_len 2 makes latents for each of llama, qwen, got only qwen"
    ):
        choose_receivers(with_values(run, {"encoder.private_len": 2}), ["qwen"])


def test_an_encoder_made_from_a_receiver_does_without_it(run: RunConfig, tmp_path: Path) -> None:
    values = {"encoder.kind": "lm", "encoder.model": "receiver:llama", "encoder.model_layers": 1}
    wire = shaken(LatentWire(with_values(run, values)))
    path = checkpoints.save(tmp_path / "both", wire, {}, {"receivers": wire.fingerprints()})
    alone = LatentWire.from_pretrained(path, receivers=["qwen"])
    assert alone.run.encoder.model == "toy-llama" and alone.encoder_id == wire.encoder_id
    namesake = with_values(
        run, {"encoder.kind": "lm", "encoder.model": "llama"}
    )  # a directory, not the receiver
    assert choose_receivers(namesake, ["qwen"]).encoder.model == "llama"
    packet = wire.encode(CONTEXTS).to_bytes()
    assert alone.answer(packet, QUESTIONS, "qwen") == wire.answer(packet, QUESTIONS, "qwen")


def test_a_strangers_export_runs_no_code_unless_told(
    run: RunConfig, tmp_path: Path, wire: LatentWire
) -> None:
    trusting = [receiver.model_dump() | {"trust_remote_code": True} for receiver in run.receivers]
    wire.run = with_values(run, {"receivers": trusting})
    path = checkpoints.save(tmp_path / "best", wire, {}, {})
    with pytest.raises(
        CheckpointError, match=r"lets llama, qwen run code .* say trust_remote_code=True"
    ):
        LatentWire.from_pretrained(path)
    assert LatentWire.from_pretrained(path, trust_remote_code=True).receivers


def test_the_hub_gets_the_whole_directory_and_gives_it_back(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub on this disk: what the mixin uploads is what ``snapshot_download`` brings."""
    store = tmp_path / "hub"

    class Repo:
        repo_id = "me/wire"

    def upload(self: HfApi, *, folder_path: Path, **_: object) -> str:
        folder_path.rename(store)
        return "commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, **_: Repo())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    asked: dict = {}

    def download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(store)

    monkeypatch.setattr("latentwire.model.snapshot_download", download)
    wire = LatentWire.from_pretrained(export)
    own, _ = elsewhere(wire.run, tmp_path, "models")
    assert LatentWire(own).push_to_hub("me/elsewhere") == "commit"
    assert json.loads((store / "config.json").read_text())["receivers"][0]["model"] == "./my-llama"
    shutil.rmtree(store)
    assert wire.push_to_hub("me/wire") == "commit"
    assert {str(f.relative_to(store)) for f in store.rglob("*") if f.is_file()} == {
        str(f.relative_to(export)) for f in export.rglob("*") if f.is_file()
    }
    back = LatentWire.from_pretrained("me/wire", revision="v1")
    assert (
        back.encoder_id == wire.encoder_id
        and asked["repo_id"] == "me/wire"
        and asked["revision"] == "v1"
    )
    assert not any("bin" in pattern or "pkl" in pattern for pattern in asked["allow_patterns"])


def test_the_directory_of_a_run_or_sweep_leads_to_its_export(export: Path) -> None:
    with pytest.raises(CheckpointError, match=f"did you mean {export}"):
        LatentWire.from_pretrained(export.parent)
    (export.parent / "manifest.json").write_text('{"trials": []}')  # as a sweep has one
    with pytest.raises(CheckpointError, match=f"format_version.*did you mean {export}"):
        LatentWire.from_pretrained(export.parent)


def test_the_card_says_what_it_is_for_whom_and_how_good(export: Path) -> None:
    card = (export / "README.md").read_text()
    manifest = json.loads((export / "manifest.json").read_text())
    assert card.startswith("---\nlibrary_name: latentwire\n")
    for fact in (
        manifest["encoder_id"],
        *manifest["pins"]["receivers"].values(),
        "toy-qwen",
        "**frozen**",
        "900 steps of 4",
    ):
        assert fact in card
    assert "| **the message** | qwen | 50.0 [40.0, 60.0] | 62.5 [50.0, 75.0] | 1.25 | 384 |" in card
    assert "| **the message** as int8 | qwen | 50.0" in card
    assert "| nothing | llama | 0.0 [0.0, 60.0]" in card and "| mean |" not in card
    del manifest["metrics"]["validation"]["closed_book"]["llama"][
        "nll"
    ]  # scored by a version that did not tell
    assert "| nothing | llama | 0.0 [0.0, 60.0] | 62.5 [50.0, 75.0] | – | 384 |" in card_of(
        read_run(export), manifest
    )


def test_the_card_says_not_frozen_and_not_scored(run: RunConfig, tmp_path: Path) -> None:
    wire = LatentWire(with_values(run, {"features.lora": {}}))
    card = (checkpoints.save(tmp_path / "best", wire, {}, {}) / "README.md").read_text()
    assert "**not frozen**" in card and "was not scored" in card and "not recorded" in card


def run_example(page: Path) -> dict:
    """Run the Python that a page shows, block after block, and return its names."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    return names


def test_the_readmes_example_runs(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(export.parent.parent.parent)
    names = run_example(README)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, str(len(names["packet"]))] for name in names["wire"].receivers
    ]


def test_the_guides_example_runs(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(export.parent.parent.parent)
    names = run_example(README.parent / "docs" / "guides" / "python.md")
    assert isinstance(names["wire"], latentwire.LatentWire)
    assert (
        len(names["packet"]) == names["message"].packed_size(8)
        and names["message"].packed_size(8) > 0
    )
    assert len(names["answers"]) == len(names["questions"]) and all(
        isinstance(a, str) for a in names["answers"]
    )
    (both,) = names["both"]
    assert len(both) == len(names["more"]) and names["answers"] == [both[1]]
    assert names["again"].answer([names["more"]]) == names["both"]
    assert names["embeds"][0].shape[1] == names["wire"].receivers["llama"].width


def test_the_package_names_what_it_does_not_have() -> None:
    with pytest.raises(AttributeError, match="latentwire has no attribute Nothing"):
        latentwire.Nothing  # noqa: B018
