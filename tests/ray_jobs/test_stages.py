"""Each stage as a command of its own, and the first commands that the docs show."""

import functools
import json
import re
import shlex
import time
from pathlib import Path

import pytest

from latentwire.dataset.toy import toy_rows
from latentwire.evaluation.baselines import DEFAULT_MODES
from tests.conftest import untimed
from tests.ray_jobs.conftest import REPOSITORY, TINY, Job, log_of

pytestmark = pytest.mark.slow


def test_preprocess_train_evaluate(job: Job, tmp_path: Path) -> None:
    prepared = ("--set", "prompt.anchor=A: ", "--set", "losses.kd_weight=0.5")
    steps = (*prepared, "--max_steps=6", "--set", "training.evaluate_every=3")
    own = functools.partial(job, shards=tmp_path / "shards")
    assert own("ray_jobs/preprocess.py", *TINY, *prepared).wait(600) == 0, log_of(tmp_path)
    assert "shards train: 200 rows (0 truncated), 0 rejected" in log_of(tmp_path)
    assert re.search(r"teacher qwen: 200 rows, [\d.]+ MB per 1,000 rows, made in", log_of(tmp_path))
    output = tmp_path / "one"
    assert (
        own(
            "ray_jobs/train.py", *TINY, *steps, "--num_workers=2", "--output_dir", str(output)
        ).wait(800)
        == 0
    ), log_of(tmp_path)
    assert re.search(r"shards train: 200 rows, reused from", log_of(tmp_path))
    assert re.search(r"teacher qwen: 200 rows, .* reused from", log_of(tmp_path))
    trained = json.loads((output / "results.json").read_text())["validation"]
    kept = json.loads((output / "best" / "manifest.json").read_text())["metrics"]["development"]
    assert kept["kd_llama"] > 0 and kept["kd_qwen"] > 0
    scores = tmp_path / "scores.json"
    code = own(
        "ray_jobs/evaluate.py", "--checkpoint", str(output / "best"), "--output", str(scores)
    ).wait(600)
    assert code == 0, log_of(tmp_path)
    assert "WARNING" not in log_of(tmp_path), log_of(tmp_path)  # of Ray's libraries
    found = json.loads(scores.read_text())
    assert set(found) == set(DEFAULT_MODES)
    both = set(found) & set(trained)
    assert both >= {"text", "latent", "shuffled"} and "latent as int4" in trained
    assert untimed({key: found[key] for key in both}) == untimed(
        {key: trained[key] for key in both}
    )
    # A third receiver joins: the exported files of the other parts are the same, byte by byte.
    third = tmp_path / "three"
    joining = (
        "--add_receiver=phi=toy-phi",
        f"--from={output / 'best'}",
        f"--output_dir={third}",
        "--max_steps=4",
        "--set",
        "losses.kd_weight=0",  # three receivers' columns would take longest
    )
    assert own("ray_jobs/train.py", *joining).wait(600) == 0, log_of(tmp_path)
    for name in ("interlingua", "adapters/llama", "adapters/qwen"):
        file = f"best/{name}.safetensors"
        assert (third / file).read_bytes() == (output / file).read_bytes()
    results = json.loads((third / "results.json").read_text())
    assert (
        set(results["validation"]["latent"]) >= {"llama", "qwen", "phi"} <= set(results["weights"])
    )
    # Its validation rows were read before, by the training of the pair's wire and by the evaluation above.
    read = results["readings"]
    assert (
        read["rows"],
        read["read_before"],
        read["scorings"],
        read["wires"],
        read["trained_on"],
    ) == (16, 16, 2, 1, 0)
    assert "16 of these 16 rows were read before, in 2 scorings by 1 other wire" in log_of(tmp_path)
    first, joined = (
        json.loads((at / "best" / "manifest.json").read_text())["trained_on"]
        for at in (output, third)
    )
    assert (
        first["documents"] == joined["documents"] == 200
        and first["known"]
        and first["stages"] == joined["stages"]
    )


