"""Files other than tokenizer.json from which transformers builds a tokenizer: tokenizers of known families are read; a
tokenizer that exceeds all known ones in any size is refused, whatever file it comes from."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from huggingface_hub import HfApi
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from keygrip.evaluation.known_features import clip_part
from keygrip.inference.processor import KeygripProcessor
from keygrip.models.language import hub, tokenizer_files
from keygrip.models.language.hub import read_tokenizer
from keygrip.models.language.tokenizer_files import check_sentencepiece
from keygrip.models.patch_dit.text_encoders import T5Text

WORDS = ["a red cube left of the blue block", "the gripper opens above a green ball", "what happens? it falls."] * 20
LETTERS = sorted({letter for line in WORDS for letter in line.replace(" ", "")})
LONG = "<" + "z" * 5000 + ">"
TOO_LONG = r"has 500\d characters; no tokenizer has one of more than 4096"


def pieces(kind: str = "unigram") -> bytes:
    """Return the file of a small SentencePiece model."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS),
        model_writer=made,
        vocab_size=60,
        model_type=kind,
        minloglevel=2,
        pad_id=3,
        hard_vocab_limit=False,
    )
    return made.getvalue()


def field(number: int, content: bytes) -> bytes:
    """Return a length-delimited field in protobuf's format."""
    length, written = len(content), b""
    while length > 127:
        written, length = written + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 & 127 | 2 | (128 if number > 15 else 0), *([number >> 4] if number > 15 else [])]) + (
        written + bytes([length]) + content
    )


