"""What a worker shows is at its node's metrics port; a notice of preemption asks for one checkpoint."""

import time
import urllib.request

import pytest

from latentwire.tuning import trial
from latentwire.tuning.gauges import SHOWN, Gauges


@pytest.mark.slow
def test_gauges_are_at_the_prometheus_endpoint() -> None:
    import ray

    ray.init(num_cpus=1)
    try:

        @ray.remote
        def work() -> None:
            gauges = Gauges("trial-7")
            for f1 in (0.5, 0.25):
                gauges.show({name: 2.0 for name in SHOWN if "f1" not in name} | {"dev_f1": f1})
            time.sleep(8)  # metrics are handed on every few seconds

        ray.get(work.remote())
        (node,) = ray.nodes()
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        end = time.time() + 30
        while "ray_latentwire_dev_f1{" not in (text := urllib.request.urlopen(address).read().decode()):
            assert time.time() < end, text[:2000]
            time.sleep(1)
        shown = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
                 if line.startswith("ray_latentwire_") and 'trial="trial-7"' in line}  # fmt: skip
        assert set(shown) == {f"ray_latentwire_{name}" for name in SHOWN}
        assert shown["ray_latentwire_best_dev_f1"] == 0.5 and shown["ray_latentwire_dev_f1"] == 0.25
    finally:
        ray.shutdown()


def test_a_notice_is_acted_on_once_and_asked_for_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    known = {"info": None}

    def info() -> object:
        asked.append(1)
        return known["info"]

    monkeypatch.setattr(trial.ray.train, "get_preemption_info", info)
    notice = trial.Notice(10)
    assert not any(notice.given(step) for step in range(20)) and len(asked) == 2
    known["info"] = object()
    assert [step for step in range(20, 60) if notice.given(step)] == [20]


def test_a_share_of_a_gpu_is_a_share_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    capped: list[float] = []
    monkeypatch.setattr(trial.torch.cuda, "set_per_process_memory_fraction", capped.append)
    monkeypatch.setattr(trial.torch.cuda, "is_available", lambda: True)
    for gpus in (0.0, 0.25, 1.0):
        trial.cap_memory(gpus)
    assert capped == [0.25]
