"""Texts that are too long to be used, and batches that stay within a budget by the true lengths of their rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from shard_sets import write_conversations, write_set

from keygrip.data.batches import Turn, VideoTextBatch
from keygrip.data.shards.budget import Budget
from keygrip.data.shards.mixing import padding_of
from keygrip.data.shards.reader import ShardSet
from keygrip.data.shards.remote import ShardCache
from keygrip.data.shards.sampling import SampleKey
from keygrip.data.shards.substitution import UnusableSample
from keygrip.data.video_text import exact_lengths
from keygrip.data.video_text.context import Context
from keygrip.data.video_text.conversations import answer, iterate_texts, read_sample
from keygrip.data.video_text.datamodule import VideoTexts
from keygrip.data.video_text.exact_lengths import NOT_COUNTED, UNREADABLE, Counting, count_lengths
from keygrip.data.video_text.lengths import TokenLengths, measure_lengths
from keygrip.data.video_text.sample_types import Conversation
from keygrip.data.video_text.samples import Part
from keygrip.data.video_text.shard_source import ShardSource
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.foveated_vlm.monitor import RowCounts
from keygrip.models.foveated_vlm.rows import text_rows
from keygrip.models.language.tokenizers import TrainedTokenizer

WORDS = ("the gripper closes around a red cube and carries it over the table into the bowl " * 90).split(" ")


def words(characters: int) -> str:
    return " ".join(WORDS)[:characters].strip()


def talk(characters: int, kind: str = "text") -> Conversation:
    return answer("Tell a story.", words(characters), kind)


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """Write 60 videos with captions, and texts like SmolTalk's, most of which are far longer than a row."""
    write_conversations(tmp_path / "videos", [(2, [talk(60 + n % 40, "caption")]) for n in range(60)], "v")
    long = [(0, [talk(6900 + n % 50)]) for n in range(120)]
    turns = (*talk(200).turns, Turn("user", "More."), Turn("assistant", words(6000)))
    kept = [(0, [talk(100 + 5 * n)]) for n in range(20)] + [(0, [Conversation(turns, "text", {})])]
    write_conversations(tmp_path / "texts", [*long, *kept], "t")
    return tmp_path


def module(root: Path, max_tokens: int = 256, **options: Any) -> VideoTexts:
    sources = {"videos": ShardSource(root / "videos", val_fraction=0.0)}
    if (root / "texts").is_dir():
        sources["texts"] = ShardSource(root / "texts", share=0.14, val_fraction=0.0)
    tokens_per_frame = options.pop("tokens_per_frame", 1)
    tokenizer, order = TrainedTokenizer(500), options.pop("prompt_order", "visual_first")
    timestamps, pack_rows = options.pop("timestamps", False), options.pop("pack_rows", False)
    how = (order, "answers", max_tokens, None, timestamps, tokens_per_frame, pack_rows)
    collator = ConversationCollator(tokenizer, *how)
    model = {"longest_row": options.pop("longest_row", None), "query_passes": options.pop("query_passes", 0)}
    ranks, configure_for = options.pop("ranks", 1), SimpleNamespace(**model)
    data = VideoTexts(sources, collator, 8, **{"batch_size": 8, "num_workers": 0, **options})
    data.processes = ranks
    data.configure_for(configure_for)
    data.prepare_data()
    data.setup("fit")
    return data


def keys(batches: Sequence[VideoTextBatch], source: str) -> list[str]:
    return [key for batch in batches for key, of in zip(batch.key, batch.source, strict=True) if of == source]


