"""The language model, its tokenizer and its chat template. The only module that imports transformers.

Shapes: B rows, T positions, C width, K positions in a cache, W vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keygrip.training.parts import model_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# ChatML, as SmolLM2 has it but without a system turn of its own.
TINY_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@model_part(from_checkpoint={"weights": "random"})
class LanguageModel(nn.Module):
    """A Llama-type causal language model that reads embeddings and gives hidden states.

    The sizes are all in the config, so that a checkpoint rebuilds the model without any file of its maker.

    Args:
        layers, width, heads, kv_heads, mlp_width, vocabulary: sizes; `heads` divides `width`, `kv_heads` divides
            `heads`.
        context: the longest row in positions, text and visual tokens together.
        rope_theta: base of the rotary periods. norm_eps: of RMSNorm.
        tie_embeddings: the output layer is the embedding table.
        embedding_std: standard deviation of randomly initialised token embeddings.
        weights: `random`, a local folder with config.json and model.safetensors, or a name on the Hugging Face hub.
        gradient_checkpointing: recompute each layer's activations in the backward pass.

    Raises:
        ValueError: impossible sizes, or weights of other sizes.
        FileNotFoundError: weights that are not there, or a hub without a network.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int,
        mlp_width: int,
        vocabulary: int,
        context: int,
        rope_theta: float,
        tie_embeddings: bool,
        norm_eps: float = 1e-5,
        embedding_std: float = 0.14,
        weights: str = "random",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if width % heads or heads % kv_heads:
            raise ValueError(
                f"language: heads={heads} must divide width={width}, and kv_heads={kv_heads} must divide heads"
            )
        from transformers import LlamaConfig, LlamaModel

        self.width, self.vocabulary, self.context, self.layers = width, vocabulary, context, layers
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=mlp_width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": float(rope_theta)},
            rms_norm_eps=norm_eps,
            tie_word_embeddings=tie_embeddings,
            # SmolLM2 names its end token as padding: an embedding with a padding index would never train the end token.
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            attention_bias=False,
            use_cache=False,
            # transformers' 0.02 is for widths of thousands: at 128 attention would start uniform and stay so for long
            initializer_range=width**-0.5,
        )
        config._attn_implementation = "sdpa"
        self.model: Any = LlamaModel(config)
        self.head = None if tie_embeddings else nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.model.embed_tokens.weight, std=embedding_std)
        self.loaded_weights = "random"
        if weights != "random":
            self._load(weights)
        self.gradient_checkpointing = gradient_checkpointing

    # ------------------------------------------------------------------ use

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings, int64 [...] -> [..., C]."""
        return self.model.embed_tokens(ids)

    @property
    def embedding_std(self) -> Tensor:
        """Standard deviation of the token embeddings now, []."""
        return self.model.embed_tokens.weight.detach().float().std()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Hidden states after the last norm, [B, T, C] -> [B, T, C]. Rows begin at position 0, padding is on the right.

        Raises:
            ValueError: more positions than the context holds.
        """
        self._check_length(embeddings.shape[1])
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        return self._run(embeddings, positions, None, None)

    def extend(self, embeddings: Tensor, cache: LanguageCache, valid: Tensor | None = None) -> Tensor:
        """Hidden states of further positions of rows whose keys and values are cached, [B, t, C] -> [B, t, C].

        Args:
            embeddings: the next t positions of each row.
            cache: extended in place.
            valid: bool [B, t], False for padding, which leaves a hole: nothing real sees it and it takes no position.
        """
        mask, positions = cache.advance(embeddings.shape[0], embeddings.shape[1], valid, embeddings.device)
        self._check_length(cache.length)
        return self._run(embeddings, positions, mask, cache.layers)

    def _run(self, embeddings: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """The layers one by one: transformers' own loop drops the cache under gradient checkpointing."""
        hidden = embeddings.to(self.model.embed_tokens.weight.dtype)  # the residual stream, also under autocast
        angles = self.model.rotary_emb(hidden, position_ids=positions)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        for layer in self.model.layers:
            if recompute:
                hidden = checkpoint(layer, hidden, mask, position_embeddings=angles, use_reentrant=False)
            else:
                hidden = layer(hidden, mask, position_embeddings=angles, past_key_values=cache)
        return self.model.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., W]."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output layer's matrix, [W, C]."""
        return self.model.embed_tokens.weight if self.head is None else self.head.weight

    def sharded_parts(self) -> list[nn.Module]:
        """Blocks that are used through their `forward` alone."""
        return list(self.model.layers)

    def _check_length(self, length: int) -> None:
        if length > self.context:
            raise ValueError(
                f"a row has {length} positions and language.model.context={self.context}: raise it, or give fewer "
                "frames or less text"
            )

    # ------------------------------------------------------------------ loading

    def _load(self, source: str) -> None:
        from transformers import AutoConfig, LlamaForCausalLM

        local = Path(source).is_dir()
        found = AutoConfig.from_pretrained(local_or_hub(source)) if local else from_hub(AutoConfig, source)
        own = self.model.config
        names = {
            "hidden_size": "width",
            "intermediate_size": "mlp_width",
            "num_hidden_layers": "layers",
            "num_attention_heads": "heads",
            "num_key_value_heads": "kv_heads",
            "vocab_size": "vocabulary",
            "rms_norm_eps": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        }
        different = [
            f"{ours} is {getattr(found, theirs, None)}, config says {getattr(own, theirs)}"
            for theirs, ours in names.items()
            if getattr(found, theirs, None) != getattr(own, theirs)
        ]
        theta = (getattr(found, "rope_parameters", None) or {}).get("rope_theta")
        if theta is not None and float(theta) != own.rope_parameters["rope_theta"]:
            different.append(f"rope_theta is {theta}, config says {own.rope_parameters['rope_theta']}")
        if getattr(found, "model_type", "") != "llama":
            different.insert(0, f"it is a {getattr(found, 'model_type', 'model without a type')}, not a llama")
        if different:
            raise ValueError(f"language.model.weights={source} does not fit language.model: {'; '.join(different[:4])}")
        options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
        loader: Any = LlamaForCausalLM
        whole, report = loader.from_pretrained(source, **options) if local else from_hub(loader, source, **options)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{source} lacks weights: {', '.join(missing[:3])}; it is not a whole language model")
        self.model.load_state_dict(whole.model.state_dict(), strict=True)
        if self.head is not None:
            self.head.load_state_dict(whole.lm_head.state_dict(), strict=True)
        self.loaded_weights = source
        log.info("language model: weights of %s", source)


