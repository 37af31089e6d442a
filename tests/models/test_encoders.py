"""The encoder reads its own text and nothing of the batch around it."""

import pytest
import torch

from latentwire.config import AdapterConfig, EncoderConfig
from latentwire.models.adapter import Adapter
from latentwire.models.encoders import ByteEncoder

TEXTS = ["Ada lives in Oslo.", "", "Ben works as baker. Cleo owns an uncommonly-long-word. Ada eats rice."]


@pytest.fixture
def encoder() -> ByteEncoder:
    torch.manual_seed(0)
    return ByteEncoder(EncoderConfig(latent_len=5, d_z=16, d_model=32, layers=2, heads=4)).eval()


def test_a_batch_gives_what_each_row_gives_alone(encoder: ByteEncoder) -> None:
    together = encoder(encoder.tokenize(TEXTS))
    assert together.shape == (3, 5, 16)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(together[row], encoder(encoder.tokenize([text]))[0], atol=1e-5, rtol=1e-4)


def test_every_byte_matters(encoder: ByteEncoder) -> None:
    one, other = encoder(encoder.tokenize(["Ada lives in Oslo.", "Ada lives in Osla."]))
    assert not torch.allclose(one, other, atol=1e-4)


def test_adapter_starts_at_the_embedding_scale() -> None:
    torch.manual_seed(0)
    adapter = Adapter(AdapterConfig(), d_z=64, d_model=128, embed_rms=0.03)
    p_BLD = adapter(5 * torch.randn(8, 4, 64))
    assert p_BLD.square().mean().sqrt().item() == pytest.approx(0.03, rel=0.1)
    assert adapter.gain.requires_grad
