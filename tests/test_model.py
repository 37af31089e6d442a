"""The public API: what a user of an export does from Python."""

import json
import re
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import GenerationConfig

import latentwire
from latentwire import exports
from latentwire.card import write as card_of
from latentwire.cli import main
from latentwire.config import EncoderConfig, RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.dataset.toy import toy_rows
from latentwire.exports import CheckpointError, choose_receivers, read_run
from latentwire.features.base import Feature
from latentwire.features.registry import FEATURES
from latentwire.message import Message, WireError, join
from latentwire.model import LatentWire, load_wire
from latentwire.models.weights import resolve
from latentwire.storage import sha256
from latentwire.training import checkpoints
from tests.conftest import wire_of

README = Path(__file__).parent.parent / "README.md"
ROWS = list(toy_rows(5, seed=3))
CONTEXTS = [row["context"] for row in ROWS]
QUESTIONS = [row["question"] for row in ROWS]


class LaterEncoder(EncoderConfig):
    """The section as a later version may have it."""

    further: float = 0.0
    """A knob that nobody has heard of yet."""


def shaken(wire: LatentWire) -> LatentWire:
    """Other weights than the fresh ones, so that rows differ in what is answered."""
    generator = torch.Generator().manual_seed(1)
    for parameter in wire.interlingua.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return wire


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


@pytest.mark.parametrize("receiver", ["llama", "qwen"])
@pytest.mark.parametrize(
    "values",
    [{}, {"features.refiner": {}}, {"encoder.tokens_per_latent": 4}, {"data.send": "prompt"}],
)
def test_whole_prompts_as_embeddings_give_our_own_answers(
    run: RunConfig, receiver: str, values: dict
) -> None:
    wire = shaken(LatentWire(with_values(run, values)))
    message = wire.encode(CONTEXTS, QUESTIONS)
    expected = wire.answer(message, QUESTIONS, receiver)
    assert (
        len(set(expected)) > 1 or "data.send" in values
    )  # where no text follows the message, an untrained one decides
    lm, stops = wire.receivers[receiver], wire.builders[receiver].stop_ids
    embeds = wire.prompt_embeds(message, QUESTIONS, receiver)
    assert [len(e_SD) for e_SD in embeds] == [
        len(p.ids) for p in wire._prompts(message, QUESTIONS, receiver)[1]
    ]
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=run.evaluation.max_answer_tokens,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )
    for e_SD, answer in zip(embeds, expected, strict=True):  # one at a time: no padding, no mask
        ids = lm.lm.generate(inputs_embeds=e_SD[None], generation_config=settings)[0]
        text = lm.tokenizer.decode(ids, skip_special_tokens=True)
        assert text.strip().split("\n")[0].strip() == answer


@pytest.mark.parametrize(
    "feature", [name for name, kind in FEATURES.items() if kind.attached is not Feature.attached]
)
def test_what_acts_inside_a_receiver_is_no_embedding(run: RunConfig, feature: str) -> None:
    wire = LatentWire(with_values(run, {f"features.{feature}": {}}))
    with pytest.raises(ConfigError, match=f"prompt_embeds needs a wire .* got {feature}"):
        wire.prompt_embeds(wire.encode(CONTEXTS), QUESTIONS, "llama")


def test_a_packet_is_answered_as_its_message_and_another_encoders_is_refused(
    wire: LatentWire, run: RunConfig
) -> None:
    message = shaken(wire).encode(CONTEXTS)
    packet = message.to_bytes(bits=16)
    assert wire.answer(packet, QUESTIONS, "qwen") == wire.answer(
        wire.receive(packet), QUESTIONS, receiver="qwen"
    )
    assert (
        wire.receive(packet).encoder == message.encoder == wire.encoder_id
        and len(wire.encoder_id) == 32
    )
    other = LatentWire(with_values(run, {"training.seed": 9}))
    with pytest.raises(WireError, match="must come from encoder"):
        other.answer(packet, QUESTIONS, "qwen")
    wider = Message(torch.zeros(1, 2, 40), torch.tensor([2]), {}, wire.encoder_id)
    with pytest.raises(WireError, match="latents must be 32 wide, got 40"):
        wire.receive(wider.to_bytes())
    with pytest.raises(ConfigError, match="receiver must be one of llama, qwen, got gpt"):
        wire.answer(packet, QUESTIONS, "gpt")
    with pytest.raises(
        ConfigError, match="each message takes one question, got 5 messages and 2 questions"
    ):
        wire.answer(packet, QUESTIONS[:2], "qwen")


def test_a_text_alone_is_one_message_and_one_question(wire: LatentWire) -> None:
    message = shaken(wire).encode(CONTEXTS[0])
    assert len(message) == 1 and torch.equal(message.z_BLZ, wire.encode([CONTEXTS[0]]).z_BLZ)
    answers = wire.answer(message, QUESTIONS[0], "qwen")
    assert answers == wire.answer(message, [QUESTIONS[0]], "qwen") and len(answers) == 1
    (e_SD,) = wire.prompt_embeds(message.to_bytes(), QUESTIONS[0], "llama")
    assert len(e_SD) == len(wire.prompt_embeds(message, (q for q in QUESTIONS[:1]), "llama")[0])
    assert len(wire.encode(tuple(CONTEXTS))) == len(CONTEXTS)


