"""One training run."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from latentwire.config.data import DataConfig
from latentwire.config.features import FeaturesConfig
from latentwire.config.losses import LossConfig
from latentwire.config.section import Section
from latentwire.config.stages import StageConfig, StageName
from latentwire.config.training import EvaluationConfig, TrainingConfig
from latentwire.config.wire import (
    AdapterConfig,
    ClosedFormConfig,
    EncoderConfig,
    PrefixConfig,
    PromptConfig,
    ReceiverConfig,
    default_receivers,
)


class RunConfig(Section):
    """One training run."""

    receivers: tuple[ReceiverConfig, ...] = Field(default_factory=default_receivers, min_length=1)
    """The frozen LLMs, two by default."""
    data: DataConfig = DataConfig()
    """Data and splits."""
    prompt: PromptConfig = PromptConfig()
    """Literal text around the message."""
    prefix: PrefixConfig | None = None
    """Constant trained vectors before the message; all that a text reader trains."""
    encoder: EncoderConfig = EncoderConfig()
    """Text to latents."""
    adapter: AdapterConfig = AdapterConfig()
    """Latents to soft prompts."""
    closed_form: ClosedFormConfig | None = None
    """The start of a wire into retrieval heads; ``None``: a random one."""
    features: FeaturesConfig = FeaturesConfig()
    """Opt-in extensions."""
    losses: LossConfig = LossConfig()
    """Loss weights."""
    training: TrainingConfig = TrainingConfig()
    """Optimisation."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Decoding and metrics."""
    stages: dict[StageName, StageConfig] = Field(default_factory=dict)
    """The stages that the run goes through, in this order, each from the wire of the one before: what each
    changes of all the above (docs/guides/stages.md). Empty: one stage."""

    @model_validator(mode="after")
    def _parts_fit(self) -> RunConfig:
        names = [receiver.name for receiver in self.receivers]
        if len(set(names)) < len(names):
            raise ValueError(f"receiver names must differ, got {', '.join(names)}")
        coarsening = self.training.coarsening_steps > 0
        # Whether every message of the run, in every step, has as many slots.
        fixed = (
            self.encoder.tokens_per_latent is None
            and self.encoder.split == "none"
            and not coarsening
        )
        # Senders are named first: the checks below read their names.
        self._name_senders(names)
        self._check_train_only(names)
        self._check_reader()
        if self.adapter.slot_positions and not fixed:
            raise ValueError(
                "slot_positions needs a fixed number of slots, got tokens_per_latent, split or coarsening_steps; unset one"
            )
        self._check_keys_values(names)
        self._check_heads(names)
        self._check_teacher()
        if coarsening and self.encoder.private_len:
            raise ValueError(
                f"coarsening_steps needs encoder.private_len 0, got {self.encoder.private_len}"
            )
        if self.training.tokens_per_latent and self.encoder.tokens_per_latent is None:
            raise ValueError(
                f"training.tokens_per_latent {self.training.tokens_per_latent} needs messages that grow with the text, got "
                "encoder.tokens_per_latent null; set it to the length that evaluations use"
            )
        if self.encoder.lender is not None and self.encoder.lender not in names:
            raise ValueError(
                f"encoder.model must name one of the receivers {', '.join(names)}, got {self.encoder.model}"
            )
        if strange := [name for name in self.encoder.lenders if name not in names]:
            raise ValueError(
                f"encoder.senders must name receivers among {', '.join(names)}, got "
                f"{', '.join(f'receiver:{name}' for name in strange)}; name one of them, or a model"
            )
        if self.training.questions_together and (
            self.data.send == "prompt" or not self.data.source.has_questions
        ):
            raise ValueError(
                "training.questions_together needs contexts that questions share, got data.send "
                f"{self.data.send} and dataset {self.data.dataset}; set it false, or send the context alone"
            )
        tuned = self.evaluation.tuned_text
        if self.training.positions_per_batch is not None and tuned is not None:
            missing = [name for name in ("steps", "batch_size") if getattr(tuned, name) is None]
            if missing:
                raise ValueError(
                    "a text reader trains by rows, and batches of positions_per_batch "
                    f"{self.training.positions_per_batch} have no fixed number of them, got evaluation.tuned_text without "
                    f"{' and '.join(missing)}; set {' and '.join(missing)} there"
                )
        if not self.data.source.has_questions and self.losses.asking:
            raise ValueError(
                f"dataset {self.data.dataset} has no questions, so the weights of terms that read answers must be 0, got "
                f"{', '.join(self.losses.asking)}; set losses.bundle: pretrain, or these to 0"
            )
        if not self.data.source.has_questions and self.training.best_by == "dev_f1":
            raise ValueError(
                f"training.best_by must be dev_loss for dataset {self.data.dataset}, which has no answers to score, "
                "got dev_f1; leave it out"
            )
        prefix = self.features.deep_prefix
        if prefix is not None and self.encoder.d_z % prefix.head_parts:
            raise ValueError(
                f"d_z must be a multiple of deep_prefix.head_parts, got {self.encoder.d_z}, {prefix.head_parts}"
            )
        refiner = self.features.refiner
        # Two numbers of a head are turned together by rotary positions: its width is even.
        if refiner is not None and self.encoder.d_z % (2 * refiner.heads):
            raise ValueError(
                f"d_z must be a multiple of 2 × refiner.heads, got {self.encoder.d_z}, {refiner.heads}"
            )
        return self

    @property
    def is_reader(self) -> bool:
        """True for a text reader, which has no encoder."""
        return self.prompt.reads != "message"

    @property
    def cache_share(self) -> float:
        """The share of a receiver's cache that a message in its retrieval heads takes."""
        return self.adapter.share_at(self.encoder.tokens_per_latent or 1)

    def _check_reader(self) -> None:
        """Raise where a text reader is asked for what only a wire has."""
        if not self.is_reader:
            return
        if self.prefix is None:
            raise ValueError(
                f"prompt.reads {self.prompt.reads} trains a prefix before the text, got prefix null; "
                f"set prefix: {{}}, or prompt.reads message"
            )
        training, losses = self.training, self.losses
        weights = ("reconstruction_ce_weight", "continuation_ce_weight", "slot_kd_weight")
        # Path → its value, which is false or 0 where nothing is asked.
        of_wires = {
            "features": self.features != FeaturesConfig(),
            "training.alignment_steps": training.alignment_steps,
            "training.coarsening_steps": training.coarsening_steps,
            "training.tokens_per_latent": training.tokens_per_latent,
            "training.train_only": training.train_only,
            "training.log_gradient_norms": training.log_gradient_norms,
            **{f"losses.{name}": getattr(losses, name) for name in weights},
        }
        if given := [path for path, value in of_wires.items() if value]:
            raise ValueError(
                f"a text reader (prompt.reads {self.prompt.reads}) has no message, got {', '.join(given)}; leave them out"
            )

    def _check_teacher(self) -> None:
        """Raise where a teacher is asked for that no columns can hold."""
        losses = self.losses
        # Both read the teacher's own words, which only columns of its likeliest tokens keep.
        chosen = {"kd_teacher": losses.kd_teacher == "tuned", "kd_rows": losses.kd_rows == "right"}
        given = [f"losses.{name} {getattr(losses, name)}" for name, on in chosen.items() if on]
        if given and losses.kd_weight and not losses.kd_top_k:
            raise ValueError(
                f"{' and '.join(given)} needs teachers whose words are kept beside the shards, got losses.kd_top_k 0; "
                f"set it to 1 or more"
            )
        if losses.slot_kd_weight and self.training.log_gradient_norms:
            raise ValueError(
                f"losses.slot_kd_weight {losses.slot_kd_weight} is no term of a receiver's output, which "
                f"training.log_gradient_norms takes apart, got both; unset one"
            )
        if losses.kd_teacher == "tuned" and (self.evaluation.tuned_text is None or self.is_reader):
            raise ValueError(
                f"losses.kd_teacher tuned needs the text reader of a wire, got evaluation.tuned_text "
                f"{self.evaluation.tuned_text} and prompt.reads {self.prompt.reads}; set evaluation.tuned_text, and "
                f"leave kd_teacher out of a reader's own training"
            )

    def _check_keys_values(self, names: list[str]) -> None:
        encoder, adapter = self.encoder, self.adapter
        # One of them without the other.
        if (encoder.pooling == "memory_kv") != (adapter.kind == "keys_values"):
            raise ValueError(
                f"encoder.pooling memory_kv and adapter.kind keys_values go together, got {encoder.pooling} and "
                f"{adapter.kind}; set both, or neither"
            )
        if adapter.kind != "keys_values":
            return
        if others := [name for name in names if name != encoder.lender]:
            raise ValueError(
                f"adapter.kind keys_values hands over keys and values of the layers of {encoder.lender}, which other receivers "
                f"do not have, got {', '.join(others)}; leave them out, or choose encoder.pooling memory"
            )
        of_slots = ("deep_prefix", "coprocessor")
        named = [name for name in of_slots if getattr(self.features, name) is not None]
        adding = [f"features.{name}" for name in named]
        if adapter.slot_positions:
            adding.append("adapter.slot_positions")
        if self.training.alignment_steps:
            adding.append("training.alignment_steps")
        if adding:
            raise ValueError(
                f"adapter.kind keys_values leaves slots without a vector or keys of their own to change, got "
                f"{', '.join(adding)}; switch that off"
            )

    def _name_senders(self, names: list[str]) -> None:
        """Name the senders, where they are all receivers: a wire that others join keeps its own."""
        if self.encoder.kind == "senders" and not self.encoder.senders:
            senders = tuple(f"receiver:{name}" for name in names)
            encoder = self.encoder.model_copy(update={"senders": senders})
            # The model is frozen once it is made.
            object.__setattr__(self, "encoder", encoder)

    def _check_heads(self, names: list[str]) -> None:
        """Raise where a wire into retrieval heads is asked for what only soft prompts have, or the reverse."""
        encoder, adapter = self.encoder, self.adapter
        prefix = self.prefix
        if prefix is not None and prefix.begin == "reader":
            tuned = self.evaluation.tuned_text
            shape = (prefix.tokens, prefix.layers)
            # The reader's vectors are copied, so both have one shape.
            same = tuned is not None and (tuned.tokens, tuned.layers) == shape
            if not same or self.is_reader:
                raise ValueError(
                    f"prefix.begin reader takes a wire's prefix from its tuned text reader, got evaluation.tuned_text {tuned} "
                    f"and prompt.reads {self.prompt.reads}; set tuned_text with the same tokens and layers"
                )
        if (adapter.kind == "heads") != (encoder.pooling == "tokens") and not self.is_reader:
            raise ValueError(
                f"adapter.kind heads and encoder.pooling tokens go together, got {adapter.kind} and {encoder.pooling}; "
                f"set both, or neither"
            )
        if adapter.kind != "heads":
            if self.closed_form is not None:
                raise ValueError(
                    f"closed_form begins a wire into retrieval heads, got adapter.kind {adapter.kind}; choose heads, or "
                    f"leave closed_form out"
                )
            return
        if encoder.sender_heads and self.closed_form is None:
            raise ValueError(
                "encoder.sender_heads needs closed_form, which measures how large keys and values are, got closed_form null; "
                "set closed_form: {}, or leave sender_heads out"
            )
        if adapter.unfold_blocks and adapter.unfold_width % (2 * encoder.heads):
            raise ValueError(
                f"adapter.unfold_width must be a multiple of 2 × encoder.heads, got {adapter.unfold_width}, {encoder.heads}"
            )
        if self.closed_form is not None:
            if encoder.kind != "senders":
                raise ValueError(
                    f"closed_form regresses from states that are not trained, got encoder.kind {encoder.kind}; choose senders"
                )
            if self.data.send != "context":
                raise ValueError(
                    f"closed_form regresses on the keys and values of contexts, got data.send {self.data.send}; send the "
                    f"context, or leave closed_form out"
                )
            if self.closed_form.metric == "gradients" and not self.data.source.has_questions:
                raise ValueError(
                    f"closed_form.metric gradients needs answers, dataset {self.data.dataset} has none; choose metric plain"
                )
            if strange := [name for name in self.closed_form.weights if name not in names]:
                raise ValueError(
                    f"closed_form.weights must name receivers ({', '.join(names)}), got {', '.join(strange)}"
                )
        training = self.training
        # Path → whether it is asked for; none of them has anything to act on here.
        of_slots: dict[str, Any] = {
            "adapter.slot_positions": adapter.slot_positions,
            "prefix.layers": prefix is not None and prefix.layers,
            "training.alignment_steps": training.alignment_steps,
            "training.coarsening_steps": training.coarsening_steps,
            "training.tokens_per_latent": training.tokens_per_latent,
            "training.gradient_checkpointing": training.gradient_checkpointing,
            "training.compile": training.compile,
            "losses.slot_kd_weight": self.losses.slot_kd_weight,
        }
        for name in ("deep_prefix", "coprocessor", "latent_adapters", "refiner"):
            of_slots[f"features.{name}"] = getattr(self.features, name) is not None
        if given := [path for path, value in of_slots.items() if value]:
            raise ValueError(
                f"adapter.kind heads has no slots in the receiver's sequence to act on, got {', '.join(given)}; leave them out"
            )

    def _check_train_only(self, names: list[str]) -> None:
        training = self.training
        if not training.train_only:
            return
        if strange := [name for name in training.train_only if name not in (*names, "encoder")]:
            raise ValueError(
                f"train_only must name receivers ({', '.join(names)}) or encoder, got {', '.join(strange)}; name one of them"
            )
        if training.init_from is None:
            raise ValueError(
                f"train_only {', '.join(training.train_only)} keeps the other parts as they are, got init_from null; "
                f"name the wire that they come from"
            )
        if "encoder" not in training.train_only and training.log_gradient_norms:
            raise ValueError(
                f"log_gradient_norms needs an encoder that learns, got train_only {', '.join(training.train_only)}; add encoder "
                f"to it, or unset log_gradient_norms"
            )
