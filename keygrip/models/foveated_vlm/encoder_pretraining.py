"""Encoder pretraining with dense labels on the simulator's tours, where every cube's place and digit is known.

With the language model's loss alone a random encoder learns nothing within minutes: queries retrieve noise until its
features hold the digits, and the encoder gets no useful gradient until queries attend to the right place. So the
encoder is first trained for some minutes to predict, for each patch, which cube is there, which digit is on it and
whether the gripper points at it. Its CLS token predicts the colour and the digit of the cube pointed at. Deep queries,
one learned query per colour, retrieve the digit of the cube of their colour, as the language model's queries will do
later. A run of this pretraining is a source of backbone weights like any other (`backbone.init_from=runs/...`);
`PretrainingStage` trains one if it is missing.

Legend: M frames, N = h * w patches, K cubes of all frames, D backbone width, C colours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.data.batches import Movable, VideoTextBatch, VideoTextSample, normalised, stack_frames
from keygrip.models.backbone import DinoBackbone
from keygrip.models.nn.processor_attention import trained_on
from keygrip.models.nn.standardise import RunningStandardisation
from keygrip.training.distributed import check_weights, global_mean, global_sum, mean_over_processes
from keygrip.training.optimizers import AdamW
from keygrip.training.parts import model_part
from keygrip.training.system import System

if TYPE_CHECKING:
    from keygrip.data.batches import VideoTextStatistics

DIGITS = 10
IGNORED = -100  # the default ignore_index of torch's cross_entropy
COVERED = 0.35  # share of a patch that a cube must cover to be the patch's label


@dataclass
class EncoderPretrainingBatch(Movable):
    """Frames and the cubes in them.

    Args:
        frames: uint8 [M, 3, S, S].
        frame: int64 [K], the frame of each cube. pixel: float32 [K, 2], its centre (x, y) in frames of size S.
        area: float32 [K], its visible pixels.
        colour: int64 [K]. digit: int64 [K], IGNORED where it cannot be read. pointed: int64 [K], 1 if the gripper
            points at the cube.
    """

    frames: Tensor
    frame: Tensor
    pixel: Tensor
    area: Tensor
    colour: Tensor
    digit: Tensor
    pointed: Tensor

    def sizes(self) -> dict[str, int]:
        """Return the size of the batch, for reports."""
        return {"frames": len(self.frames)}

    def __len__(self) -> int:
        return len(self.frames)


@model_part
class EncoderPretrainingCollator:
    """Make encoder-pretraining batches from tours; the metadata of the questions gives the positions of the cubes.

    Args:
        colours: names of the colours; their order gives their class numbers.
    """

    def __init__(self, colours: Sequence[str]) -> None:
        self.colours = {name: number for number, name in enumerate(colours)}

    def __call__(self, samples: list[VideoTextSample]) -> EncoderPretrainingBatch:
        """Make a batch. Raises ValueError: a sample without frames or without such metadata, or an unknown colour."""
        stacked, mask = stack_frames(samples)
        starts = mask.sum(1).cumsum(0).tolist()
        cubes: list[tuple[int, float, float, float, int, int, int]] = []
        for sample, stop in zip(samples, starts, strict=True):
            sample_cubes = cubes_of(sample)
            if not sample_cubes:
                raise ValueError(
                    f"{sample.key} has no labels of the cubes in its frames: this pretraining needs tours "
                    "(data.sources.*), and all of their frames (data.max_frames)"
                )
            for (frame, colour), cube in sample_cubes.items():
                if colour not in self.colours:
                    raise ValueError(f"{sample.key} has a {colour} cube; collator.colours does not list {colour}")
                x, y = cube["pixel"]
                first_frame = stop - len(sample.frames)
                cubes.append(
                    (first_frame + frame, x, y, cube["area"], self.colours[colour], cube["digit"], int(cube["pointed"]))
                )
        frames, xs, ys, areas, colours, digits, pointed = (list(column) for column in zip(*cubes, strict=True))
        return EncoderPretrainingBatch(
            frames=stacked[mask],
            frame=torch.tensor(frames),
            pixel=torch.tensor([xs, ys], dtype=torch.float32).T.contiguous(),
            area=torch.tensor(areas, dtype=torch.float32),
            colour=torch.tensor(colours),
            digit=torch.tensor(digits),
            pointed=torch.tensor(pointed),
        )


def cubes_of(sample: VideoTextSample) -> dict[tuple[int, str], dict[str, Any]]:
    """Return a tour's cubes: (frame, colour) -> pixel, area, digit (IGNORED if no question gives it) and pointed."""
    cubes: dict[tuple[int, str], dict[str, Any]] = {}
    for conversation in sample.conversations:
        evidence = conversation.evidence
        if conversation.kind not in ("mark", "glance") or not {"frame", "pixel"} <= evidence.keys():
            continue
        cube = cubes.setdefault(
            (int(evidence["frame"]), str(evidence["colour"])),
            {
                "pixel": [float(v) for v in evidence["pixel"]],
                "area": float(evidence["pixels_seen"]),
                "digit": IGNORED,
                "pointed": False,
            },
        )
        if conversation.kind == "mark":
            cube["digit"] = int(conversation.turns[-1].text)
        else:
            cube["pointed"] = True
    return cubes