WRONG = [
    ([], "must hold at least one text, got none"),
    (None, "must be a text or a list of texts, got None"),
    (b"bytes", "must be a text or a list of texts, got a bytes"),
    ({"a": "b"}, "must be a text or a list of texts, got a dict"),
    (7, "must be a text or a list of texts, got 7"),
    (["Ada lives in Oslo.", None], "must be texts that hold something, got None at 1"),
    (["Ada", ["lives"]], "must be texts that hold something, got a list at 1"),
    ("", "must be texts that hold something, got '' at 0"),
    ([" \n"], r"must be texts that hold something, got ' \\n' at 0"),
    ("Ada \ud800", "must be texts that UTF-8 can write, got a lone surrogate at 0"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "rule"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_text_is_told_in_one_line(wire: LatentWire, given: object, rule: str) -> None:
    message = wire.encode(CONTEXTS[0])
    calls = [("contexts", lambda: wire.encode(given))]  # type: ignore[arg-type]
    calls += [("questions", lambda: wire.answer(message, given, "qwen"))]  # type: ignore[arg-type]
    calls += [("questions", lambda: wire.prompt_embeds(message, given, "llama"))]  # type: ignore[arg-type]
    if given is not None:  # which says that there are none
        calls += [("questions", lambda: wire.encode(CONTEXTS[0], given))]  # type: ignore[arg-type]
    for what, call in calls:
        with pytest.raises(ConfigError, match=f"{what} {rule}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_numbers_that_do_not_match_are_told_in_one_line(wire: LatentWire) -> None:
    with pytest.raises(
        ConfigError, match="each context takes one question, got 5 contexts and 2 questions"
    ):
        wire.encode(CONTEXTS, QUESTIONS[:2])
    for given in (None, [wire.encode(CONTEXTS[0])], "packet"):
        with pytest.raises(
            ConfigError, match="a message must be what encode gives, or its packet as bytes"
        ):
            wire.answer(given, QUESTIONS[0], "qwen")  # type: ignore[arg-type]


def test_a_context_that_is_longer_than_any_trained_on_is_warned_of(run: RunConfig) -> None:
    wire = wire_of(with_values(run, {"data.max_context_bytes": 20}))
    texts = ["Ada lives in Oslo.", "\u00e4" * 11]  # 22 bytes
    told = r"at most 20 bytes, .*\(data\.max_context_bytes\), got 1 longer, the longest of 22"
    with pytest.warns(UserWarning, match=told) as caught:
        assert len(wire.encode(texts)) == 2
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wire.encode(texts[0])


def test_messages_are_sent_without_dropout(run: RunConfig) -> None:
    wire = wire_of(with_values(run, {"encoder.latent_dropout": 0.5}))
    wire.interlingua.train()
    first = wire.encode(CONTEXTS)
    wire.interlingua.train()
    assert torch.equal(wire.encode(CONTEXTS).z_BLZ, first.z_BLZ) and bool((first.z_BLZ != 0).all())


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
    with pytest.raises(CheckpointError, match=told):
        load_wire(export)
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


def test_an_address_says_as_little_as_it_can(tmp_path: Path) -> None:
    (tmp_path / "home" / "models" / "llama").mkdir(parents=True)
    model = str(tmp_path / "home" / "models" / "llama")
    assert exports.beside(tmp_path / "home" / "runs" / "best", model) == "../../models/llama"
    assert exports.beside(tmp_path / "home", model) == "./models/llama"
    assert exports.below(tmp_path / "home", model) == "models/llama"
    assert exports.below(tmp_path / "home" / "runs", model) == model
    assert exports.by_name(model) == "./llama"
    for address in (
        exports.by_name,
        partial(exports.beside, tmp_path),
        partial(exports.below, tmp_path),
    ):
        assert [address(name) for name in ("toy-llama", "org/model", "receiver:llama")] == [
            "toy-llama",
            "org/model",
            "receiver:llama",
        ]


def test_the_encoders_id_hangs_on_what_a_latent_means_and_on_nothing_else(
    wire: LatentWire, run: RunConfig
) -> None:
    first = wire.encoder_id
    same = {
        "encoder.latent_dropout": 0.5,
        "receivers": [run.receivers[1].model_dump()],
        "features.deep_prefix": {},
    }
    assert LatentWire(with_values(run, same)).encoder_id == first
    assert LatentWire(with_values(run, {"features.refiner": {}})).encoder_id != first
    later = run.model_copy(update={"encoder": LaterEncoder(**run.encoder.model_dump())})
    assert (
        LatentWire(later).encoder_id == first
    )  # a knob that a later version adds takes no packet away
    with torch.no_grad():
        wire.interlingua.encoder.project.bias += 1
    assert wire.encoder_id != first


def test_paragraphs_sent_apart_are_the_message_of_all_lines(run: RunConfig) -> None:
    wire = LatentWire(with_values(run, {"encoder.split": "lines"}))
    whole = wire.encode(["\n".join(CONTEXTS[:3])])
    joined = join([wire.receive(wire.encode([text]).to_bytes()) for text in CONTEXTS[:3]])
    torch.testing.assert_close(joined.z_BLZ, whole.z_BLZ, atol=2e-3, rtol=2e-3)
    assert joined.length_B.tolist() == whole.length_B.tolist()


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
        CheckpointError, match=r"must be a directory or a Hub id, got runs/none/best \("
    ):
        LatentWire.from_pretrained("runs/none/best")


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
