"""Every family of language models works in the foveated model: against transformers' own, with and without a cache."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from vlm_parts import frames_of, small_backbone, small_language

import keygrip.models.language
from keygrip.models.foveated_vlm.conversations import EncodedText
from keygrip.models.foveated_vlm.generation import generate
from keygrip.models.foveated_vlm.network import MODES, FoveatedVLM
from keygrip.models.foveated_vlm.rows import TextRows
from keygrip.models.language.decoder import LanguageModel
from keygrip.models.language.llama import LlamaSized

for module in pkgutil.iter_modules(keygrip.models.language.__path__):
    importlib.import_module(f"{keygrip.models.language.__name__}.{module.name}")
FAMILIES: list[type[LanguageModel]] = [
    family for family in (*LanguageModel.__subclasses__(), *LlamaSized.__subclasses__()) if family is not LlamaSized
]


class Letters:
    """Stand-in for a tokenizer: token n is the n-th character."""

    size, stop_tokens = 300, frozenset([299])

    @staticmethod
    def decode(ids: list[int]) -> str:
        return "".join(chr(0x4E00 + n) for n in ids)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.__name__)
def language(request: pytest.FixtureRequest) -> LanguageModel:
    torch.manual_seed(3)
    language = small_language(request.param, norm_eps=1e-6).eval()
    with torch.no_grad():  # biases start at zero, which would hide whether they are used
        for name, parameter in language.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return language


def whole_model(language: LanguageModel) -> torch.nn.Module:
    """Return transformers' own model with the same weights."""
    import transformers

    theirs: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(language.model.config).eval()
    theirs.model.load_state_dict(language.model.state_dict())
    return theirs


@torch.no_grad()
def test_rows_of_text_are_those_of_transformers_and_weights_come_from_a_folder(
    language: LanguageModel, tmp_path: Path
) -> None:
    theirs = whole_model(language)
    network = FoveatedVLM(small_backbone(), language).eval()
    ids = torch.randint(3, 299, (2, 7))
    expected = theirs(input_ids=ids).logits
    for mode in MODES:
        output = network(frames_of([0, 0]), TextRows(ids, [7, 7], [3, 3], [0, 1], [0, 0]), mode)
        torch.testing.assert_close(language.logits(output.hidden[:, :7]), expected, atol=1e-5, rtol=1e-4)
    theirs.save_pretrained(tmp_path)
    loaded = small_language(type(language), norm_eps=1e-6, weights=str(tmp_path)).eval()
    torch.testing.assert_close(loaded.logits(loaded(loaded.embed(ids))), expected, atol=1e-5, rtol=1e-4)
    other = FAMILIES[FAMILIES.index(type(language)) - 1]
    with pytest.raises(ValueError, match=r"it is a \w+, not a \w+"):
        small_language(other, norm_eps=1e-6, weights=str(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_are_those_of_transformers_in_every_type(
    dtype: torch.dtype, language: LanguageModel, tmp_path: Path
) -> None:
    """transformers loads weights in fewer bits and keeps the frequencies in float32; the same after converting back."""
    import transformers

    whole_model(language).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    whole = language.model.rotary_emb.inv_freq.clone()
    language.to(dtype)
    assert language.model.norm.weight.dtype == dtype
    assert torch.equal(language.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    ids = torch.randint(3, 299, (2, 120))
    torch.testing.assert_close(language.logits(language(language.embed(ids))), theirs(input_ids=ids).logits)
    language.to(torch.float32)
    assert torch.equal(language.model.rotary_emb.inv_freq, whole)
    assert language.to("meta").model.rotary_emb.inv_freq.is_meta


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_cached_generation_is_that_of_whole_rows(language: LanguageModel, mode: str) -> None:
    network = FoveatedVLM(small_backbone(), language).eval()
    frames, words = frames_of([3]), [5, 17, 40, 8, 99]
    prompt = EncodedText(words, [False] * 5, [False] * 5, 2, 5)
    (found,) = generate(network, Letters(), frames, [3], [prompt], [0], mode, max_new_tokens=5).ids
    ids = list(words)
    for _ in range(5):
        output = network(frames, TextRows(torch.tensor([ids]), [len(ids)], [2], [0], [3]), mode)
        ids.append(int(language.logits(output.hidden[0, -1])[: Letters.size].argmax()))
    assert found == ids[5:]
