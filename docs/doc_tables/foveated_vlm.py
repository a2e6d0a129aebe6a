"""Tables about the foveated video-language model."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from doc_tables.base import ablation, gigabytes, markdown, over_seeds, read, span, table


@table
def vlm_summary() -> str:
    """Accuracy of the foveated model by kind of training, lowest to highest over training seeds."""
    record, named, claims = _vlm_runs()
    lengths, short = record["lengths"], record["lengths"]["short_tours"]["runs"]

    def row(
        training: str, seeds: str, runs: list[dict[str, Any]], mode: str = "autoregressive", ends: Sequence[int] = ()
    ) -> list[str]:
        figures = [f"_of_{end}" for end in ends] or [""]
        cells = [
            span(run[mode][name] for run in runs for end in figures if (name := f"accuracy_{kind}{end}") in run[mode])
            for kind in ("mark", "cue", "glance")
        ]
        return [training, *cells, seeds]

    labelled = "question first, **encoder pretrained with labels of the same videos** (`experiment=vlm_robot_videos`)"
    own = "question first, **self-supervised encoder**, six times the steps"
    again = "the same, encoder trained again on another machine, entirely in bf16"
    stalled = "two; a third learned nothing after the first stages"
    long = "trained on 1 to 64 frames (`experiment=vlm_lengths`, self-supervised encoder), tested on 33 to 64"
    few = "the same, tested on 1 to 4 frames; one of the two **misses** the target for *glance*, 0.95"
    pooled = "16 pooled tokens per frame, trained with as many floating-point operations and thus fewer steps, "
    pooled += "tested on 33 to 64 frames"
    order = "**published order, query source and initial coarse query** (`query_source=fine`, random), "
    order += "self-supervised encoder"
    parallel = "the same, evaluated in parallel as in training (coarse_fine): higher than at inference"
    frames_first = "frames first, otherwise the recipe (`query_source=coarse`, initial coarse query from CLS, "
    frames_first += "label-supervised encoder)"
    adamw = [named["self_supervised_0"], named["own_encoder_1"]]
    rows = [
        row(labelled, "three", [named[f"final_{seed}"] for seed in range(3)]),
        row(own, "three, one encoder for all", [named[f"muon_{seed}"] for seed in range(3)]),
        row(again, "three", claims["recipe"]),
        row("question first, self-supervised encoder, AdamW, 7000 steps", stalled, adamw),
        row(long, "three", lengths["runs"], ends=[64]),
        row(few, "two; the third was not tested on enough tours", short, ends=[1, 2, 4]),
        row(pooled, "one; longer training was not tried", lengths["pooled"]["runs"], "many_tokens", [64]),
        row(order, "three", claims["published_order"]),
        row(parallel, "three", claims["published_order"], "coarse_fine"),
        row("coarse pass alone, in the published order", "three", claims["coarse_only_published"], "coarse_only"),
        row(frames_first, "one", [named["visual_first_0"]]),
    ]
    return markdown(["training", "*mark*", "*cue*", "*glance*", "training seeds"], rows)


@table
def vlm_headline() -> str:
    """README: accuracy for the digit on a cube of a given colour, lowest to highest over training seeds."""
    record, named, claims = _vlm_runs()

    def mark(runs: list[dict[str, Any]], mode: str = "autoregressive", end: str = "") -> str:
        return span(run[mode][f"accuracy_mark{end}"] for run in runs)

    own = [*(named[f"muon_{seed}"] for seed in range(3)), *claims["recipe"]]
    lengths = record["lengths"]
    coarse, pooled = "one coarse token alone", "16 pooled tokens per frame, trained with as many operations"
    rows = [
        (
            "question before the frames, **encoder pretrained with the labels of the same videos**",
            mark([named[f"final_{seed}"] for seed in range(3)]),
            "",
        ),
        (
            "question before the frames, self-supervised encoder (trained twice, three seeds with each), "
            "six times the steps",
            mark(own),
            f"trained with {coarse}: {mark(claims['coarse_only'], 'coarse_only')}",
        ),
        (
            "trained on videos of 1 to 64 frames, tested on 33 to 64; self-supervised encoder",
            mark(lengths["runs"], end="_of_64"),
            f"{pooled}: {mark(lengths['pooled']['runs'], 'many_tokens', '_of_64')} (one seed)",
        ),
        (
            "**the published order**: frames before the question, each query computed from the chosen tokens of "
            "earlier frames; self-supervised encoder",
            mark(claims["published_order"]),
            f"trained with {coarse}: {mark(claims['coarse_only_published'], 'coarse_only')}",
        ),
    ]
    return markdown(["order and training", "accuracy", "for comparison"], rows)


def _vlm_runs() -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Return the record of the foveated model, its runs by name, and the runs of `sweep=vlm_claims` by job."""
    record = read("foveated_vlm")
    named = {run["run"]: run for run in [*record["runs"], *record["label_free"]["runs"]]}
    claims: dict[str, list[dict[str, Any]]] = {}
    for run in record["claims"]["runs"]:
        claims.setdefault(run["ablation"].removeprefix("vlm_claims/"), []).append(run)
    return record, named, claims