def write(folder: Path, **files: Any) -> str:
    """Write files by their name without its ending: bytes and text as they are, everything else as JSON."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / f"{name}.model").write_bytes(content)
        elif isinstance(content, str):
            (folder / f"{name}.txt").write_text(content)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def words() -> dict[str, Any]:
    """Return the content of a tokenizer.json with whole words."""
    made = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "red": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return dict(json.loads(made.to_str()))


def bytes_of(**config: Any) -> dict[str, Any]:
    """Return vocab.json, merges.txt and tokenizer_config.json as in GPT-2 and Qwen."""
    vocab = {letter: number for number, letter in enumerate([*LETTERS, "Ġ", "re", "red", "<|endoftext|>"])}
    return {"vocab": vocab, "merges": "#version: 0.2\nr e\nre d\n", "tokenizer_config": config}


def added(**contents: str) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {number.removeprefix("at"): {"content": content, **plain} for number, content in contents.items()}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
KNOWN: dict[str, Callable[[], dict[str, Any]]] = {
    "T5 of a SentencePiece alone": lambda: {
        "config": {"model_type": "t5"},
        "spiece": pieces(),
        "tokenizer_config": {"tokenizer_class": "T5Tokenizer", "extra_ids": 100},
        "special_tokens_map": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    },
    "SigLIP of a SentencePiece": lambda: {
        "config": {"model_type": "siglip"},
        "spiece": pieces(),
        "tokenizer_config": {"tokenizer_class": "SiglipTokenizer", "sp_model_kwargs": {}, "added_tokens_decoder": {}},
    },
    "Llama 2 of a SentencePiece, with added tokens": lambda: {
        "config": {"model_type": "llama"},
        "tokenizer": pieces("bpe"),
        "tokenizer_config": {
            "tokenizer_class": "LlamaTokenizer",
            "pad_token": {"__type": "AddedToken", "content": "<p>"},
        },
        "added_tokens": {"<p>": 60},
    },
    "Llama 3": lambda: {
        "config": {"model_type": "llama"},
        "tokenizer": words(),
        "tokenizer_config": FAST
        | {"added_tokens_decoder": added(at3="<|eot_id|>"), "eos_token": "<|eot_id|>", "model_max_length": 131072}
        | {"chat_template": "x" * 9000, "system": "y" * 9000, "additional_special_tokens": ["<|eot_id|>"]},
    },
    "Qwen of a vocabulary and merges": lambda: {
        "config": {"model_type": "qwen2"},
        **bytes_of(
            tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=added(at22="<|endoftext|>", at23="<|im_end|>")
        ),
    },
    "SmolLM": lambda: {
        "config": {"model_type": "llama"},
        **bytes_of(tokenizer_class="GPT2Tokenizer", extra_special_tokens=["<|im_start|>"]),
    },
    "CLIP": lambda: {
        "config": {"model_type": "clip"},
        "vocab": {each: n for n, each in enumerate([*LETTERS, *(f"{x}</w>" for x in LETTERS), "<|startoftext|>"])}
        | {"<|endoftext|>": 99, "re": 100, "red</w>": 101},
        "merges": "#version: 0.2\nr e\nre d</w>\n",
        "tokenizer_config": {"tokenizer_class": "CLIPTokenizer"},
        "special_tokens_map": {"bos_token": {"content": "<|startoftext|>", "normalized": True}},
    },
    "BERT": lambda: {
        "config": {"model_type": "bert"},
        "vocab": "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "##s"]),
        "tokenizer_config": {"tokenizer_class": "BertTokenizer"},
    },
    "files by version": lambda: {
        "tokenizer": words(),
        "tokenizer_config": FAST | {"fast_tokenizer_files": ["tokenizer.4.0.0.json", "tokenizer.json"]},
        "tokenizer.4.0.0": words(),
    },
}


@pytest.mark.parametrize("files", list(KNOWN.values()), ids=list(KNOWN))
def test_tokenizers_of_known_families_are_read(files: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write(tmp_path, **files()))
    ids = tokenizer("a red red")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["a", "red", "red"]


def growing(content: dict[str, Any]) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    return content | {"normalizer": {"type": "Sequence", "normalizers": [replace] * 2}}


def large_id(content: dict[str, Any]) -> dict[str, Any]:
    content["model"]["vocab"]["big"] = 300_000_000
    return content


CONVERTED = {"tokenizer_class": "LlamaTokenizer"}
T5 = {"tokenizer_class": "T5Tokenizer"}
# files in a folder in addition to config.json, and why the tokenizer is not read
HOSTILE: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "growth by version": (
        lambda: {
            "tokenizer": words(),
            "tokenizer.4.0.0": growing(words()),
            "tokenizer_config": FAST | {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]},
        },
        r"tokenizer\.4\.0\.0\.json: .*may make 1000000 characters",
    ),
    "ids by version": (
        lambda: {
            "tokenizer": words(),
            "tokenizer.4.0.0": large_id(words()),
            "tokenizer_config": FAST | {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]},
        },
        r"tokenizer\.4\.0\.0\.json: .*has the id 300000000",
    ),
    "versions that are no list": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST | {"fast_tokenizer_files": 5}},
        "fast_tokenizer_files is no list",
    ),
    "versions that are none": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST | {"fast_tokenizer_files": ["tokenizer.x y.json"]}},
        "Invalid version",
    ),
    "added tokens": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST | {"added_tokens_decoder": added(at3=LONG)}},
        rf"tokenizer_config\.json: .*{TOO_LONG}",
    ),
    "ids of added tokens": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST | {"added_tokens_decoder": added(at300000000="<x>")}},
        r"tokenizer_config\.json: .*has the id 300000000",
    ),
    "extra tokens": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST | {"extra_special_tokens": [LONG]}},
        rf"tokenizer_config\.json: .*{TOO_LONG}",
    ),
    "extra tokens by name": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST | {"extra_special_tokens": {"image_token": LONG}}},
        rf"tokenizer_config\.json: .*{TOO_LONG}",
    ),
    "additional tokens": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST | {"additional_special_tokens": [LONG]}},
        rf"tokenizer_config\.json: .*{TOO_LONG}",
    ),
    "a named token": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST | {"bos_token": LONG}},
        rf"tokenizer_config\.json: .*{TOO_LONG}",
    ),
    "a named token with its settings": (
        lambda: {
            "tokenizer": words(),
            "tokenizer_config": FAST | {"bos_token": {"__type": "AddedToken", "content": LONG}},
        },
        rf"tokenizer_config\.json: .*{TOO_LONG}",
    ),
    "a named token of its own": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST | {"chat_template_token": LONG}},
        rf"tokenizer_config\.json: .*{TOO_LONG}",
    ),
    "the map of special tokens": (
        lambda: {
            "tokenizer": words(),
            "tokenizer_config": FAST,
            "special_tokens_map": {"bos_token": {"content": LONG}},
        },
        rf"special_tokens_map\.json: .*{TOO_LONG}",
    ),
    "the file of added tokens": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST, "added_tokens": {LONG: 3}},
        rf"added_tokens\.json: .*{TOO_LONG}",
    ),
    "ids of the file of added tokens": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST, "added_tokens": {"<x>": 300_000_000}},
        r"added_tokens\.json: .*has the id 300000000",
    ),
    "tokens that it makes": (
        lambda: {"spiece": pieces(), "tokenizer_config": T5 | {"extra_ids": 10**9}},
        "extra_ids=1000000000 tokens of its own; no tokenizer needs 10000",
    ),
    "another format": (lambda: {"tokenizer_config": FAST | {"gguf_file": "x.gguf"}}, "gguf_file is not taken here"),
    "a vocabulary": (
        lambda: bytes_of(tokenizer_class="GPT2Tokenizer") | {"vocab": {"a": 0, LONG: 1}},
        rf"vocab\.json: .*{TOO_LONG}",
    ),
    "ids of a vocabulary": (
        lambda: bytes_of(tokenizer_class="GPT2Tokenizer") | {"vocab": {"a": 0, "b": 300_000_000}, "merges": "#version"},
        r"vocab\.json: .*has the id 300000000",
    ),
    "a vocabulary of the configuration": (
        lambda: {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "vocab": {"a": 0, LONG: 1}, "merges": []}},
        rf"tokenizer_config\.json: .*{TOO_LONG}",
    ),
    "many long tokens": (
        lambda: bytes_of(tokenizer_class="GPT2Tokenizer") | {"vocab": {f"{n:04d}" * 1000: n for n in range(20)}},
        "may be divided in 320000000 ways",
    ),
    "a vocabulary in lines": (
        lambda: {"vocab": "[UNK]\n[CLS]\n[SEP]\na\n" + LONG, "tokenizer_config": {"tokenizer_class": "BertTokenizer"}},
        rf"the tokenizer of .*{TOO_LONG}",
    ),
    "a longer line": (
        lambda: {"vocab": "[UNK]\n" + "z" * 20_000, "tokenizer_config": {"tokenizer_class": "BertTokenizer"}},
        r"vocab\.txt: a line has 20000 bytes",
    ),
    "lines under a SentencePiece's name": (
        lambda: {"tokenizer": b"IQ== 0\n" + b"eHh4" * 5000 + b" 1\n", "tokenizer_config": CONVERTED},
        r"tokenizer\.model: a line has 20002 bytes",
    ),
    "a piece": (
        lambda: {"spiece": pieces() + field(1, field(1, LONG.encode())), "tokenizer_config": T5},
        rf"spiece\.model: .*{TOO_LONG}",
    ),
    "a piece of merges": (
        lambda: {"tokenizer": pieces("bpe") + field(1, field(1, LONG.encode())), "tokenizer_config": CONVERTED},
        rf"tokenizer\.model: .*{TOO_LONG}",
    ),
    "a map of pieces": (
        lambda: {
            "spiece": pieces() + field(3, field(2, struct.pack("<I", 0) + b"x" * 999 + b"\0")),
            "tokenizer_config": {"tokenizer_class": "SiglipTokenizer"},
        },
        r"spiece\.model: its normalizer may make 999 characters of one",
    ),
    "what a piece that is not known is written as": (
        lambda: {"spiece": pieces() + field(2, field(44, LONG.encode())), "tokenizer_config": T5},
        rf"spiece\.model: .*{TOO_LONG}",
    ),
    "a damaged SentencePiece": (
        lambda: {"spiece": pieces()[:-3], "tokenizer_config": T5},
        r"spiece\.model is damaged or no SentencePiece model",
    ),
    "no object": (lambda: {"tokenizer": words(), "tokenizer_config": [1]}, "it is no object"),
    "an array of arrays": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST | {"added_tokens_decoder": [1]}},
        "added_tokens_decoder is no object",
    ),
    "settings of another kind": (
        lambda: {"tokenizer": words(), "tokenizer_config": FAST | {"added_tokens_decoder": {"3": {"content": 5}}}},
        "the tokenizer of .* is damaged or no tokenizer",
    ),
}


@pytest.mark.parametrize(("files", "reason"), list(HOSTILE.values()), ids=list(HOSTILE))
def test_what_no_tokenizer_has_is_refused_whatever_file_it_stands_in(
    files: Callable[[], dict[str, Any]], reason: str, tmp_path: Path
) -> None:
    content = {"config": {"model_type": "bert"}} | files()
    with pytest.raises(ValueError, match=reason):
        read_tokenizer(write(tmp_path, **content))


def test_what_transformers_makes_is_checked_where_no_file_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example if a version of transformers reads a file that keygrip does not check."""
    for name in ("TOKENIZER_FILE", "VOCABULARY_FILES", "TOKEN_FILES"):
        monkeypatch.setattr(f"keygrip.models.language.hub.{name}", () if name != "TOKENIZER_FILE" else "no.json")
    hostile = [
        ({"tokenizer": growing(words())}, r"the tokenizer of .*may make 1000000 characters"),
        ({"tokenizer": large_id(words())}, r"the tokenizer of .*has the id 300000000"),
        ({"tokenizer": words(), "added_tokens": {LONG: 3}}, rf"the tokenizer of .*{TOO_LONG}"),
        ({"spiece": pieces() + field(1, field(1, LONG.encode())), "tokenizer_config": T5}, TOO_LONG),
        ({"vocab": {"a": 0, LONG: 1}, "merges": "#version: 0.2\n"}, TOO_LONG),
    ]
    for number, (files, reason) in enumerate(hostile):
        kind = "GPT2Tokenizer" if "vocab" in files else "PreTrainedTokenizerFast"
        content = {"config": {"model_type": "bert"}, "tokenizer_config": {"tokenizer_class": kind}} | files
        with pytest.raises(ValueError, match=reason):
            read_tokenizer(write(tmp_path / str(number), **content))


