"""Every knob of LatentWire, once.

A :class:`RunConfig` says everything about one training run. A :class:`SweepConfig`, which is what a
YAML file holds, adds what a sweep varies and how it is searched. The tree of models here is the tree
of objects that the package builds: ``run.encoder`` is what ``models/encoders.py`` reads,
``run.losses`` what ``losses/`` reads.
"""

from latentwire.config.data import DataConfig
from latentwire.config.features import (
    CoprocessorFeature,
    DeepPrefixFeature,
    FeaturesConfig,
    LatentAdaptersFeature,
    LoraFeature,
    RefinerFeature,
)
from latentwire.config.losses import LOSS_BUNDLES, LossConfig, Schedule
from latentwire.config.run import RunConfig
from latentwire.config.section import Section
from latentwire.config.space import (
    CategoricalDimension,
    Dimension,
    FloatDimension,
    IntDimension,
    SamplerConfig,
    SweepConfig,
    TuneConfig,
)
from latentwire.config.stages import StageConfig
from latentwire.config.training import EvaluationConfig, TrainingConfig, TunedTextConfig
from latentwire.config.wire import (
    AdapterConfig,
    EncoderConfig,
    PrefixConfig,
    PromptConfig,
    ReceiverConfig,
    default_receivers,
)

__all__ = [
    "LOSS_BUNDLES",
    "AdapterConfig",
    "CategoricalDimension",
    "CoprocessorFeature",
    "DataConfig",
    "DeepPrefixFeature",
    "Dimension",
    "EncoderConfig",
    "EvaluationConfig",
    "FeaturesConfig",
    "FloatDimension",
    "IntDimension",
    "LatentAdaptersFeature",
    "LoraFeature",
    "LossConfig",
    "PrefixConfig",
    "PromptConfig",
    "ReceiverConfig",
    "RefinerFeature",
    "RunConfig",
    "SamplerConfig",
    "Schedule",
    "Section",
    "StageConfig",
    "SweepConfig",
    "TrainingConfig",
    "TuneConfig",
    "TunedTextConfig",
    "default_receivers",
]
