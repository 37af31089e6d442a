"""A node's watcher hears of its end from a stand-in of the metadata service, and drains it once."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from latentwire.distributed import spot
from tests.s3 import free_port

REPOSITORY = Path(__file__).parents[2]
TOKEN_PATH, ACTION_PATH = "/latest/api/token", "/latest/meta-data/spot/instance-action"
GOOGLE_PATH = "/computeMetadata/v1/instance/preempted"


class Metadata:
    """A stand-in of either cloud's metadata service; what it was asked is in ``requests``."""

    def __init__(self, cloud: str) -> None:
        self.requests: list[tuple[str, str]] = []
        self.answers: list[tuple[int, str]] = []
        """Of the next looks for a notice; after them there is none."""
        self.tokens = 0
        look = {"ec2": self._ec2, "google": self._google}[cloud]

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                status, body = look(self.command, self.path, dict(self.headers))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = _answer

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def expire(self) -> None:
        """Let the tokens given so far be too old."""
        self.tokens += 1

    def _ec2(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        self.requests.append((method, path))
        if (method, path) == ("PUT", TOKEN_PATH):
            lifetime = int(headers["X-Aws-Ec2-Metadata-Token-Ttl-Seconds"])
            self.tokens += 1
            return (200, f"token-{self.tokens}") if 1 <= lifetime <= 21_600 else (400, "")
        if headers.get("X-Aws-Ec2-Metadata-Token") != f"token-{self.tokens}":
            return 401, ""
        if (method, path) != ("GET", ACTION_PATH):
            return 404, ""
        return self.answers.pop(0) if self.answers else (404, "Not Found")

    def _google(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        self.requests.append((method, path))
        if headers.get("Metadata-Flavor") != "Google":
            return 403, ""
        if (method, path) != ("GET", GOOGLE_PATH):
            return 404, ""
        return self.answers.pop(0) if self.answers else (200, "FALSE")


@pytest.fixture
def metadata(request: pytest.FixtureRequest) -> Iterator[Metadata]:
    service = Metadata(request.param)
    yield service
    service.close()


ON_EC2 = pytest.mark.parametrize("metadata", ["ec2"], indirect=True)
ON_GOOGLE = pytest.mark.parametrize("metadata", ["google"], indirect=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot, "POLL_SECONDS", 0.01)


@pytest.fixture
def ray_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Put a ``ray`` first on the PATH that writes down its arguments and refuses the first ``refusals`` calls."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    log.touch()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def calls(refusals: int | None = None) -> list[list[str]]:
        if refusals is not None:
            script = folder / "ray"
            script.write_text(
                f"#!{sys.executable}\nimport json, sys\n"
                f"log = open({str(log)!r}, 'a+')\nprint(json.dumps(sys.argv[1:]), file=log, flush=True)\n"
                f"log.seek(0)\n"
                f"if len(log.readlines()) <= {refusals}:\n    sys.exit('Error: the GCS is busy')\n"
            )
            script.chmod(script.stat().st_mode | stat.S_IEXEC)
        return [json.loads(line) for line in log.read_text().splitlines()]

    return calls


def value(call: list[str], flag: str) -> str:
    return call[call.index(flag) + 1]


def in_seconds(seconds: float, action: str = "terminate") -> str:
    """What EC2 says of an interruption that is so far ahead."""
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": action, "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")})


@ON_EC2
def test_a_notice_of_ec2_drains_the_node_once(
    metadata: Metadata,
    ray_calls: Callable[..., list[list[str]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray_calls(0)
    metadata.answers = [(404, ""), (404, ""), (200, in_seconds(120))]
    with caplog.at_level(logging.INFO, "latentwire.spot"):
        assert spot.main(["--metadata", metadata.address, "--node_id", "ab12"]) == 0
    assert metadata.requests == [("PUT", TOKEN_PATH), *[("GET", ACTION_PATH)] * 3]
    (call,) = ray_calls()
    assert call[0] == "drain-node" and value(call, "--node-id") == "ab12"
    assert value(call, "--reason") == "DRAIN_NODE_REASON_PREEMPTION"
    assert "EC2 will terminate the node at 20" in value(call, "--reason-message")
    assert 105 <= int(value(call, "--deadline-remaining-seconds")) <= 115  # a little before the end
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == f"watching for EC2's notice at {metadata.address}"
    assert lines[1].startswith("notice: EC2 will terminate the node at") and "draining" in lines[1]
    assert lines[2].startswith("the node drains")


@ON_GOOGLE
def test_a_notice_of_compute_engine_leaves_half_a_minute(
    metadata: Metadata, ray_calls: Callable[..., list[list[str]]]
) -> None:
    ray_calls(0)
    metadata.answers = [(200, "FALSE"), (200, "FALSE"), (200, "TRUE\n")]
    assert spot.main(["--metadata", metadata.address]) == 0
    assert metadata.requests[0] == ("PUT", TOKEN_PATH)  # EC2 is asked for first
    assert metadata.requests[1:] == [("GET", GOOGLE_PATH)] * 3
    (call,) = ray_calls()
    assert "--node-id" not in call and "--address" not in call
    assert 20 <= int(value(call, "--deadline-remaining-seconds")) <= 25


@ON_EC2
def test_a_service_that_fails_for_a_while_is_asked_again(
    metadata: Metadata,
    ray_calls: Callable[..., list[list[str]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray_calls(0)
    metadata.answers = [
        (503, ""), (503, ""), (200, "<html>"), (200, '{"action": "stop"}'), (404, ""), (200, in_seconds(60, "stop")),
    ]  # fmt: skip
    with caplog.at_level(logging.INFO, "latentwire.spot"):
        assert spot.main(["--metadata", metadata.address]) == 0
    assert len(ray_calls()) == 1
    lines = [record.getMessage() for record in caplog.records]
    failed = [line for line in lines if "gives no answer, and is asked again" in line]
    assert len(failed) == 1 and "status 503" in failed[0]  # said once, not at each look
    assert "EC2 answers again" in lines


@ON_EC2
def test_a_token_that_is_too_old_is_renewed(metadata: Metadata) -> None:
    cloud = spot.find_cloud(metadata.address)
    assert isinstance(cloud, spot.EC2)
    metadata.expire()
    assert cloud.notice() is None
    metadata.answers = [(200, in_seconds(60))]
    assert cloud.notice() is not None
    assert [path for _, path in metadata.requests].count(TOKEN_PATH) == 2


def test_a_service_that_is_gone_is_no_end_of_the_watch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = Metadata("google")
    cloud = spot.find_cloud(service.address)
    assert cloud is not None
    service.close()
    notices: list[spot.Notice] = []
    watcher = threading.Thread(
        target=lambda: notices.append(spot.wait_for_notice(cloud)), daemon=True
    )
    with caplog.at_level(logging.INFO, "latentwire.spot"):
        watcher.start()
        end = time.time() + 30
        while not caplog.records:
            assert time.time() < end
            time.sleep(0.01)
        assert "Compute Engine gives no answer" in caplog.records[0].getMessage()
        assert watcher.is_alive() and not notices
        # The service is back, at another port.
        cloud._address = (back := Metadata("google")).address  # type: ignore[attr-defined]
        back.answers = [(200, "TRUE")]
        watcher.join(30)
    back.close()
    assert [notice.text for notice in notices] == ["Compute Engine preempts the node"]


def test_where_no_cloud_answers_the_watch_ends_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    ray_calls: Callable[..., list[list[str]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray_calls(0)
    monkeypatch.setattr(spot.find_cloud, "__defaults__", (0.05,))
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert spot.main(["--metadata", nowhere]) == 1
    assert f"neither EC2 nor Compute Engine answers at {nowhere}" in caplog.text
    assert not ray_calls()


def test_draining_is_tried_again_until_ray_takes_it(
    ray_calls: Callable[..., list[list[str]]], caplog: pytest.LogCaptureFixture
) -> None:
    ray_calls(2)
    assert spot.main(["--now", "60", "--address", "10.0.0.1:6379"]) == 0
    calls = ray_calls()
    assert len(calls) == 3 and {value(call, "--address") for call in calls} == {"10.0.0.1:6379"}
    assert caplog.text.count("is asked again: Error: the GCS is busy") == 2


def test_draining_ends_at_the_deadline(
    ray_calls: Callable[..., list[list[str]]], caplog: pytest.LogCaptureFixture
) -> None:
    ray_calls(1_000_000)
    assert spot.main(["--now", "0.5"]) == 1
    assert ray_calls()
    assert "was not drained in time: Error: the GCS is busy" in caplog.text


def test_an_interruption_that_is_past_is_drained_all_the_same(
    ray_calls: Callable[..., list[list[str]]],
) -> None:
    """Hibernation begins at once."""
    ray_calls(0)
    assert spot.drain(spot.Notice("EC2 will hibernate the node", time.time() - 3))
    (call,) = ray_calls()
    assert value(call, "--deadline-remaining-seconds") == "1"


@pytest.mark.parametrize("seconds", ["0", "-5"])
def test_a_wrong_call_is_one_line(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        spot.main(["--now", seconds])
    assert ended.value.code == 2
    assert (
        f"--now must be the seconds until the node goes, got {seconds}" in capsys.readouterr().err
    )


def test_without_ray_on_the_path_nothing_is_watched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as ended:
        spot.main([])
    assert ended.value.code == 2 and "`ray` must be on the PATH" in capsys.readouterr().err


def test_the_file_needs_python_alone(tmp_path: Path) -> None:
    """The cluster files send it to nodes that have neither the package nor anything that it would import."""
    copy = tmp_path / "spot.py"
    copy.write_text(Path(spot.__file__).read_text())
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\n")
    ray.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(copy), "--now", "60"],
        env={"PATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "notice: the node is told to stop, in 60 s; draining it" in done.stderr


@pytest.mark.parametrize(
    ("flags", "variable", "expected"),
    [
        (["--address", "10.0.0.1:6379"], None, "10.0.0.1:6379"),
        (["--address", "10.0.0.1:6379"], "local", "10.0.0.1:6379"),
        ([], "10.0.0.2:6379", "10.0.0.2:6379"),
        ([], "local", "auto"),
        ([], None, "auto"),
    ],
)
def test_the_node_is_asked_of_the_cluster_that_is_told(
    flags: list[str],
    variable: str | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`ray drain-node --address A` without a node connects to RAY_ADDRESS, and where there is none starts a Ray of its
    own: that one's node was drained, and the cluster said yes."""
    script = tmp_path / "ray"
    script.write_text(f"#!/bin/sh\necho $RAY_ADDRESS >> {tmp_path}/addresses\n")
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert spot.main(["--now", "60", *flags]) == 0
    assert (tmp_path / "addresses").read_text().split() == [expected]


@pytest.mark.slow
@ON_EC2
def test_a_notice_makes_rays_node_drain(metadata: Metadata) -> None:
    """A node of a real Ray: it drains until the time of the notice, and no other node does. What a trial makes of that is
    in tests/ray_jobs/test_cluster.py."""
    import ray
    from ray._private.state import state
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        node = cluster.add_node(num_cpus=1, resources={"spot": 1})
        cluster.wait_for_nodes()
        ray.init(cluster.address)

        @ray.remote(num_cpus=1, resources={"spot": 1})
        def work() -> None:  # an idle node would be gone at once
            time.sleep(120)

        ray.wait([work.remote()], timeout=10)
        assert state.get_draining_nodes() == {}
        begin = time.time()
        metadata.answers = [(404, ""), (200, in_seconds(90))]
        folder = Path(sys.executable).parent
        done = subprocess.run(
            [sys.executable, "-m", "latentwire.distributed.spot", "--metadata", metadata.address,
             "--address", cluster.address, "--node_id", node.node_id],
            cwd=REPOSITORY, env=os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True, text=True, timeout=80,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ((drained, deadline_ms),) = state.get_draining_nodes().items()
        assert drained == node.node_id
        # Of the notice's end, but for the lead and for the time that `ray drain-node` takes to start.
        early, late = 90 - spot.LEAD_SECONDS - 2, 90 - spot.LEAD_SECONDS + time.time() - begin
        assert early <= deadline_ms / 1000 - begin <= late
    finally:
        ray.shutdown()
        cluster.shutdown()
