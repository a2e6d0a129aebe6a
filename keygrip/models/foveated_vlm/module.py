"""Training of the foveated video-language model and its baseline: loss, metrics by mode and question kind, images."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from keygrip.data.batches import VideoTextBatch, VideoTextStatistics, normalised
from keygrip.data.video_text.conversations import frame_settings
from keygrip.models.foveated_vlm.attention_maps import attention_on_targets
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.foveated_vlm.data_checks import check_data
from keygrip.models.foveated_vlm.dry_run import report_on, step_memory
from keygrip.models.foveated_vlm.figures import show_answers
from keygrip.models.foveated_vlm.frame_cache import Encoded, FrameCache, frame_names
from keygrip.models.foveated_vlm.hub_files import hub_files
from keygrip.models.foveated_vlm.loss import KERNELS, Kernel, check_liger
from keygrip.models.foveated_vlm.monitor import RowCounts, health_figures, ranges_of
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.rows import TextRows, text_rows
from keygrip.models.foveated_vlm.scores import REFINED, BatchScores, Scores, comparisons, gather_values, score
from keygrip.models.foveated_vlm.streaming import NO_STREAM, VideoStream
from keygrip.models.foveated_vlm.video_language import VideoLanguageNetwork, VLMOutput
from keygrip.models.language.tokenizers import TOKENIZER_STATE, ChatTokenizer
from keygrip.models.nn.processor_attention import trained_on
from keygrip.training.checkpoints import stored_beside_weights
from keygrip.training.distributed import global_mean, global_sum, world_size
from keygrip.training.lightning_loops import completes_step
from keygrip.training.memory import StepMemory
from keygrip.training.monitors import RangeChecks, gradient_norm
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import ReadWhere, model_part
from keygrip.training.system import System

log = logging.getLogger(__name__)

SHOWN_ROWS = 4
COARSE_MISSES = 50  # coarse steps in a row without a question of coarse_kinds, after which training stops


@model_part(from_checkpoint={"init_from": None})
class FoveatedVLMModule(System):
    """Train a video-language network with the cross-entropy of text tokens, in one of the network's modes.

    Args:
        network: the network without training code, foveated or baseline.
        collator: converts conversations to tokens; the data module uses it too.
        optimizer: the optimizer recipe.
        mode: the mode of training; one of the network's modes.
        val_modes: the modes that validation computes; None: all modes of the network.
        refinement: the largest number of times that a training step recomputes the queries from the tokens that they
            produced; each step samples a number from 0 to this. Queries then depend on fine tokens, as at inference.
        refinement_from: share of the run before refinement begins.
        coarse_share: share of the training steps in mode coarse_only, which answer from the coarse pass alone, so that
            coarse tokens learn to hold what they can: the queries of the fine pass are computed from them.
        coarse_kinds: kinds of the questions whose answers carry the loss in those steps; None: all kinds.
        loss_chunk: number of tokens whose logits are in memory at the same time.
        loss_kernel: of the training loss: `chunked`, or `liger`, a fused Triton kernel for GPUs with its own chunks.
        vision_cache_gb: memory for the outputs of a frozen encoder on training and validation frames.
        init_from: run folder or checkpoint of such a model; training starts from its weights (EMA if it has them).
            It is read when training is set up, so that a trained module does not need it.
        monitor_every_n_steps: training steps between health checks; 0: none.
        monitor_from_step: first step with health warnings.
        log_images_every_n_steps: training steps between images in TensorBoard; 0: none.

    Raises:
        ValueError: a mode that the network does not have, refinement or a share of coarse steps in a mode other than
            coarse_fine, or a frame cache for an encoder that is trained.
    """

    read_where: ClassVar = {
        "refinement_from": ReadWhere("refinement"),
        "coarse_kinds": ReadWhere("coarse_share"),
        "monitor_from_step": ReadWhere("monitor_every_n_steps"),
    }
    batch_type = VideoTextBatch
    evaluation_kind = "video_text"
    about = "foveated_vlm, a video-language model: one visual token per frame, chosen by a query"
    toy_overrides = (
        *("data=robot_tours", "backbone.image_size=64", "backbone.width=32", "backbone.depth=2", "backbone.heads=2"),
        *("data.sources.tours.make.options.train=6", "data.sources.tours.make.options.val=2"),
        *("data.sources.tours.make.options.test=2", "data.sources.tours.make.options.processes=1"),
        *("data.sources.tours_1=null", "data.sources.tours_2=null", "data.sources.tours_3=null"),
        *("data.curriculum=null", "data.sources.texts.make.options={train: 8, val: 2, test: 2}", "data.batch_size=2"),
    )
    usage = """from keygrip.inference.video_chat import VideoChat