def test_every_reader_of_tokenizers_checks_the_files_and_what_is_made_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = KNOWN["CLIP"]()
    config = files["tokenizer_config"]
    readers: dict[str, Callable[[str], Any]] = {
        "read": read_tokenizer,
        "clip": lambda source: clip_part(CLIPTokenizer, Path(source)),
        "T5": lambda source: T5Text(source).parts,
        "processor": KeygripProcessor.from_pretrained,
    }
    for name, read in readers.items():
        settings = {"image_size": 32, "fit": "crop", "max_frames": 4, "prompt_order": "media_first"}
        settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "KeygripProcessor"}
        files["tokenizer_config"] = config | {"extra_special_tokens": [LONG]}
        source = write(tmp_path / name, **files, processor_config=settings)
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json: .*{TOO_LONG}"):
            read(source)
        write(tmp_path / name, tokenizer_config=config)
        with monkeypatch.context() as patch:
            patch.setattr("keygrip.models.language.tokenizer_json.LONGEST_TOKEN", 12)
            patch.setattr("keygrip.models.language.hub.VOCABULARY_FILES", ())
            patch.setattr("keygrip.models.language.hub.TOKEN_FILES", ())
            with pytest.raises(ValueError, match=r"the tokenizer of .*has 1[35] characters"):
                read(source)


