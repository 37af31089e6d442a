"""What fails on a worker reads as it would have read here."""

import pytest
import ray

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from latentwire.tuning import results


def test_an_error_on_a_worker_is_the_users_error() -> None:
    ray.init(num_cpus=1, log_to_driver=False)
    texts = RunConfig.model_validate({"data": {"dataset": "text"}, "losses": {"bundle": "pretrain"}})
    try:
        with pytest.raises(ConfigError, match=r"^scores need questions, dataset text has none"):
            results.on_cluster(RunConfig(), 0.0, results.check_questions, texts)
    finally:
        ray.shutdown()
