"""The console command: one door, and the same flag means the same behind it."""

import subprocess
import sys
from pathlib import Path

import pytest

from latentwire import __all__ as names
from latentwire.api import train
from latentwire.cli import COMMANDS, as_written, command_line, main, program

REPOSITORY = Path(__file__).parents[2]


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([command, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    assert f"Usage: latentwire {command}" in text and len(text.splitlines()) > 2


def test_the_same_flags_are_in_every_command_that_has_a_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = ("--config --space", "--set", "--max_steps", "--latent_len", "--verbose")
    for command in ("tune", "train", "preprocess"):
        text = help_of(command, capsys)
        assert not [flag for flag in shared if flag not in text], command
    for command in ("tune", "train"):
        text = help_of(command, capsys)
        assert "--output --output_dir" in text and "--resume" in text
    assert "--ray" in help_of("train", capsys) and "--ray" in help_of("evaluate", capsys)


def test_help_loads_neither_torch_nor_ray() -> None:
    code = "import sys; from latentwire.cli import main; main(['--help']); print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["tune", "--max_stesp", "3"], "Unknown option: --max_stesp. Did you mean --max_steps?"),
        (
            ["train"],
            "a run needs --output DIR for a new one or --resume DIR to go on, and not both; name one",
        ),
        (["train", "--output=x", "--resume=x"], "a run needs --output DIR"),
        (
            ["evaluate"],
            "an evaluation needs --checkpoint DIR or --predictions FILE, got neither; name one",
        ),
        (
            ["tune", "--retry_failed"],
            "--retry_failed takes up the failed trials of a sweep that --resume names",
        ),
        (["train", "--output=x", "--max_steps=0"], "max_steps must be ≥ 1, got 0"),
        (
            ["train", "--output=x", "--set=losses.answer_ce_weight=.inf"],
            "answer_ce_weight: input should be a finite number, got inf",
        ),
        (
            ["train", "--output=x", "--set=tune.trials=3"],
            "one run, which searches nothing, got --set tune.trials",
        ),
        (
            ["ask", "nowhere", "--question=Who?"],
            "a question needs --context TEXT or --context_file FILE",
        ),
        (["tuen"], "Did you mean"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    words: list[str],
    error: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and error in printed and len(printed.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_says_how_a_run_goes_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", stopped)
    run = tmp_path / "one"
    assert main(["train", "--config", "toy", "--output", str(run)]) == 130
    assert "stopped: Ctrl-C; before anything was written" in capsys.readouterr().out
    run.mkdir()
    assert main(["train", "--config", "toy", "--output", str(run)]) == 130
    assert capsys.readouterr().out.endswith(f"by the same flags with --resume {run}\n")


def test_a_script_resumes_in_its_output_directory(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert as_written(["--output_dir", run, "--resume", "--seed", "3"]) == [
        "--seed",
        "3",
        "--resume",
        run,
    ]
    assert as_written([f"--output_dir={run}", "--seed=3"]) == ["--output_dir", run, "--seed=3"]
    assert as_written(["--seed=3"], config="toy") == ["--seed=3", "--config", "toy"]
    for named in (["--space=small"], ["--config", "small"], ["--from", run]):
        assert as_written(named, config="toy") == named
    assert as_written([f"--output_dir={run}"], goes_on=True) == ["--resume", run]
    assert as_written(["--output=elsewhere"], goes_on=True) == ["--output", "elsewhere"]
    assert as_written(["--resume", run, "--set", "tune.trials=3"]) == [
        "--resume",
        run,
        "--set",
        "tune.trials=3",
    ]


@pytest.mark.parametrize(
    "script", ["latentwire/train.py", "latentwire/evaluate.py", "ray_jobs/evaluate.py"]
)
def test_a_script_hides_no_package_of_its_own_name(script: str) -> None:
    """Hugging Face's ``evaluate`` must stay what ``import evaluate`` finds."""
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']; sys.path[0] = 'latentwire'\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import importlib.util; print(importlib.util.find_spec('evaluate'), importlib.util.find_spec('train'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, script], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.endswith("None None\n"), done.stdout[-500:] + done.stderr[-500:]


def test_dir_shows_what_the_package_offers() -> None:
    import latentwire

    assert set(names) <= set(dir(latentwire))
    for name in names:
        assert callable(getattr(latentwire, name)) or isinstance(getattr(latentwire, name), type)
    assert callable(latentwire.train) and callable(
        latentwire.evaluate
    )  # functions, though files have these names


def test_a_command_is_recorded_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ray_jobs/tune.py", "--space", "a b.yaml"])
    assert program("tune") == "python ray_jobs/tune.py"
    assert command_line("tune") == "python ray_jobs/tune.py --space 'a b.yaml'"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/latentwire", "tune", "--config", "toy"])
    assert program("tune") == "latentwire tune"
    assert command_line("tune") == "latentwire tune --config toy"