class LanguageCache:
    """Keys and values of B rows in slots, of which padding is never looked at.

    Attributes:
        layers: transformers' cache. length: slots in use, at least the positions of the longest row.
    """

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.layers: Any = DynamicCache()
        self.length = 0
        self._valid: Tensor | None = None  # [B, slots]; None: all real, and all rows equally long
        self._next: Tensor | None = None  # [B] positions, where they differ

    def advance(self, rows: int, more: int, valid: Tensor | None, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Mask bool [B, 1, t, K] (or None: causal) and positions [B, t] for t further positions."""
        slot = torch.arange(self.length + more, device=device)
        query = slot[self.length :, None]
        past, self.length = self.length, self.length + more
        if valid is None and self._valid is None:
            return (slot <= query)[None, None] if past and more > 1 else None, query.T
        if self._valid is None:
            self._valid = torch.ones(rows, past, dtype=torch.bool, device=device)
            self._next = torch.full((rows,), past, device=device)
        assert self._next is not None
        if valid is None:
            valid = torch.ones(rows, more, dtype=torch.bool, device=device)
        positions = (self._next[:, None] + valid.cumsum(1) - 1).clamp_min(0)
        self._next = self._next + valid.sum(1)
        self._valid = torch.cat([self._valid, valid], dim=1)
        # padding sees itself: a position without anything to look at would be NaN, and spread
        mask = (self._valid[:, None] & (slot <= query)) | (slot == query)
        return mask[:, None], positions

    def select(self, rows: Tensor) -> None:
        """Keeps rows [n] (repeats allowed) in that order."""
        self.layers.batch_select_indices(rows)
        if self._valid is not None and self._next is not None:
            self._valid, self._next = self._valid[rows], self._next[rows]


def local_or_hub(source: str) -> str:
    """A folder as it is.

    Raises:
        FileNotFoundError: it has no config.json.
    """
    if not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json: give the folder of a language model as the hub ships it")
    return source


def from_hub(loader: Any, name: str, **options: Any) -> Any:
    """`loader.from_pretrained(name)`, with one line that says what to do where there is no network."""
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"weights or tokenizer: there is no folder {name}")
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is neither a folder nor to be had from the hub ({str(error).splitlines()[0][:120]}): download its "
            f"config.json, model.safetensors and tokenizer files from https://huggingface.co/{name} into a folder and "
            "give that folder where the config names the hub (weights and tokenizer.source)"
        ) from error


# ---------------------------------------------------------------------- tokenizers


TOKENIZER_STATE = "language"  # under which name a video-language model's checkpoint holds it


class ChatTokenizer:
    """A tokenizer with a chat template and the ids that matter. Picklable, and kept in checkpoints by `state`.

    Attributes:
        end_of_turn: id of the token that ends an assistant's turn; generation stops there.
        size: number of tokens, at most the model's vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: take an instruction-tuned model's")
        self._tokenizer = tokenizer
        self.size = len(tokenizer)
        turn_end: Any = tokenizer.convert_tokens_to_ids(TURN_END)
        end: Any = tokenizer.eos_token_id
        self.end_of_turn = int(end if turn_end in (None, tokenizer.unk_token_id) else turn_end)
        self.end_text = str(tokenizer.convert_ids_to_tokens(self.end_of_turn))

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it is, special tokens in it recognised, none added."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int] | Tensor, special: bool = False) -> str:
        """Text of ids, with special tokens where `special`."""
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return str(self._tokenizer.decode(values, skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def render(self, turns: Sequence[tuple[str, str]], answering: bool = False) -> str:
        """(role, text) turns in the chat template; with `answering`, up to where the assistant begins to speak."""
        messages = [{"role": role, "content": text} for role, text in turns]
        rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
        assert isinstance(rendered, str)
        return rendered

    def state(self) -> dict[str, str]:
        """All of it as plain text, for a checkpoint."""
        template = self._tokenizer.chat_template
        assert isinstance(template, str)
        return {
            "tokenizer": self._tokenizer.backend_tokenizer.to_str(),
            "chat_template": template,
            "end": str(self._tokenizer.eos_token),
        }

    @classmethod
    def from_state(cls, state: dict[str, str]) -> ChatTokenizer:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        return cls(
            PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(state["tokenizer"]),
                chat_template=state["chat_template"],
                eos_token=state["end"],
            )
        )


@model_part(from_checkpoint={"source": "the checkpoint"})
class PretrainedTokenizer:
    """Source of a language model's own tokenizer.

    Args:
        source: local folder or name on the Hugging Face hub.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    def load(self, folder: Path, texts: Iterable[str] | None = None) -> ChatTokenizer:
        """The tokenizer; neither argument matters.

        Raises:
            FileNotFoundError: not there.
        """
        from transformers import AutoTokenizer

        found: Any
        if Path(self.source).is_dir():
            found = AutoTokenizer.from_pretrained(self.source)
        else:
            found = from_hub(AutoTokenizer, self.source)
        return ChatTokenizer(found)


@model_part(from_checkpoint={"run": None})
class TrainedTokenizer:
    """Source of a byte-level BPE tokenizer trained on the shards' own text, kept beside them.

    Args:
        vocabulary: at most so many tokens. Every byte is one, so that nothing is unknown.
        run: a run folder or checkpoint whose tokenizer is taken over in place of training one: for the stage after.
    """

    def __init__(self, vocabulary: int = 1024, run: str | None = None) -> None:
        if vocabulary < 300:
            raise ValueError(f"language.tokenizer.vocabulary={vocabulary}: 256 bytes and the special tokens need 300")
        self.vocabulary, self.run = vocabulary, run

    def load(self, folder: Path, texts: Iterable[str] | None = None) -> ChatTokenizer:
        """The tokenizer in `folder`, trained on `texts` first where it is not there; or that of `run`.

        Raises:
            FileNotFoundError: not there and no texts given, or no such run. ValueError: the run has none.
        """
        if self.run is not None:
            return _tokenizer_of(self.run)
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        file = Path(folder) / TOKENIZER_FILE
        if not file.is_file():
            if texts is None:
                raise FileNotFoundError(f"no tokenizer at {file}: prepare the data first")
            tokenizer = Tokenizer(models.BPE())
            # digits one by one: a number is then spelt, and an answer of one digit is one token
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=self.vocabulary,
                special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            tokenizer.train_from_iterator(texts, trainer)
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{os.getpid()}")
            tokenizer.save(str(temporary))
            temporary.replace(file)
            log.info("tokenizer of %d tokens trained: %s", tokenizer.get_vocab_size(), file)
        tokenizer = Tokenizer.from_file(str(file))
        if tokenizer.get_vocab_size() > self.vocabulary:
            raise ValueError(
                f"{file} has {tokenizer.get_vocab_size()} tokens and language.tokenizer.vocabulary={self.vocabulary}: "
                "raise it, or remove the file and it is trained again"
            )
        return ChatTokenizer(
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TINY_TEMPLATE, eos_token=TURN_END)
        )


def _tokenizer_of(run: str) -> ChatTokenizer:
    from keygrip.training.checkpoints import read_checkpoint

    content = read_checkpoint(run)
    if TOKENIZER_STATE not in content:
        raise ValueError(f"language.tokenizer.run={run} is no run of a video-language model")
    return ChatTokenizer.from_state(content[TOKENIZER_STATE]["tokenizer"])
