"""The language model against transformers' own, its cache, its weights from a folder, and tokenizers."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from vlm_parts import small_language

from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.language.cache import LanguageCache
from keygrip.models.language.hub import from_pretrained, read_config, read_tokenizer, read_weights
from keygrip.models.language.tokenizers import (
    END_OF_TEXT,
    TINY_TEMPLATE,
    TURN_END,
    TURN_START,
    ChatTokenizer,
    PretrainedTokenizer,
    TrainedTokenizer,
)

SENTENCES = ["Which digit is on the red cube in frame 2?", "The arm lifts the 3rd cube.", "naïve café"]


def export(folder: Path, tie: bool = True, **changes: object) -> torch.nn.Module:
    """A checkpoint folder as on the hub."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    options = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tie,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": 2,  # the end token, as in SmolLM2
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(options | changes))).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tie", [True, False])
def test_weights_from_a_folder_give_the_logits_of_transformers(tmp_path: Path, tie: bool) -> None:
    theirs = export(tmp_path, tie)
    ours = small_language(weights=str(tmp_path), tie_embeddings=tie).eval()
    ids = torch.randint(0, 320, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.logits(ours(ours.embed(ids))), theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-4
        )
    assert ours.loaded_weights == str(tmp_path)
    assert (ours.head is None) == tie


def test_the_end_token_keeps_its_gradient_although_it_is_the_padding_token(tmp_path: Path) -> None:
    export(tmp_path)
    language = small_language(weights=str(tmp_path))
    language(language.embed(torch.tensor([[2, 5]]))).sum().backward()
    assert language.model.embed_tokens.weight.grad[2].abs().sum() > 0


def test_weights_of_other_sizes_are_refused_by_name(tmp_path: Path) -> None:
    export(tmp_path, intermediate_size=64, num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"mlp_width is 64, config says 48; kv_heads is 4, config says 2"):
        small_language(weights=str(tmp_path))


def test_a_context_longer_than_that_of_the_weights_is_refused(tmp_path: Path) -> None:
    export(tmp_path)
    with pytest.raises(ValueError, match=r"its context is 128, config says 256: give context=128 or less"):
        small_language(weights=str(tmp_path), context=256)
    assert small_language(weights=str(tmp_path), context=64).context == 64
    assert small_language(context=256).context == 256


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
            "its rotary positions are of type linear, which is not supported here",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, here it is silu"),
        ({"head_dim": 8}, "head_dim is 8, here it is 6"),
        ({"attention_bias": True}, "attention_bias is True, here it is False"),
        ({"mlp_bias": True}, "mlp_bias is True, here it is False"),
    ],
)
def test_weights_that_would_be_computed_otherwise_are_refused(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    export(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"does not fit language.model: {said}"):
        small_language(weights=str(tmp_path))


def test_missing_weights_say_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        small_language(weights=str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        small_language(weights="./nowhere")

    import transformers

    def offline(name: str, **options: object) -> None:
        raise OSError("cannot reach the hub\nand more")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(FileNotFoundError, match=r"download its config.json.*huggingface.co/maker/model"):
        small_language(weights="maker/model")


def test_cached_steps_give_the_hidden_states_of_one_pass() -> None:
    language = small_language().eval()
    rows = torch.randn(3, 10, 24)
    cache = LanguageCache()
    with torch.no_grad():
        parts = [language.extend(rows[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 6), (6, 10))]
        torch.testing.assert_close(torch.cat(parts, 1), language(rows), atol=1e-5, rtol=1e-4)
    assert cache.length == 10


def test_holes_in_the_cache_are_neither_seen_nor_counted() -> None:
    language = small_language().eval()
    rows = torch.randn(3, 9, 24)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)  # the last row is still empty
    cache = LanguageCache()
    with torch.no_grad():
        language.extend(rows[:, :4], cache, valid)
        after = torch.cat([language.extend(rows[:, 4:5], cache), language.extend(rows[:, 5:], cache)], 1)
        for row in range(3):
            alone = language(torch.cat([rows[row, :4][valid[row]], rows[row, 4:]])[None])[0]
            torch.testing.assert_close(after[row], alone[-5:], atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        language = small_language(gradient_checkpointing=recompute).train()
        ids = torch.arange(3, 12)[None]
        language(language.embed(ids)).square().sum().backward()
        gradients.append(language.model.embed_tokens.weight.grad)
        with torch.no_grad():  # the cache still works
            cache = LanguageCache()
            pieces = [language.extend(language.embed(ids[:, a : a + 3]), cache) for a in (0, 3, 6)]
            torch.testing.assert_close(torch.cat(pieces, 1), language(language.embed(ids)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*gradients)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="must divide"):
        small_language(heads=5)


def test_a_trained_tokenizer_is_kept_and_spells_everything(tmp_path: Path) -> None:
    first = TrainedTokenizer(400).load(tmp_path, SENTENCES * 5)
    again = TrainedTokenizer(400).load(tmp_path)
    for text in (*SENTENCES, "unseen ☃ \n 4711"):
        assert first.decode(first.encode(text)) == text
        assert again.encode(text) == first.encode(text)
    assert len(first.encode("4711")) == 4  # one token per digit
    assert first.size <= 400
    assert first.end_text == TURN_END
    assert first.encode(TURN_END) == [first.end_of_turn]
    with pytest.raises(FileNotFoundError, match="prepare the data"):
        TrainedTokenizer(400).load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="prepare the data"):  # with another vocabulary size
        TrainedTokenizer(300).load(tmp_path)
    file = TrainedTokenizer(400).file_in(tmp_path)
    whole = file.read_bytes()
    for damaged in (b"", b"{}", whole[:200], whole.replace(b"e", b"\xff", 1)):
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"tokenizer-400\.json is damaged or no tokenizer .*remove it, and it is trained"
        ):
            TrainedTokenizer(400).load(tmp_path)


