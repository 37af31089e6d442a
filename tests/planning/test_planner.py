"""A machine that cannot hold one trial says so before anything starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from latentwire.config import RunConfig, SweepConfig, TuneConfig
from latentwire.config.resolve import with_values
from latentwire.config.space import IntDimension
from latentwire.distributed import scoring_pool
from latentwire.exports import CheckpointError
from latentwire.models.lm import LMWrapper
from latentwire.planning import autoscaler, forecast, planner
from latentwire.planning.devices import hold, pieces, times
from latentwire.planning.planner import Plan, PlanError, plan
from latentwire.planning.sharing import messages_of, obstacles, rows_of, slots_of
from latentwire.planning.stages import check_start

ENOUGH = 64e9


def space(**values: object) -> SweepConfig:
    named = {name.replace("__", "."): value for name, value in values.items()}
    tune = {
        name.removeprefix("tune."): named.pop(name)
        for name in list(named)
        if name.startswith("tune.")
    }
    return SweepConfig(run=with_values(RunConfig(), named), tune=TuneConfig.model_validate(tune))


def test_parameters_are_counted_from_the_configuration() -> None:
    parameters = {r.name: r.parameters for r in plan(space(), {"CPU": 2}, ENOUGH).receivers}
    for receiver in RunConfig().receivers:
        assert parameters[receiver.name] == sum(p.numel() for p in LMWrapper(receiver).parameters())


def test_features_that_look_at_heads_are_weighed_without_weights() -> None:
    parted = {
        "encoder.pooling": "spans",
        "encoder.span_parts": 2,
        "features.deep_prefix": {"head_parts": 2},
    }
    plain = plan(space(features__deep_prefix={}), {"CPU": 2}, ENOUGH)
    assert (
        plan(space(**parted), {"CPU": 2}, ENOUGH).trainable_parameters < plain.trainable_parameters
    )  # narrower maps from parts of latents


def test_as_many_trials_as_cpus_memory_and_sweep_allow() -> None:
    assert plan(space(), {"CPU": 4}, ENOUGH).max_concurrent_trials == 4
    assert plan(space(training__num_workers=2), {"CPU": 4}, ENOUGH).max_concurrent_trials == 2
    assert (
        plan(space(), {"CPU": 100}, ENOUGH).max_concurrent_trials == 8
    )  # the sweep has eight trials
    one = plan(space(), {"CPU": 4}, ENOUGH).bytes_per_worker
    assert plan(space(), {"CPU": 4}, 2.5 * one).max_concurrent_trials == 2


@pytest.mark.parametrize("knob", ["sequential_models", "receivers_per_step"])
def test_a_step_through_one_receiver_holds_no_graph_of_the_other(knob: str) -> None:
    together = plan(space(), {"CPU": 4}, ENOUGH)
    value = True if knob == "sequential_models" else "one"
    by_turns = plan(space(**{f"training__{knob}": value}), {"CPU": 4}, ENOUGH)
    steps = [receiver.bytes_step for receiver in together.receivers]
    assert together.bytes_per_worker - by_turns.bytes_per_worker == min(steps)


def test_quantised_weights_and_encoders_that_stay_as_they_are_count() -> None:
    def first(**values: object) -> Plan:
        return plan(space(**values), {"CPU": 4}, ENOUGH)

    lm = {"encoder__kind": "lm", "encoder__model": "receiver:llama", "encoder__pooling": "spans"}
    sizes = [
        first(receivers__0__quantization=kind).receivers[0].bytes_weights
        for kind in ("none", "int8", "nf4")
    ]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[0] / 8
    frozen, full = (first(**lm, encoder__tune=tune).bytes_per_worker for tune in ("frozen", "full"))
    layers = 4 * first().receivers[0].parameters  # a copy of the receiver, head left out
    assert (
        frozen - first(**lm, encoder__tune="frozen", encoder__model_layers=1).bytes_per_worker
        > layers / 2
    )
    assert full > frozen + 2 * layers


def test_gpus_are_used_where_there_are_any() -> None:
    on_gpu = plan(space(tune__receivers="own"), {"CPU": 16, "GPU": 4}, ENOUGH)
    assert (on_gpu.gpus_per_worker, on_gpu.max_concurrent_trials) == (1.0, 4)


def test_messages_that_grow_or_shrink_are_planned_at_their_longest() -> None:
    kib = {"data__max_context_bytes": 1024, "training__batch_size": 2}
    assert slots_of(space(**kib).run) == shared_latents()
    assert slots_of(space(**kib, encoder__tokens_per_latent=8).run) == 32
    assert (
        slots_of(space(**kib, encoder__tokens_per_latent=8, training__tokens_per_latent=[4, 8]).run)
        == 64
    )
    assert (
        slots_of(space(**kib, training__coarsening_steps=9, training__coarsening_from=2.0).run)
        == 128
    )
    assert slots_of(space(**kib, encoder__private_len=3).run) == shared_latents() + 3
    fixed, shrinking = (
        plan(space(**kib, training__coarsening_steps=steps), {"CPU": 2}, ENOUGH)
        .receivers[0]
        .bytes_step
        for steps in (0, 9)
    )
    assert shrinking > 2 * fixed


def test_receivers_are_shared_where_more_trials_fit_that_way() -> None:
    eight = {"CPU": 16, "GPU": 4}
    shared = plan(space(), eight, ENOUGH)
    assert shared.sharing is not None and shared.max_concurrent_trials == 8  # the sweep has no more
    assert shared.sharing.replicas == 4 and shared.sharing.most_positions == 4 * 32 * (
        shared_latents() + 64
    )
    single = plan(space(tune__joined_trials=1), eight, ENOUGH).sharing
    assert single is not None and single.most_positions == 0  # nothing is joined, however short
    assert (
        0 < shared.worker_gpus < 0.1 and shared.gpus_per_worker == 1.0
    )  # a finished wire is scored with its own
    whole = shared.sharing.gpus_per_replica
    assert all(0 < share < 0.2 for share in whole.values()) and set(whole) == {"llama", "qwen"}
    on_cpus = plan(space(), {"CPU": 4}, ENOUGH)
    assert on_cpus.sharing is None  # as many fit with their own
    one = plan(space(tune__receivers="own"), {"CPU": 8}, ENOUGH).bytes_per_worker
    tight = plan(space(), {"CPU": 8}, 4 * one)
    assert (tight.sharing, tight.max_concurrent_trials) == (
        None,
        4,
    )  # toy receivers are small: replicas would cost more
    assert plan(space(tune__trials=1), eight, ENOUGH).sharing is None
    assert plan(planner.alone(space(tune__receivers="shared")), eight, ENOUGH).sharing is None
    searched = SweepConfig.model_validate(
        {"search": {"losses.first_token_ce_weight": {"type": "float", "low": 0.1, "high": 1}}}
    )
    assert not planner.alone(
        searched
    ).search  # a single run has what its ``run:`` says, and is planned by it


def test_trials_that_fit_only_beside_a_replica_share_it_and_a_plan_reads_well() -> None:
    sizes = {"training__batch_size": 512, "data__max_context_bytes": 4096}
    with_own = plan(space(tune__receivers="own", **sizes), {"CPU": 8}, 1e12)
    shared = plan(space(tune__receivers="shared", **sizes), {"CPU": 8}, 1e12)
    assert with_own.sharing is None and shared.sharing is not None
    between = sum(shared.sharing.bytes_per_replica.values()) + 1.5 * shared.worker_bytes
    lines = str(shared).splitlines()
    assert lines[0].startswith("receiver llama: 0.9 M parameters")
    assert lines[-1].startswith("trials at once: 8; receivers: shared, 1 replica(s) each of llama")
    assert str(with_own).endswith("; receivers: own, in every worker")
    with pytest.raises(PlanError, match="one worker needs about"):
        plan(
            space(tune__receivers="own", **sizes),
            {"CPU": 8},
            min(between, with_own.bytes_per_worker - 1),
        )


def test_a_receiver_on_all_of_a_workers_gpus_has_their_memory_together() -> None:
    split = {
        "receivers__0__device_map": "auto",
        "training__gpus_per_worker": 2.0,
        "tune__receivers": "own",
    }
    need = plan(space(**split), {"CPU": 8, "GPU": 4}, ENOUGH).bytes_per_worker
    assert plan(space(**split), {"CPU": 8, "GPU": 4}, 0.6 * need).max_concurrent_trials == 2
    with pytest.raises(PlanError, match="the GPU has"):
        plan(space(**split), {"CPU": 8, "GPU": 4}, 0.4 * need)


def shared_latents() -> int:
    return RunConfig().encoder.latent_len


@pytest.mark.parametrize(
    ("values", "memory", "message"),
    [
        (
            {"features__lora": {}},
            ENOUGH,
            r"but features\.lora acts on the receivers' own layers: change that, or set",
        ),
        (
            {"training__log_gradient_norms": True},
            ENOUGH,
            "log_gradient_norms takes a backward pass per term",
        ),
        (
            {},
            1e9,
            r"needs room for one trial beside the replicas, got 1\.0 GB for 1 replica\(s\) each of llama 0\.8",
        ),
        ({}, float("inf"), "set tune.gpu_memory_gb, or tune.receivers: own"),
    ],
)
def test_what_cannot_be_shared_is_refused(values: dict, memory: float, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(space(tune__receivers="shared", **values), {"CPU": 2}, memory)
    assert plan(space(tune__receivers="own", **values), {"CPU": 2}, ENOUGH).sharing is None


def test_a_searched_feature_that_needs_weights_stands_against_sharing() -> None:
    searched = space(tune__receivers="shared").model_copy(
        update={"search": {"features.lora.rank": IntDimension(type="int", low=1, high=4)}}
    )
    assert obstacles(searched) == ["features.lora acts on the receivers' own layers"]


def packed(positions: int, **values: object) -> SweepConfig:
    return space(training__positions_per_batch=positions, tune__receivers="own", **values)


def test_a_budget_of_positions_says_what_a_trial_takes() -> None:
    def step(sweep: SweepConfig) -> int:
        return plan(sweep, {"CPU": 8}, ENOUGH).receivers[0].bytes_step

    small, large = step(packed(2048)), step(packed(8192))
    assert large == pytest.approx(4 * small, rel=0.1)
    long = {"data__max_context_bytes": 4096, "encoder__tokens_per_latent": 8}
    assert step(packed(8192, **long)) <= large  # longer messages leave room for fewer
    halves = packed(8192, training__num_workers=2)
    assert step(halves) == step(packed(8192, training__accumulation=2)) == step(packed(4096))
    coarse = {"training__coarsening_steps": 9, "training__coarsening_from": 1.0}
    assert step(packed(8192, **coarse)) > large  # while messages are longer than they are counted
    assert step(packed(16)) == step(packed(8))  # no part is less than a row
    together = packed(8192, training__questions_together=True).run
    assert messages_of(together) == rows_of(packed(8192).run) < rows_of(together)
    with pytest.raises(PlanError, match=r"training\.positions_per_batch \(now 8192\), set"):
        plan(packed(8192), {"CPU": 2}, 1e8)


@pytest.mark.parametrize(
    ("values", "resources", "memory", "message"),
    [
        (
            {},
            {"CPU": 2},
            1e8,
            r"one worker needs about .* GB and the node has 0\.1 GB: lower training\.batch_size",
        ),
        (
            {"training__num_workers": 4},
            {"CPU": 2},
            ENOUGH,
            "one trial needs 4 CPUs and the cluster has 2",
        ),
        (
            {"training__gpus_per_worker": 1},
            {"CPU": 2},
            ENOUGH,
            "one trial needs 1 GPUs and the cluster has 0",
        ),
        (
            {"training__num_workers": 3},
            {"CPU": 8},
            ENOUGH,
            "batch_size must be a multiple of num_workers, got 32 and 3",
        ),
    ],
)
def test_what_cannot_fit_is_refused(
    values: dict, resources: dict, memory: float, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan(space(**values), resources, memory)


def test_nodes_that_the_autoscaler_may_add_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private import state

    monkeypatch.setattr(
        ray, "cluster_resources", lambda: {"CPU": 0.0, "node:__internal_head__": 1.0, "memory": 8e9}
    )
    possible = {"GPU": 4, "CPU": 32, "on_demand": 1}
    monkeypatch.setattr(state.state, "get_max_resources_from_cluster_config", lambda: possible)
    resources = autoscaler.cluster_resources()
    assert resources == {
        "CPU": 32.0,
        "GPU": 4.0,
        "on_demand": 1.0,
        "node:__internal_head__": 1.0,
        "memory": 8e9,
    }
    on_gpus = planner.plan_on_cluster(space())
    assert (on_gpus.gpus_per_worker, on_gpus.max_concurrent_trials) == (1.0, 4)
    one = space(training__worker_resources={"on_demand": 1})
    assert planner.plan_on_cluster(one).max_concurrent_trials == 1
    with pytest.raises(PlanError, match="one trial needs 1 A100 and the cluster has 0"):
        planner.plan_on_cluster(space(training__worker_resources={"A100": 1}))
    monkeypatch.setattr(
        state.state, "get_max_resources_from_cluster_config", lambda: None
    )  # no autoscaler
    with pytest.raises(PlanError, match="one trial needs 1 CPUs and the cluster has 0"):
        planner.plan_on_cluster(space())


def test_node_types_that_only_the_older_autoscalers_file_tells_count_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray._private import state

    config = {
        "max_workers": 5,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 2}},
            "large": {"resources": {"CPU": 8, "GPU": 2}, "max_workers": 3},
            "small": {"resources": {"CPU": 4}},
        },
    }
    assert autoscaler.most_resources(config) == {"CPU": 2.0 + 3 * 8 + 2 * 4, "GPU": 6.0}
    assert autoscaler.most_resources({}) == {}
    monkeypatch.setattr(state.state, "get_cluster_config", lambda: None)
    monkeypatch.setattr(autoscaler, "autoscaling_config", lambda: config)
    assert [(node["Count"], node["Resources"]["CPU"]) for node in autoscaler.addable_nodes()] == [
        (3, 8),
        (5, 4),
    ]
    one = planner.plan(space(), {"CPU": 64.0}, 1e12)
    head = {"Alive": True, "NodeManagerAddress": "head", "Resources": {"CPU": 0.0}}
    fitting, lines = forecast.fit(one, [head, *autoscaler.addable_nodes()])
    assert (
        fitting.max_concurrent_trials == one.max_concurrent_trials
        and "of type large, up to 3 when asked for" in lines[1]
    )


def test_a_start_that_is_not_whole_is_refused_where_something_is_trained(tmp_path: Path) -> None:
    begun = space(training__init_from=str(tmp_path))
    with pytest.raises(CheckpointError, match="must hold manifest"):
        check_start(begun.run)
    assert (
        plan(begun, {"CPU": 2}, ENOUGH).max_concurrent_trials == 2
    )  # a finished wire is scored without it
    check_start(space().run)


def test_node_types_of_the_newer_autoscaler_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import state

    kinds = [
        SimpleNamespace(name="gpu", resources={"GPU": 1}, max_count=4),
        SimpleNamespace(name="no", resources={}, max_count=0),
    ]
    monkeypatch.setattr(
        state.state, "get_cluster_config", lambda: SimpleNamespace(node_group_configs=kinds)
    )
    (node,) = autoscaler.addable_nodes()
    assert (node["Resources"], node["Count"]) == ({"GPU": 1}, 4)


def test_where_a_trial_needs_more_whole_gpus_than_there_are_its_workers_share_them() -> None:
    two = {"CPU": 16, "GPU": 2}
    spread = space(training__num_workers=4)
    assert plan(spread, two, ENOUGH).sharing is not None
    with pytest.raises(PlanError, match="one trial needs 4 GPUs and the cluster has 2"):
        plan(space(training__num_workers=4, tune__receivers="own"), two, ENOUGH)


def test_trials_on_gpus_are_counted_beside_replicas_on_each_of_them() -> None:
    shared = plan(space(), {"CPU": 16, "GPU": 4}, ENOUGH)
    nodes = [{"Alive": True, "NodeManagerAddress": "a", "Resources": {"CPU": 8, "GPU": 2}}]
    fitting, lines = forecast.fit(shared, nodes)
    assert (
        0 < fitting.max_concurrent_trials <= shared.max_concurrent_trials
        and "node a (8 CPU, 2 GPU" in lines[0]
    )


@pytest.mark.parametrize(
    ("share", "trials"), [(0.4, 16), (0.3, 24), (0.15, 48), (0.1, 80), (1.0, 8), (2.0, 4)]
)
def test_a_share_of_a_gpu_lies_on_one_device(share: float, trials: int) -> None:
    wide = space(training__gpus_per_worker=share, tune__receivers="own", tune__trials=100)
    assert plan(wide, {"CPU": 100, "GPU": 8}, ENOUGH).max_concurrent_trials == trials
    node = {"Alive": True, "NodeManagerAddress": "a", "Resources": {"CPU": 100, "GPU": 4}}
    (two, _), (one, _) = (
        forecast.fit(plan(wide, {"CPU": 100, "GPU": 8}, ENOUGH), [node] * n) for n in (2, 1)
    )
    assert (two.max_concurrent_trials, one.max_concurrent_trials) == (trials, trials // 2)
    assert (
        scoring_pool.copies_at_once({"CPU": 100, "GPU": 8}, two, ENOUGH) == trials
    )  # of a finished wire, too


def test_a_worker_whose_share_lies_on_no_device_is_refused() -> None:
    pair = space(
        training__gpus_per_worker=0.6,
        training__num_workers=3,
        tune__receivers="own",
        training__batch_size=33,
    )
    with pytest.raises(
        PlanError, match=r"each of a trial's 3 worker\(s\) needs 0\.6 of one GPU, and 2 GPUs hold 2"
    ):
        plan(pair, {"CPU": 16, "GPU": 2}, ENOUGH)


def test_parts_of_gpus_are_put_where_they_leave_least() -> None:
    assert pieces(2, 0.5, [0.6, 0.3, 0.3]) == 1  # 0.6 and 0.3 share a device
    assert pieces(4, 1.0, [0.2] * 8) == 2 and pieces(4, 0.2, [0.2] * 8) == 12
    assert pieces(1.5, 0.5) == 3 and pieces(1.5, 1.0) == 1 and pieces(0, 0.1) == 0
    assert (
        hold(2, [0.6, 0.6, 0.4])
        and not hold(2, [0.6, 0.6, 0.6])
        and pieces(2, 0.1, [0.6, 0.6, 0.6]) == 0
    )
    assert times(1, 0.1) == 10 and times(0.3, 0.1) == 3


def test_a_plan_says_what_is_free_now_and_what_the_others_wait_for() -> None:
    one = plan(
        space(training__gpus_per_worker=1, tune__receivers="own"), {"CPU": 16, "GPU": 4}, ENOUGH
    )
    has = {"CPU": 8.0, "GPU": 2.0, "memory": 64e9}
    busy, idle = (
        {"Alive": True, "NodeManagerAddress": name, "Resources": has, "Free": free}
        for name, free in (("a", {"CPU": 8.0}), ("b", has))
    )
    fitting, lines = forecast.fit(one, [busy, idle])
    assert fitting.max_concurrent_trials == 4  # they wait: what is busy now may be free soon
    assert lines == [
        "node a (8 CPU, 2 GPU, 64.0 GB): 2 worker(s), 0 now (8 CPU, 0 GPU, 0.0 GB free)",
        "node b (8 CPU, 2 GPU, 64.0 GB): 2 worker(s), 2 now (8 CPU, 2 GPU, 64.0 GB free)",
        "trials that can start now: 2 of 4; the others wait for 1 worker(s) of 1 CPU, 1 GPU each, as long as it takes",
    ]
    assert forecast.fit(one, [idle])[1] == lines[1:2]  # nothing waits, and nothing is said of it