@table
def vlm_speed() -> str:
    """Time and memory of the foveated model on one thread of a CPU."""
    step, decode, stream = read("vlm_step"), read("vlm_decode"), read("vlm_stream")
    steps = [
        f"{step[f'{order}_step_ms'] / 1000:.1f} s, {step[f'{order}_fine_over_coarse_time']:.2f} times a coarse step"
        for order in ("visual_first", "question_first")
    ]
    peaks = ", ".join(gigabytes(step[f"peak_{frames}_frames_mb"]) for frames in (1, 8, 16, 32))
    eighth, later, last = (f"{stream[f'push_ms_{frame}']:.0f}" for frame in (8, 64, 512))
    rows = [
        (
            "forward, loss and backward pass of a coarse_fine step in the published order",
            steps[0],
            "`bench case=vlm_step`",
        ),
        ("the same with the question first", steps[1], "the same"),
        ("peak memory in addition to the weights at 1, 8, 16, 32 frames", f"{peaks} GB", "the same"),
        (
            "an autoregressive frame without the encoder, at 8 and 64 frames",
            f"{decode['ms_per_frame_8']:.1f} and {decode['ms_per_frame_64']:.1f} ms",
            "`bench case=vlm_decode`",
        ),
        (
            "the 8th, 64th and 512th frame of a stream, including the encoder",
            f"{eighth}, {later} and {last} ms (last to first: {stream['frame_512_over_8_time']:.2f} times, median of "
            "the ratios), and "
            f"{span((stream[f'push_extra_mb_{frame}'] for frame in (8, 64, 512)), 1)} MiB at each, in addition to the "
            "cache of earlier frames",
            "`bench case=vlm_stream`, one thread of an Intel Xeon, 2.8 GHz; record `benchmarks/vlm_stream.json`",
        ),
    ]
    return markdown(["measurement", "value", "command"], rows)


@table
def vlm_padding() -> str:
    """Padding of the stages' batches, in bold with the recipes' setting of pack_rows."""
    record = read("vlm_padding")
    rows = []
    for stage, words in (
        ("stage1", "stage 1: captions of videos, frames first"),
        ("stage2", "stage 2: several questions about each image"),
        ("stage3", "stage 3: a question about each video"),
    ):
        shares = {name: record[f"{stage}_{name}_share"] for name in ("padding", "packed_padding", "recipe_padding")}
        cells = [f"{100 * shares[name]:.1f} %" for name in ("padding", "packed_padding")]
        packs = shares["recipe_padding"] == shares["packed_padding"]
        cells[packs] = f"**{cells[packs]}**"
        last, estimated = record[f"{stage}_rows_padding_share"], record[f"{stage}_estimated_recipe_padding_share"]
        rows.append((words, *cells, f"{100 * last:.1f} %", f"{100 * estimated:.1f} %"))
    columns = ["padded rows", "packed rows", "padded rows, last pass alone", "as the recipe, estimated lengths"]
    return markdown(["batches", *columns], rows)


@table
def vlm_memory() -> str:
    """Memory of a training step of each recipe on its largest batch."""
    record = read("vlm_memory")
    rows = []
    for words, recipes, between in (
        ("SmolLM2 135M and DINOv2-S, stage 1; stages 2 and 3", ("stage1_135m", "stage2_135m"), "; "),
        (
            "published variants of these recipes (`..._published`), stage 1; stages 2 and 3",
            ("stage1_135m_published", "stage2_135m_published"),
            "; ",
        ),
        (
            "360M, stage 2 (`vlm_stage2_360m` and `vlm_stage2_published_360m`)",
            ("stage2_360m", "stage2_360m_published"),
            " and ",
        ),
        (
            "1.7B, stage 2 (`vlm_stage2_1700m` with DINOv2-B and `vlm_stage2_published_1700m` with DINOv2-S)",
            ("stage2_1700m", "stage2_1700m_published"),
            " and ",
        ),
        (
            "models of `sweep=vlm_scaling` with DINOv2-S; its own batches of 24 samples need less",
            ("scaling_135m_small", "scaling_360m_small"),
            " and ",
        ),
        (
            "the same with DINOv2-B, which does not fit on a GPU of 24 GB",
            ("scaling_135m_base", "scaling_360m_base"),
            " and ",
        ),
    ):
        rows.append((words, between.join(f"{record[f'{recipe}_worst_gib']:.1f}" for recipe in recipes)))
    return markdown(["recipe", "GiB"], rows)


