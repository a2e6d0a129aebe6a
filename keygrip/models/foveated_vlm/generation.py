"""Generation of answers to batches of conversations about videos, and likelihoods of given answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, nn

from keygrip.models.backbone import BlockKV
from keygrip.models.foveated_vlm.conversations import EncodedText, text_columns
from keygrip.models.foveated_vlm.loss import token_cross_entropy
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.rows import TextRows, real_frames, take
from keygrip.models.foveated_vlm.sampling import GREEDY, Sampling
from keygrip.models.foveated_vlm.video_language import Passes, VideoLanguageNetwork
from keygrip.models.language.cache import LanguageCache
from keygrip.models.language.tokenizers import ChatTokenizer

Seconds = Sequence[Sequence[float] | None] | None  # of V videos: the time of each frame


@dataclass(frozen=True)
class Answers:
    """What was generated for B prompts.

    Attributes:
        texts: B answers. ids: B lists, without the token at which they stopped.
        passes: results of the passes over the videos (None for text alone). rows: the prompts.
    """

    texts: list[str]
    ids: list[list[int]]
    passes: Passes | None
    rows: TextRows


def rows_of(
    texts: Sequence[EncodedText],
    videos: Sequence[int],
    frame_counts: Sequence[int],
    device: torch.device,
    seconds: Seconds = None,
) -> TextRows:
    """Convert encoded texts to the rows that the network reads."""
    ids: Tensor = text_columns(texts)["input_ids"]
    lengths, places = [len(text.ids) for text in texts], [text.visual_at for text in texts]
    return TextRows(ids.to(device), lengths, places, list(videos), list(frame_counts), seconds)


def refuse_half_characters(text: str, whose: str) -> None:
    """Raise ValueError if the text contains half a surrogate pair, which a tokenizer cannot read."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{whose} holds half a surrogate pair, which is no character")


def check_count(count: int, name: str = "max_new_tokens") -> None:
    """Raise ValueError if `count` is not a whole number of at least 1."""
    if not isinstance(count, Integral) or count < 1:
        raise ValueError(f"{name}={count}: it must be at least 1, and a whole number")


def room(network: VideoLanguageNetwork, text: int, frames: int) -> int:
    """Return how many answer tokens fit into the language model's context after `text` tokens and `frames` frames;
    below 0: text and frames do not fit."""
    return int(network.language.context - text - network.tokens_per_frame * frames)


def check_room(network: VideoLanguageNetwork, text: int, frames: int, max_new_tokens: int) -> None:
    """Check that a conversation of `text` tokens and `frames` frames can be answered.

    Raises:
        ValueError: conversation and answer do not fit into the language model's context, or the network can number
            fewer frames.
    """
    unused, context = room(network, text, frames), network.language.context
    if unused < max_new_tokens:
        raise ValueError(
            f"the conversation takes {context - unused} positions and the answer up to {max_new_tokens}; the language "
            f"model holds {context}: lower max_new_tokens, or give fewer frames or less text"
        )
    if network.frame_tokens is not None and frames > len(network.frame_tokens):
        raise ValueError(
            f"the conversation has {frames} frames and the model numbers {len(network.frame_tokens)} "
            "(model.network.frame_numbers): give fewer frames"
        )