def test_a_template_that_floods_is_refused() -> None:
    """An untrusted template runs in transformers' sandbox, which does not limit the text."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = TrainedTokenizer(400)._trained(SENTENCES)
    for template, fits in (("{{ messages[0]['content'] }}", True), ("{{ 'a' * (10 ** 8) }}", False)):
        told = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(made), chat_template=template, eos_token=TURN_END
        )
        if fits:
            assert ChatTokenizer(told).render([("user", "hello")]) == "hello"
            continue
        with pytest.raises(ValueError, match="may make 100000000 characters"):
            ChatTokenizer(told).render([("user", "hello")])


def test_a_tokenizer_survives_pickling_and_a_checkpoint(tmp_path: Path) -> None:
    tokenizer = TrainedTokenizer(400).load(tmp_path, SENTENCES)
    turns = [("user", "How many?"), ("assistant", "3")]
    for copy in (pickle.loads(pickle.dumps(tokenizer)), ChatTokenizer.from_state(tokenizer.state())):
        assert copy.render(turns, answering=True) == tokenizer.render(turns, answering=True)
        assert copy.encode(copy.render(turns)) == tokenizer.encode(tokenizer.render(turns))
        assert copy.end_of_turn == tokenizer.end_of_turn
    assert json.loads(json.dumps(tokenizer.state())) == tokenizer.state()


def test_tokens_that_a_template_names_survive_a_checkpoint(tmp_path: Path) -> None:
    """A template that starts with the bos token, like Llama's; of several named templates the default one is used."""
    from transformers import PreTrainedTokenizerFast

    made = TrainedTokenizer(400).load(tmp_path / "made", SENTENCES)
    template = "{{ bos_token }}" + made.state()["chat_template"]
    tokens = {"eos_token": TURN_END, "bos_token": END_OF_TEXT}
    read = []
    for folder, given in (("one", template), ("two", {"default": template, "tool_use": "x"})):
        fast = PreTrainedTokenizerFast(
            tokenizer_object=made._tokenizer.backend_tokenizer, chat_template=given, **tokens
        )
        fast.save_pretrained(tmp_path / folder)
        read.append(PretrainedTokenizer(str(tmp_path / folder)).load(tmp_path))
    for tokenizer in (*read, *(ChatTokenizer.from_state(each.state()) for each in read)):
        text = tokenizer.render([("user", "Which?")], answering=True)
        assert text.startswith(END_OF_TEXT)
        assert tokenizer.encode(text) == read[0].encode(text)