@table
def vlm_seeds() -> str:
    """Figures of the foveated model with the label-supervised encoder, by training seed."""
    runs = [run for run in read("foveated_vlm")["runs"] if run["run"].startswith("final_")]
    title = "training time of the language model (seed 2: including the encoder)"
    return _vlm_by_seed(runs, mark=0.95, cue=0.9, trained=title)


@table
def vlm_self_supervised() -> str:
    """Figures with the self-supervised encoder, by training seed: the recipe, and an earlier recipe with AdamW."""
    runs = [run for run in read("foveated_vlm")["label_free"]["runs"] if "shorter stage" not in run["settings"]]
    runs = [run for run in runs if run["run"] != "self_supervised_1_longer"]  # continues a run with a shorter stage
    return _vlm_by_seed(runs, 0.9, 0.85, "training time of the language model")


def _vlm_by_seed(runs: Sequence[dict[str, Any]], mark: float, cue: float, trained: str) -> str:
    """Return a table of figures of some runs. mark, cue: targets. trained: label of the training time."""
    lines = (
        ("*mark*, coarse_fine", mark, lambda r: f"{r['coarse_fine']['accuracy_mark']:.3f}"),
        ("*mark*, autoregressive", mark, lambda r: f"{r['autoregressive']['accuracy_mark']:.3f}"),
        ("*mark*, coarse_only, the same network", "at most 0.5", lambda r: f"{r['coarse_only']['accuracy_mark']:.3f}"),
        ("*cue*, autoregressive", cue, lambda r: f"{r['autoregressive']['accuracy_cue']:.3f}"),
        ("*glance*, autoregressive", "", lambda r: f"{r['autoregressive']['accuracy_glance']:.3f}"),
        (
            "attention on the cube asked about (*mark*), last block, in multiples of uniform",
            10,
            lambda r: f"{r['autoregressive']['attention_mark']:.1f}",
        ),
        (
            "the same, all blocks except the first",
            "",
            lambda r: f"{r['autoregressive']['attention_mark_all_blocks']:.1f}",
        ),
        ("gap between coarse_fine and autoregressive", "below 0.6 %", lambda r: f"{100 * r['gap']:.2f} %"),
        (trained, "", lambda r: f"{r['train_wall_s'] / 60:.1f} min"),
    )
    rows = [(title, wanted, *(cell(run) for run in runs)) for title, wanted, cell in lines]
    return markdown(["", "target", *(run["settings"].replace("=", " ") for run in runs)], rows)


@table
def vlm_lengths() -> str:
    """Accuracy by number of frames, for models that were trained on all lengths."""
    record = read("foveated_vlm")["lengths"]
    ends = [1, 2, 4, 8, 16, 32, 64]
    spans = [str(end) if end < 3 else f"{end // 2 + 1} to {end}" for end in ends]
    models = (
        ("one chosen token", record["runs"], "autoregressive"),
        ("16 pooled tokens", record["pooled"]["runs"], "many_tokens"),
    )
    rows = []
    for tokens, runs, mode in models:
        for kind in ("mark", "cue", "glance"):
            for run in runs:
                found = [run[mode].get(f"accuracy_{kind}_of_{end}") for end in ends]
                seed = "" if len(runs) == 1 else f", seed {run['seed']}"
                rows.append([tokens, f"*{kind}*{seed}", *("" if share is None else f"{share:.2f}" for share in found)])
    return markdown(["tokens per frame", "question, by number of frames", *spans], rows)


@table
def vlm_short_tours() -> str:
    """Accuracy of two seeds on many tours of 1 to 4 frames, and the number of questions."""
    record = read("foveated_vlm")["lengths"]["short_tours"]["runs"]
    rows: list[list[str]] = []
    for kind in ("mark", "cue", "glance"):
        for run in record:
            found = [run["autoregressive"].get(f"accuracy_{kind}_of_{end}") for end in (1, 2, 4)]
            rows.append(
                [f"*{kind}*, seed {run['seed']}", *("" if share is None else f"{share:.2f}" for share in found)]
            )
        asked = [record[0]["autoregressive"].get(f"questions_{kind}_of_{end}") for end in (1, 2, 4)]
        rows.append([f"number of *{kind}* questions", *("" if number is None else f"{number:.0f}" for number in asked)])
    return markdown(["question, by number of frames", "1", "2", "3 to 4"], rows)