@torch.inference_mode()
def encoded(network: VideoLanguageNetwork, frames: Tensor, frame_counts: Sequence[int]) -> list[BlockKV] | None:
    """Compute the keys and values of videos, to use for several questions and modes; None if the network has none."""
    if not isinstance(network, FoveatedVLM) or not any(frame_counts):
        return None
    return network.encode(real_frames(frames, frame_counts))


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Set a network to evaluation mode; afterwards each of its parts has its former mode, and training can go on."""
    if not network.training:  # for each token of an answer: no search through all parts
        yield
        return
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@torch.inference_mode()
def generate(
    network: VideoLanguageNetwork,
    tokenizer: ChatTokenizer,
    frames: Tensor,
    frame_counts: Sequence[int],
    prompts: Sequence[EncodedText],
    videos: Sequence[int],
    mode: str = "autoregressive",
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    kv: Sequence[BlockKV] | None = None,
    seconds: Seconds = None,
    samples: Sequence[int] | None = None,
) -> Answers:
    """Continue each prompt up to a stop token of the tokenizer.

    Args:
        frames: [V, F, 3, H, W], normalised; padding frames after the real ones. frame_counts: V.
        prompts: B conversations that end where the assistant's words begin. videos: B, the index of each prompt's
            video.
        mode: one of the network's modes. max_new_tokens: longest answer in tokens.
        sampling: how tokens are chosen. Each prompt is sampled independently of the others: equal prompts get equal
            answers.
        kv: keys and values of the real frames if they are computed already (`encoded`).
        seconds: V, times of the frames, for a clock that counts seconds.
        samples: B, for prompts that occur several times: the number of each answer to the same prompt
            (`Sampling.of`). None: all are the first answer.

    Raises:
        ValueError: a prompt, the frames and the answer do not fit into the language model's context.
    """
    device = frames.device
    rows = rows_of(prompts, videos, frame_counts, device, seconds)
    visual, passes, _ = network.visual_tokens(frames, rows, mode, kv=kv)
    layout = rows.layout(network.tokens_per_frame)
    language = network.language
    if layout.source.shape[1] + max_new_tokens > language.context:
        raise ValueError(
            f"prompt and frames take {layout.source.shape[1]} positions and the answer up to {max_new_tokens}; the "
            f"language model holds {language.context}: lower max_new_tokens, or give fewer frames"
        )
    cache = LanguageCache()
    # Rows are padded on the right; padding leaves a gap in the cache, to which no later token attends.
    equal_lengths = bool(layout.valid.all())
    hidden = language.extend(
        layout.place(language.embed(rows.input_ids), network.with_frame_positions_of(visual, rows)),
        cache,
        None if equal_lengths else layout.valid,
    )
    state = take(hidden, layout.valid.sum(1, keepdim=True) - 1)[:, 0]
    # one for each row: an answer does not depend on the other prompts of the batch
    generators = [sampling.of(sample).generator(device) for sample in samples or [0] * len(prompts)]
    ids: list[list[int]] = [[] for _ in prompts]
    unfinished = torch.ones(len(prompts), dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(tokenizer.stop_tokens), dtype=torch.int64, device=device)
    for _ in range(max_new_tokens):
        logits = language.logits(state).float()
        logits[:, tokenizer.size :] = -torch.inf  # rows of the output table without a token
        token = sampling.next(logits, generators)
        unfinished = unfinished & ~torch.isin(token, stops)
        for row, (value, is_unfinished) in enumerate(zip(token.tolist(), unfinished.tolist(), strict=True)):
            if is_unfinished:
                ids[row].append(value)
        if not bool(unfinished.any()):
            break
        valid = None if bool(unfinished.all()) else unfinished[:, None]
        state = language.extend(language.embed(token[:, None]), cache, valid)[:, 0]
    return Answers([tokenizer.decode(row).strip() for row in ids], ids, passes, rows)


@dataclass(frozen=True)
class Likelihoods:
    """For B given answers: the sum of the tokens' log-likelihoods, the number of tokens, and whether every token is the
    most probable one; [B] each."""

    total: Tensor
    tokens: Tensor
    greedy: Tensor


@torch.inference_mode()
def answer_likelihoods(
    network: VideoLanguageNetwork,
    frames: Tensor,
    frame_counts: Sequence[int],
    answered: Sequence[EncodedText],
    videos: Sequence[int],
    mode: str = "autoregressive",
    kv: Sequence[BlockKV] | None = None,
    with_end: bool = True,
    seconds: Seconds = None,
    tokens: int | None = None,
) -> Likelihoods:
    """Compute the log-likelihood of each conversation's last answer.

    Args:
        frames, frame_counts, videos, mode, kv, seconds: as in `generate`.
        answered: B conversations that end with an answer.
        with_end: whether the token that ends the answer's turn counts.
        tokens: as in `token_cross_entropy`.
    """
    rows = rows_of(answered, videos, frame_counts, frames.device, seconds)
    visual, _, _ = network.visual_tokens(frames, rows, mode, kv=kv)
    hidden, layout = network.read(visual, rows)
    mask = torch.zeros(rows.input_ids.shape, dtype=torch.bool, device=frames.device)
    for row, text in enumerate(answered):
        answer = text.answer[text.prompt :]
        end = len(answer) - answer[::-1].index(True) if any(answer) else 0
        mask[row, text.prompt : text.prompt + end - (0 if with_end else 1)] = True
    state_positions = layout.text_at - 1
    token_rows, token = (mask & (state_positions >= 0)).nonzero(as_tuple=True)
    losses, right = token_cross_entropy(
        hidden[token_rows, state_positions[token_rows, token]],
        network.language.head_weight,
        rows.input_ids[token_rows, token],
        tokens=tokens,
    )
    zeros = torch.zeros(len(answered), device=losses.device)
    wrong = zeros.index_add(0, token_rows, (~right).float())
    return Likelihoods(-zeros.index_add(0, token_rows, losses), mask.sum(1), wrong == 0)


def answer_scores(
    network: VideoLanguageNetwork,
    frames: Tensor,
    frame_counts: Sequence[int],
    answered: Sequence[EncodedText],
    videos: Sequence[int],
    mode: str = "autoregressive",
    kv: Sequence[BlockKV] | None = None,
    seconds: Seconds = None,
) -> Tensor:
    """Mean log-likelihood per token of each conversation's last answer, float32 [B], to choose among given answers."""
    likelihoods = answer_likelihoods(network, frames, frame_counts, answered, videos, mode, kv, seconds=seconds)
    return likelihoods.total / likelihoods.tokens.clamp_min(1)