def patch_labels(batch: EncoderPretrainingBatch, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Return the labels of each patch: colour (0: no cube), digit and pointed, int64 [M, h * w] each.

    The label of a patch is the cube whose centre lies in it, otherwise a cube that covers a share of at least COVERED.
    Patches that a cube only touches have the label IGNORED.
    """
    size, device = batch.frames.shape[-1], batch.frames.device
    overlap = []
    side = batch.area.clamp_min(1).sqrt()
    for axis, count in ((1, grid[0]), (0, grid[1])):
        cell = size / count
        low = torch.arange(count, device=device) * cell
        centre = batch.pixel[:, axis, None]
        extent = torch.minimum(low + cell, centre + side[:, None] / 2) - torch.maximum(low, centre - side[:, None] / 2)
        overlap.append(extent.clamp_min(0) / cell)  # [K, count]
    cover = (overlap[0][:, :, None] * overlap[1][:, None, :]).flatten(1)  # [K, N]
    row = (batch.pixel[:, 1] / size * grid[0]).long().clamp(0, grid[0] - 1)
    column = (batch.pixel[:, 0] / size * grid[1]).long().clamp(0, grid[1] - 1)
    cover[torch.arange(len(cover), device=device), row * grid[1] + column] = 1.0
    patches = grid[0] * grid[1]
    colour = torch.zeros(len(batch.frames), patches, dtype=torch.int64, device=device)
    digit = torch.full_like(colour, IGNORED)
    pointed = torch.full_like(colour, IGNORED)
    cube, patch = (cover > 0.02).nonzero(as_tuple=True)
    colour[batch.frame[cube], patch] = IGNORED
    for level in (COVERED, 0.999):  # the cube whose centre lies in the patch decides
        cube, patch = (cover >= level).nonzero(as_tuple=True)
        index = (batch.frame[cube], patch)
        colour[index], digit[index], pointed[index] = batch.colour[cube] + 1, batch.digit[cube], batch.pointed[cube]
    return {"colour": colour, "digit": digit, "pointed": pointed}


@model_part
class EncoderPretraining(nn.Module):
    """A backbone with linear heads: patches predict colour, digit and pointed, CLS predicts the colour and digit of the
    cube pointed at, and a deep query per colour predicts the digit of the cube of that colour.

    Args:
        colours: C.
        weight_std: standard deviation of the blocks' weight matrices at initialisation; None: that of the backbone
            (0.02, which suits the widths of DINO; at width 128 attention stays uniform for long).
        standardise: heads receive features minus their mean, divided by their standard deviation, as probes of frozen
            features do (He et al. 2022, arXiv:2111.06377, appendix A.1). Otherwise the information in a few features
            of small spread is learned too slowly.
    """

    def __init__(
        self, backbone: DinoBackbone, colours: int, weight_std: float | None = None, standardise: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        if weight_std is not None:
            if backbone.loaded_weights != "random":
                raise ValueError("model.network.weight_std is for random weights: set it to null with backbone.weights")
            for part in backbone.net.blocks.modules():
                if isinstance(part, nn.Linear):
                    nn.init.trunc_normal_(part.weight, std=weight_std)
        self.sizes = {"colour": colours + 1, "digit": DIGITS, "pointed": 2}
        self.patch_head = nn.Linear(backbone.embed_dim, sum(self.sizes.values()))
        self.cls_head = nn.Linear(backbone.embed_dim, colours + DIGITS)
        self.asked_head = nn.Linear(backbone.embed_dim, DIGITS)
        self.asking_queries = nn.Parameter(torch.randn(colours, backbone.embed_dim))
        self.standards = nn.ModuleDict(
            {
                name: RunningStandardisation(backbone.embed_dim) if standardise else nn.Identity()
                for name in ("patches", "cls", "found")
            }
        )
        self.colours = colours

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[int, int]]:
        """Images [M, 3, S, S] -> logits [M, N, classes] of patches, [M, classes] of the whole frame (`asked`: [M, C,
        DIGITS], of each colour's query), and the grid."""
        features, kv = self.backbone.forward_with_kv(images)
        query_output = self.backbone.query(self.asking_queries.expand(len(images), -1, -1), kv)
        patches, cls, query_output = (
            self.standards[name](values.float().flatten(0, -2)).view(values.shape)
            for name, values in (("patches", features.patches), ("cls", features.cls), ("found", query_output))
        )
        patch_logits = self.patch_head(patches).float().split(list(self.sizes.values()), dim=-1)
        frame_logits = self.cls_head(cls).float().split([self.colours, DIGITS], dim=-1)
        names = ("colour", "digit")
        return (
            dict(zip(self.sizes, patch_logits, strict=True)),
            dict(zip(names, frame_logits, strict=True)) | {"asked": self.asked_head(query_output).float()},
            features.grid,
        )


@model_part
class EncoderPretrainingModule(System):
    """Train an `EncoderPretraining`; `val/digit` is the share of patches labelled with a digit that predict it.

    Args:
        network: the network without training code. collator: for the data module. optimizer: the optimizer recipe.
        weights: loss weights: colour, digit and pointed of patches, colour and digit of the frame, digits asked for.

    Raises:
        ValueError: weights that do not name every loss, or that are negative or all 0, or a collator with another
            number of colours.
    """

    # batch type of the data module; this model's own collator converts its samples to EncoderPretrainingBatch
    batch_type = VideoTextBatch
    toy_overrides = (
        *("data=robot_tours", "backbone.image_size=64", "backbone.width=32", "backbone.depth=2", "backbone.heads=2"),
        *("data.sources.tours.make.options.train=6", "data.sources.tours.make.options.val=2"),
        *("data.sources.tours.make.options.test=2", "data.sources.tours.make.options.processes=1"),
        *("data.sources.tours_1=null", "data.sources.tours_2=null", "data.sources.tours_3=null"),
        *("data.curriculum=null", "data.sources.texts=null", "data.batch_size=2", "data.questions=null"),
    )
    headline_metrics = (
        "train/loss",
        "val/digit",
        "val/colour",
        "val/pointed",
        "val/frame_colour",
        "val/frame_digit",
        "val/asked",
    )

    def __init__(
        self,
        network: EncoderPretraining,
        collator: EncoderPretrainingCollator,
        optimizer: AdamW,
        weights: Mapping[str, float],
    ) -> None:
        super().__init__(optimizer)
        names = {"colour", "digit", "pointed", "frame_colour", "frame_digit", "asked"}
        if set(weights) != names:
            raise ValueError(f"model.weights must name exactly {', '.join(sorted(names))}; it names {sorted(weights)}")
        check_weights({f"model.weights.{name}": weight for name, weight in weights.items()})
        if len(collator.colours) != network.colours:
            raise ValueError(
                f"model.network.colours={network.colours}, and collator.colours has {len(collator.colours)} names"
            )
        self.network, self.collator = network, collator
        self.weights = dict(weights)
        self._right: dict[str, list[float]] = {}

    def losses(self, batch: EncoderPretrainingBatch) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Return the losses by name, and (number right, number counted) by name."""
        backbone = self.network.backbone
        with trained_on(batch.frames.device):
            patches, frame, grid = self.network(normalised(batch.frames, backbone.mean, backbone.std))
        labels = patch_labels(batch, grid)
        ignored_labels = torch.full((len(batch), self.network.colours), IGNORED, device=batch.frame.device)
        labels["frame_colour"], labels["frame_digit"] = ignored_labels[:, 0].clone(), ignored_labels[:, 0].clone()
        labels["asked"] = ignored_labels
        is_pointed = batch.pointed == 1
        labels["frame_colour"][batch.frame[is_pointed]] = batch.colour[is_pointed]
        labels["frame_digit"][batch.frame[is_pointed]] = batch.digit[is_pointed]
        labels["asked"][batch.frame, batch.colour] = batch.digit
        asked_logits = frame.pop("asked")
        logits = patches | {f"frame_{name}": value for name, value in frame.items()} | {"asked": asked_logits}
        losses, right = {}, {}
        for name, values in logits.items():
            targets = labels[name].flatten()
            values = values.reshape(len(targets), -1)
            counted = targets != IGNORED
            total = F.cross_entropy(values, targets, ignore_index=IGNORED, reduction="sum")
            losses[name] = global_mean(total, counted.sum())
            scored = counted & (targets > 0) if name == "colour" else counted
            right[name] = (((values.argmax(-1) == targets) & scored).sum(), scored.sum())
        return losses, right

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()

    def sharded_parts(self) -> list[nn.Module]:
        """Return no part: the encoder's blocks are also called in parts, not only through their ``forward``."""
        return []

    def loss(self, batch: EncoderPretrainingBatch) -> Tensor:
        """The loss of a training step on a batch."""
        return self._total(self.losses(batch)[0])

    def training_step(self, batch: EncoderPretrainingBatch, batch_idx: int) -> Tensor:
        losses, right = self.losses(batch)
        loss = self._total(losses)
        self.log_values("train", mean_over_processes({"total": loss}), len(batch))
        good, count = global_sum(torch.stack(right["digit"]))
        self.log("train/digit", good / count.clamp_min(1), prog_bar=True, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._right = defaultdict(lambda: [0.0, 0.0])

    def validation_step(self, batch: EncoderPretrainingBatch, batch_idx: int) -> None:
        for name, (good, count) in self.losses(batch)[1].items():
            self._right[name][0] += float(good)
            self._right[name][1] += float(count)

    def on_validation_epoch_end(self) -> None:
        for name, (good, count) in self._right.items():
            totals = global_sum(torch.tensor([good, count], dtype=torch.float64, device=self.device))
            if totals[1]:  # over all processes; without any sample there is nothing to log
                self.log(f"val/{name}", float(totals[0] / totals[1]), prog_bar=name == "digit", sync_dist=True)

    def set_statistics(self, statistics: VideoTextStatistics) -> None:
        """Check the statistics of the data; nothing is stored.

        Raises:
            ValueError: some of the questions that give the positions of cubes are not read.
        """
        if kinds := sorted({"mark", "glance"} & statistics.partial_kinds):
            raise ValueError(
                f"not all questions of the kinds {', '.join(kinds)} are read, and a cube that none of them names would "
                "be trained on as no cube: set data.questions=null and data.val_questions=null, and let "
                "data.sources.NAME.kinds be null or hold mark and glance"
            )
