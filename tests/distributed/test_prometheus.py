"""What a worker shows is at its node's metrics port, and its share of a GPU caps its memory."""

import time
import urllib.request

import pytest

from latentwire.distributed import prometheus, worker
from latentwire.distributed.prometheus import SHOWN, TrialMetrics


@pytest.mark.slow
def test_gauges_are_at_the_prometheus_endpoint() -> None:
    import ray

    ray.init(num_cpus=1)
    try:

        @ray.remote
        def work() -> None:
            gauges = TrialMetrics("trial-7")
            for f1 in (0.5, 0.25):
                gauges.show({name: 2.0 for name in SHOWN if "f1" not in name} | {"dev_f1": f1})
            time.sleep(8)  # metrics are handed on every few seconds

        ray.get(work.remote())
        (node,) = ray.nodes()
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        end = time.time() + 30
        while "ray_latentwire_dev_f1{" not in (
            text := urllib.request.urlopen(address).read().decode()
        ):
            assert time.time() < end, text[:2000]
            time.sleep(1)
        shown = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
                 if line.startswith("ray_latentwire_") and 'trial="trial-7"' in line}  # fmt: skip
        assert set(shown) == {f"ray_latentwire_{name}" for name in SHOWN}
        assert shown["ray_latentwire_best_dev_f1"] == 0.5 and shown["ray_latentwire_dev_f1"] == 0.25
    finally:
        ray.shutdown()


def test_a_share_of_a_gpu_is_a_share_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    capped: list[float] = []
    monkeypatch.setattr(worker.torch.cuda, "set_per_process_memory_fraction", capped.append)
    monkeypatch.setattr(worker.torch.cuda, "is_available", lambda: True)
    for gpus in (0.0, 0.25, 1.0):
        worker.cap_memory(gpus)
    assert capped == [0.25]


def test_the_best_score_outlives_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, float] = {}

    class OneGauge:
        def __init__(self, name: str, **_: object) -> None:
            self.name = name

        def set(self, value: float, **_: object) -> None:
            shown[self.name] = value

    monkeypatch.setattr(prometheus, "Gauge", OneGauge)
    before = [{"dev_f1": 0.25}, {"dev_f1": 0.5}, {"dev_loss": 1.0}]
    TrialMetrics("trial-7", before).show({"dev_f1": 0.375})
    assert shown["latentwire_best_dev_f1"] == 0.5 and shown["latentwire_dev_f1"] == 0.375
