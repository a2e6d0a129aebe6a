"""Untrusted exports, tokenizers, chat templates and conversations: impossible content is refused without using
memory."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import string
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor
from vlm_parts import small_module

from keygrip.config import compose
from keygrip.exporting.folder import CONFIG, WEIGHTS, write_export
from keygrip.inference.processor import KeygripProcessor
from keygrip.inference.video_chat import VideoChat
from keygrip.models.foveated_vlm.hub_files import chat_template
from keygrip.models.language.chat_templates import FILTERS, METHODS, TESTS, render_chat
from keygrip.models.language.tokenizer_json import parse_tokenizer
from keygrip.models.language.tokenizers import (
    TINY_TEMPLATE,
    ChatTokenizer,
    PretrainedTokenizer,
    TrainedTokenizer,
)
from keygrip.training.checkpoints import Header, build_module

TEXTS = ["Which digit is on the red cube? And which on the blue one? 7. Sure?"] * 3
SETTINGS = [
    *("model=foveated_vlm", "data=robot_videos", "backbone.image_size=32", "language.model.vocabulary=400"),
    *("+backbone.width=32", "+backbone.depth=2", "+backbone.heads=2"),
    *("language.model.width=32", "language.model.layers=1", "language.model.mlp_width=48"),
]
PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}  # a normalizer that no library can read
TALK = [{"role": "user", "content": "Which digit?"}]


def user(*items: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a small model, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("hostile")
    config: Any = OmegaConf.to_container(compose("train", [*SETTINGS, f"run_dir={folder / 'run'}"]), resolve=True)
    module: Any = build_module(config)
    module.collator.prepare(folder / "words", lambda: iter(TEXTS))
    module.image_options = {"image_size": 32, "fit": "stretch", "max_frames": 8}
    content: dict[str, Any] = {"keygrip": Header(config, {"packages": {"keygrip": "0"}}).header, "global_step": 7}
    module.on_save_checkpoint(content)
    files, facts = module.export_files()
    return write_export(folder / "export", content, module.state_dict(), "card", files=files, facts=facts)


def changed(export: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy an export, change its stored content and update its hashes to match."""
    folder.mkdir()
    for file in export.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / CONFIG).read_text())
    change(config["checkpoint"])
    config["sha256"][CONFIG] = hashlib.sha256(json.dumps(config["checkpoint"], sort_keys=True).encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def with_tokenizer(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        stored = content["language"]["tokenizer"]
        tokenizer = json.loads(stored["tokenizer"])
        change(tokenizer)
        stored["tokenizer"] = json.dumps(tokenizer)

    return apply


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("network", "frame_numbers"), 20_000_000),
        (("network", "language", "vocabulary"), 2**40),
        (("network", "language", "mlp_width"), 10**8),
        (("network", "backbone", "width"), 2 * 10**6),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_taken(
    place: tuple[str, ...], value: int, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def larger(content: dict[str, Any]) -> None:
        node = content["keygrip"]["config"]["model"]
        for key in place[:-1]:
            node = node[key]
        assert place[-1] in node
        node |= {place[-1]: value, "frame_clock": False} if place[-1] == "frame_numbers" else {place[-1]: value}

    folder = changed(export, tmp_path / "changed", larger)
    made: list[int] = []
    randn, empty = torch.randn, torch.empty
    monkeypatch.setattr(torch, "randn", lambda *a, **k: (found := randn(*a, **k), made.append(found.numel()))[0])
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (found := empty(*a, **k), made.append(found.numel()))[0])
    setting = rf"model\.{re.escape('.'.join(place))}={value}"
    with pytest.raises(
        ValueError, match=rf"changed: .*{setting}.*, and the largest one that is stored has \d+ numbers"
    ):
        VideoChat.from_pretrained(folder, "cpu")
    assert max(made, default=0) < 10**7


def test_sizes_that_are_wrong_by_little_name_the_setting_too(export: Path, tmp_path: Path) -> None:
    def larger(content: dict[str, Any]) -> None:
        content["keygrip"]["config"]["model"]["network"]["language"]["mlp_width"] = 49

    folder = changed(export, tmp_path / "changed", larger)
    with pytest.raises(ValueError, match=r"do not fit its model.*\[48, 32\].*\[49, 32\].*language\.mlp_width=49\)"):
        VideoChat.from_pretrained(folder, "cpu")


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_makes_its_library_panic_is_a_damaged_file(export: Path, tmp_path: Path) -> None:
    folder = changed(export, tmp_path / "a", with_tokenizer(lambda each: each.update(normalizer=PANICS)))
    with pytest.raises(ValueError, match=r"a: .*its tokenizer is damaged or no tokenizer"):
        VideoChat.from_pretrained(folder, "cpu")
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": PANICS}))
    TrainedTokenizer(400).file_in(folder).write_text(file.read_text())
    for load in (
        lambda: KeygripProcessor.from_pretrained(folder),
        lambda: PretrainedTokenizer(str(folder)).load(tmp_path),
        lambda: TrainedTokenizer(400).load(folder),
    ):
        with pytest.raises(ValueError, match=r"tokenizer(-400)?\.json is damaged or no tokenizer"):
            load()


@pytest.mark.parametrize("number", [2**31, 2**70, 400, -1, "7", True, None])
def test_ids_beyond_the_vocabulary_are_refused_before_the_library_takes_them(
    number: Any, export: Path, tmp_path: Path
) -> None:
    def more(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"]["zz"] = number

    folder = changed(export, tmp_path / "a", with_tokenizer(more))
    with pytest.raises(ValueError, match=rf"a: .*the token 'zz' has the id {number}; .*has ids below 400"):
        VideoChat.from_pretrained(folder, "cpu")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    more(tokenizer)
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: the token 'zz' has the id {number}; .*below 400"):
        KeygripProcessor.from_pretrained(folder)
    if number != 400:  # a larger model may have this id
        with pytest.raises(ValueError, match=rf"tokenizer\.json: the token 'zz' has the id {number}"):
            PretrainedTokenizer(str(folder)).load(tmp_path)


def replacing(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(name: str, *parts: Any) -> dict[str, Any]:
    return {"type": "Sequence", name: list(parts)}


def charsmap(*texts: str) -> dict[str, Any]:
    """Return a normalizer with a SentencePiece map that has a table without entries and these texts."""
    content = struct.pack("<I256I", 1024, *[0] * 256) + b"".join(text.encode() + b"\0" for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


TENFOLD = replacing("x", "x" * 10)
FOUND = {"Sequence": {"id": "A", "type_id": 0}}
TOKEN = {"SpecialToken": {"id": "x", "type_id": 0}}
TEMPLATE = {"type": "TemplateProcessing", "single": [FOUND], "pair": [FOUND, FOUND], "special_tokens": {}}
GROWING = {
    "normalizer": {"normalizer": sequence("normalizers", *[TENFOLD] * 3)},
    "nested": {"normalizer": sequence("normalizers", TENFOLD, sequence("normalizers", TENFOLD, TENFOLD))},
    "without types": {"normalizer": {"normalizers": [{"pattern": {"String": "x"}, "content": "x" * 10}] * 3}},
    "as a list": {"normalizer": [{"String": "x"}, "x" * 10]},
    "one": {"normalizer": replacing("xy", "x" * 600)},
    "expressions": {"normalizer": sequence("normalizers", *[replacing("z*", "y", "Regex")] * 9)},
    "prepended": {"normalizer": sequence("normalizers", *[{"type": "Prepend", "prepend": "x" * 20}] * 2)},
    "forms": {"normalizer": sequence("normalizers", *[replacing("x", "\ufdfa"), {"type": "NFKC"}] * 3)},
    "form of what was made": {"normalizer": sequence("normalizers", replacing("x", "\ufdfa" * 50), {"type": "NFKC"})},
    "form of other characters": {
        "normalizer": sequence("normalizers", replacing("x", "\ufdfa"), {"type": "NFKC"}, replacing("y", "y" * 50))
    },
    "expressions of something or nothing": {
        "normalizer": sequence("normalizers", *[replacing(each, "y", "Regex") for each in ("x{0,2}", "^", r"\b") * 3])
    },
    "map": {"normalizer": charsmap("ab", "x" * 300, "c")},
    "bytes": {"pre_tokenizer": sequence("pretokenizers", *[{"type": "ByteLevel", "add_prefix_space": True}] * 6)},
    "both": {"normalizer": replacing("x", "x" * 99), "pre_tokenizer": {"type": "ByteLevel"}},
    "decoder": {"decoder": sequence("decoders", *[TENFOLD] * 3)},
    "template": {"post_processor": TEMPLATE | {"single": [FOUND] * 300}},
    "ids": {
        "post_processor": TEMPLATE
        | {
            "single": [FOUND, *[TOKEN] * 20],
            "special_tokens": {"x": {"id": "x", "ids": [0] * 20, "tokens": ["x"] * 20}},
        }
    },
    "parts": {"normalizer": sequence("normalizers", *[replacing("x", "y")] * 200)},
}


@pytest.mark.parametrize("parts", list(GROWING.values()), ids=list(GROWING))
def test_a_tokenizer_that_makes_far_more_of_a_text_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    made = TrainedTokenizer(300).load(tmp_path, TEXTS).state()
    hostile = json.dumps({**json.loads(made["tokenizer"]), **parts})
    with pytest.raises(ValueError, match=r"its tokenizer.*(than the 256 that any tokenizer needs|parts|is no part of)"):
        ChatTokenizer.from_state(made | {"tokenizer": hostile})


# Parts of tokenizers of known families, as in their files.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{L}+| ?\p{N}"}, "behavior": "Isolated", "invert": False}
PIECES = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT-2": {"pre_tokenizer": BYTES, "decoder": BYTES, "post_processor": BYTES},
    "SmolLM2": {"pre_tokenizer": sequence("pretokenizers", {"type": "Digits", "individual_digits": True}, BYTES)},
    "Qwen": {"normalizer": {"type": "NFC"}, "pre_tokenizer": sequence("pretokenizers", SPLIT, BYTES), "decoder": BYTES},
    "Llama 2": {
        "normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "\u2581"}, replacing(" ", "\u2581")),
        "decoder": sequence(
            "decoders",
            replacing("\u2581", " "),
            *({"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}),
        ),
    },
    "Llama 3": {
        "pre_tokenizer": sequence("pretokenizers", SPLIT, BYTES),
        "post_processor": sequence(
            "processors",
            BYTES,
            TEMPLATE
            | {"single": [TOKEN, FOUND], "pair": [TOKEN, FOUND, TOKEN, FOUND]}
            | {"special_tokens": {"x": {"id": "x", "ids": [0], "tokens": ["x"]}}},
        ),
    },
    "T5": {
        "normalizer": sequence("normalizers", charsmap("x" * 18, "y"), replacing(" {2,}", "\u2581", "Regex")),
        "pre_tokenizer": sequence("pretokenizers", {"type": "WhitespaceSplit"}, PIECES),
        "decoder": PIECES,
    },
    "ALBERT": {
        "normalizer": sequence(
            "normalizers",
            *(replacing("``", '"'), replacing("''", '"'), {"type": "NFKD"}, {"type": "StripAccents"}),
            *({"type": "Lowercase"}, charsmap("x" * 18, "y"), replacing(" {2,}", " ", "Regex")),
        ),
        "pre_tokenizer": PIECES,
    },
    "CLIP": {"normalizer": sequence("normalizers", {"type": "NFC"}, replacing(r"\s+", " ", "Regex"))},
    "SigLIP": {  # as transformers converts it from SentencePiece's file
        "normalizer": sequence(
            "normalizers",
            *({"type": "Lowercase"}, replacing(f"[{re.escape(string.punctuation)}]", "", "Regex")),
            *(replacing(r"\s+", " ", "Regex"), {"type": "Strip", "strip_left": True, "strip_right": True}),
            *(charsmap("x" * 18, "y"), {"type": "Strip", "strip_left": False, "strip_right": True}),
            replacing(" {2,}", "\u2581", "Regex"),
        ),
        "pre_tokenizer": PIECES,
        "decoder": PIECES,
    },
}


@pytest.mark.parametrize("parts", list(FAMILIES.values()), ids=list(FAMILIES))
def test_the_parts_of_known_families_are_taken(parts: dict[str, Any], tmp_path: Path) -> None:
    made = json.loads(TrainedTokenizer(300).load(tmp_path, TEXTS).state()["tokenizer"])
    named = json.dumps({**made, **parts})
    assert json.loads(parse_tokenizer(named, "its file").to_str()) == json.loads(Tokenizer.from_str(named).to_str())


def test_an_expression_that_matches_something_makes_no_more_than_it_puts_in_its_place(tmp_path: Path) -> None:
    made = json.loads(TrainedTokenizer(300).load(tmp_path, TEXTS).state()["tokenizer"])
    expressions = ("x", r"\s+", " {2,}", "[xy]", r"[^\]x]", r"\p{L}{2}", ".", r"\n+") * 10
    parts = [replacing(each, "y", "Regex") for each in expressions]
    named = json.dumps(made | {"normalizer": sequence("normalizers", *parts)})
    normalizer = parse_tokenizer(named, "its file").normalizer
    assert normalizer is not None
    for text in ("", "x", "aa  \n", "]"):
        assert len(normalizer.normalize_str(text)) <= len(text)


LONG = {
    "a token": (lambda it: it["model"]["vocab"].update({"z" * 5000: 1}), "'z{40}'... has 5000 characters"),
    "an added token": (
        lambda it: it["added_tokens"].append({**it["added_tokens"][0], "content": "z" * 5000}),
        "'z{40}'... has 5000 characters",
    ),
    "a token in a list": (
        lambda it: it.update(
            model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["z" * 5000, -1.0]], "byte_fallback": False}
        ),
        "'z{40}'... has 5000 characters",
    ),
    "padding": (
        lambda it: it.update(
            padding={"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
            | {"pad_type_id": 0, "pad_token": "z" * 5000}
        ),
        "'z{40}'... has 5000 characters",
    ),
    "a prefix": (
        lambda it: it["model"].update(continuing_subword_prefix="z" * 99),
        "continuing_subword_prefix has 99 characters",
    ),
    "a suffix": (lambda it: it["model"].update(end_of_word_suffix="z" * 99), "end_of_word_suffix has 99 characters"),
    "words": (
        lambda it: it.update(
            model={"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0}, "continuing_subword_prefix": "##"}
            | {"max_input_chars_per_word": 10**9}
        ),
        "max_input_chars_per_word=1000000000",
    ),
}


@pytest.mark.parametrize(("change", "words"), list(LONG.values()), ids=list(LONG))
def test_a_tokenizer_with_what_is_longer_than_any_token_is_refused(
    change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    content = json.loads(TrainedTokenizer(300).load(tmp_path, TEXTS).state()["tokenizer"])
    change(content)
    with pytest.raises(ValueError, match=rf"its file: .*{words}"):
        parse_tokenizer(json.dumps(content), "its file")


def test_tokens_as_long_as_known_ones_are_taken(tmp_path: Path) -> None:
    content = json.loads(TrainedTokenizer(300).load(tmp_path, TEXTS).state()["tokenizer"])
    content["added_tokens"].append({**content["added_tokens"][0], "id": 5000, "content": " " * 1024})
    tokenizer = parse_tokenizer(json.dumps(content), "its file")
    assert tokenizer.encode(" " * 1024).ids == [tokenizer.token_to_id(" " * 1024)]


# ---- code in an export folder ----------------------------------------------------------------------------------------


@pytest.fixture
def bringing_code(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export that contains code of its own; a prompt that asks whether to execute it is answered with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = changed(export, tmp_path / "a", lambda content: None)
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(folder / 'executed')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Evil(PreTrainedTokenizerFast): pass\n"
    )
    named = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    return folder


def test_no_code_of_a_folder_is_executed(bringing_code: Path, tmp_path: Path) -> None:
    for load in (
        lambda: KeygripProcessor.from_pretrained(bringing_code),
        lambda: AutoProcessor.from_pretrained(bringing_code),
        lambda: PretrainedTokenizer(str(bringing_code)).load(tmp_path),
    ):
        with pytest.raises(
            ValueError, match=r"a needs Python code of its own, which keygrip does not execute"
        ) as found:
            load()
        assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match="trust_remote_code: keygrip executes no code"):
        KeygripProcessor.from_pretrained(bringing_code, trust_remote_code=True)
    assert not (bringing_code / "executed").exists()


def test_no_code_of_an_audio_tokenizer_is_executed(bringing_code: Path, export: Path, tmp_path: Path) -> None:
    """transformers loads an audio tokenizer with the class and from the path that the folder names."""
    named = {"audio_tokenizer_class": "AutoTokenizer", "audio_tokenizer_name_or_path": str(bringing_code)}
    inside, beside = (changed(export, tmp_path / name, lambda content: None) for name in ("inside", "beside"))
    file = inside / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"audio_tokenizer": named}))
    (beside / "audio_tokenizer_config.json").write_text(json.dumps(named))
    for folder in (inside, beside):
        with pytest.raises(ValueError, match=rf"{folder.name}/.*json names an audio tokenizer"):
            KeygripProcessor.from_pretrained(folder)
    assert not (bringing_code / "executed").exists()


def test_a_token_beyond_a_gap_of_ids_counts_in_the_size(tmp_path: Path) -> None:
    """Rows of the embedding table above the largest id have no token; the rows in a gap of ids are few."""
    state = TrainedTokenizer(300).load(tmp_path, TEXTS).state()
    tokenizer = json.loads(state["tokenizer"])
    tokenizer["model"]["vocab"]["zz"] = 5000
    found = ChatTokenizer.from_state(state | {"tokenizer": json.dumps(tokenizer)})
    assert found.size == 5001


def test_a_tokenizer_without_an_end_token_is_stored_without_one(tmp_path: Path) -> None:
    """The turns of such a tokenizer end with <|im_end|>; no token "None" is added, in the stored state or in an
    export."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = TrainedTokenizer(320).load(tmp_path / "made", TEXTS)
    PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer.backend_tokenizer, chat_template=TINY_TEMPLATE, pad_token="<|endoftext|>"
    ).save_pretrained(tmp_path / "hub")
    first = PretrainedTokenizer(str(tmp_path / "hub")).load(tmp_path)
    again = ChatTokenizer.from_state(json.loads(json.dumps(first.state())))
    assert first.state() == again.state()
    assert "end" not in first.state()
    for text in ("None of them", "<|im_start|>user\nNone<|im_end|>\n"):
        assert again.encode(text) == first.encode(text) == made.encode(text)
    assert (again.size, again.end_of_turn) == (first.size, first.end_of_turn) == (made.size, made.end_of_turn)
    module = small_module(tmp_path / "words", TEXTS)
    module.collator.tokenizer = again
    files, facts = module.export_files()
    folder = write_export(tmp_path / "out", {"keygrip": {}}, module.state_dict(), "card", files=files, facts=facts)
    read = AutoTokenizer.from_pretrained(folder)
    assert (read.eos_token, read.pad_token, len(read)) == (None, "<|endoftext|>", made.size)


def test_a_tokenizer_that_ends_no_turn_or_names_tokens_that_it_lacks_is_refused(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    made = TrainedTokenizer(320).load(tmp_path, TEXTS)
    state = made.state()
    with pytest.raises(ValueError, match=r"its tokenizer has no token 'None', which is to be its eos_token"):
        ChatTokenizer.from_state(state | {"end": "None"})
    other = json.loads(state["tokenizer"].replace("<|im_end|>", "<|end|>"))
    endless = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(other)), chat_template=TINY_TEMPLATE
    )
    with pytest.raises(ValueError, match=r"neither an eos token nor <\|im_end\|>.*name the token that ends a turn"):
        ChatTokenizer(endless)


# ---- chat templates --------------------------------------------------------------------------------------------------

DOUBLED = "{%% set all = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set all.x = %s %%}{%% endfor %%}{{ all.x }}"
ENDLESS = {
    "range": "{% for a in range(10**9) %}{% endfor %}",
    "nested": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "nested with text": "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "sum": DOUBLED % ("'ab'", "all.x + all.x"),
    "concatenation": DOUBLED % ("'ab'", "all.x ~ all.x"),
    "lists": DOUBLED % ("[1]", "[all.x, all.x]"),
    "dictionaries": DOUBLED % ("[1]", "{1: all.x, 2: all.x}.values()"),
    "namespaces": DOUBLED % ("[1]", "namespace(a=all.x, b=all.x)"),
    "squares": DOUBLED % ("3", "all.x * all.x"),
    "times": "{{ ('a' * 4000000000)|length }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "filter": "{{ 'a'|center(4000000000) }}",
    "method": "{{ 'a'.ljust(4000000000) }}",
    "keyword": "{{ 'a'.zfill(width=4000000000) }}",
    "format": "{{ '%4000000000d' % 1 }}",
    "method format": "{{ '{:{}}'.format(1, 4000000000) }}",
    "replace": "{% set x = 'a' * 900000 %}{{ x.replace('a', x) }}",
    "join": "{% set x = 'a' * 900000 %}{{ x.join(range(9999)|map('string')) }}",
    "lorem ipsum": "{{ lipsum(1000000000) }}",
    "long text": "{% for a in range(9999) %}" + "x" * 40_000 + "{% endfor %}",
    "long text kept": "{% set y %}{% for a in range(9999) %}" + "x" * 40_000 + "{% endfor %}{% endset %}",
    "long value": "{% set x = 'a' * 900000 %}{% for a in range(9999) %}{{ x }}{% endfor %}",
    "long template": "x" * 60_000,
    "texts of lists": "{% set x = ['a' * 900000] %}{{ x|replace('a', 'b' * 900000)|length }}",
    "format of a test": "{{ '%999999d' is odd }}",
    "many widths": "{{ ('%999d' * 50000) % (1,) }}",
    "widths of names": "{{ ('%(a)999d' * 50000) % {'a': 1} }}",
    "indentation": (
        "{% set ns = namespace(x=range(20000)|list) %}{% for i in range(99) %}{% set ns.x = [ns.x] %}{% endfor %}"
        "{{ ns.x|tojson(indent=16)|length }}"
    ),
    "separators": "{{ (range(20000)|list)|tojson(separators=['a' * 20000, 'b'])|length }}",
    "pieces": "{% set x = 'a' * 900000 %}{{ x.split('a')|length }}",
    "searched backwards": "{% set x = 'a' * 80000 %}{{ x.rfind('ab' + 'a' * 40000) }}",
    "divided backwards": "{% set x = 'a' * 80000 %}{{ x.rsplit('ab' + 'a' * 40000) }}",
    "times of any width": "{{ strftime_now('%1400d' * 20000)|length }}",
    "large integer": "{{ (('v' * 50000)|int(base=32)) > 0 }}",
    "large integers divided": (
        "{% set x = ('v' * 5000)|int(base=32) %}{% set y = ('v' * 2500)|int(base=32) %}{{ (x // y) > 0 }}"
    ),
    "large integer written": "{{ 0x" + "f" * 20_000 + " > 1 }}",
    "power of a power": "{{ ((2 ** 63) ** 64) > 0 }}",
    "product of integers": "{{ (2 ** 63 * 4) > 0 }}",
    "large integer of a float": "{{ ('1e300'|int) > 0 }}",
}


@pytest.mark.parametrize("template", list(ENDLESS.values()), ids=list(ENDLESS))
@pytest.mark.quick_sets(14)
def test_templates_that_take_all_time_or_memory_are_ended(template: str) -> None:
    with pytest.raises(ValueError, match="chat template cannot render this conversation"):
        render_chat(template, TALK, True, {})


@pytest.mark.parametrize("loops", [10, 11, 18, 100])
def test_loops_that_stand_in_each_other_are_limited_before_they_are_compiled(loops: int) -> None:
    """Ten nested loops with one iteration each are accepted; more took Jinja seconds and ended in Python errors."""
    template = "".join(f"{{% for a{n} in [1] %}}" for n in range(loops)) + "{{ a0 }}" + "{% endfor %}" * loops
    if loops <= 10:
        assert render_chat(template, TALK, True, {}) == "1"
        return
    for _ in range(2):  # a template that is refused is not compiled again
        with pytest.raises(ValueError, match="more than 10 of its loops, macros and blocks stand in each other"):
            render_chat(template, TALK, True, {})


@pytest.mark.parametrize(
    ("template", "made"),
    [
        ("{{ 'Knowledge of 2023, said %s * %d' % ('2024', 5) }}", "Knowledge of 2023, said 2024 * 5"),
        ("{{ 'Knowledge of 2023 {}'.format(1) }}", "Knowledge of 2023 1"),
        ("{{ '2023-%s'|format('x') }}", "2023-x"),
        ("{{ '100%% (2024) %s' % 1 }}", "100% (2024) 1"),
        ("{{ '%%%%5000d %d%%5000' % 1 }}", "%%5000d 1%5000"),
        ("{{ '%(k2024)s' % {'k2024': 1} }}", "1"),
        ('{{ \'{"year": 2024, "x": %s}\' % 1 }}', '{"year": 2024, "x": 1}'),
        ('{{ \'{"year": 2024, "x": {%s}}\'|format(1) }}', '{"year": 2024, "x": {1}}'),
        ("{{ '{{\"year\": 2024, {}}}'.format(1) }}", '{"year": 2024, 1}'),
        ("{{ '{{{{:5000}}}} {k2024} {d[{}]}'.format(k2024=1, d={'{}': 2}) }}", "{{:5000}} 1 2"),
        ("{{ '100% *5000 {}'.format(1) }}", "100% *5000 1"),
    ],
)
def test_years_and_marks_in_a_format_are_no_widths(template: str, made: str) -> None:
    assert render_chat(template, TALK, True, {}) == made


def test_separators_and_what_takes_turns_are_as_transformers_has_them() -> None:
    made = (
        "{% set j = joiner('-') %}{% set c = cycler('a', 'b') %}{% for i in range(3) %}{{ j() ~ c.next() }}{% endfor %}"
    )
    assert render_chat(made, TALK, True, {}) == "a-b-a"
    kept = "{% set j = joiner('a' * 900000) %}{{ j() }}{% for a in range(9999) %}{{ j() }}{% endfor %}"
    turns = "{% set c = cycler('a' * 900000) %}{% for a in range(9999) %}{% set x = c.next() %}{% endfor %}"
    held = "{% set x = [cycler(['a' * 900000])] %}{% for a in range(9999) %}{% set y = x + x %}{% endfor %}"
    for endless in (kept, turns, held):
        with pytest.raises(ValueError, match=r"more than a chat template needs|more than .* characters"):
            render_chat(endless, TALK, True, {})


@pytest.mark.parametrize(
    "template",
    [
        *("{{ '%1000d' % 1 }}", "{{ '%*d' % (9, 1) }}", "{{ '%(a)1000d' % {'a': 1} }}", "{{ '{:1000}'.format(1) }}"),
        *("{{ '%%%1000d' % 1 }}", "{{ '%%%*d' % (9, 1) }}", "{{ '%l%%1000d' % 1 }}", "{{ '%5%%*d' % (9, 1) }}"),
        *("{{ '%.*f' % (9, 1) }}", "{{ '%.1000f' % 1 }}", "{{ '%(a(b)c)1000d' % {'a(b)c': 1} }}"),
        *("{{ '%1000d'|format(1) }}", "{{ '{{{:1000}}}'.format(1) }}", "{{ '{{{:{}}}}'.format(1, 9) }}"),
        *("{{ '{a[}]:{w}}'.format(a={'}': 1}, w=9) }}", "{{ '{a[}]:1000}'.format(a={'}': 1}) }}"),
        *("{{ '{!s:>1000}'.format(1) }}", "{{ ('{:1000}'|safe).format(1) }}"),
    ],
)
def test_wide_formats_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match="widths as in"):
        render_chat(template, TALK, True, {})


@pytest.mark.parametrize("name", ["many widths", "widths of names"])
def test_what_would_be_large_is_refused_before_it_is_made(name: str) -> None:
    assert render_chat("x", TALK, True, {}) == "x"  # loads everything that rendering needs
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="chat template cannot render this conversation"):
            render_chat(ENDLESS[name], TALK, True, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


LOOKED_UP = "{%% set n = namespace() %%}{%% set n.a = n %%}%s" + ("{%% set y = n" + ".a" * 30 + " %%}") * 90 + "%s"
LONG_TURNS = {
    "attributes": LOOKED_UP % ("{% for i in range(9999) %}", "{% endfor %}"),
    "attributes of macros": "{% macro f(n) %}"
    + LOOKED_UP % ("", "{% endmacro %}{% for i in range(9999) %}{{ f(n) }}{% endfor %}"),
    "attributes of callers": (
        "{% macro f() %}{% for i in range(9999) %}{{ caller() }}{% endfor %}{% endmacro %}"
        + LOOKED_UP % ("{% call f() %}", "{% endcall %}")
    ),
    "attributes of blocks": LOOKED_UP
    % ("{% block b %}", "{% endblock %}{% for i in range(9999) %}{{ self.b() }}{% endfor %}"),
    "attributes of tests": (
        "{% set n = namespace() %}{% set n.a = n %}{% for i in range(9999) if n" + ".a" * 100 + " %}{% endfor %}"
    ),
    "paths of attributes": "{{ (range(9999)|map(attribute='" + "a." * 9000 + "a', default=1)|list)|length }}",
}


LIKE_MACROS = ("attributes of callers", "attributes of blocks")


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(template, id=name, marks=pytest.mark.slow if name in LIKE_MACROS else ())
        for name, template in LONG_TURNS.items()
    ],
)
def test_what_stands_in_a_loop_or_macro_counts_with_every_turn(template: str) -> None:
    with pytest.raises(ValueError, match="does more than a chat template needs"):
        render_chat(template, TALK, True, {})


IN_LOOP = "{%% set x = %s %%}{%% set y = %s %%}{%% for i in range(900) %%}{%% if %s %%}{%% endif %%}{%% endfor %%}"
LONG_OPERANDS = {
    "methods": ("'a' * 900000", "0", "x.isalpha()"),
    "comparisons": ("'a' * 900000", "'a' * 899999 + 'b'", "x == y"),
    "searches": ("'a' * 9000", "'a' * 80 + 'b'", "y in x"),
    "tests": ("'a' * 9000", "'a' * 80 + 'b'", "y is in(x)"),
    "finding": ("'a' * 9000", "'a' * 80 + 'b'", "x.find(y) > 0"),
    "finding backwards": ("'a' * 900", "'b' + 'a' * 400", "x.rfind(y) > 0"),
    "parting": ("'a' * 9000", "'a' * 80 + 'b'", "x.partition(y)"),
    "parting backwards": ("'a' * 900", "'b' + 'a' * 400", "x.rpartition(y)"),
    "stripping": ("'b' * 3000", "'a' * 3000 + 'b'", "x.strip(y)"),
    "keys": ("(1,) * 9000", "{x: 1}", "y[x]"),
    "paths": ("range(900)|list", "'a,' * 900 + 'a'", "x|sort(attribute=y)"),
}


@pytest.mark.parametrize("case", list(LONG_OPERANDS.values()), ids=list(LONG_OPERANDS))
def test_what_an_operation_goes_through_counts_each_time(case: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match="does more than a chat template needs"):
        render_chat(IN_LOOP % case, TALK, True, {})


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        ("1|round(9, 'ceil')", "the filter round"),
        ("[1]|map('round')|list", "the filter round"),
        ("'a'|center(9)", "the filter center"),
        ("'a' is escaped", "the test escaped"),
        ("'a'.encode('punycode')", r"str\.encode"),
        ("(['a']|map(attribute='encode')|first)()", r"str\.encode"),
        ("'a'.rindex('a')", r"str\.rindex"),
        ("'a'.rjust(9)", r"str\.rjust"),
        ("(1).to_bytes(9)", r"int\.to_bytes"),
        ("lipsum(1)", "generate_lorem_ipsum"),
        ("(1.5).hex()", r"float\.hex"),
    ],
)
def test_what_no_chat_template_needs_is_refused_by_name_where_it_is_reached(expression: str, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"cannot render this conversation \(SecurityError: {name} is none of th.*\)$"
    ):
        render_chat(f"{{{{ {expression} }}}}", TALK, True, {})
    assert render_chat(f"{{% if messages|length > 9 %}}{{{{ {expression} }}}}{{% endif %}}x", TALK, True, {}) == "x"


def test_what_a_template_says_itself_is_one_line_of_some_length() -> None:
    with pytest.raises(ValueError, match=r"\(TemplateError: one two (x{10})") as found:
        render_chat("{{ raise_exception('one\\n\\ntwo ' + 'x' * 90000) }}", TALK, True, {})
    assert len(str(found.value)) < 500


# All that a chat template may use, applied to `x`, a text; `d`, a dictionary; `l`, a list of messages; `n`, numbers.
USED = {
    "filter": [
        *("-3|abs", "x|capitalize", "l|count", "q|d('z')", "q|default('z', true)", "d|dictsort", "x|e", "x|escape"),
        *("n|first", "'2.5'|float", "'%s-%05.2f-%d'|format(x, 2.5, 1700000000)", "'a\nb'|indent(2, first=true)"),
        *("'0x1f'|int(base=16)", "'7'|int + 1", "d|items|list", "n|join('-')", "l|join(',', attribute='role')"),
        *("n|last", "x|length", "x|list", "x|lower", "n|map('string')|list", "l|map(attribute='role')|list", "n|max"),
        *("n|min", "n|reject('odd')|list", "l|rejectattr('role', 'equalto', 'user')|list", "x|replace('e', 'oo')"),
        *("n|reverse|list", "x|safe + '<'", "n|select('gt', 2)|list", "l|selectattr('content', 'defined')|list"),
        *("n|sort(reverse=true)", "n|string", "x|title", "d|tojson", "l|tojson(indent=4)", "x|trim", "x|trim('n ')"),
        *("n|unique|list", "x|upper", "d|tojson(ensure_ascii=true, sort_keys=true, separators=[',', ':'])"),
    ],
    "test": [
        *(f"n|select('{sign}', 2)|list" for sign in ("!=", "<", "<=", "==", ">", ">=")),
        *("n is sequence", "1 is eq 1"),
        *(
            "1 is equalto 1",
            "2 is ge 1",
            "2 is greaterthan 1",
            "2 is gt 1",
            "1 is le 2",
            "1 is lessthan 2",
            "1 is lt 2",
        ),
        *("1 is ne 2", "true is boolean", "range is callable", "x is defined", "9 is divisibleby 3", "2 is even"),
        *(
            "x is false",
            "'trim' is filter",
            "2.5 is float",
            "x is in(x)",
            "2 is integer",
            "x is iterable",
            "x is lower",
        ),
        *("d is mapping", "none is none", "2 is number", "3 is odd", "x is sameas x", "x is string", "'odd' is test"),
        *("true is true", "q is undefined", "x is upper"),
    ],
    "str": [
        *("x.capitalize()", "x.count('n')", "x.endswith(' ')", "x.find('w')", "'{}-{:02d}'.format(x, 3)"),
        *("x.index('w')", "x.isalnum()", "x.isalpha()", "'7'.isdecimal()", "'7'.isdigit()", "x.islower()"),
        *("'7'.isnumeric()", "x.isspace()", "x.isupper()", "'-'.join(['a', 'b'])", "x.lower()", "x.lstrip('\n')"),
        *("x.removeprefix(' ')", "x.removesuffix(' ')", "x.replace('e', 'oo', 1)", "x.rfind('e')", "x.rsplit('e', 1)"),
        *("x.rstrip()", "x.split()", "x.split('e', 1)[-1]", "x.splitlines()", "x.startswith(('a', ' '))", "x.strip()"),
        *("x.title()", "x.upper()", "x.partition('e')", "x.rpartition('e')[-1]"),
    ],
    "dict": ["d.copy()", "d.get('q', 3)", "d.items()|list", "d.keys()|list", "d.values()|list"],
    "list": ["n.copy()", "n.count(3)", "n.index(3)"],
    "tuple": ["(1, 2).count(2)", "(1, 2).index(2)"],
    "Cycler": ["cycler('a', 'b').next()", "cycler('a', 'b').reset()"],
    "LoopContext": ["l and loop.cycle('a', 'b')", "l and loop.changed(3)"],
    "function": [
        "joiner('-')()",
        "cycler(1, 2).current",
        "dict(a=1).a",
        "namespace(a=1).a",
        "range(3)|list",
        "strftime_now('%Y')|length",
    ],
    "operator": [
        *("'e' in x", "'e' not in x", "3 in n", "'a' in d", "1 < 2 <= 2 != 3", "x ~ n", "n + [4]", "n * 2", "'-' * 3"),
        *(
            "7 // 2",
            "7 / 2",
            "7 % 4",
            "7 - 9",
            "2 ** 63",
            "2 ** -1",
            "(-2) ** 63",
            "'%s %d' % (x, 5)",
            "x[::-1]",
            "n[1:]",
        ),
    ],
}


def test_every_name_that_templates_may_use_is_used_here() -> None:
    for kind, names in (("filter", FILTERS), ("test", TESTS)):
        sign = r"\|" if kind == "filter" else r"(?: is |select\(')"
        used = {each for text in USED[kind] for each in re.findall(rf"{sign}\s*([a-z]+|[<>=!]+)", text)}
        assert names <= used
    for kind_of, names in METHODS.items():
        assert names == {each for text in USED[kind_of.__name__] for each in re.findall(r"\.([a-z]+)\(", text)}


@pytest.mark.parametrize("kind", list(USED))
def test_what_templates_may_use_does_what_it_does_for_transformers(kind: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    lines = "".join(f"{{{{ {expression} }}}}\n" for expression in USED[kind])
    template = (
        "{% set x = '\n Seven <words> \u00e9 ' %}{% set d = {'b': [1, {'c': 'e\u00e9'}], 'a': none} %}"
        "{% set n = [3, 1, 2, 3] %}{% set l = messages %}{% for _ in [1, 2] %}" + lines + "{% endfor %}"
    )
    wanted = render_jinja_template([TALK], chat_template=template)[0][0]
    assert render_chat(template, TALK, False, {}) == wanted


def test_a_long_text_may_be_gone_through_several_times() -> None:
    """The work that a template may do grows with the length of the messages."""
    template = (
        "{% for message in messages %}{% set text = message.content %}{% if '</think>' in text %}"
        "{% set text = text.split('</think>')[-1] %}{% endif %}{% if not text.startswith('<tool_response>') %}"
        "{{ '<|im_start|>' + message.role + '\n' + (text|trim).rstrip('\n') + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    said = "Which digit? " * 100_000
    rendered = render_chat(template, [{"role": "user", "content": said}], True, {})
    assert rendered == f"<|im_start|>user\n{said.strip()}<|im_end|>"


def test_an_endless_template_of_an_export_is_refused_where_it_renders(export: Path, tmp_path: Path) -> None:
    def endless(content: dict[str, Any]) -> None:
        content["language"]["tokenizer"]["chat_template"] = ENDLESS["nested"] + TINY_TEMPLATE

    folder = changed(export, tmp_path / "a", endless)
    (folder / "chat_template.jinja").write_text(ENDLESS["nested"] + TINY_TEMPLATE)
    chat, processor = VideoChat.from_pretrained(folder, "cpu"), KeygripProcessor.from_pretrained(folder)
    for render in (
        lambda: chat.generate(TALK, 4),
        lambda: processor(TALK),
        lambda: processor.apply_chat_template(TALK),
    ):
        with pytest.raises(ValueError, match=r"cannot render this .*does more than a chat template needs"):
            render()


# What templates of known models do, combined in one template.
USUAL = """{%- macro said(message, end='<|im_end|>') -%}
{{ '<|im_start|>' + message.role + '\n' ~ (message['content']|trim) ~ end }}
{% endmacro -%}
{%- set ns = namespace(last=messages|length - 1, roles=[]) -%}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] -%}
{%- else %}{% set rest = messages %}{% endif -%}
{%- for message in rest[::-1] if message.role != 'tool' %}{% set ns.roles = ns.roles + [message.role] %}
{%- if 'nothing' not in message.content and loop.index0 >= 9 %}{% break %}{% endif %}{% endfor -%}
{{- bos_token }}{{ system|default('none') }}{{ ns.roles|join(', ') }}{{ tools is not none }}
{%- for message in rest %}{{ said(message) }}{% if message.role == 'assistant' %}{% generation -%}
{{ message.content.split('</think>')[-1].lstrip('\n') }}{% endgeneration %}{% endif %}{% endfor -%}
{{- {'a': rest|map(attribute='role')|list}|tojson(indent=2) }}{{ '%s-%d' % ('a', 3) }}{{ '-' * 3 }}
{%- set block %}{{ rest|selectattr('role', 'equalto', 'user')|list|length }}{% endset %}{{ block|upper }}
{%- for key, value in (rest|first).items() %}{{ key }}{{ loop.last }}{{ unknown }}{% endfor %}
{%- macro twice() %}{{ caller('a') }}{{ caller('b') }}{% endmacro %}{{ 'x'|replace('x', 'yy') }}
{%- call(each) twice() %}{{ each }}{% endcall %}{{ strftime_now('%Y')|length }}{{ 2 ** 3 }}{{ 1 < 2 < 3 }}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.mark.parametrize("answering", [True, False])
@pytest.mark.parametrize("template", [USUAL, TINY_TEMPLATE, chat_template(TINY_TEMPLATE, "Be 'brief'.\n")])
def test_what_known_templates_do_is_rendered_as_transformers_renders_it(template: str, answering: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    words = ["Which digit?\n {{ no }}", " <think>seven</think>\n\n7 \u00e9", "Sure?"]
    talk = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(words)]
    for messages in (talk, [{"role": "system", "content": "You see."}, *talk], talk * 100):
        tokens = {"bos_token": "<s>"}
        wanted = render_jinja_template([messages], chat_template=template, add_generation_prompt=answering, **tokens)[
            0
        ][0]
        assert render_chat(template, messages, answering, tokens) == wanted


