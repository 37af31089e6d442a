"""Encoder and adapters of a run, as one module."""

import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.models.adapter import Adapter
from tests.conftest import wire_of


def test_each_slot_of_a_soft_prompt_has_a_position_of_its_own(run: RunConfig) -> None:
    placed = {"adapter.slot_positions": True, "encoder.latent_len": 5, "encoder.private_len": 2}
    interlingua = wire_of(with_values(run, placed)).interlingua
    message = interlingua.encode(["Ada lives in Oslo."])
    for name, adapter in interlingua.adapters.items():
        assert isinstance(adapter, Adapter) and len(adapter.position_LD) == 7
        before_BLD, _ = interlingua.prompt(name, message)
        with torch.no_grad():
            adapter.position_LD[3] += 1.0
        after_BLD, _ = interlingua.prompt(name, message)
        moved_L = (after_BLD - before_BLD).abs().amax((0, 2)) > 1e-6
        assert moved_L.nonzero().flatten().tolist() == [3]
