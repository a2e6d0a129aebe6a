"""Semantics for the action head: hidden states of the last layers of Qwen2.5-VL, pretrained or small and random.

Bai et al., "Qwen2.5-VL Technical Report" (2025).

Shape legend: B samples, V views, S side of an image, L tokens of a prompt, H width of the language model.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.data.batches import normalised
from keygrip.models.language import PromptOrder
from keygrip.models.language.hub import read_config, read_weights, with_fused_attention
from keygrip.models.language.qwen_vision import replace_layers
from keygrip.models.language.tokenizers import ChatTokenizer, TokenizerSource
from keygrip.models.nn.lora import LoRA, add_lora
from keygrip.models.nn.low_precision import Precision, lower_precision
from keygrip.models.nn.processor_attention import recompute_contexts
from keygrip.training.parts import ReadWhere, model_part

log = logging.getLogger(__name__)

# Mean and standard deviation of the vision tower's training images (CLIP's).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MERGE = 2  # patches along a side that become one token
TEMPORAL = 2  # frames that a patch spans: an image is used for both
KEPT_PROMPTS = 4096  # instructions whose tokens are cached
IMAGES = "<images>"  # a placeholder while a prompt is rendered
EXTRA = -1  # id of a token whose embedding is given

Trainable = Literal["all", "language", "frozen"]


@dataclass(frozen=True)
class Semantics:
    """Output of a vision-language model for images and instructions.

    Attributes:
        layers: hidden states ``[B, L, H]`` of the last layers, in the order of depth.
        mask: bool ``[B, L]``, False for padding; None: no padding.
        places: ``[B, L, 3]`` position of an image's token: its view, counted from 1, row and column as shares of the
            image; zeros for words.
    """

    layers: list[Tensor]
    mask: Tensor | None
    places: Tensor


@model_part
@dataclass(frozen=True)
class Vision:
    """Sizes of the vision tower.

    Args:
        layers, width, heads, mlp_width: of its transformer. patch_size: pixels along a patch.
        window: pixels along a window of attention; full_attention: layers that attend to the whole image instead.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    patch_size: int
    window: int
    full_attention: Sequence[int]