chat = VideoChat.from_pretrained("{name}")
video, question = {"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "What happens?"}
chat.generate([{"role": "user", "content": [video, question]}])"""

    def __init__(
        self,
        network: VideoLanguageNetwork,
        collator: ConversationCollator,
        optimizer: AdamW,
        mode: str = "coarse_fine",
        val_modes: Sequence[str] | None = None,
        refinement: int = 0,
        refinement_from: float = 0.4,
        coarse_share: float = 0.0,
        coarse_kinds: Sequence[str] | None = None,
        loss_chunk: int = 4096,
        loss_kernel: Kernel = "chunked",
        vision_cache_gb: float = 0.0,
        init_from: str | None = None,
        monitor_every_n_steps: int = 100,
        monitor_from_step: int = 300,
        log_images_every_n_steps: int = 500,
    ) -> None:
        super().__init__(optimizer)
        val_modes = network.modes if val_modes is None else tuple(val_modes)
        for name, chosen in (("mode", [mode]), ("val_modes", val_modes)):
            for each in chosen:
                if each not in network.modes:
                    raise ValueError(f"model.{name}={each}: {type(network).__name__} has {', '.join(network.modes)}")
        if refinement < 0 or not 0 <= refinement_from <= 1:
            raise ValueError("model.refinement must not be negative, and refinement_from lies in 0..1")
        if refinement and mode != "coarse_fine":
            raise ValueError(f"model.refinement={refinement} has no effect in mode={mode}: set it to 0")
        if not 0 <= coarse_share < 1:
            raise ValueError(f"model.coarse_share={coarse_share} must lie in 0..1; all steps are mode=coarse_only")
        if coarse_share and mode != "coarse_fine":
            raise ValueError(f"model.coarse_share={coarse_share} has no effect in mode={mode}: set it to 0")
        if coarse_kinds is not None and not coarse_kinds:
            raise ValueError("model.coarse_kinds=[] leaves the coarse steps nothing to learn: null trains on all kinds")
        if loss_chunk < 1 or min(monitor_every_n_steps, log_images_every_n_steps) < 0:
            raise ValueError("model: loss_chunk from 1, monitor_every_n_steps and log_images_every_n_steps from 0 on")
        if monitor_every_n_steps and not isinstance(network, FoveatedVLM):
            raise ValueError(
                f"model.monitor_every_n_steps={monitor_every_n_steps}: health is of queries, and a "
                f"{type(network).__name__} has none; 0"
            )
        if loss_kernel not in KERNELS:
            raise ValueError(f"model.loss_kernel={loss_kernel!r}: must be one of {', '.join(KERNELS)}")
        if vision_cache_gb < 0 or (vision_cache_gb and network.backbone.trainable != "frozen"):
            raise ValueError(
                f"model.vision_cache_gb={vision_cache_gb} keeps what a frozen encoder makes of frames: it needs "
                "backbone.trainable=frozen, and is not negative"
            )
        self.network, self.collator = network, collator
        self.frame_cache = FrameCache(vision_cache_gb) if vision_cache_gb else None
        self.mode, self.val_modes = mode, tuple(dict.fromkeys([*val_modes, mode]))
        self.refinement, self.refinement_from = refinement, refinement_from
        self.coarse_share = coarse_share
        self.coarse_kinds = None if coarse_kinds is None else frozenset(coarse_kinds)
        self.row_counts = RowCounts(network.tokens_per_frame, network.pack_rows)
        self._coarse_misses = 0  # coarse steps in a row whose batch has none of these kinds
        self._learns_nothing = False  # whether the current step is one of them; processes may differ
        self.loss_chunk, self.init_from = loss_chunk, init_from
        self.loss_kernel: Kernel = loss_kernel
        self.monitor_every_n_steps, self.log_images_every_n_steps = monitor_every_n_steps, log_images_every_n_steps
        self.health = RangeChecks(ranges_of(network), monitor_from_step)
        self.image_options: dict[str, Any] = {}  # how frames were prepared: see `frame_settings`
        self._scores: dict[str, Scores] = {}
        self._on_targets: dict[str, list[float]] = {}

    @property
    def headline_metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Metrics used to compare runs."""
        kinds = ("", "_mark", "_cue", "_glance", "_caption")
        modes = [f"val/{mode}/accuracy{kind}" for mode in (*self.val_modes, REFINED) for kind in kinds]
        losses = [f"val/{mode}/loss" for mode in (*self.val_modes, REFINED)]
        return ("train/loss", "val/loss", *losses, *modes, "val/gap", "val/gap_refined", "val/attention_mark")

    # ------------------------------------------------------------------ set-up

    def set_statistics(self, statistics: VideoTextStatistics) -> None:
        """Load the tokenizer and the weights of `init_from`, if it is set, and store how images are prepared.

        Raises:
            FileNotFoundError, ValueError: the checkpoint of `init_from` is missing, or of another model or tokenizer;
                or the data do not fit (`check_data`).
        """
        check_data(self.network, self.collator, self.coarse_kinds or (), statistics)
        self.collator.prepare(statistics.folder, statistics.texts)
        self._check_tokenizer()
        if self.init_from is not None and not self.resumed:
            self._load_initial_weights(self.init_from)
        preparation = (statistics.image_size, statistics.fit, statistics.max_frames, statistics.image_frames)
        self.image_options = frame_settings(*preparation)

    def check_run(self, max_steps: int, begins: bool) -> None:
        """See `System`."""
        super().check_run(max_steps, begins)
        if not begins:
            return
        query_source = self.network.query_source if isinstance(self.network, FoveatedVLM) else None
        if self.refinement and self.refinement_from < 1 and query_source == "coarse":
            raise ValueError(
                f"model.refinement={self.refinement} computes queries from fine tokens in training, and with "
                "model.network.query_source=coarse inference computes them from coarse tokens: set model.refinement=0"
            )
        if self.collator.pack_rows != self.network.pack_rows:
            raise ValueError(
                f"collator.pack_rows={self.collator.pack_rows}: the padding that is reported before training is that "
                f"of model.network.pack_rows={self.network.pack_rows}: set that, and leave collator.pack_rows out"
            )

    def _load_initial_weights(self, path: str) -> None:
        source_model = self.take_weights(path, "a video-language model")
        if not source_model.tokenizer.same_words(self.tokenizer, template=False):
            raise ValueError(
                f"model.init_from={path} was trained with another tokenizer: its weights mean other words. Use "
                "the same language=..., and for a tokenizer trained on the shards "
                "language.tokenizer.init_from=${model.init_from}. For weights of language=smollm2_* or qwen2_5_* from "
                "before 30 November 2026, begin again with stage 1, or convert the published weights again"
            )
        if not source_model.tokenizer.same_words(self.tokenizer):  # an export's, which has the system turn of training
            log.warning("conversations are laid out by another chat template than that of %s, which it replaces", path)

    def started_from(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """As in the parent class, but a scale of the visual tokens that this run sets replaces that of the weights."""
        return self.network.with_own_scale(weights)

    @property
    def longest_row(self) -> int:
        """Length of the language model's context in positions, visual and text tokens together; the data module leaves
        out longer rows."""
        return self.network.language.context

    @property
    def query_passes(self) -> float:
        """Mean number of passes of the language model that predict queries, over the steps of a run."""
        least, most = (self.network.query_passes(self.mode, times) for times in (0, self.refinement))
        return (1 - self.coarse_share) * (least + (1 - self.refinement_from) * (most - least) / 2)

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The collator's tokenizer. Raises ValueError: it has none yet."""
        if self.collator.tokenizer is None:
            raise ValueError("The model has no tokenizer: train it, or load a checkpoint written by keygrip.train.")
        return self.collator.tokenizer

    def _check_tokenizer(self) -> None:
        if self.tokenizer.size > self.network.language.vocabulary:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.size} tokens and the language model "
                f"{self.network.language.vocabulary}: language.model and language.tokenizer must belong together"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[TOKENIZER_STATE] = {"tokenizer": self.tokenizer.state(), "images": self.image_options}

    def resume_data(self, datamodule: Any, checkpoint: Mapping[str, Any]) -> None:
        """Use the checkpoint's tokenizer in a resumed run, even if another one is stored with the data by now.

        Raises:
            ValueError: the checkpoint has no tokenizer.
        """
        self._restore_tokenizer(stored_beside_weights(checkpoint, TOKENIZER_STATE, "tokenizer"))
        if isinstance(collator := getattr(datamodule, "collator", None), ConversationCollator):
            collator.tokenizer = self.collator.tokenizer

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        former = "pictures" in (checkpoint.get(TOKENIZER_STATE) or {})  # its key in earlier checkpoints
        key = "pictures" if former else "images"
        stored = stored_beside_weights(checkpoint, TOKENIZER_STATE, "tokenizer", key)
        self._restore_tokenizer(stored)
        self.image_options = frame_settings(**stored[key])

    def _restore_tokenizer(self, stored: Mapping[str, Any]) -> None:
        self.collator.tokenizer = ChatTokenizer.from_state(stored["tokenizer"], self.network.language.vocabulary)
        self._check_tokenizer()

    def on_fit_start(self) -> None:
        """Raises ValueError: the loss's kernel cannot be used on this machine."""
        if self.loss_kernel == "liger":
            check_liger(self.device)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self._is_health_due():
            norm = gradient_norm(self.network.parameters())  # in every process, also where the batch has no question
            if not self._learns_nothing:  # otherwise zero, which is no fault
                self._report_health({"grad_norm_clipped": norm})

    # ------------------------------------------------------------------ steps

    def inputs(self, batch: VideoTextBatch) -> tuple[Tensor, TextRows]:
        """Return normalised frames and the rows of text."""
        return batch.normalised(self.network.backbone.mean, self.network.backbone.std), text_rows(batch)

    def as_input(self, frames: np.ndarray) -> Tensor:
        """Convert one video, uint8 [F, S, S, 3], to the network's input: [1, F, 3, S, S] on the module's device."""
        pixels = torch.from_numpy(np.require(frames, requirements=["C", "W"])).to(self.device).permute(0, 3, 1, 2)
        video = normalised(pixels, self.network.backbone.mean, self.network.backbone.std)[None]
        return video.to(next(self.network.backbone.parameters()).dtype)

    def stream(
        self,
        question: str,
        mode: str | None = None,
        seconds: Sequence[float] | None = None,
        answer_tokens: int | None = None,
    ) -> VideoStream:
        """Open a stream for a question about a live video: `push(frame)` for each frame, `answer()` at any time.

        Args:
            mode: see `StreamingSession`; None: `answer_mode`.
            seconds, answer_tokens: see `VideoStream`.

        Raises:
            ValueError: a baseline, a mode in which a frame depends on later frames, or `seconds` missing but required.
        """
        if not isinstance(self.network, FoveatedVLM):
            raise ValueError(NO_STREAM.format(type(self.network).__name__))
        return VideoStream(self, question, mode or self.answer_mode, seconds, answer_tokens)

    def forward(self, batch: VideoTextBatch, mode: str, refinement: int = 0) -> VLMOutput:
        frames, rows = self.inputs(batch)
        return self.network(frames, rows, mode, refinement)

    def score(self, output: VLMOutput, batch: VideoTextBatch) -> BatchScores:
        """Compute the loss and the exact matches of a network's output for a batch, per row."""
        tokens = None if self.collator.tokenizer is None else self.collator.tokenizer.size
        weight = self.network.language.head_weight
        return score(output, batch, weight, self.loss_chunk, self.loss_kernel, tokens)

    def refinement_now(self) -> int:
        """Return how often this step recomputes the queries: a function of the step, the same in every process."""
        if not self.refinement or self.progress() < self.refinement_from:
            return 0
        generator = torch.Generator().manual_seed(self.global_step)
        return int(torch.randint(self.refinement + 1, (), generator=generator))

    def mode_now(self) -> str:
        """Return the mode in which this step trains: a function of the step, the same in every process."""
        generator = torch.Generator().manual_seed(self.global_step)
        coarse = self.coarse_share and float(torch.rand((), generator=generator)) < self.coarse_share
        return "coarse_only" if coarse else self.mode

    def _restrict_to_kinds(self, batch: VideoTextBatch, kinds: frozenset[str]) -> VideoTextBatch:
        """Return the batch with a loss on questions of these kinds only; ValueError if too many steps have none."""
        self._coarse_misses = 0 if kinds & set(batch.kind) else self._coarse_misses + 1
        if self._coarse_misses >= COARSE_MISSES:
            raise ValueError(
                f"model.coarse_kinds={sorted(kinds)}: no question of these kinds in {COARSE_MISSES} coarse steps one "
                f"after another (the last batch has {', '.join(sorted(set(batch.kind)))}): name kinds of this data"
            )
        return batch.answering(kinds)

    def encoder_inputs(self, batch: VideoTextBatch, rows: TextRows) -> tuple[Tensor, Encoded | None]:
        """Return the network's arguments `frames` and `kv`: normalised frames and None; with a frame cache, the raw
        frames, whose pixels are not read, and the encoder's outputs."""
        network, backbone = self.network, self.network.backbone
        if self.frame_cache is None or not any(rows.frame_counts):
            return batch.normalised(backbone.mean, backbone.std), None

        def encode(frames: Tensor) -> Encoded:
            return network.encode(normalised(frames, backbone.mean, backbone.std))

        return batch.frames, self.frame_cache.get(frame_names(batch), batch.frames[batch.frame_mask], encode)

    def training_step(self, batch: VideoTextBatch, batch_idx: int) -> Tensor:
        rows = text_rows(batch)
        with trained_on(batch.frames.device):
            frames, kv = self.encoder_inputs(batch, rows)
            mode = self.mode_now()
            if mode != self.mode and self.coarse_kinds is not None:
                batch = self._restrict_to_kinds(batch, self.coarse_kinds)
            self._learns_nothing = mode != self.mode and self._coarse_misses > 0
            refinement = self.refinement_now() if mode == self.mode else 0
            output = self.network(frames, rows, mode, refinement, kv)
        scores = self.score(output, batch)
        loss = global_mean(scores.loss, scores.tokens)
        size, name = len(batch), "train/" if mode == self.mode else "train/coarse_"
        global_loss = global_sum(loss) / world_size()  # processes hold different shares of the batch's rows
        right, answered = global_sum(torch.stack([scores.exact.sum(), scores.answered.sum()]))
        if not self._learns_nothing:  # otherwise a loss and an accuracy of 0, of no question
            self.log(f"{name}loss", global_loss, prog_bar=True, batch_size=size)
            self.log(f"{name}accuracy", right / answered.clamp_min(1), prog_bar=True, batch_size=size)
        self.row_counts.add(batch, rows, self.network.query_passes(mode, refinement))
        if self.due(self.trainer.log_every_n_steps):  # type: ignore[attr-defined]
            for figure, value in self.row_counts.report(self.device).items():
                self.log(f"train/{figure}", value, batch_size=size)
        if self._is_health_due():
            assert isinstance(self.network, FoveatedVLM)
            self._report_health(
                health_figures(self.network, output, rows, frames, scores, partial(self.score, batch=batch))
            )
        if self._shown(self.log_images_every_n_steps) and completes_step(self.trainer):
            self._show("train", batch)
        return self.mean_of_step(loss, scores.tokens)

    def on_validation_epoch_start(self) -> None:
        self._scores = defaultdict(Scores)
        self._on_targets = defaultdict(list)

    def validation_step(self, batch: VideoTextBatch, batch_idx: int) -> None:
        rows = text_rows(batch)
        frames, kv = self.encoder_inputs(batch, rows)
        for mode, (network_mode, refinement) in self._validation_modes().items():
            output = self.network(frames, rows, network_mode, refinement, kv)
            self._scores[mode].add(self.score(output, batch), batch.kind)
            if output.passes is not None:
                kv = output.passes.kv  # computed once for all modes
                if mode == self._attention_mode():
                    for kind, attention in attention_on_targets(self.network, output, rows, batch):
                        self._on_targets[kind].append(attention)
        if batch_idx == 0 and self._shown(1 if self.log_images_every_n_steps else 0):
            self._show("val", batch)

    def on_validation_epoch_end(self) -> None:
        figures = {mode: scores.figures() for mode, scores in self._scores.items()}
        for mode, values in figures.items():
            for name, value in values.items():
                self.log(f"val/{mode}/{name}", value, rank_zero_only=False)
        mode_figures = figures.get(self.mode, {})
        if "loss" in mode_figures:
            self.log("val/loss", mode_figures["loss"], prog_bar=True)
            self.log("val/accuracy", mode_figures.get("accuracy", float("nan")), prog_bar=True)
        compared = comparisons(figures)
        for name, value in compared.items():
            self.log(f"val/{name}", value)
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self.health.check({f"val/{name}": value for name, value in compared.items()}, self.global_step)
        for kind, shares in gather_values(self._on_targets).items():
            self.log(f"val/attention_{kind}", sum(shares) / len(shares))

    def _validation_modes(self) -> dict[str, tuple[str, int]]:
        """Return what validation computes: for each name, the network's mode and the number of refinements."""
        modes = {mode: (mode, 0) for mode in self.val_modes}
        if self.refinement and "coarse_fine" in modes:
            modes[REFINED] = ("coarse_fine", self.refinement)
        return modes

    @property
    def answer_mode(self) -> str:
        """Default mode for answers: the network's last one, or coarse_only if the model was trained in it, since its
        other queries were never trained."""
        return "coarse_only" if self.mode == "coarse_only" else self.network.modes[-1]

    def _attention_mode(self) -> str:
        """Return the mode whose attention is reported: that of inference if it is validated, else that of training."""
        return "autoregressive" if "autoregressive" in self.val_modes else self.mode

    # ------------------------------------------------------------------ health

    def _is_health_due(self) -> bool:
        return isinstance(self.network, FoveatedVLM) and self.due(self.monitor_every_n_steps)

    def _report_health(self, figures: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in figures.items()}
        for name, value in values.items():
            self.log(f"health/{name}", value)
        if self.trainer.is_global_zero:
            self.health.check(values, self.global_step)

    # ------------------------------------------------------------------ images

    def _shown(self, every: int) -> bool:
        return bool(every) and self.global_step % every == 0 and not self.trainer.sanity_checking

    @torch.no_grad()
    def _show(self, split: str, batch: VideoTextBatch) -> None:
        if not self.shows_images:
            return
        was_training = self.training
        self.eval()
        image, text = show_answers(self, batch, SHOWN_ROWS)
        self.train(was_training)
        if image is not None:
            self.show_image(f"{split}/query_attention", image)
        self.show_text(f"{split}/answers", text)

    # ------------------------------------------------------------------ dry run

    def dry_run(self, batch: VideoTextBatch) -> dict[str, Any]:
        """Report shapes, parameter counts by group and memory of one batch in each mode, without training. On a CPU,
        only the first videos of a large batch are used."""
        return report_on(self, batch)

    def step_memory(self, batch: VideoTextBatch, bf16: bool, ema: bool, accumulated: bool = False) -> StepMemory:
        """Return the memory of a training step on a batch: measured if the module is on a GPU, else calculated."""
        return step_memory(self, batch, bf16, ema, accumulated)

    def export_files(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what an export holds in addition to the weights: files by name (tokenizer, chat template, processor),
        and entries of config.json for other programs."""
        return hub_files(self)

    def sharded_parts(self) -> list[Any]:
        """Return no parts: the number of language model calls depends on the rows of a process (text alone, the longest
        video), and FSDP waits for all processes in each call. Instead, FSDP gathers the whole model once per step."""
        return []

    def compiled_parts(self) -> list[Any]:
        """See `System`."""
        return self.network.language.sharded_parts()