# ---- animations ------------------------------------------------------------------------------------------------------


def animation(kind: str, **options: Any) -> tuple[Image.Image, np.ndarray, bytes]:
    pixels = np.zeros((5, 28, 28, 3), np.uint8)
    for number, frame in enumerate(pixels):
        frame[:] = 40 * number
        frame[4 * number : 4 * number + 4] = 255
    images = [Image.fromarray(frame) for frame in pixels]
    file = io.BytesIO()
    images[0].save(file, kind, save_all=True, append_images=images[1:], **options)
    return Image.open(io.BytesIO(file.getvalue())), pixels, file.getvalue()


@pytest.mark.parametrize(
    ("kind", "options", "numbers"),
    [
        ("GIF", {"duration": [1500, 0, 2000, 900, 500]}, [0, 0, 2, 2, 3]),  # 0 is read as a tenth of a second
        ("PNG", {"duration": [1500, 100, 2000, 900, 500]}, [0, 0, 2, 2, 3]),
        ("WEBP", {"duration": [1500, 100, 2000, 900, 500], "lossless": True}, [0, 0, 2, 2, 3]),
        ("GIF", {"duration": 100}, [0]),
        ("TIFF", {}, [0, 1, 2, 3, 4]),
    ],
)
def test_an_opened_animation_is_read_as_a_video(
    kind: str, options: dict[str, Any], numbers: list[int], tmp_path: Path
) -> None:
    """One frame per second, the same frames as from the file; TIFF is not read from a file."""
    chat = VideoChat(small_module(tmp_path, TEXTS))
    image, pixels, content = animation(kind, **options)
    image.seek(2)
    asked = [user({"type": "video", "video": image}, "Which digit?")]
    prompt = chat.reader.read(asked)
    assert prompt.times == (tuple(map(float, range(len(numbers)))),)
    assert (prompt.visuals[0] == pixels[numbers]).all()
    assert image.tell() == 2
    if kind != "TIFF":
        file = tmp_path / f"a.{kind.lower()}"
        file.write_bytes(content)
        of_file = chat.reader.read([user({"type": "video", "video": file}, "Which digit?")])
        assert of_file.times == prompt.times
        assert np.abs(of_file.visuals[0].astype(int) - prompt.visuals[0]).max() < 8
    if len(numbers) == 5:
        chat.reader.max_frames = 3
        thinned = chat.reader.read(asked)
        assert thinned.times == ((0.0, 2.0, 4.0),)
        assert (thinned.visuals[0] == pixels[numbers[::2]]).all()
    with pytest.raises(ValueError, match="an image of 5 frames: give it as a video"):
        chat.reader.read([user({"type": "image", "image": image}, "Which digit?")])
    with pytest.raises(ValueError, match="one of several images has 5 frames itself: give it alone"):
        chat.reader.read([user({"type": "video", "video": [Image.fromarray(pixels[0]), image]}, "Which digit?")])