@model_part(from_checkpoint={"weights": "random"})
class QwenVL(nn.Module):
    """Qwen2.5-VL without its output layer: views and an instruction in, hidden states of the last layers out.

    All sizes are in the config, so that a checkpoint rebuilds the model without any file of the published model.

    Args:
        layers, width, heads, kv_heads, mlp_width, vocabulary: of the language model. vision: of the vision tower.
        image_token, vision_start, vision_end: ids in place of and around an image; no words of the tokenizer.
        image_size: side in pixels to which images are resized.
        tokenizer: source of the tokenizer.
        rope_sections: pairs of a head's channels that time, height and width rotate; their sum is half a head's width.
        prompt_order: images before the text (`visual_first`), as in the published training, or after the instruction
            (`question_first`): the hidden states of image tokens then depend on the instruction.
        weights: ``random``, a local folder with config.json and weights, or a name on the Hugging Face hub.
        trainable: ``all``, ``language`` (the vision tower is frozen) or ``frozen``.
        gradient_checkpointing: recompute activations in the backward pass.
        lora: the language model's weights are frozen and it learns differences of low rank; the vision tower is frozen.

    Raises:
        ValueError: impossible sizes, or weights of other sizes. FileNotFoundError: weights that do not exist.
    """

    # a frozen model stays in eval mode, in which transformers recomputes nothing
    read_where: ClassVar = {"gradient_checkpointing": ReadWhere("trainable", "all", "language")}

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int,
        mlp_width: int,
        vocabulary: int,
        vision: Vision,
        image_token: int,
        vision_start: int,
        vision_end: int,
        image_size: int,
        tokenizer: TokenizerSource,
        rope_sections: Sequence[int],
        rope_theta: float = 1e6,
        norm_eps: float = 1e-6,
        prompt_order: PromptOrder = "visual_first",
        weights: str = "random",
        trainable: Trainable = "all",
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        if trainable not in ("all", "language", "frozen"):
            raise ValueError(f"vlm.trainable is all, language or frozen, not {trainable!r}.")
        if lora is not None and trainable != "language":
            raise ValueError(f"vlm.lora adapts the language model: set vlm.trainable=language, not {trainable}.")
        if prompt_order not in get_args(PromptOrder):
            raise ValueError(f"vlm.prompt_order is {' or '.join(get_args(PromptOrder))}, not {prompt_order!r}.")
        if width % heads or heads % kv_heads or sum(rope_sections) * 2 * heads != width:
            raise ValueError(
                f"vlm: heads={heads} must divide width={width}, kv_heads={kv_heads} must divide heads, and "
                f"rope_sections must add up to half a head's width, got {list(rope_sections)}."
            )
        if image_size % (vision.patch_size * MERGE):
            raise ValueError(
                f"vlm.image_size={image_size} must be a multiple of {vision.patch_size * MERGE}, two patches."
            )
        image_ids = (image_token, vision_start, vision_end)
        if max(image_ids) >= vocabulary or len(set(image_ids)) < 3:
            raise ValueError(f"vlm: image_token, vision_start and vision_end are three ids below {vocabulary}.")
        self.layers, self.width, self.vocabulary, self.image_size = layers, width, vocabulary, image_size
        self.image_token, self.vision_start, self.vision_end = image_ids
        self.vision, self.prompt_order, self.trainable = vision, prompt_order, trainable
        self.tokenizer_source = tokenizer
        self.tokenizer: ChatTokenizer | None = None
        self._prompts: dict[tuple[str, int, int], tuple[list[int], Tensor, Tensor]] = {}
        sizes = {
            "text_config": {
                "hidden_size": width,
                "intermediate_size": mlp_width,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "vocab_size": vocabulary,
                "rms_norm_eps": norm_eps,
                "max_position_embeddings": 128000,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": float(rope_theta),
                    "mrope_section": list(rope_sections),
                },
                "use_cache": False,
                "bos_token_id": None,
                "eos_token_id": None,
                "pad_token_id": None,
            },
            "vision_config": {
                "depth": vision.layers,
                "hidden_size": vision.width,
                "num_heads": vision.heads,
                "intermediate_size": vision.mlp_width,
                "patch_size": vision.patch_size,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": TEMPORAL,
                "window_size": vision.window,
                "fullatt_block_indexes": list(vision.full_attention),
                "out_hidden_size": width,
            },
        }
        self.model: Any = (
            _build_random(sizes, image_ids) if weights == "random" else _load_pretrained(weights, sizes, image_ids)
        )
        replace_layers(self.model.visual, image_size)
        self.loaded_weights = weights
        self.precision: Precision = "float32"
        if gradient_checkpointing:
            # The method's name changed within transformers 5.
            model = self.model
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "context_fn": recompute_contexts})
            # The method makes every embedding's output require a gradient, which only reentrant checkpointing needs. A
            # frozen vision tower, which is not checkpointed, would store all its activations for that gradient.
            model.disable_input_require_grads()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trainable == "all" or (trainable == "language" and not name.startswith("visual")))
        self.lora = lora
        if lora is not None:
            count = len(add_lora(self.model.language_model, lora))
            log.info("vision-language model: %d layers learn differences of rank %d", count, lora.rank)
        self.train(self.training)

    def train(self, mode: bool = True) -> QwenVL:
        """As `nn.Module.train`, except that what is frozen stays in eval mode."""
        super().train(mode)
        if self.trainable == "frozen":
            self.model.eval()
        elif self.trainable == "language":
            self.model.visual.eval()
        return self

    def lower_precision(self, precision: Precision) -> None:
        """Round the weights in place, for inference (`keygrip.models.nn.low_precision`).

        Raises:
            ValueError: they were rounded to another precision before.
        """
        if precision == self.precision:
            return
        if self.precision != "float32":
            raise ValueError(f"the vision-language model's weights are {self.precision} already: load it again")
        lower_precision(self.model, precision)
        self.precision = precision

    # ------------------------------------------------------------------ tokens

    @property
    def tokens_per_view(self) -> int:
        """Visual tokens of one image."""
        return (self.image_size // (self.vision.patch_size * MERGE)) ** 2

    def prepare(self, folder: Path, instructions: Sequence[str]) -> None:
        """Load the tokenizer from its source, which may train it on the instructions if ``folder`` has none.

        Raises:
            FileNotFoundError: the tokenizer does not exist. ValueError: it has more words than the model.
        """
        digest = hashlib.sha256("\n".join(sorted(set(instructions))).encode()).hexdigest()[:16]
        self.set_tokenizer(self.tokenizer_source.load(folder / f"instructions-{digest}", sorted(set(instructions))))

    def set_tokenizer(self, tokenizer: ChatTokenizer) -> None:
        """Set the tokenizer. Raises ValueError: its words and the ids of images do not fit into one vocabulary."""
        names = {"<|image_pad|>": self.image_token, "<|vision_start|>": self.vision_start}
        names |= {"<|vision_end|>": self.vision_end}
        conflicts = [id for name, id in names.items() if id < tokenizer.size and tokenizer.decode([id], True) != name]
        if conflicts or tokenizer.size > self.vocabulary:
            raise ValueError(
                f"The tokenizer has {tokenizer.size} tokens, the vision-language model {self.vocabulary}, of which "
                f"{sorted(names.values())} stand for images: vlm and vlm.tokenizer must belong together."
            )
        self.tokenizer = tokenizer
        self._prompts.clear()

    def _encode_around_images(self, instruction: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a prompt before and after its images. All of the instruction is encoded as text."""
        if self.tokenizer is None:
            raise ValueError("The model has no tokenizer: train it, or load a checkpoint written by keygrip.train.")
        order = "{0}{1}" if self.prompt_order == "visual_first" else "{1}\n{0}"
        images, words = IMAGES, self.tokenizer.as_words(instruction)
        while images in words:
            images = f"<{images}>"
        rendered = self.tokenizer.render([("user", order.format(images, words))], answering=True)
        before, after = rendered.split(images)
        return self.tokenizer.encode(before), self.tokenizer.encode(after)

    def prompt(self, instruction: str, views: int, extra: int = 0) -> tuple[list[int], Tensor, Tensor]:
        """Return the token ids of one sample's images and instruction, their positions ``[3, L]`` (time, height, width)
        and their places ``[L, 3]`` (see `Semantics`).

        Positions are those of the published training: for words, all three count up together; an image's tokens have
        one time, and this number plus row or column as height and width; the next token follows the largest position.

        Args:
            extra: number of tokens of id EXTRA before the images; they count as words.

        Raises:
            ValueError: there is no tokenizer yet.
        """
        cached = self._prompts.get((instruction, views, extra))
        if cached is not None:
            return cached
        ids, suffix = self._encode_around_images(instruction)
        ids += [EXTRA] * extra
        side = self.image_size // (self.vision.patch_size * MERGE)
        positions = [torch.arange(len(ids)).expand(3, -1)]
        places = [torch.zeros(len(ids), 3)]
        next_position = len(ids)
        cells = torch.arange(side)
        grid = torch.stack([torch.zeros(side, side), *torch.meshgrid(cells, cells, indexing="ij")]).flatten(1).long()
        shares = (grid[1:].T + 0.5) / side
        for view in range(views):
            ids += [self.vision_start] + [self.image_token] * side**2 + [self.vision_end]
            start = next_position + 1
            positions += [torch.full((3, 1), next_position), start + grid, torch.full((3, 1), start + side)]
            image_places = torch.cat([torch.full((side**2, 1), view + 1.0), shares], dim=1)
            places += [torch.zeros(1, 3), image_places, torch.zeros(1, 3)]
            next_position = start + side + 1
        positions.append((next_position + torch.arange(len(suffix))).expand(3, -1))
        places.append(torch.zeros(len(suffix), 3))
        if len(self._prompts) >= KEPT_PROMPTS:
            self._prompts.clear()
        entry = self._prompts[instruction, views, extra] = ids + suffix, torch.cat(positions, dim=1), torch.cat(places)
        return entry

    def tokens(
        self, instructions: Sequence[str], views: int, extra: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return ids ``[B, L]``, positions ``[3, B, L]``, mask ``[B, L]`` (None if all lengths are equal, for faster
        attention) and places ``[B, L, 3]`` of a batch, padded on the right."""
        prompts = [self.prompt(instruction, views, extra) for instruction in instructions]
        longest = max(len(ids) for ids, *_ in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        positions = torch.zeros(3, len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        places = torch.zeros(len(prompts), longest, 3)
        for row, (prompt_ids, prompt_positions, prompt_places) in enumerate(prompts):
            ids[row, : len(prompt_ids)] = torch.tensor(prompt_ids)
            positions[:, row, : len(prompt_ids)] = prompt_positions
            mask[row, : len(prompt_ids)] = True
            places[row, : len(prompt_ids)] = prompt_places
        return ids, positions, None if mask.all() else mask, places

    # ------------------------------------------------------------------ forward

    def forward(self, images: Tensor, instructions: Sequence[str], last: int, extra: Tensor | None = None) -> Semantics:
        """Hidden states of the last layers.

        Args:
            images: uint8 ``[B, V, 3, S, S]``. instructions: B sentences. last: how many layers.
            extra: embeddings ``[B, K, H]`` of further tokens, which stand before the images.

        Raises:
            ValueError: more layers than there are, or no tokenizer.
        """
        if not 1 <= last <= self.layers:
            raise ValueError(
                f"The vision-language model has {self.layers} layers and {last} are asked for: lower "
                "model.network.blocks."
            )
        extra_count = 0 if extra is None else extra.shape[1]
        ids, positions, mask, places = self.tokens(instructions, images.shape[1], extra_count)
        ids, positions, places = (part.to(images.device) for part in (ids, positions, places))
        mask = None if mask is None else mask.to(images.device)
        # Inputs of a frozen model still get gradients through it.
        frozen = self.trainable == "frozen" and (extra is None or not extra.requires_grad)
        with torch.no_grad() if frozen else contextlib.nullcontext():
            # Only the language model: the whole model would also store all hidden states of its vision tower.
            output = self.model.language_model(
                inputs_embeds=self._embed_inputs(ids, images, extra),
                attention_mask=None if mask is None else mask.long(),
                position_ids=positions,
                output_hidden_states=True,
                use_cache=False,
            )
        return Semantics(list(output.hidden_states[-last:]), mask, places)

    def _embed_inputs(self, ids: Tensor, images: Tensor, extra: Tensor | None) -> Tensor:
        """Embeddings ``[B, L, H]`` of token ids, those of id EXTRA given by ``extra`` ``[B, K, H]``, those of images by
        the vision tower."""
        embeddings = self.model.get_input_embeddings()(ids.clamp(min=0))
        if extra is not None:
            embeddings = embeddings.masked_scatter((ids == EXTRA)[..., None], extra.to(embeddings.dtype))
        image_features = torch.cat(self.model.get_image_features(*self.patches(images), return_dict=True).pooler_output)
        return embeddings.masked_scatter((ids == self.image_token)[..., None], image_features.to(embeddings.dtype))

    def patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Convert images to the vision tower's input: patches ``[N, 3 * 2 * P * P]``, the patches of a token next to
        each other, and the grids ``[B V, 3]`` (frames, rows, columns of patches), on the CPU, because transformers
        reads their values."""
        pixels = normalised(images.flatten(0, 1), MEAN, STD)
        size, patch = self.image_size, self.vision.patch_size
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
        side = size // patch
        blocks = pixels.unflatten(3, (side // MERGE, MERGE, patch)).unflatten(2, (side // MERGE, MERGE, patch))
        # [B V, 3, rows, MERGE, P, columns, MERGE, P] -> [B V, rows, columns, MERGE, MERGE, 3, P, P]
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
        repeated = blocks[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, TEMPORAL, -1, -1)
        grid = torch.tensor([[1, side, side]]).expand(len(pixels), -1)
        return repeated.reshape(len(pixels) * side**2, -1), grid

    def sharded_parts(self) -> list[nn.Module]:
        """Blocks that are used through their `forward` alone."""
        return [*self.model.language_model.layers, *self.model.visual.blocks]


def _build_config(sizes: dict[str, dict[str, Any]], image_ids: tuple[int, int, int]) -> Any:
    from transformers import Qwen2_5_VLConfig

    image_token, vision_start, vision_end = image_ids
    config = Qwen2_5_VLConfig(
        **sizes,  # type: ignore[arg-type]  # transformers turns dictionaries into its own kinds of config
        image_token_id=image_token,
        vision_start_token_id=vision_start,
        vision_end_token_id=vision_end,
        video_token_id=-1,  # no videos
    )
    return with_fused_attention(config)


def _build_random(sizes: dict[str, dict[str, Any]], image_ids: tuple[int, int, int]) -> Any:
    from transformers import Qwen2_5_VLModel

    model = Qwen2_5_VLModel(_build_config(sizes, image_ids))
    # transformers initialises all with a standard deviation of 0.02, which suits widths of thousands. The small
    # video-language model learned nothing from such weights; here the first 200 steps were the same with both.
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)  # as large as an image's tokens
    return model


def _load_pretrained(source: str, sizes: dict[str, dict[str, Any]], image_ids: tuple[int, int, int]) -> Any:
    """Load the model with weights of a folder or the hub, of exactly the config's sizes."""
    from transformers import Qwen2_5_VLModel

    stored_config = read_config(source)
    if getattr(stored_config, "model_type", "") != "qwen2_5_vl":
        raise ValueError(f"vlm.weights={source} is a {getattr(stored_config, 'model_type', 'model')}, not a qwen2_5_vl")
    config = _build_config(sizes, image_ids)
    stored_sizes, config_sizes = _compared_values(stored_config, sizes), _compared_values(config, sizes)
    differences = [
        f"{name} is {stored_sizes[name]}, config says {value}"
        for name, value in config_sizes.items()
        if stored_sizes[name] != value
    ]
    stored_rules, own_rules = _computation_rules(stored_config), _computation_rules(config)
    differences += [
        f"{name} is {stored_rules[name]}, here it is {rule}"
        for name, rule in own_rules.items()
        if stored_rules[name] != rule
    ]
    if differences:
        raise ValueError(f"vlm.weights={source} does not fit vlm: {'; '.join(differences[:4])}")
    model = read_weights(Qwen2_5_VLModel, source, "Qwen2.5-VL", attn_implementation="sdpa")
    log.info("vision-language model: weights of %s", source)
    return model


def _compared_values(config: Any, sizes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the values that must agree between two configs, by name."""
    values: dict[str, Any] = {}
    for part, names in sizes.items():
        ignored = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
        for name in names:
            if name == "rope_parameters":
                rope = getattr(config.text_config, name, None) or {}
                values |= {key: rope.get(key) for key in ("rope_theta", "mrope_section")}
            elif name not in ignored:
                values[f"{part}.{name}"] = getattr(getattr(config, part), name, None)
    for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        values[name] = getattr(config, name, None)
    return {name: list(value) if isinstance(value, list | tuple) else value for name, value in values.items()}


def _computation_rules(config: Any) -> dict[str, Any]:
    """Return, by name, what changes the hidden states and is no setting. A checkpoint rebuilds the model without the
    stored config, so all of these must have the values of `_build_config`."""
    text, vision = config.text_config, config.vision_config
    text_rope, vision_rope = (getattr(part, "rope_parameters", None) or {} for part in (text, vision))
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    return {
        "rope_type": text_rope.get("rope_type", "default"),
        "text_config.layer_types": " and ".join(["full_attention", *sorted(kinds)]),
        "text_config.hidden_act": getattr(text, "hidden_act", None),
        "vision_config.hidden_act": getattr(vision, "hidden_act", None),
        "vision_config.rope_type": vision_rope.get("rope_type"),
        "vision_config.rope_theta": vision_rope.get("rope_theta"),
    }