@pytest.mark.parametrize("reached", [True, False])
def test_the_hub_is_asked_once_which_files_it_has(
    reached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "sub", **KNOWN["Llama 3"](), added_tokens={LONG: 3})
    told: list[dict[str, Any]] = []
    asked: dict[str, dict[str, Any]] = {}

    def listed(hub: HfApi, source: str, **options: Any) -> list[str]:
        told.append({"source": source, **options})
        if not reached:
            raise ConnectionError("no network")
        return ["README.md", *(f"sub/{path.name}" for path in (tmp_path / "sub").iterdir())]

    def file_of(source: str, name: str, **options: Any) -> Path | None:
        asked[name] = options
        return found if (found := tmp_path / options["subfolder"] / name).is_file() else None

    monkeypatch.setattr("keygrip.hub_network.unreachable", lambda: None)
    monkeypatch.setattr(HfApi, "list_repo_files", listed)
    monkeypatch.setattr(hub, "file_of", file_of)
    with pytest.raises(ValueError, match=rf"added_tokens\.json: .*{TOO_LONG}"):
        hub.checked_tokenizer(lambda: pytest.fail("was read"), "some/model", subfolder="sub", revision="x")
    assert told == [{"source": "some/model", "revision": "x"}]
    if reached:
        assert asked.keys() == {"tokenizer_config.json", "tokenizer.json", "added_tokens.json"}
    else:
        assert all(options["local_files_only"] for options in asked.values())


def test_a_larger_file_than_any_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, **KNOWN["T5 of a SentencePiece alone"]())
    monkeypatch.setattr("keygrip.models.language.tokenizer_json.LARGEST_FILE_BYTES", 500)
    with pytest.raises(ValueError, match=r"spiece\.model has \d+ bytes, more than any tokenizer"):
        read_tokenizer(source)


def test_a_sentencepiece_is_read_as_its_own_library_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("unigram", "bpe", "char"):
        content = pieces(kind)
        own = sentencepiece.SentencePieceProcessor(model_proto=content)
        seen: list[str] = []
        monkeypatch.setattr(tokenizer_files, "_refuse_texts", lambda texts, where, seen=seen: seen.extend(texts))
        check_sentencepiece(content, "x")
        assert seen[: len(own)] == [own.id_to_piece(n) for n in range(len(own))]


def test_a_tokenizer_of_tokens_that_are_settings_is_as_transformers_makes_it(tmp_path: Path) -> None:
    """Reading the tokenizer does not change the checked files."""
    made = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    made.normalizer = normalizers.NFC()
    made.add_special_tokens([AddedToken("<s>", special=True)])
    source = write(tmp_path, config={"model_type": "bert"}, tokenizer=json.loads(made.to_str()), tokenizer_config=FAST)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads(read_tokenizer(source).backend_tokenizer.to_str())["added_tokens"][0]["content"] == "<s>"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