def test_the_first_image_of_a_cameras_multi_picture_jpeg_is_the_photo(tmp_path: Path) -> None:
    chat = VideoChat(small_module(tmp_path, TEXTS))
    image, _, _ = animation("MPO")
    assert image.n_frames == 5  # type: ignore[attr-defined]
    for kind in ("image", "video"):
        assert len(chat.reader.read([user({"type": kind, kind: image}, "Which?")]).visuals[0]) == 1


# ---- conversations for the processor ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "robot", "content": "x"}], "message 1: a message is from 'robot'; known are"),
        ([*TALK, {"content": "x"}], "message 2: a message is from 'None'"),
        ([*TALK, {"role": "user"}], "message 2: the content of a user's message is 'None'"),
        ([*TALK, {"role": "user", "content": 3}], "message 2: the content of a user's message is '3'"),
        ([*TALK, 3], "message 2: a message is no object but '3'"),
        ([user({"type": "sound", "sound": "x"}, "x")], "message 1: an item of a user's message is"),
        ([user({"text": "x"})], "message 1: an item of a user's message is"),
        ([user({"type": "text"})], "message 1: an item of a user's message is"),
        ([user({"type": "video"}, "x")], "message 1: an item of type video has none"),
        ([{"role": "user", "content": "half \ud83d"}], "message 1: a user's message holds half a surrogate pair"),
        ([*TALK, {"role": "assistant", "content": "7."}], "ends with a user's message"),
        ([user(" ")], "the last message has no words"),
        ([[]], "a conversation without a message"),
    ],
)
def test_the_processor_checks_messages_as_the_chat_does(messages: list[Any], words: str, export: Path) -> None:
    chat, processor = VideoChat.from_pretrained(export, "cpu"), KeygripProcessor.from_pretrained(export)
    for given in (
        lambda: chat.generate(messages, 4),
        lambda: processor(messages),
        lambda: processor.apply_chat_template(messages),
        lambda: processor.apply_chat_template(messages, tokenize=True),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            given()


def test_a_conversation_with_its_answer_is_rendered_and_a_template_sees_no_image(export: Path, tmp_path: Path) -> None:
    processor = KeygripProcessor.from_pretrained(export)
    image = Image.new("RGB", (8, 8))
    talk = [user({"type": "image", "image": image}, "Which?"), {"role": "assistant", "content": "7."}]
    rendered = processor.apply_chat_template(talk, add_generation_prompt=False)
    assert rendered.endswith("<|im_start|>user\n<image>Which?<|im_end|>\n<|im_start|>assistant\n7.<|im_end|>\n")
    file = tmp_path / "written.png"
    processor.tokenizer.chat_template = f"{{{{ messages[-1]['content'][0]['image'].save('{file}') }}}}"
    with pytest.raises(ValueError, match="cannot render this conversation"):
        processor.apply_chat_template(talk[:1])
    assert not file.exists()


def test_the_files_of_the_fixture_are_an_export(export: Path) -> None:
    """The other tests change copies of this export."""
    assert (export / WEIGHTS).is_file()
    assert VideoChat.from_pretrained(changed(export, export.parent / "same", lambda content: None), "cpu")


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    """transformers would advise installing sentencepiece."""
    with pytest.raises(
        ValueError, match=r"holds no processor_config\.json: .*`keygrip export checkpoint=RUN to=FOLDER`"
    ):
        KeygripProcessor.from_pretrained(tmp_path)