@table
def vlm_claims() -> str:
    """Jobs of `sweep=vlm_claims` that were run: means over seeds; in brackets the autoregressive extremes."""
    record = read("foveated_vlm")["claims"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in [*record["runs"], *record["stopped_on_a_gpu"]["runs"]]:
        stopped = ", stopped halfway" if "of_steps" in run else ""
        kind = run["precision"].partition("-")[0].replace("32", "float32") + stopped
        groups.setdefault((run["ablation"], kind), []).append(run)
    rows = []
    for (job, kind), runs in groups.items():
        row = [f"`{job.removeprefix('vlm_claims/')}`, {kind}", str(len(runs))]
        # A job that trains the coarse pass alone is evaluated with that pass.
        modes = ["coarse_only"] if "coarse_only" in job else ["coarse_fine", "autoregressive"]
        for question in ("mark", "cue", "glance"):
            found = [[run[mode][f"accuracy_{question}"] for run in runs] for mode in modes]
            row.append(" / ".join([*(f"{fmean(shares):.2f}" for shares in found[:-1]), over_seeds(found[-1], 2)]))
        gaps = [100 * run["gap"] for run in runs]
        row.append("" if "coarse_only" in job else over_seeds(gaps, 1, " %"))
        rows.append(row)
    return markdown(["job", "seeds", "*mark*", "*cue*", "*glance*", "gap"], rows)


def token_counts(record: str) -> str:
    """Return a table of one chosen and several pooled tokens per frame: means over seeds, extremes in brackets."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in read("foveated_vlm")["claims"][record]["runs"]:
        groups.setdefault((run["experiment"], run["steps"]), []).append(run)
    rows = []
    for (experiment, steps), runs in groups.items():
        number = experiment.removeprefix("vlm_tokens_")
        row = ["1 chosen" if number == "1" else f"{number} pooled", steps, len(runs)]
        row.append(f"{fmean(run['tflop'] for run in runs):.0f}")
        row.append(over_seeds([run["train_loss"] for run in runs], 2))
        for question in ("mark", "cue", "glance"):
            row.append(over_seeds([run[run["mode"]][f"accuracy_{question}"] for run in runs], 2))
        rows.append(row)
    titles = ["tokens per frame", "steps", "seeds", "TFLOP", "training loss", "*mark*", "*cue*", "*glance*"]
    return markdown(titles, rows)


@table
def vlm_token_counts() -> str:
    """Token counts with the self-supervised encoder."""
    return token_counts("token_counts")


@table
def vlm_token_counts_same_encoder() -> str:
    """Token counts with one training of the self-supervised encoder for all runs."""
    rows = []
    for run in read("foveated_vlm")["claims"]["token_counts_same_encoder"]["runs"]:
        number = run["experiment"].removeprefix("vlm_tokens_")
        losses = {each["step"]: each["loss"] for each in run["val"]}
        end = max(losses)
        row = ["1 chosen" if number == "1" else f"{number} pooled", run["steps"], f"{run['tflop']:.0f}"]
        row += [f"{losses[step]:.2f}" for step in (2000, 4000)]
        row.append(f"{losses[end]:.2f} (step {end})")
        row += [f"{run[run['mode']][f'accuracy_{question}']:.2f}" for question in ("mark", "cue", "glance")]
        rows.append(row)
    losses_at = [f"validation loss {at}" for at in ("at step 2000", "4000", "of the last validation")]
    return markdown(["tokens per frame", "steps", "TFLOP", *losses_at, "*mark*", "*cue*", "*glance*"], rows)


@table
def vlm_token_counts_label_taught() -> str:
    """Token counts with the label-supervised encoder."""
    return token_counts("token_counts_label_taught")


@table
def vlm_gpu() -> str:
    """Training steps of stage 1 on a GPU, compiled and not compiled."""
    rows = []
    for name, record, key in (
        ("not compiled, 64 videos", "train_vlm_135m", "frames_16_batch_64"),
        ("not compiled, 128 videos", "train_vlm_135m", "frames_16_batch_128"),
        ("`compile=inductor`, 128 videos", "train_vlm_135m", "frames_16_compiled"),
        ("not compiled, 64 videos, another run", "train_vlm_135m_64_videos", "frames_16_batch_64"),
        ("`compile=inductor`, 64 videos, another run", "train_vlm_135m_64_videos", "frames_16_compiled"),
    ):
        figures = read(f"gpu/{record}")["figures"]
        step, rate, peak, share = (figures[f"{key}_{each}"] for each in ("step_ms", "samples_per_s", "peak_gb", "mfu"))
        rows.append([name, f"{step:.0f} ms", f"{16 * rate:.0f}", f"{peak:.1f} GB", f"{share:.1%}"])
    return markdown(["", "step", "frames per second", "peak memory", "share of peak FLOP/s"], rows)


@table
def vlm_others() -> str:
    """Models with other training settings."""
    titles = {
        "coarse_only_0": ("`ablation=foveated_vlm/coarse_only`: the coarse pass alone", "coarse_only"),
        "visual_first_0": (
            "`ablation=foveated_vlm/visual_first`: frames first, otherwise the recipe",
            "autoregressive",
        ),
        "pooled_0": ("`experiment=vlm_pooled_videos`: 16 pooled tokens per frame", "many_tokens"),
        "full_0": ("`query_source=fine`, refinement up to 2, 1600 steps", "autoregressive"),
    }
    rows = []
    for run in read("foveated_vlm")["runs"]:
        if run["run"] in titles:
            title, mode = titles[run["run"]]
            figures = run[mode]
            cells = [f"{figures[f'accuracy_{kind}']:.3f}" for kind in ("mark", "cue", "glance")]
            gap = f"{100 * run['gap']:.1f} %" if mode == "autoregressive" else ""
            rows.append((title, *cells, gap))
    return markdown(["model (seed 0)", "*mark*", "*cue*", "*glance*", "gap"], rows)


@table
def vlm_refinement() -> str:
    """Runs with refinement, where chosen queries choose the next queries at inference."""
    record = read("foveated_vlm")
    found = {run["run"]: run for run in [*record["earlier"]["runs"], *record["runs"]] if "settings" in run}
    starts = {"seed_0": "random", "seed_1_1200": "random", "seed_1": "random", "seed_2": "random", "full_0": "CLS"}
    rows = []
    for name, start in starts.items():
        run = found[name]
        seed = run.get("seed", run["settings"].rpartition("seed=")[2])
        figures = [f"{run[mode]['accuracy_cue']:.3f}" for mode in ("coarse_fine", "autoregressive")]
        mark = f"{run['autoregressive']['accuracy_mark']:.3f}"
        rows.append((f"{seed}, {run['steps']} steps, {start}", mark, *figures, f"{100 * run['gap']:.1f} %"))
    header = ["seed, steps, initial coarse query", "*mark*", "*cue*, coarse_fine", "*cue*, autoregressive", "gap"]
    return markdown(header, rows)


@table
def vlm_ablations() -> str:
    """Ablations of the foveated model, on `val`."""
    rows = []
    for job in read("foveated_vlm")["ablations"]:
        figures = job["metrics"]
        one = "val/autoregressive/accuracy_{}"
        cells = [f"{figures[one.format(kind)]:.3f}" for kind in ("mark", "cue", "glance")]
        rows.append(
            (
                ablation(job["overrides"]["ablation"]),
                *cells,
                f"{100 * figures['val/gap']:.1f} %",
                f"{figures['val/attention_mark']:.1f}",
            )
        )
    return markdown(["", "*mark*", "*cue*", "*glance*", "gap", "attention on the cube asked about"], rows)


@table
def vlm_label_free() -> str:
    """Linear probes of frozen encoders on `val`: random weights, and self-supervised training."""
    kinds = ("colour", "pointed", "digit", "asked", "frame_colour", "frame_digit")
    titles = {
        "untrained": "random weights",
        "objects": "self-supervised",
        "untrained_long_standardised": "random weights, videos of 24 to 32 s",
        "crops_standardised": "self-supervised, the best of the earlier losses, the same videos",
    }
    records = read("foveated_vlm")
    probes = {
        probe["encoder"]: probe["metrics"]
        for kept in ("label_free_earlier", "label_free")  # later probes replace earlier ones of the same name
        for probe in records[kept]["probes"]
    }
    rows = [(title, *(f"{probes[name][f'val/{kind}']:.3f}" for kind in kinds)) for name, title in titles.items()]
    header = [
        "frozen encoder",
        "cube's colour",
        "pointed at",
        "digit",
        "digit, from a query",
        "CLS: colour",
        "CLS: digit",
    ]
    return markdown(header, rows)
