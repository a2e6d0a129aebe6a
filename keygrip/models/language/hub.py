"""Loading of weights and tokenizers from a local folder or the Hugging Face hub: the only module that calls
`from_pretrained` for language models."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from keygrip.hub_network import cache_only_without_network, unreachable
from keygrip.models.language.tokenizer_files import (
    CONFIG_FILE,
    TOKEN_FILES,
    VOCABULARY_FILES,
    check_built,
    check_config,
    check_tokens,
    check_vocabulary,
)
from keygrip.models.language.tokenizer_json import TOKENIZER_FILE, check_tokenizer_file, tokenizer_errors

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


def read_config(source: str) -> Any:
    """Read the configuration of a language model, in the layout of the hub.

    Args:
        source: a local folder or a name on the hub.

    Raises:
        FileNotFoundError: the source does not exist, or is a folder without config.json. ValueError: config.json has
            impossible values.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json: give the folder of a language model as the hub ships it")
    try:
        return from_pretrained(AutoConfig, source)
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{source}: its config.json has values that cannot be ({message}): download it again"
        ) from error


def with_fused_attention(config: Any) -> Any:
    """Set PyTorch's fused attention kernels in a configuration of transformers; it is changed in place and returned."""
    config._attn_implementation = "sdpa"  # transformers has no public name for it once a configuration is made
    return config


def read_weights(kind: Any, source: str, title: str, **options: Any) -> Any:
    """Load a model of transformers with the weights of a folder or the hub, in float32: from safetensors if there are
    any, else from PyTorch's own file, of which only tensors are read (openai/clip-vit-base-patch32 has no other).

    Args:
        kind: class of transformers. source: as in `read_config`. title: name of the model, for messages.
        options: for `from_pretrained`.

    Raises:
        FileNotFoundError: the source does not exist. ValueError: weights are missing.
    """
    options = {"dtype": torch.float32, "output_loading_info": True, "weights_only": True, **options}
    model, report = from_pretrained(kind, source, **options)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{source} lacks weights: {', '.join(missing[:3])}; it is not a whole {title}")
    return model


def read_tokenizer(source: str) -> Any:
    """Load a tokenizer of transformers from a folder or the hub. Raises FileNotFoundError: it does not exist;
    ValueError: as `checked_tokenizer`."""
    from transformers import AutoTokenizer

    return checked_tokenizer(lambda: from_pretrained(AutoTokenizer, source), source)


def read_language_tokenizer(source: str) -> Any:
    """Load the tokenizer of a language model as `read_tokenizer` does, but with exactly the pieces of tokenizer.json if
    there is one.

    tokenizer_config.json may name a class that builds the tokenizer anew from the vocabulary, and drops other settings
    of tokenizer.json. SmolLM2's names GPT-2's class, which does not split numbers into digits.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    def load() -> Any:
        tokenizer = from_pretrained(AutoTokenizer, source)  # first: it refuses a tokenizer with code of its own
        if type(tokenizer) is PreTrainedTokenizerFast or file_of(source, TOKENIZER_FILE) is None:
            return tokenizer
        return from_pretrained(PreTrainedTokenizerFast, source)

    return checked_tokenizer(load, source)


def read_stop_tokens(source: str) -> list[int]:
    """Return the ids of the tokens that end an answer of a language model, as in transformers: eos_token_id of
    generation_config.json, or of config.json if there is no such file. Without either: no ids, and a log message.

    Args:
        source: as in `read_config`.

    Raises:
        ValueError: the file is damaged.
    """
    for name in ("generation_config.json", "config.json"):
        file = file_of(source, name)
        if file is None:
            continue
        try:
            eos_token_id = json.loads(file.read_bytes()).get("eos_token_id")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} is damaged or no configuration ({error}): download it again") from error
        ids = eos_token_id if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]
        if not all(type(each) is int for each in ids):
            raise ValueError(f"{file}: eos_token_id={eos_token_id!r} is no token's id and no list of them")
        return ids
    log.info("%s: an answer ends where the tokenizer says: no generation_config.json or config.json to be had", source)
    return []


def checked_tokenizer(load: Callable[[], Loaded], source: str, vocabulary: int | None = None, **options: Any) -> Loaded:
    """Load a tokenizer of transformers, or a processor with one. Its files are checked before transformers reads them,
    and the tokenizer itself afterwards, since it may be built from several files.

    Args:
        load: function that loads it. source: where `load` loads it from, as in `read_config`. vocabulary: see
            `keygrip.models.language.tokenizer_json.parse_tokenizer`. options: its location, as in `from_pretrained`
            ("revision").

    Raises:
        ValueError: as `parse_tokenizer`, for any of the files. Also any error of `load` for files that do not exist or
            cannot be read.
    """
    find = _finder(source, **options)
    config = find(CONFIG_FILE)
    other_files = [] if config is None else check_config(config, vocabulary)
    for names, check in (
        ((TOKENIZER_FILE, *other_files), check_tokenizer_file),
        (TOKEN_FILES, check_tokens),
        (VOCABULARY_FILES, check_vocabulary),
    ):
        for name in dict.fromkeys(names):
            if (file := find(name)) is not None:  # otherwise `load` reports it, if it is needed
                check(file, vocabulary)
    origin = f"the tokenizer of {source}"
    try:
        loaded = load()
    except (OSError, ValueError, ImportError):
        raise
    except BaseException:  # any error is treated as one of damaged files: also a panic of Rust
        with tokenizer_errors(origin):
            raise
    built: Any = loaded
    check_built(built if hasattr(built, "get_vocab") else built.tokenizer, origin, vocabulary)
    return loaded


def file_of(source: str, name: str, **options: Any) -> Path | None:
    """Return a file of a folder or the hub, as transformers finds it; None: it does not exist or is not available.

    Args:
        source: as in `read_config`. options: its location, as in `from_pretrained` ("revision").
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(source, name, **cache_only_without_network(source, options))
    except (OSError, ValueError):
        return None
    return None if path is None else Path(path)