def test_texts_of_which_no_answer_fits_a_row_are_left_out_beforehand(
    stage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        data = module(stage)
    assert "train: 120 of 141 samples of texts are left out: by estimate their first answer ends beyond" in caplog.text
    batches = list(data.train_dataloader())
    texts = keys(batches, "texts")
    assert {int(key[1:]) for key in texts} <= set(range(120, 141))
    assert len(texts) in (8, 9)  # the share is kept: 60 / 0.86 * 0.14 are 9.8, in whole batches
    assert data.skipped.count == data.unusable.count == 0


def test_where_an_index_does_not_tell_them_shorter_ones_take_their_place(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: nine neighbours in length that were all too long ended the run; fewer of them counted as broken
    samples."""
    monkeypatch.setattr(Part, "usable", lambda part: part)
    data = module(stage)
    batches = list(data.train_dataloader())
    assert {int(key[1:]) for key in keys(batches, "texts")} <= set(range(120, 141))
    assert data.unusable.count >= 5
    assert data.skipped.count == 0
    assert data.skipped.seen == sum(len(batch) for batch in batches)
    assert "does not end within collator.max_tokens=256" in next(iter(data.unusable.reasons))


def test_a_source_in_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    write_conversations(tmp_path / "videos", [(1, [talk(3000)])] * 20, "v")
    with pytest.raises(ValueError, match=r"no sample of the source 'videos' has an answer that ends within"):
        module(tmp_path)


def test_texts_that_fit_are_kept_beside_others_with_many_tokens_per_character(tmp_path: Path) -> None:
    said = [digits(200)] * 54 + ["a red cube " * 20] * 6  # 200 characters of the latter are some 60 tokens
    write_conversations(tmp_path / "videos", [(1, [answer("What?", each, "text")]) for each in said], "v")
    data = module(tmp_path, max_tokens=256)
    assert all(data.collator.problem(answer("What?", each, "text")) is None for each in said)
    assert len(data.parts["train"][0]) == 60


def test_a_text_that_is_too_long_with_its_times_is_replaced(tmp_path: Path) -> None:
    samples = [(4, [answer("Which number?", digits(60 + n), "text")]) for n in range(40)]
    write_conversations(tmp_path / "videos", samples, "v")
    data = module(tmp_path, max_tokens=160, timestamps=True, batch_size=1)
    plain = ConversationCollator(data.collator.source, "question_first", "answers", 160)
    plain.tokenizer = data.collator.tokenizer
    assert not any(plain.problem(conversation) for _, (conversation,) in samples)
    batches = list(data.train_dataloader())
    assert data.unusable.count > 0
    assert all(len(batch) == 1 and batch.left_out == 0 for batch in batches)


def digits(count: int) -> str:
    """Return a text with one token per character, four times as many as English has."""
    return "".join(str(n % 10) for n in range(count))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("questions", "tokens_per_frame"),
    [(None, 1), (2, 16), *(pytest.param(*both, marks=pytest.mark.slow) for both in ((None, 16), (2, 1)))],
)
def test_batches_keep_within_the_budget_by_what_they_really_hold(
    tmp_path: Path, tokens_per_frame: int, questions: int | None, exact: bool
) -> None:
    rng = np.random.default_rng(0)
    samples = [
        (int(frames), [answer("Which number?", digits(int(rng.integers(5, 150))), "text") for _ in range(1 + n % 5)])
        for n, frames in enumerate(rng.integers(0, 9, 200))
    ]
    write_conversations(tmp_path / "videos", samples, "v")
    budget = Budget(64, 2048, exact)
    options: dict[str, Any] = {"questions": questions, "tokens_per_frame": tokens_per_frame}
    data = module(tmp_path, batch_size=64, budget=budget, **options)
    batches = list(data.train_dataloader())
    taken = []
    for batch in batches:
        assert int(batch.frame_mask.sum()) <= 64
        longest = (batch.frame_mask.sum(1)[batch.video_index] * tokens_per_frame + batch.attention_mask.sum(1)).max()
        taken.append(len(batch) * int(longest))
    assert max(taken) <= 2048
    assert np.median(taken) > 1000  # and most batches fill it
    assert sum(batch.left_out for batch in batches) <= (0 if exact else 0.02 * sum(map(len, batches)))
    worst = data.worst_batches()[0]
    share = int(worst.frame_mask.sum()) / 64 + len(worst) * data._tokens_per_frame * worst.frame_mask.shape[1] / 2048
    assert share > 0.5
    lengths = data.parts["train"][0].lengths
    assert lengths is not None
    assert lengths.tokens_per_frame == tokens_per_frame
    assert isinstance(lengths, TokenLengths) != exact
    if isinstance(lengths, TokenLengths):
        assert lengths.typical > 0.5  # tokens per character; the usual 0.25 would be far off


@pytest.mark.parametrize("exact", [True, False])
def test_what_nobody_foresaw_is_left_out_of_a_batch_and_counted(tmp_path: Path, exact: bool) -> None:
    """A few texts have many more tokens than nearly all others of their length; counting finds them beforehand."""
    samples = [(1, [answer("What?", digits(200) if n % 120 == 7 else words(200), "text")]) for n in range(240)]
    data = module_of(tmp_path, samples, exact)
    batches = list(data.train_dataloader())
    assert max(len(b) * (1 + b.attention_mask.shape[1]) for b in batches) <= 1024
    left_out = sum(batch.left_out for batch in batches)
    assert left_out == 0 if exact else 1 <= left_out <= 4


def module_of(root: Path, samples: Sequence[tuple[int, Sequence[Conversation]]], exact: bool = True) -> VideoTexts:
    write_conversations(root / "videos", samples, "v")
    return module(root, batch_size=32, budget=Budget(64, 1024, exact))


def test_an_index_without_the_number_of_conversations_is_refused_where_lengths_are_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ShardSet.__init__

    def older(self: ShardSet, *options: Any, **named: Any) -> None:
        opened(self, *options, **named)
        del self.columns["conversations"]

    monkeypatch.setattr(ShardSet, "__init__", older)
    with pytest.raises(
        ValueError, match=r"earlier version: make it anew with `keygrip prepare step=manifest again=true"
    ):
        module_of(tmp_path, [(1, [talk(50)])] * 40, exact=False)
    assert module(tmp_path, batch_size=8, budget=Budget(64, 1024)).mixture is not None  # rows are counted


# ---- rows longer than the language model's context -------------------------------------------------------------------


def rows_in(data: VideoTexts, sample: int) -> list[int]:
    """Return the positions of each row of a training sample."""
    (part,) = data.parts["train"]
    found = read_sample(part.shards, sample, 8)
    each = [data.collator.text_tokens(c, found.seconds) for c in found.conversations]  # type: ignore[attr-defined]
    return [len(found.frames) * data._tokens_per_frame + tokens for tokens in each]


@pytest.fixture
def tours(tmp_path: Path) -> Path:
    """Write 60 videos of 0 to 5 frames with a short text; every second one also has a text of 60 digits."""
    short = [(n, (n % 6, [answer("Which?", digits(4 + n), "text")])) for n in range(60)]
    samples = [(frames, [*told, answer("Which?", digits(60), "text")][: 1 + n % 2]) for n, (frames, told) in short]
    write_conversations(tmp_path / "videos", samples, "v")
    return tmp_path


@pytest.mark.parametrize("budget", [Budget(64, 4096), Budget(64, 4096, exact_lengths=False), None])
def test_rows_that_are_longer_than_the_context_are_left_out_and_counted(
    tours: Path, budget: Budget | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: the first such batch ended the training, with a curriculum after hours."""
    options: dict[str, Any] = {"tokens_per_frame": 16, "budget": budget, "batch_size": 4}
    everything = module(tours, **options)
    rows = {number: rows_in(everything, number) for number in range(60)}
    limit = 110
    fitting = {number for number, lengths in rows.items() if min(lengths) <= limit}
    partly = {number for number in fitting if max(rows[number]) > limit}
    assert 20 < len(fitting) < 50
    assert len(partly) > 5
    with caplog.at_level(logging.INFO):
        data = module(tours, longest_row=limit, **options)
    kept = {int(number) for part in data.parts["train"] for number in part.chosen}
    assert fitting <= kept < set(range(60))
    exact = budget is not None and budget.exact_lengths
    assert not exact or kept == fitting
    assert f"{60 - len(kept)} of 60 samples of videos are left out: " in caplog.text
    assert "longer than the language model's context of 110; to use them, lower data.max_frames=64" in caplog.text
    batches = list(data.train_dataloader())
    assert max(int(positions_of_frames(batch, 16).max()) for batch in batches) <= limit
    used = {int(key[1:]) for batch in batches for key in batch.key}
    assert used <= fitting
    taken = [int(key[1:]) for b in batches for key in dict(zip(b.video_index.tolist(), b.key, strict=True)).values()]
    assert sum(batch.left_out for batch in batches) == sum(
        length > limit for number in taken for length in rows[number]
    )
    assert data.skipped.count == 0
    assert (data.unusable.count == 0) if exact else all("v" in reason for reason in data.unusable.reasons)


def positions_of_frames(batch: VideoTextBatch, tokens_per_frame: int) -> torch.Tensor:
    """Return the positions that each row takes."""
    return tokens_per_frame * batch.frame_mask.sum(1)[batch.video_index] + batch.attention_mask.sum(1)


def test_held_out_samples_that_turn_out_too_long_are_left_out_and_none_counts_twice(
    tours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = module(tours, tokens_per_frame=16, longest_row=110, batch_size=4)
    data.parts["val"] = data.parts["train"]  # by estimate they fit
    (part,) = data.parts["val"]
    fitting = {f"v{n}" for n in part.chosen.tolist() if min(rows_in(data, n)) <= 110}
    assert 0 < len(fitting) < len(part)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loader = data.val_dataloader()
            batches = list(loader)
            taken = [key for b in batches for key in dict.fromkeys(b.key, 0)]
            assert sorted(taken) == sorted(fitting)
            assert list(loader)
    assert data.unusable.count == 4 * (len(part) - len(fitting))
    assert caplog.text.count(f"val: {len(part) - len(fitting)} samples are left out whole, and") == 2  # once per loader
    data.processes = 2  # both need the same number of batches
    assert len(list(data.val_dataloader())) == len(data.val_dataloader())


def test_a_sample_that_turns_out_too_long_is_named_with_what_to_change(tours: Path) -> None:
    data = module(tours, tokens_per_frame=16, longest_row=110)
    samples = data._samples(data.parts["train"], None)
    (part,) = data.parts["train"]
    long = next(n for n, each in enumerate(part.chosen.tolist()) if min(rows_in(data, each)) > 110)
    with pytest.raises(
        UnusableSample, match=r"v\d+.*: a row of it has \d+ positions \(\d frames of 16 and \d+ tokens"
    ) as error:
        samples[SampleKey(long, 0)]
    assert "lower data.max_frames=64 or lower collator.max_tokens=256" in str(error.value)


@pytest.mark.parametrize("exact", [True, False])
def test_a_source_of_which_every_row_is_longer_than_the_context_is_refused(tmp_path: Path, exact: bool) -> None:
    """By estimate 39 are shorter, since one sample has few tokens for its characters: without counts some are tried."""
    samples = [(4, [answer("Which?", digits(60) if n else words(600), "text")]) for n in range(40)]
    write_conversations(tmp_path / "videos", samples, "v")
    options: dict[str, Any] = {"tokens_per_frame": 8, "budget": Budget(64, 4096) if exact else None}
    limit = min(rows_in(module(tmp_path, **options), number)[0] for number in range(40)) - 1
    every = r"every sample of the source 'videos' \(of 4 frames or more, 8 positions each\) has rows longer than"
    tried = (
        r"every sample of the source 'videos' that was tried \(39\) is too long; the first: .*v1 .*: a row of it has"
    )
    with pytest.raises(ValueError, match=every if exact else tried):
        module(tmp_path, longest_row=limit, **options)
    with pytest.raises(ValueError, match=every):
        module(tmp_path, longest_row=4 * 8, **options)


def test_how_many_of_the_tried_samples_are_too_long_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By estimate nearly all are shorter, since some samples have few tokens for their characters."""
    for long, level in ((30, "WARNING"), (4, "INFO")):
        texts = [digits(60) if n < long else words(60) for n in range(40)]
        root = tmp_path / level
        write_conversations(root / "videos", [(4, [answer("Which?", each, "text")]) for each in texts], "v")
        options: dict[str, Any] = {"tokens_per_frame": 8}
        data = module(root, **options)
        limit = min(rows_in(data, number)[0] for number in range(long)) - 1
        caplog.clear()
        with caplog.at_level(logging.INFO):
            module(root, longest_row=limit, **options)
        (told,) = [record for record in caplog.records if "that were tried are too long" in record.getMessage()]
        assert told.levelname == level
        assert told.getMessage().startswith(f"train: {long} of 40 samples of videos that were tried")


def test_advice_names_the_settings_that_help(tours: Path) -> None:
    collator = module(tours, tokens_per_frame=16).collator
    assert isinstance(collator, ConversationCollator)
    context = Context(110, collator, 64)
    assert context.advice().startswith("lower data.max_frames=64 or lower collator.max_tokens=256 (")
    assert context.advice(frames=False).startswith("lower collator.max_tokens=256 (")
    collator.max_tokens = None
    assert context.advice().startswith("lower data.max_frames=64 or set collator.max_tokens (")
    assert context.advice(frames=False).startswith("set collator.max_tokens (")


def test_nothing_is_asked_of_samples_that_fit_whatever_their_text_is(tours: Path) -> None:
    data = module(tours, tokens_per_frame=16, longest_row=5 * 16 + 256)
    assert [part.context for part in data.parts["train"]] == [None]
    before = module(tours, tokens_per_frame=16)
    assert data.fingerprint == before.fingerprint


# ---- counted lengths -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 1000, 200)


def write_corpus(root: Path, images: int, texts: int) -> Path:
    """Write images and texts of log-normal length; 0 to 30 % of each text are digits, which gives up to twice the
    tokens."""
    rng = np.random.default_rng(0)
    for name, count, frames, mean in (("videos", images, 1, 4.8), ("texts", texts, 0, 5.5)):
        samples = []
        for characters in np.exp(rng.normal(mean, 0.7, count)).clip(20, 1200).astype(int).tolist():
            spelt = int(rng.uniform(0, 0.3) * characters)
            said = f"{words(characters - spelt)} {digits(spelt)}"
            samples.append((frames, [answer("What is it?", said, "text")]))
        write_conversations(root / name, samples, name)
    return root


def budgeted_module(corpus: Path, exact: bool = True, **options: Any) -> VideoTexts:
    return module(corpus, max_tokens=512, batch_size=16, budget=Budget(64, 4096, exact), **options)


def positions(batch: VideoTextBatch) -> np.ndarray:
    """Return the positions that each row takes."""
    return (batch.frame_mask.sum(1)[batch.video_index] + batch.attention_mask.sum(1)).numpy()


@pytest.mark.slow
def test_less_than_a_tenth_of_the_positions_is_padding_when_tokens_are_counted(corpus: Path) -> None:
    shares = []
    for exact in (True, False):
        batches = list(budgeted_module(corpus, exact).train_dataloader())
        places = [len(batch) * int(positions(batch).max()) for batch in batches]
        assert max(places) <= 4096
        assert sum(map(len, batches)) >= 0.97 * 1000 / 0.86
        shares.append(1 - sum(int(positions(batch).sum()) for batch in batches) / sum(places))
        assert not exact or sum(batch.left_out for batch in batches) == 0
    assert shares[0] < 0.1 < 0.13 < shares[1]


def write_questions(root: Path) -> Path:
    """Write 80 images and short videos, each with 1 to 16 questions whose answers differ in length."""
    rng = np.random.default_rng(0)
    samples = [
        (int(frames), [answer("Which?", digits(int(rng.integers(1, 60))), "text") for _ in range(int(rows))])
        for frames, rows in zip(rng.integers(0, 4, 80), rng.integers(1, 17, 80), strict=True)
    ]
    return write_conversations(root / "videos", samples, "v")


@pytest.mark.parametrize(
    ("packed", "ranks", "tokens_per_frame", "query_passes", "order"),
    [
        (False, 2, 4, 0, "visual_first"),
        (True, 2, 4, 0, "visual_first"),
        (True, 1, 1, 0, "visual_first"),
        (False, 1, 1, 1, "question_first"),
        (True, 2, 1, 2, "question_first"),
        (False, 1, 1, 1, "visual_first"),
    ],
)
def test_the_padding_that_is_told_is_that_of_the_rows_of_training(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    packed: bool,
    ranks: int,
    tokens_per_frame: int,
    query_passes: int,
    order: str,
) -> None:
    """Regression: padding was computed from each sample's longest row only, a small part of what `train/padding_share`
    reported, and without the passes that predict queries."""
    write_questions(tmp_path)
    options: dict[str, Any] = {"batch_size": 16, "budget": Budget(64, 4096), "pack_rows": packed}
    options |= {"query_passes": query_passes, "prompt_order": order}
    counts, last_pass = RowCounts(tokens_per_frame, packed), RowCounts(tokens_per_frame, packed)
    for rank in range(ranks):
        with caplog.at_level(logging.INFO):
            data = module(tmp_path, tokens_per_frame=tokens_per_frame, ranks=ranks, **options)
        for batch in as_rank(data, rank, ranks).train_dataloader():
            assert batch.left_out == 0
            counts.add(batch, text_rows(batch), query_passes)
            last_pass.add(batch, text_rows(batch))
    trained, alone = (each.report(torch.device("cpu"))["padding_share"] for each in (counts, last_pass))
    assert data.padding_share() == pytest.approx(trained, abs=1e-9)
    assert (trained != alone) == bool(query_passes)
    assert f"padding about {100 * trained:.1f} %" in caplog.text
    assert data.mixture is not None
    longest = padding_of(data.mixture.batches_of(0), data.mixture.sizes.positions)
    assert (trained < 0.2) if packed else (2 * longest < trained)


def test_padding_where_some_questions_are_drawn_and_where_nothing_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is computed from other rows than those that are sampled or, as the log states, with all rows of a sample as
    long as its longest."""
    write_questions(tmp_path)
    data = module(tmp_path, batch_size=16, budget=Budget(64, 4096), questions=4)
    counts = RowCounts(1, False)
    for batch in data.train_dataloader():
        counts.add(batch, text_rows(batch))
    trained = counts.report(torch.device("cpu"))["padding_share"]
    assert data.padding_share() == pytest.approx(trained, abs=0.03)
    with caplog.at_level(logging.INFO):
        data = module(tmp_path, batch_size=16, questions=4)
    assert caplog.messages[-1].endswith("% if all rows of a sample were as long as the longest, by estimate")
    with caplog.at_level(logging.INFO):
        module(tmp_path, batch_size=16, questions=4, query_passes=1)
    assert caplog.messages[-1].endswith("the longest, by estimate, without the passes that predict queries")
    assert data.mixture is not None
    assert set(data.mixture.sizes.rows.tolist()) == {1, 2, 3, 4}


def test_the_batch_with_the_most_queries_is_among_the_worst(tmp_path: Path) -> None:
    """Long videos with one question have the most frames, and texts have the most positions. Videos with many questions
    have the most rows times frames, which is the number of queries in a network that reads the question first."""
    ask = answer("Which?", digits(10), "text")
    many = [(8, [ask] * 6)] * 16 + [(8, [ask])] * 8  # rows of about 40 positions
    samples = [*many, *[(32, [ask])] * 12, *[(0, [answer("Which?", digits(440), "text")])] * 16]
    write_conversations(tmp_path / "videos", samples, "v")
    data = module(tmp_path, 512, batch_size=4, budget=Budget(64, 2048), prompt_order="question_first")
    taken = []
    for batch in data.train_dataloader():
        streams = text_rows(batch).streams
        made = streams.to_frames(torch.zeros(len(streams), streams.longest, 1)) if len(streams) else torch.zeros(0, 0)
        taken.append((int(batch.frame_mask.sum()), len(batch) * int(positions(batch).max()), made.shape[:2].numel()))
    most = [max(taken, key=of) for of in (lambda t: t[0], lambda t: t[1], lambda t: t[0] / 64 + t[1] / 2048)]
    largest = max(made for _, _, made in taken)
    assert largest == 32 * 6 > 2 * max(made for _, _, made in most)
    worst = data.worst_batches()
    found = [len(text_rows(batch).streams.slots) for batch in worst]
    assert max(found) == largest
    assert len(worst) <= 4


def as_rank(data: VideoTexts, rank: int, ranks: int, done: int = 0) -> VideoTexts:
    progress = SimpleNamespace(total=SimpleNamespace(processed=done))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    trainer = SimpleNamespace(
        global_rank=rank, world_size=ranks, fit_loop=loop, accumulate_grad_batches=1, max_steps=-1, max_epochs=-1
    )
    data.trainer = trainer  # type: ignore[assignment]
    return data


def test_counted_batches_resume_in_mid_epoch_on_other_ranks_and_with_workers(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, 250, 50)
    whole = [batch.key for batch in budgeted_module(corpus).train_dataloader()]
    state = as_rank(budgeted_module(corpus), 0, 1, done=7).state_dict()
    parts = []
    for rank in range(2):
        data = as_rank(budgeted_module(corpus, num_workers=1), rank, 2)
        data.load_state_dict(state)
        parts.append([batch.key for batch in data.train_dataloader()])
    assert len(whole) > 2 * 7
    assert [len(part) for part in parts] == [len(whole) - 7] * 2
    assert [sorted(first + second) for first, second in zip(*parts, strict=True)] == [
        sorted(keys) for keys in whole[7:]
    ]
    with pytest.raises(ValueError, match=r"fingerprint=.*; the order of samples cannot be continued"):
        budgeted_module(corpus, exact=False).load_state_dict(state)


def collator_of(shards: ShardSet, folder: Path, **options: Any) -> ConversationCollator:
    collator = ConversationCollator(TrainedTokenizer(500), "question_first", "answers", **options)
    collator.prepare(folder, lambda: iterate_texts([shards]))
    return collator


@pytest.fixture
def several(tmp_path: Path) -> ShardSet:
    """Write 40 samples of 0 to 4 images with 1 to 3 conversations, some of which are too long."""
    said = [[talk(50 + 30 * n + 9 * m, "a" if n % 2 else "b") for m in range(1 + n % 3)] for n in range(40)]
    write_conversations(tmp_path, [(n % 5, each) for n, each in enumerate(said)])
    return ShardSet(tmp_path / "train")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("timestamps", [False, True])
def test_what_is_counted_is_what_rows_have(several: ShardSet, tmp_path: Path, timestamps: bool) -> None:
    collator = collator_of(several, tmp_path, max_tokens=200, timestamps=timestamps)
    chosen, wanted, rows, every, places = np.arange(40), [], [], [], list[int]()
    for number in range(40):
        sample = read_sample(several, number, 8, max_frames=3)
        try:
            batch = collator([sample])
            taken = batch.attention_mask.sum(1).tolist()
            places += batch.visual_at
        except ValueError:  # a batch without a row
            taken = []
            places.append(0)
        wanted.append(max(taken, default=0))
        rows.append(max(1, len(taken)))
        every.append(taken)
    found = count_lengths(several, chosen, collator, tmp_path / "counts", max_frames=3)
    backwards = chosen[::-1]
    assert found.tokens_of_rows(several, backwards, found.rows(several, backwards)).tolist() == [
        tokens for each in reversed(every) for tokens in each or [0]
    ]
    one = found.tokens_of_rows(several, chosen, np.ones(40, np.int64)).astype(int).tolist()
    assert all(tokens in (each or [0]) for tokens, each in zip(one, every, strict=True))
    assert one != wanted  # tokens of any row, not of the longest
    assert found.prefixes_of_rows(several, chosen, found.rows(several, chosen)).tolist() == places
    assert max(places) > 5
    assert found.tokens(several, chosen).tolist() == wanted
    assert found.rows(several, chosen).tolist() == rows
    assert found.usable(several, chosen).tolist() == [tokens > 0 for tokens in wanted]
    assert 0 < wanted.count(0) < 30
    assert max(wanted) <= 200
    parallel = count_lengths(several, chosen, collator, tmp_path / "parallel", max_frames=3, workers=2)
    assert parallel.fingerprint == found.fingerprint


def test_counts_are_kept_and_only_what_is_missing_is_counted(
    several: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    count = Counting._count

    def noted(self: Counting, sample: int) -> list[tuple[int, int]] | None:
        asked.append(sample)
        if sample == stop:
            raise KeyboardInterrupt
        return count(self, sample)

    stop, folder = 21, tmp_path / "counts"
    monkeypatch.setattr(Counting, "_count", noted)
    monkeypatch.setattr(exact_lengths, "BLOCK", 5)
    monkeypatch.setattr(exact_lengths, "KEPT_EVERY", 5)
    collator = collator_of(several, tmp_path, max_tokens=200)
    count_lengths(several, np.arange(0, 40, 2), collator, folder)
    assert asked == [*range(0, 40, 2)]
    with pytest.raises(KeyboardInterrupt):
        count_lengths(several, np.arange(40), collator, folder)
    stop = -1
    asked.clear()
    whole = count_lengths(several, np.arange(40), collator, folder)
    assert asked == [*range(21, 40, 2)]  # 1 to 19 were written before it was interrupted
    stored = count_lengths(several, np.arange(40), collator, folder)
    assert stored.fingerprint == whole.fingerprint
    assert len(asked) == 10
    at_once = count_lengths(several, np.arange(40), collator, tmp_path / "at_once")  # counted at once, not in pieces
    assert stored.row_tokens.tolist() == whole.row_tokens.tolist() == at_once.row_tokens.tolist()
    assert stored.row_prefixes.tolist() == whole.row_prefixes.tolist() == at_once.row_prefixes.tolist()
    (file,) = folder.glob("lengths-*.npz")
    other: list[tuple[dict[str, Any], list[str] | None]] = [
        ({"max_tokens": 100}, None),
        ({"system": "Be brief."}, None),
    ]
    for options, kinds in (*other, ({"max_tokens": 200}, ["a"])):
        count_lengths(several, np.arange(40), collator_of(several, tmp_path, **options), folder, kinds)
    assert len(list(folder.glob("lengths-*.npz"))) == 4  # one file per settings
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"lengths-.*npz is damaged .* remove it and the tokens are counted again"):
        count_lengths(several, np.arange(40), collator, folder)


def test_a_sample_whose_text_cannot_be_read_is_counted_as_bad_when_it_is_its_turn(tmp_path: Path) -> None:
    write_conversations(tmp_path / "videos", [(1, [talk(60 + n)]) for n in range(60)], "v")
    shards = ShardSet(tmp_path / "videos" / "train")
    index = shards.index(0)
    with (tmp_path / "videos" / "train" / "v-000.tar").open("r+b") as file:
        file.seek(int(index.part_offsets[index.first_part[7]]) + 3)
        file.write(b"~")
    data = module(tmp_path, budget=Budget(64, 1024))
    (counts,) = data.folder.parent.glob("lengths-*.npz")
    assert np.flatnonzero(np.load(counts)["longest"] == UNREADABLE).tolist() == [7]
    lengths, this = data.parts["train"][0].lengths, np.array([7])
    assert lengths is not None
    assert lengths.tokens_of_rows(shards, this, np.array([1])) == TokenLengths().tokens(shards, this)
    seen = keys(list(data.train_dataloader()), "videos")
    assert "v7" not in seen
    assert data.skipped.count == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_reached_is_not_stored_as_unreadable(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was counted before is stored, and counting goes on from there."""
    monkeypatch.setattr(exact_lengths, "BLOCK", 4)
    root = write_set(tmp_path / "far", [0] * 12, per_shard=6)
    shards = ShardSet(f"file://{root}", tmp_path / "near")
    collator = ConversationCollator(TrainedTokenizer(500), "visual_first", "answers", 256)
    collator.prepare(tmp_path / "tokenizer", lambda: iterate_texts([ShardSet(root)]))
    everything, folder = np.arange(12), tmp_path / "counts"
    fetch = ShardCache.fetch

    def fetch_before_the_failure(self: ShardCache, name: str, *rest: Any, **options: Any) -> Path:
        if name == "s-001.tar":
            raise ConnectionError(f"{self.url}/{name} cannot be read")
        return fetch(self, name, *rest, **options)

    monkeypatch.setattr(ShardCache, "fetch", fetch_before_the_failure)
    with pytest.raises(ConnectionError, match=r"^file://.*s-001\.tar cannot be read$"):
        count_lengths(shards, everything, collator, folder, workers=workers)
    (file,) = folder.glob("lengths-*.npz")
    longest = np.load(file)["longest"]
    assert (longest[:4] > 0).all()
    assert (longest[4:] == NOT_COUNTED).all()  # the second block holds samples of both shards
    with pytest.raises(ConnectionError):
        list(iterate_texts([shards]))
    with pytest.raises(ConnectionError):
        measure_lengths(shards, everything, collator)
    monkeypatch.setattr(ShardCache, "fetch", fetch)
    again = count_lengths(shards, everything, collator, folder, workers=workers)
    assert again.longest.tolist() == count_lengths(ShardSet(root), everything, collator, tmp_path).longest.tolist()


def test_evaluation_counts_no_training_texts(tmp_path: Path) -> None:
    write_conversations(tmp_path, [(1, [talk(60 + n)]) for n in range(60)])
    collator = ConversationCollator(TrainedTokenizer(500), "visual_first", "answers", 256)
    source = ShardSource(tmp_path / "train", val_fraction=0.3)
    data = VideoTexts({"videos": source}, collator, 8, 8, num_workers=0, budget=Budget(64, 1024))
    data.prepare_data()
    data.setup("validate")
    (counts,) = data.folder.parent.glob("lengths-*.npz")
    held_out = data.parts["val"][0].chosen
    assert 5 < len(held_out) < 40
    assert np.flatnonzero(np.load(counts)["longest"] != NOT_COUNTED).tolist() == held_out.tolist()
    assert sum(map(len, data.val_dataloader())) == len(held_out)
    data.setup("fit")
    assert (np.load(counts)["longest"] > 0).all()
    assert sum(map(len, data.train_dataloader())) >= 0.9 * (60 - len(held_out))