def test_texts_first_and_questions_after_them(job: Job, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for split, count in (("train", 150), ("validation", 10)):
        rows = [json.dumps({"text": row["context"]}) for row in toy_rows(count, seed=5)]
        (tmp_path / "texts" / f"{split}.jsonl").write_text("\n".join(rows))
    texts = (
        "--dataset=text",
        f"--data_dir={tmp_path / 'texts'}",
        "--set",
        "losses.bundle=pretrain",
    )
    small = (*TINY, "--samples=100", "--max_steps=4", "--set", "training.evaluate_every=4")
    first = tmp_path / "first"
    assert job("ray_jobs/train.py", *small, *texts, "--output_dir", str(first)).wait(800) == 0, (
        log_of(tmp_path)
    )
    losses = json.loads((first / "best" / "manifest.json").read_text())["metrics"]["development"]
    assert (
        losses["dev_loss"] > 0
        and losses["dev_reconstruction_ce_llama"] > 0
        and losses["dev_continuation_ce_qwen"] > 0
    )
    assert job("ray_jobs/evaluate.py", "--checkpoint", str(first / "best")).wait(600) == 2
    assert "error: scores need questions" in log_of(tmp_path)
    # ray_jobs/train.py reads this space where none is named, latentwire/train.py reads none.
    second = (
        "--space=search_spaces/toy.yaml",
        "--set",
        f"training.init_from={first / 'best'}",
        "--output_dir",
        str(tmp_path / "second"),
    )
    assert job("latentwire/train.py", *small, *second).wait(800) == 0, log_of(tmp_path)
    assert "full text" in log_of(tmp_path)


def test_the_quickstarts_commands(job: Job, tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "quickstart.md").read_text()
    block = next(
        b for b in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "latentwire/train.py" in b
    )
    commands = [
        shlex.split(line.replace("runs/test", str(tmp_path / "run"))) for line in block.splitlines()
    ]
    assert len(commands) == 2
    for _, script, *flags in commands:
        assert job(script, *flags).wait(800) == 0, log_of(tmp_path)
    assert "full text" in log_of(tmp_path)
    # With shards that are there, both run where neither Ray nor Optuna is installed.
    (_, train, *flags), (_, evaluate, *of_best) = commands
    flags = [flag.replace(str(tmp_path / "run"), str(tmp_path / "plain")) for flag in flags]
    for script, own in ((train, [*flags, "--profile=2", "--max_steps=3"]), (evaluate, of_best)):
        assert job("-c", WITHOUT_RAY, script, *own).wait(600) == 0, log_of(tmp_path)


WITHOUT_RAY = """
import runpy, sys
sys.modules.update(ray=None, optuna=None)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A script as ``python`` would run it, but for two packages that it cannot import."""


def test_train_saves_at_sigterm_and_resumes(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = (
        *TINY,
        "--epochs=40",
        "--set",
        "training.evaluate_every=10000",
        "--output_dir",
        str(output),
    )
    process = job("latentwire/train.py", *flags, "--max_steps=500")
    end = time.time() + 240
    while "step 10/500" not in log_of(tmp_path):
        assert process.poll() is None and time.time() < end, log_of(tmp_path)
        time.sleep(0.2)
    process.terminate()
    assert process.wait(120) == 2, log_of(tmp_path)
    assert "stopped by SIGTERM after step" in log_of(tmp_path) and "Traceback" not in log_of(
        tmp_path
    )
    assert job("latentwire/train.py", *flags, "--max_steps=500").wait(120) == 2
    assert "output must not exist yet" in log_of(tmp_path)
    (saved,) = (output / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert (
        job("latentwire/train.py", *flags, f"--max_steps={step + 5}", "--resume").wait(600) == 0
    ), log_of(tmp_path)
    assert f"resumed at step {step}" in log_of(tmp_path)
    assert (output / "best" / "manifest.json").exists()


def test_the_full_size_command_fails_for_want_of_the_hub_alone(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = (REPOSITORY / "docs" / "guides" / "another_model.md").read_text()
    command = re.search(
        r"python3 latentwire/train\.py --llama_id.*?experiment_name", text, re.DOTALL
    )
    assert command
    words = shlex.split(
        command[0].replace("\\\n", " ").replace("runs/experiment_name", str(tmp_path / "run"))
    )
    assert job(words[1], *words[2:]).wait(300) == 2, log_of(tmp_path)
    log = log_of(tmp_path)
    assert "error: receiver llama: meta-llama/Meta-Llama-3.1-8B-Instruct cannot be loaded" in log
    assert "hf auth login" in log and "--llama_id <directory>" in log and "Traceback" not in log
