"""What LeRobot's SmolVLA reads of the hub, made without it: a SmolVLM configuration and a tokenizer.

`write_vlm` writes a folder in the hub's format, whose path takes the place of `--policy.vlm_model_name`. Of that,
LeRobot's SmolVLA with `load_vlm_weights=false` reads the configuration (`AutoConfig`), from which it draws random
weights by transformers' own initialisation and its seed, and the tokenizer (`AutoProcessor`, `AutoTokenizer`). Hence
the folder holds no weights: nothing would read them. The tokenizer is keygrip's (`TrainedTokenizer`), trained on the
data set's instructions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keygrip.artifacts import atomic_folder
from keygrip.models.language.tokenizers import END_OF_TEXT, TURN_END, TURN_START, TrainedTokenizer

VOCABULARY = 1024  # at most; training stops where every instruction's words are tokens
IMAGE_TOKENS = {  # SmolVLM's names: its processor and SmolVLA ask for their ids
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


@dataclass(frozen=True)
class Size:
    """Shapes of a SmolVLM, and the arguments of lerobot-train that go with them.

    Attributes:
        text: of the language model (transformers' LlamaConfig); without `vocab_size` it has the tokenizer's.
        vision: of the image encoder (SmolVLMVisionConfig).
        scale: `scale_factor`: so many patches per side become one token.
        arguments: of lerobot-train; those that the user gives come after them and win.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    scale: int
    arguments: tuple[str, ...] = ()


SIZES = {
    # config.json of HuggingFaceTB/SmolVLM2-500M-Video-Instruct; what it leaves out is transformers' default. As there,
    # 507,482,304 parameters. SmolVLA keeps 16 of the 32 layers.
    "500m": Size(
        text={
            "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
            "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49280, "max_position_embeddings": 8192,
            "rope_theta": 100000,
        },
        vision={"hidden_size": 768, "image_size": 512, "patch_size": 16, "num_attention_heads": 12},
        scale=4,
    ),
    # The same proportions at a fifth of the width: three query heads for each key head, 2.67 of the width in the MLP,
    # half of the layers kept. 64 patches and 16 tokens for an image keep a step short on one core. The authors'
    # learning rate of 1e-4 is for weights that are trained already.
    "small": Size(
        text={
            "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024,
        },
        vision={
            "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6,
            "image_size": 128, "patch_size": 16,
        },
        scale=2,
        arguments=(
            "--policy.num_vlm_layers=4",
            "--policy.resize_imgs_with_padding=[128,128]",
            "--policy.optimizer_lr=5e-4",
        ),
    ),
}  # fmt: skip


def instructions_of(dataset: Path) -> list[str]:
    """The instructions of a LeRobot data set, sorted."""
    from lerobot.datasets.utils import load_tasks

    return sorted(map(str, load_tasks(dataset).index))


def write_vlm(folder: Path, size: Size, instructions: Iterable[str]) -> None:
    """Writes `config.json` and a processor with a tokenizer of its own.

    Args:
        folder: must not exist. size: one of `SIZES`. instructions: what the tokenizer is trained on.

    Raises:
        FileExistsError: the folder is there. ValueError: the tokenizer has more tokens than the model.
    """
    from transformers import (
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    with tempfile.TemporaryDirectory() as temporary:
        trained = Path(temporary)
        source = TrainedTokenizer(VOCABULARY)
        source.load(trained, instructions)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(source.file_in(trained)),
            unk_token=END_OF_TEXT,
            bos_token=TURN_START,
            eos_token=TURN_END,
            pad_token=TURN_END,
            extra_special_tokens=IMAGE_TOKENS,
        )
    text = {"vocab_size": len(tokenizer), "rms_norm_eps": 1e-5, **size.text}
    if len(tokenizer) > text["vocab_size"]:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the language model {text['vocab_size']}")
    pad = tokenizer.pad_token_id
    config = SmolVLMConfig(
        text_config={"model_type": "llama", "pad_token_id": pad, **text},
        vision_config=dict(size.vision),
        scale_factor=size.scale,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKENS["image_token"]),
        pad_token_id=pad,
    )
    config.architectures = ["SmolVLMForConditionalGeneration"]
    edge = {"longest_edge": size.vision["image_size"]}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size=edge, max_image_size=edge),
        tokenizer,
        SmolVLMVideoProcessor(size=edge, max_image_size=edge),
        image_seq_len=(size.vision["image_size"] // size.vision["patch_size"] // size.scale) ** 2,
    )
    with atomic_folder(folder) as path:
        config.save_pretrained(path)
        processor.save_pretrained(path)