def test_a_model_with_code_of_its_own_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("a question on the terminal"))
    made = TrainedTokenizer(400).load(tmp_path / "made", SENTENCES)
    folder = tmp_path / "own"
    PreTrainedTokenizerFast(tokenizer_object=made._tokenizer.backend_tokenizer).save_pretrained(folder)
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | own))
    executed = tmp_path / "executed"
    (folder / "own.py").write_text(f"open({str(executed)!r}, 'w')\n")
    for read in (
        lambda: read_config(str(folder)),
        lambda: read_tokenizer(str(folder)),
        lambda: read_weights(AutoModelForCausalLM, str(folder), "language model"),
    ):
        with pytest.raises(ValueError, match=r"own needs Python code of its own, which keygrip does not") as refused:
            read()
        assert "trust_remote_code" not in str(refused.value)
    assert not executed.exists()


def test_a_model_of_the_hub_with_code_of_its_own_is_not_called_missing() -> None:
    class Owned:
        @staticmethod
        def from_pretrained(source: str, **options: Any) -> None:
            assert options["trust_remote_code"] is False
            raise ValueError(f"{source} contains custom code.\nPlease pass the argument `trust_remote_code=True`")

    with pytest.raises(ValueError, match="some/model needs Python code of its own"):
        from_pretrained(Owned, "some/model")