def _finder(source: str, **options: Any) -> Callable[[str], Path | None]:
    """Return `file_of` for many files of a folder or the hub; the hub's list of files is requested only once. If the
    hub cannot be reached, files that were downloaded before are found."""
    options = cache_only_without_network(source, options)
    if not Path(source).is_dir() and not options.get("local_files_only"):
        from huggingface_hub import HfApi

        folder = f"{options['subfolder']}/" if options.get("subfolder") else ""
        try:
            hub_options = {name: options[name] for name in ("revision", "token") if name in options}
            hub_files = set(HfApi().list_repo_files(source, **hub_options))
        except Exception:  # any error of the network
            options = options | {"local_files_only": True}
        else:
            return lambda name: file_of(source, name, **options) if folder + name in hub_files else None
    return lambda name: file_of(source, name, **options)


class ForeignCodeError(ValueError):
    """The content of a folder or the hub needs Python code that comes with it."""


@contextmanager
def foreign_code_errors(source: str) -> Iterator[None]:
    """Convert errors of transformers to errors that name the source.

    Raises:
        ForeignCodeError: `trust_remote_code=False` refused it, or a weights file of PyTorch's holds more than tensors.
        ValueError: a safetensors file is cut off or damaged.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{source} has weights that cannot be read as safetensors ({error}): copy them again"
        ) from error
    except pickle.UnpicklingError as error:
        raise ForeignCodeError(
            f"{source} has weights in a file of PyTorch's that is damaged, or holds more than tensors, which keygrip "
            "does not execute: give a folder that has them as safetensors"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ForeignCodeError(
            f"{source} needs Python code of its own, which keygrip does not execute: give a model and a tokenizer of a "
            "kind that transformers has itself"
        ) from error


def from_pretrained(kind: Any, source: str, **options: Any) -> Any:
    """Call `kind.from_pretrained(source)` of an Auto class or a model of transformers. Code from the folder or the hub
    is never executed, and there is no prompt on the terminal to permit it.

    Raises:
        FileNotFoundError: the source does not exist or is not available from the hub; one line states what to download.
        ForeignCodeError: the source needs such code.
    """
    is_folder = Path(source).is_dir()
    if not is_folder and source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"weights or tokenizer: there is no folder {source}")
    load_options = cache_only_without_network(source, options)
    try:
        with foreign_code_errors(source):
            return kind.from_pretrained(source, trust_remote_code=False, **load_options)
    except ForeignCodeError:
        raise
    except (OSError, ValueError) as error:
        if is_folder:
            raise
        reason = str(error).splitlines()[0][:120]
        if load_options is not options:
            reason = f"{unreachable()}; and the files in its cache: {reason}"
        raise FileNotFoundError(
            f"{source} is neither a folder nor to be had from the hub ({reason}): download "
            "its config.json, generation_config.json, model.safetensors and tokenizer files from "
            f"https://huggingface.co/{source} into a folder and give that folder where the config names the hub "
            "(weights and tokenizer.source)"
        ) from error
