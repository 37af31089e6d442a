"""How far a scoring on the cluster is can be seen at the driver."""

import json
from pathlib import Path
from typing import Any

import pytest

from latentwire.config import RunConfig
from latentwire.distributed import remote
from latentwire.distributed.driver_log import LOG
from latentwire.distributed.worker_output import PROGRESS
from latentwire.evaluation import progress


def test_a_scoring_elsewhere_is_shown_as_one_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths: dict[Any, Path] = {"validation": tmp_path}

    def on_cluster(run: RunConfig, gpus: float, function: Any, *arguments: Any) -> str:
        """Say what a task with this progress teller prints, and what another work prints meanwhile."""
        *_, teller, tuned = arguments
        assert tuned.keywords["paths"] == paths
        for name, done in ((teller.name, 5), ("trial-0", 1), (teller.name, 9)):
            values = {"name": name, "what": "latents", "done": done, "total": 10}
            LOG.receive({"lines": [PROGRESS + json.dumps(values)], "pid": 1, "is_err": False})
        return "scores"

    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(remote, "on_cluster", on_cluster)
    assert remote.score_and_export(RunConfig(), 0.0, tmp_path, paths, tmp_path) == "scores"
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("scoring latents: 5/10 rows, about ") and second.startswith(
        "scoring latents: 9/10 rows"
    )