def _lengths_depend_on(tokenizer: ChatTokenizer) -> str:
    collator = ConversationCollator(PretrainedTokenizer(""), "visual_first", "answers")
    collator.tokenizer = tokenizer
    return collator.lengths_depend_on()


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_answer_stops_at_every_token_that_the_weights_name(
    file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the end-of-turn token, the tokenizer's own, and those of the folder's configuration; a checkpoint keeps
    them."""
    from transformers import PreTrainedTokenizerFast

    made = TrainedTokenizer(400).load(tmp_path / "made", SENTENCES)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer.backend_tokenizer, chat_template=TINY_TEMPLATE, eos_token=END_OF_TEXT
    )
    fast.save_pretrained(tmp_path / "hub")
    source, own = str(tmp_path / "hub"), {made.end_of_turn, fast.eos_token_id}
    caplog.clear()  # remove the messages of training it
    with caplog.at_level("INFO", "keygrip"):
        plain = PretrainedTokenizer(source).load(tmp_path)
    assert [(each.levelname, f"{source}: an answer ends where" in each.message) for each in caplog.records] == [
        ("INFO", True)
    ]
    caplog.clear()
    assert plain.stop_tokens == own
    named = tmp_path / "hub" / file
    for ids, further in (([7, 9, made.end_of_turn, 10**6, -1], {7, 9}), (8, {8}), (None, set())):
        named.write_text(json.dumps({"eos_token_id": ids}))
        with caplog.at_level("INFO", "keygrip"):
            tokenizer = PretrainedTokenizer(source).load(tmp_path)
        assert not caplog.records
        assert tokenizer.stop_tokens == own | further
        assert ChatTokenizer.from_state(json.loads(json.dumps(tokenizer.state()))).stop_tokens == own | further
        assert tokenizer.same_words(plain)
        assert _lengths_depend_on(tokenizer) == _lengths_depend_on(plain)  # lengths measured before stay valid
    for damaged in ('{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}', "[]", "{"):
        (tmp_path / "hub" / "generation_config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            PretrainedTokenizer(source).load(tmp_path)
    for stored in ("{", "[true]", "7"):
        with pytest.raises(ValueError, match="at which its tokenizer stops"):
            ChatTokenizer.from_state(plain.state() | {"stop": stored})


@pytest.mark.parametrize("template", ["{% if %}", "{{ a.b.c }}", "{{ 1/0 }}", "{{ ''.__class__.__mro__ }}"])
def test_a_template_that_cannot_render_is_an_error_in_a_line(template: str, tmp_path: Path) -> None:
    made = TrainedTokenizer(400).load(tmp_path, SENTENCES)
    broken = ChatTokenizer.from_state(made.state() | {"chat_template": template})
    with pytest.raises(ValueError, match="chat template cannot render this conversation"):
        broken.render([("user", "Which?")])
    with pytest.raises(ValueError, match="its tokenizer is damaged"):
        ChatTokenizer.from_state(made.state() | {"tokenizer": "{}"})


def test_a_pretrained_tokenizer_comes_from_its_folder_with_its_template(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    made = TrainedTokenizer(400).load(tmp_path / "made", SENTENCES)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(TrainedTokenizer(400).file_in(tmp_path / "made")),
        eos_token=TURN_END,
        pad_token=TURN_END,
        bos_token=END_OF_TEXT,
        chat_template="{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}",
    )
    theirs.save_pretrained(tmp_path / "hub")
    loaded = PretrainedTokenizer(str(tmp_path / "hub")).load(tmp_path)
    assert loaded.render([("user", "a")]) == "[user] a<|im_end|>"
    assert loaded.encode(SENTENCES[0]) == made.encode(SENTENCES[0])


def test_a_language_models_tokenizer_has_the_pieces_of_its_file_whatever_class_its_settings_name(
    tmp_path: Path,
) -> None:
    """SmolLM2's settings name GPT-2's class, which builds a tokenizer anew that does not split digits off."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    sentences = ["tips:\n\n1. a   10 \n\n\n2) naïve café", f"{TURN_START}user\n\n12  3{TURN_END}"] + SENTENCES
    TrainedTokenizer(400).load(tmp_path / "made", [*sentences, " \n\n " * 50])
    file = TrainedTokenizer(400).file_in(tmp_path / "made")
    tokens = {"bos_token": TURN_START, "eos_token": TURN_END, "pad_token": TURN_END, "unk_token": END_OF_TEXT}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=TINY_TEMPLATE, **tokens)
    folder = tmp_path / "hub"
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if not name.endswith("_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))

    loaded = PretrainedTokenizer(str(folder)).load(tmp_path)
    right = Tokenizer.from_file(str(file))
    assert [loaded.encode(text) for text in sentences] == [right.encode(text).ids for text in sentences]
    assert loaded.render([("user", "a")]) == f"{TURN_START}user\na{TURN_END}\n"
    state = loaded.state()
    assert [state[name] for name in ("bos", "end", "pad", "unk")] == list(tokens.values())
    loaded._tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(sentences[0])["input_ids"] == right.encode(sentences[0]).ids


def test_words_are_encoded_without_changing_how_other_threads_encode(tmp_path: Path) -> None:
    """Whether special tokens are recognised is a setting of the tokenizer itself, which several threads share."""
    tokenizer = TrainedTokenizer(400).load(tmp_path, SENTENCES)
    backend = tokenizer._tokenizer.backend_tokenizer
    assert tokenizer.end_of_turn not in tokenizer.encode(tokenizer.as_words(TURN_END))
    assert backend.encode_special_tokens is False
    texts = [tokenizer.as_words(TURN_END), TURN_END] * 50
    with ThreadPoolExecutor(4) as threads:
        results = [*threads.map(tokenizer.encode, texts)]
    assert results[1::2] == [[tokenizer.end_of_turn]] * 50
    assert all(tokenizer.end_of_turn not in ids for ids in results[::2])


def test_a_tokenizer_that_cannot_encode_is_refused_when_it_is_loaded() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="[UNK]"))  # [UNK] is not in the vocabulary
    with pytest.raises(ValueError, match=r"the tokenizer is damaged.*Missing \[UNK\]"):
        ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, chat_template="x", eos_token="</s>"))


def test_the_longest_row_counts_only_real_positions_and_those_to_come() -> None:
    cache = LanguageCache()
    cache.advance(2, 3, torch.tensor([[True, True, True], [True, False, False]]), torch.device("cpu"))
    assert cache.longest(2, None) == 5
    assert cache.longest(2, torch.tensor([[False, False], [True, True]])) == 3
