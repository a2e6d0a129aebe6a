"""Tokenizers with a chat template, and where they come from.

A source (`TokenizerSource`) is a part of a model's configuration; it loads a `ChatTokenizer`, which is stored in the
checkpoint, so that a checkpoint needs neither the hub nor the training data.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from keygrip.artifacts import make_once, write_text
from keygrip.models.language.chat_templates import render_chat
from keygrip.models.language.hub import read_language_tokenizer, read_stop_tokens
from keygrip.models.language.tokenizer_json import parse_tokenizer, tokenizer_errors
from keygrip.training.checkpoints import read_checkpoint
from keygrip.training.parts import model_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

TOKENIZER_STATE = "language"  # key of a video-language model's tokenizer in its checkpoint
BEHIND = ("\n", ".", "0")  # texts to which a piece of text is appended, to encode it as a continuation
SPELT = "\ufdd0"  # encloses text to spell out (see `as_words`); Unicode reserves it, so that no text contains it
# The form of control tokens, "<tool_call>" or "[INST]", not all of which vocabularies mark as special. Added tokens of
# other forms without that mark are words or runs of spaces, which ordinary text contains.
CONTROL_FORM = re.compile(r"<.+>|\[.+\]")
# Special tokens that chat templates may name, if the tokenizer has them: key in a state, and name in transformers.
NAMED_TOKENS = {"end": "eos_token", "bos": "bos_token", "unk": "unk_token", "pad": "pad_token"}
TEMPLATE = "chat_template"  # key in a state
STOP = "stop"  # key in a state: further ids at which generation stops
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# ChatML as in SmolLM2, but without a default system turn.
TINY_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TokenizerSource(Protocol):
    """Where a tokenizer comes from: `PretrainedTokenizer` or `TrainedTokenizer`."""

    def load(self, folder: Path, texts: Iterable[str] | None = None) -> ChatTokenizer:
        """Load the tokenizer.

        Args:
            folder: where a tokenizer trained on these texts is stored. texts: training texts if there is none.

        Raises:
            FileNotFoundError: there is no tokenizer, and no texts.
        """
        ...


class ChatTokenizer:
    """A tokenizer with a chat template and special ids. Picklable; checkpoints store its `state`.

    Args:
        stop_tokens: ids at which its language model stops besides `end_of_turn` and the tokenizer's eos token; ids
            that the tokenizer does not have are ignored.

    Attributes:
        end_of_turn: id of the token that ends an assistant's turn, in training.
        stop_tokens: all ids at which generation stops.
        size: the largest id plus one, at most the model's vocabulary.

    Raises:
        ValueError: it has no chat template, no token that ends a turn, or cannot encode a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_tokens: Iterable[int] = ()) -> None:
        if isinstance(tokenizer.chat_template, dict):  # several by name; transformers uses this one
            tokenizer.chat_template = tokenizer.chat_template.get("default")
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: take an instruction-tuned model's")
        self._tokenizer = tokenizer
        self.size = 1 + max(tokenizer.get_vocab().values(), default=-1)
        turn_end: Any = tokenizer.convert_tokens_to_ids(TURN_END)
        end: Any = tokenizer.eos_token_id
        self.end_of_turn = end if turn_end in (None, tokenizer.unk_token_id) else turn_end
        if self.end_of_turn is None:
            raise ValueError(
                f"the tokenizer has neither an eos token nor {TURN_END}, so that no answer would end: name the token "
                "that ends a turn as eos_token in its tokenizer_config.json"
            )
        base_stops = [self.end_of_turn] if end is None else [self.end_of_turn, end]
        self.stop_tokens = frozenset([*base_stops, *(each for each in stop_tokens if 0 <= each < self.size)])
        self._further_stops = sorted(self.stop_tokens.difference(base_stops))
        self.end_text = str(tokenizer.convert_ids_to_tokens(self.end_of_turn))
        self._added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        spelt_out = {
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special or CONTROL_FORM.fullmatch(token.content)
        }
        self._control = re.compile("|".join(re.escape(each) for each in self._added if each in spelt_out) or "(?!)")
        # SentencePiece (Llama 2, Mistral) puts a space before the first word of each text that it encodes
        self._adds_space = self._token_ids("\nx") != self._token_ids("\n") + self._token_ids("x")

    def encode(self, text: str, after: str = "") -> list[int]:
        """Return the ids of a text without adding any; tokens that it names are recognised, except control tokens in
        `as_words`.

        Args:
            after: the text that it continues: a tokenizer that puts a space before the first word of a text puts none
                here, or, after a special token, what it puts there.

        Raises:
            ValueError: such a tokenizer merges the text with every text before it, or words spell a control token for
                which the tokenizer has no other ids.
        """
        ids: list[int] = []
        for index, part in enumerate(text.split(SPELT)):
            if part:
                spelt = index % 2 == 1
                part_ids = self._continued(part, after, spelt) if after else self._token_ids(part, spelt)
                if spelt and self._contains_control(part_ids, part):
                    raise ValueError(
                        f"the words contain {part!r}, a control token of the tokenizer, which encodes it as that token "
                        "even as plain text: remove it from the words"
                    )
                ids += part_ids
                after = SPELT if spelt else part
        return ids

    def _contains_control(self, ids: Sequence[int], name: str) -> bool:
        """Return whether the ids of a control token's name contain the token itself. Unknown text has the id of the
        unknown token, and padding may have that of a punctuation mark: both may stand in words."""
        token: Any = self._tokenizer.convert_tokens_to_ids(name)
        controls = CONTROL_FORM.fullmatch(name) is not None or token in self.stop_tokens
        return controls and name != self._tokenizer.unk_token and token in ids

    def _token_ids(self, text: str, spelt: bool = False) -> list[int]:
        with tokenizer_errors("the tokenizer"):
            if not spelt:
                ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
                return ids
            # The steps of the tokenizer without its added tokens. `split_special_tokens` of transformers would leave
            # out only those marked as special, and is a setting of the tokenizer that other threads use meanwhile.
            backend = self._tokenizer.backend_tokenizer
            if backend.normalizer is not None:
                text = backend.normalizer.normalize_str(text)
            pieces = [text]
            if backend.pre_tokenizer is not None:
                pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
            return [token.id for piece in pieces for token in backend.model.tokenize(piece)]

    def _continued(self, text: str, after: str, spelt: bool) -> list[int]:
        if not self._adds_space:
            return self._token_ids(text, spelt)
        special = None if spelt else next(filter(after.endswith, self._added), None)
        for prefix in (special,) if special else BEHIND:
            prefix_ids, ids = self._token_ids(prefix, spelt), self._token_ids(prefix + text, spelt)
            if prefix_ids and ids[: len(prefix_ids)] == prefix_ids:
                return ids[len(prefix_ids) :]
        raise ValueError(f"the tokenizer has no ids of its own for a text that continues another: {text[:40]!r}")

    def as_words(self, text: str) -> str:
        """Mark control tokens in the words of a turn, so that `encode` encodes them as plain text: those that the
        tokenizer marks as special, and those of the form `CONTROL_FORM`. Words can then neither end a turn nor begin
        one."""
        return self._control.sub(lambda found: f"{SPELT}{found[0]}{SPELT}", text.replace(SPELT, ""))

    def decode(self, ids: Sequence[int] | Tensor, special: bool = False) -> str:
        """Decode ids to text, with special tokens if `special` is set."""
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return str(self._tokenizer.decode(values, skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def is_byte(self, token: int) -> bool:
        """Whether a token is one byte of a character that the vocabulary lacks: it decodes with its neighbours."""
        name = self._tokenizer.convert_ids_to_tokens(int(token))
        return isinstance(name, str) and re.fullmatch(r"<0x[0-9A-F]{2}>", name) is not None

    def render(self, turns: Sequence[tuple[str, str]], answering: bool = False) -> str:
        """Render (role, text) turns with the chat template; `answering`: end where the assistant's words begin."""
        return self.render_messages([{"role": role, "content": text} for role, text in turns], answering)

    def render_messages(self, messages: Sequence[Mapping[str, Any]], answering: bool = False) -> str:
        """As `render`, for messages of plain strings, lists and dictionaries. Raises ValueError as `render_chat`."""
        template = self._tokenizer.chat_template
        assert isinstance(template, str)
        return render_chat(template, messages, answering, self._tokenizer.special_tokens_map)

    def state(self) -> dict[str, str]:
        """Return the whole tokenizer as plain text, for a checkpoint."""
        template = self._tokenizer.chat_template
        assert isinstance(template, str)
        special_tokens = {name: getattr(self._tokenizer, token) for name, token in NAMED_TOKENS.items()}
        return {
            "tokenizer": self._tokenizer.backend_tokenizer.to_str(),
            TEMPLATE: template,
            **{name: str(token) for name, token in special_tokens.items() if token is not None},
            **({STOP: json.dumps(self._further_stops)} if self._further_stops else {}),
        }

    def words(self) -> dict[str, str]:
        """Return the state without the stop tokens: all that ids, and so the lengths of texts, depend on."""
        return {name: text for name, text in self.state().items() if name != STOP}

    def same_words(self, other: ChatTokenizer, template: bool = True) -> bool:
        """Return whether another tokenizer assigns the same ids and, with `template`, has the same chat template; stop
        tokens may differ."""
        own_words, other_words = self.words(), other.words()
        return all(
            own_words.get(name) == other_words.get(name)
            for name in own_words.keys() | other_words
            if template or name != TEMPLATE
        )

    @classmethod
    def from_state(cls, state: dict[str, str], vocabulary: int | None = None) -> ChatTokenizer:
        """Build the tokenizer of a stored state (see `state`); no file is read.

        Args:
            vocabulary: tokens of its language model; None: not known.

        Raises:
            ValueError: the state is damaged, or as `parse_tokenizer`.
        """
        from transformers import PreTrainedTokenizerFast

        backend = parse_tokenizer(state["tokenizer"], "its tokenizer", vocabulary)
        special_tokens = {token: state[name] for name, token in NAMED_TOKENS.items() if name in state}
        for token, text in special_tokens.items():
            if backend.token_to_id(text) is None:  # transformers would add it, beyond the model's vocabulary
                raise ValueError(f"its tokenizer has no token {text[:40]!r}, which is to be its {token}")
        with tokenizer_errors("its tokenizer"):
            fast = PreTrainedTokenizerFast(
                tokenizer_object=backend, chat_template=state["chat_template"], **special_tokens
            )
        return cls(fast, _parse_ids(state.get(STOP, "[]")))


@model_part(from_checkpoint={"source": "the checkpoint"})
class PretrainedTokenizer:
    """Source of a language model's own tokenizer.

    Args:
        source: local folder or name on the Hugging Face hub.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    def load(self, folder: Path, texts: Iterable[str] | None = None) -> ChatTokenizer:
        """Load the tokenizer; both arguments are ignored.

        Raises:
            FileNotFoundError: the source does not exist. ValueError: damaged files.
        """
        return ChatTokenizer(read_language_tokenizer(self.source), read_stop_tokens(self.source))


@model_part(from_checkpoint={"init_from": None})
class TrainedTokenizer:
    """Source of a byte-level BPE tokenizer trained on the data's own text and stored in a folder of the data, one file
    per size.

    Args:
        vocabulary: largest number of tokens. Every byte is a token, so that no text is unknown.
        init_from: a run folder or checkpoint whose tokenizer is used instead of training one, for the next stage.
    """

    def __init__(self, vocabulary: int = 1024, init_from: str | None = None) -> None:
        if vocabulary < 300:
            raise ValueError(f"language.tokenizer.vocabulary={vocabulary}: 256 bytes and the special tokens need 300")
        self.vocabulary, self.init_from = vocabulary, init_from

    def load(self, folder: Path, texts: Iterable[str] | None = None) -> ChatTokenizer:
        """Load the tokenizer in `folder`, after training it on `texts` if it does not exist; or that of `init_from`.

        Raises:
            FileNotFoundError: it does not exist and no texts are given, or no such run. ValueError: the run has none.
        """
        if self.init_from is not None:
            return _read_run_tokenizer(self.init_from)
        from transformers import PreTrainedTokenizerFast

        file = self.file_in(folder)
        if texts is None and not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}: prepare the data first")
        make_once(file, Path.is_file, lambda path: write_text(path, self._trained(texts or ())), together_without=True)
        try:
            tokenizer = parse_tokenizer(file.read_bytes(), str(file))
        except ValueError as error:
            raise ValueError(f"{error}: remove it, and it is trained again") from error
        return ChatTokenizer(
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TINY_TEMPLATE, eos_token=TURN_END)
        )

    def file_in(self, folder: Path) -> Path:
        """Return the file of the tokenizer of this size in a folder. `load` identifies it only by its name, so the
        folder must be that of the texts."""
        return Path(folder) / f"tokenizer-{self.vocabulary}.json"

    def _trained(self, texts: Iterable[str]) -> str:
        """Train a tokenizer on texts and return it as JSON."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
        log.info("tokenizer of %d tokens trained", tokenizer.get_vocab_size())
        return tokenizer.to_str(pretty=True)


def _parse_ids(text: str) -> list[int]:
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"the tokens at which its tokenizer stops are damaged ({error})") from error
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError(f"the tokens at which its tokenizer stops are no list of ids: {text[:40]}")
    return ids


def _read_run_tokenizer(run: str) -> ChatTokenizer:
    content = read_checkpoint(run)
    if TOKENIZER_STATE not in content:
        raise ValueError(f"language.tokenizer.init_from={run} is no run of a video-language model")
    return ChatTokenizer.from_state(content[TOKENIZER_STATE]["tokenizer"])
