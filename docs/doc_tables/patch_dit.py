"""Tables about patch_dit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from doc_tables.base import gigabytes, markdown, over_seeds, read, table

# Cases of the image evaluation suite, and the heads of their columns.
IMAGE_CASES = {
    "real": "real images",
    "unrelated_image": "an unrelated real image",
    "autoencoder": "autoencoder alone",
    "reconstruction": "words and features",
    "text_only": "words alone",
    "changed_words": "features, changed words",
    "dino_swap": "another image's features",
    "shuffled_patches": "shuffled patches",
}


@table
def dit_claims() -> str:
    """Reference patches, CLS alone and a DINO that receives colour images, compared with an unrelated real image."""
    jobs = [job for job in read("dit_claims")["jobs"] if job["status"] == "finished"]
    kinds = [kind for kind in ("dit_none", "dit_cls_only", "dit_colour_view", "dit_no_position") if _of(jobs, kind)]
    names = {
        "dit_none": "with patches",
        "dit_cls_only": "CLS only",
        "dit_colour_view": "patches of a colour image",
        "dit_no_position": "patches without positions",
    }
    lines = (
        ("SSIM of reconstructions", "reconstruction/ssim", 2, "", "1"),
        ("SSIM, words alone", "text_only/ssim", 2, "", ""),
        ("PSNR of reconstructions", "reconstruction/psnr_db", 1, " dB", "5 dB above CLS only"),
        ("distance in DINO features", "reconstruction/dino_distance", 3, "", "0"),
        ("distance in DINO features, words alone", "text_only/dino_distance", 3, "", ""),
        ("distance in the attribute classifier's features", "reconstruction/classifier_distance", 3, "", "0"),
        ("cube within 4 of 64 px", "reconstruction/cube_within_4px", 2, "", "0.8; CLS only at most 0.15"),
        ("the same with shuffled patches", "shuffled_patches/cube_within_4px", 2, "", "lost"),
        ("PSNR with shuffled patches", "shuffled_patches/psnr_db", 1, " dB", "lost"),
        ("layout of another image (`dino_swap`): cube within 4 px", "dino_swap/cube_within_4px", 2, "", ""),
        ("reconstructions: requested colour", "reconstruction/colour_as_asked", 2, "", "0.98"),
        ("changed words: requested colour", "changed_words/colour_as_asked", 2, "", "0.9"),
        ("words alone: requested colour", "text_only/colour_as_asked", 2, "", ""),
        ("words alone: requested side", "text_only/side_as_asked", 2, "", ""),
    )
    unrelated = jobs[0]["suite"]["cases"]["unrelated_image"]
    rows = []
    for title, figure, digits, unit, wanted in lines:
        case, _, name = figure.partition("/")
        cells = []
        for kind in kinds:
            values = [suite[case][name] for suite in _of(jobs, kind) if case in suite]
            cells.append(over_seeds(values, digits, unit) if values else "")
        anchor = f"{unrelated[name]:.{digits}f}{unit}" if case == "reconstruction" else ""
        rows.append((title, *cells, anchor, wanted))
    header = [f"{names[kind]}, {len(_of(jobs, kind))} seed{'s' * (len(_of(jobs, kind)) > 1)}" for kind in kinds]
    return markdown(["", *header, "an unrelated real image", "target"], rows)


def _of(jobs: Sequence[dict[str, Any]], ablation: str) -> list[dict[str, Any]]:
    return [job["suite"]["cases"] for job in jobs if job["overrides"].get("ablation") == ablation]


@table
def dit_images(run: str = "run", pixels: int = 64) -> str:
    """Images of the small recipe on pixels, compared with real images and with an unrelated real image."""
    cases = read("dit_images")[run]["cases"]
    return _image_figures([(title, cases[case]) for case, title in IMAGE_CASES.items() if case in cases], pixels)


def _image_figures(columns: Iterable[tuple[str, dict[str, Any] | list[dict[str, Any]]]], pixels: int) -> str:
    """Return a table with one column per set of images. columns: title and figures, or the figures of each seed."""
    columns_by_seed = [(title, found if isinstance(found, list) else [found]) for title, found in columns]
    lines = (
        ("Frechet distance to real training images", "frechet", 2),
        ("CMMD", "cmmd", 3),
        ("precision", "precision", 2),
        ("recall", "recall", 2),
        ("grain, 1/255", "grain", 2),
        ("SSIM", "ssim", 2),
        ("PSNR, dB", "psnr_db", 1),
        ("distance in DINO features", "dino_distance", 3),
        (f"cube within {pixels // 16} of {pixels} px", "cube_within_4px", 2),
        (f"block within {pixels // 16} of {pixels} px", "block_within_4px", 2),
        ("requested colour", "colour_as_asked", 2),
        ("requested side (another image's features: side in that image)", "side_as_asked", 2),
        ("exactly the named objects", "objects_as_named", 2),
    )
    rows = [
        (
            title,
            *(_image_figure(found, name, digits) for _, found in columns_by_seed),
        )
        for title, name, digits in lines
    ]
    return markdown(["", *(title for title, _ in columns_by_seed)], rows)


def _image_figure(found: list[dict[str, Any]], name: str, digits: int) -> str:
    """Return one figure over training seeds. With another image's features, the side is that of the reference."""
    name = "side_of_reference" if name == "side_as_asked" and "side_of_reference" in found[0] else name
    return over_seeds([figures[name] for figures in found], digits) if name in found[0] else ""


@table
def dit_images_128px() -> str:
    """The table `dit_images` at 128 px."""
    return dit_images("run_128px", 128)


@table
def dit_latents(run: str = "run_latents", pixels: int = 64) -> str:
    """Images of the small recipe on latents of the project's own autoencoder; mean and range over training seeds."""
    runs = read("dit_images")[run]["runs"]
    columns = []
    for case, title in IMAGE_CASES.items():
        own = runs[:1] if case in ("real", "unrelated_image", "autoencoder") else runs  # the same for all seeds
        if case in runs[0]["cases"]:
            columns.append((title, [trained["cases"][case] for trained in own]))
    return _image_figures(columns, pixels)


@table
def dit_headline() -> str:
    """README: images of the small recipe from words alone, and from words and features."""
    record = read("dit_images")
    small, large = (record[name]["runs"] for name in ("run_latents", "run_latents_128px_6000"))

    def of(runs: Sequence[Mapping[str, Any]], case: str, name: str) -> str:
        return over_seeds([trained["cases"][case][name] for trained in runs], 2)

    def words(runs: Sequence[Mapping[str, Any]]) -> str:
        objects, distance = (of(runs, "text_only", name) for name in ("objects_as_named", "frechet"))
        real = of(runs[:1], "real", "frechet")
        named = f"exactly the named objects in {objects} of images, bent"
        return f"{named}; Frechet distance {distance}, other real images {real}"

    ssim, distance = (of(small, "reconstruction", name) for name in ("ssim", "frechet"))
    unrelated = of(small[:1], "unrelated_image", "ssim")
    colour, place = (of(small, "changed_words", name) for name in ("colour_as_asked", "cube_within_4px"))
    rows = (
        ("**words alone** (the shortcoming)", words(small)),
        ("words alone at 128 px, three training seeds", words(large)),
        (
            "words and the reference's patches",
            f"SSIM {ssim} (an unrelated real image: {unrelated}), Frechet distance {distance}",
        ),
        (
            "the reference's patches, words that name another colour",
            f"requested colour in {colour} of images, cube in place (within 4 of 64 px) in {place}",
        ),
    )
    return markdown(["condition", "result"], rows)


@table
def dit_latents_128px() -> str:
    """The table `dit_latents` at 128 px."""
    return dit_latents("run_latents_128px_6000", 128)


@table
def dit_switches_128px() -> str:
    """Training timesteps and a detail head at 128 px: errors by noise level, and figures of generated images."""
    record = read("dit_images")["switches_128px"]
    rows = []
    for row in record["rows"]:
        errors, drawn = row["error_by_level"], row["cases"]
        rows.append(
            (
                row["what"],
                *(f"{errors[level]['words_and_features']:.3f}" for level in ("0.5", "0.8", "0.95")),
                *(f"{errors[level]['words']:.3f}" for level in ("0.8", "0.95")),
                *(
                    f"{drawn[case][name]:.2f}"
                    for case in ("reconstruction", "text_only")
                    for name in ("frechet", "objects_as_named")
                ),
                f"{row['wall_s'] / 60:.0f} min",
            )
        )
    real = record["real"]
    rows.append(("real images", *[""] * 5, f"{real['frechet']:.2f}", f"{real['objects_as_named']:.2f}", "", "", ""))
    header = [
        "trained with",
        *(f"error at noise level {level}" if level == "0.5" else f"at {level}" for level in ("0.5", "0.8", "0.95")),
        *("words alone: error at 0.8", "at 0.95"),
        *("words and features: Frechet distance", "exactly the named objects"),
        *("words alone: Frechet distance", "exactly the named objects", "training time"),
    ]
    return markdown(header, rows)


@table
def dit_trainings_128px() -> str:
    """Training runs at 128 px on latents: steps, learning rate, share of samples with words alone, decoder steps."""
    record = read("dit_images")
    first, longer, recipe = (record[f"run_latents_128px{end}"] for end in ("_first", "", "_6000"))
    slow, fast = (run for run in record["learning_rates_128px"]["runs"] if run["steps"] == 4000)
    trainings = [
        (6000, "1e-3", "30 %", "2000", [run["with_guide"] for run in first["runs"]]),
        (10000, "1e-3", "50 %", "2000", [run["with_guide"] for run in longer["runs"]]),
        (4000, "1e-3", "50 %", "4000", [slow["cases"]]),
        (4000, "3e-3", "50 %", "4000", [fast["cases"]]),
        (6000, "3e-3", "50 %", "4000", [run["cases"] for run in recipe["runs"]]),
    ]
    columns = (
        ("reconstruction", "frechet"),
        ("reconstruction", "ssim"),
        ("text_only", "frechet"),
        ("text_only", "objects_as_named"),
    )
    rows: list[tuple[str, ...]] = [
        (
            *(str(steps), rate, words, decoder, str(len(runs))),
            *(over_seeds([run[case][name] for run in runs], 2) for case, name in columns),
        )
        for steps, rate, words, decoder, runs in trainings
    ]
    real = recipe["runs"][0]["cases"]["real"]
    rows.append(("real images", *[""] * 4, f"{real['frechet']:.2f}", "", "", f"{real['objects_as_named']:.2f}"))
    header = [
        "steps",
        "learning rate",
        "samples with words alone",
        "decoder steps",
        "seeds",
        "words and features: Frechet distance",
    ]
    header += ["SSIM", "words alone: Frechet distance", "exactly the named objects"]
    return markdown(header, rows)


@table
def dit_detail_head() -> str:
    """The small recipe with and without convolutions after the last layer."""
    record = read("dit_images")
    plain, detail = record["run"]["cases"], record["run_detail_head"]["cases"]
    columns = (
        ("real images", plain["real"]),
        ("words and features, the recipe", plain["reconstruction"]),
        ("the same, `detail_head`", detail["reconstruction"]),
        ("words alone, the recipe", plain["text_only"]),
        ("the same, `detail_head`", detail["text_only"]),
    )
    return _image_figures(columns, 64)


@table
def dit_few_steps() -> str:
    """A student with four sampling steps and its teacher with forty, on pixels at 64 px."""
    return _student_and_teacher("few_steps")


@table
def dit_few_steps_latents_128px() -> str:
    """A student with four sampling steps and its teacher with forty, on latents at 128 px."""
    return _student_and_teacher("few_steps_latents_128px")


def _student_and_teacher(name: str) -> str:
    record = read("dit_images")[name]
    seconds, real = record["s_per_image"], record["student"]["real"]
    rows: list[tuple[str, ...]] = [("real images", "", f"{real['frechet']:.2f}", f"{real['grain']:.2f}", "", "", "")]
    told = (("reconstruction", "words_and_features"), ("text_only", "words_alone"))
    for case, timed in told:
        for side, run in (("teacher, 40 steps", "teacher_40_steps"), ("student, 4 steps", "student")):
            found = record[run][case]
            figures = (f"{found[name]:.2f}" for name in ("frechet", "grain", "ssim", "objects_as_named"))
            rows.append((timed.replace("_", " "), side, *figures, f"{seconds[timed][run]:.3f} s"))
    header = ["condition", "sampler", "Frechet distance", "grain", "SSIM", "exactly the named objects"]
    return markdown([*header, "time per image"], rows)


@table
def dit_recipes() -> str:
    """Settings that were tried on the way to the small recipe."""
    rows = []
    for run in read("dit_images")["explored"]:
        cases = run["cases"]
        whole, words, changed = cases["reconstruction"], cases["text_only"], cases["changed_words"]
        rows.append(
            (
                *(run["name"], run["steps"], f"{whole['ssim']:.2f}", f"{whole['grain']:.2f}"),
                *(f"{whole['frechet']:.2f}", f"{words['frechet']:.2f}", f"{words['objects_as_named']:.2f}"),
                *(f"{changed['colour_as_asked']:.2f}", f"{changed['cube_within_4px']:.2f}"),
            )
        )
    real, other = (read("dit_images")["explored"][0]["cases"][name] for name in ("real", "unrelated_image"))
    anchor = ("an unrelated real image", "", f"{other['ssim']:.2f}", f"{other['grain']:.2f}")
    rows.append((*anchor, "", "", f"{other['objects_as_named']:.2f}", "", ""))
    frechet = f"{real['frechet']:.2f}"
    rows.append(
        ("real images", "", "1", f"{real['grain']:.2f}", frechet, frechet, f"{real['objects_as_named']:.2f}", "", "")
    )
    header = ["settings", "steps", "SSIM", "grain", "Frechet distance", "words alone: Frechet distance"]
    header += ["words alone: exactly the named objects", "changed words: requested colour"]
    header += ["changed words: cube within 4 px"]
    return markdown(header, rows)


@table
def dit_decoders() -> str:
    """One transformer at 128 px with the decoder of its autoencoder as it was, and after further training."""
    record = read("dit_images")["decoders_128px"]
    columns = {
        "autoencoder alone: PSNR, dB": ("autoencoder", "psnr_db", 1),
        "autoencoder alone: Frechet distance": ("autoencoder", "frechet", 2),
        "words and features: SSIM": ("reconstruction", "ssim", 3),
        "words and features: Frechet distance": ("reconstruction", "frechet", 2),
        "words and features: grain": ("reconstruction", "grain", 3),
        "words alone: Frechet distance": ("text_only", "frechet", 2),
        "exactly the named objects": ("text_only", "objects_as_named", 2),
    }
    rows = [
        [each["decoder"], *(f"{each['cases'][case][key]:.{digits}f}" for case, key, digits in columns.values())]
        for each in record["decoders"]
    ]
    real = record["real"]
    shown = {"frechet": 2, "grain": 3, "objects_as_named": 2}
    rows.append(["real images", *(f"{real[k]:.{shown[k]}f}" if k in shown else "" for _, k, _ in columns.values())])
    return markdown(["decoder", *columns], rows)


@table
def dit_ablations() -> str:
    """One switch of the small recipe changed at a time: mean over training seeds, and lowest to highest value."""
    record = read("dit_ablations")
    columns = {
        "SSIM": ("reconstruction", "ssim"),
        "grain": ("reconstruction", "grain"),
        "Frechet distance": ("reconstruction", "frechet"),
        "words alone: Frechet distance": ("text_only", "frechet"),
        "words alone: exactly the named objects": ("text_only", "objects_as_named"),
        "words alone: requested side": ("text_only", "side_as_asked"),
        "changed words: requested colour": ("changed_words", "colour_as_asked"),
        "changed words: cube within 4 px": ("changed_words", "cube_within_4px"),
    }
    by_name: dict[str, list[dict[str, Any]]] = {}
    for job in record["jobs"]:
        by_name.setdefault(job["ablation"], []).append(job)
    first = "patch_dit/none"

    def cell(jobs: Sequence[dict[str, Any]], place: tuple[str, str]) -> str:
        return over_seeds([job["cases"][place[0]][place[1]] for job in jobs], 2)

    def words_alone(name: str) -> float:
        values = [float(job["cases"]["text_only"]["frechet"]) for job in by_name[name]]
        return sum(values) / len(values)

    rows = []
    for name in [first, *sorted(by_name.keys() - {first}, key=words_alone)]:
        title = "unchanged recipe" if name == first else f"`{name.removeprefix('patch_dit/')}`"
        rows.append([title, len(by_name[name]), *(cell(by_name[name], place) for place in columns.values())])
    for title, anchor in (("an unrelated real image", "unrelated_image"), ("real images", "real")):
        found = record[anchor]
        known = [found.get(figure) if case == "reconstruction" else None for case, figure in columns.values()]
        rows.append([title, "", *("" if value is None else f"{value:.2f}" for value in known)])
    return markdown(["switch", "seeds", *columns], rows)


@table
def dit_views() -> str:
    """A grey and a colour reference image compared: means over training seeds."""
    jobs = [job for job in read("dit_claims")["jobs"] if job["status"] == "finished"]
    rows = []
    for title, case, name, digits, unit in (
        ("changed words: requested colour", "changed_words", "colour_as_asked", 2, ""),
        ("reconstructions: requested colour", "reconstruction", "colour_as_asked", 2, ""),
        ("PSNR of reconstructions", "reconstruction", "psnr_db", 1, " dB"),
        ("cube within 4 of 64 px", "reconstruction", "cube_within_4px", 2, ""),
    ):
        means = (fmean(cases[case][name] for cases in _of(jobs, kind)) for kind in ("dit_none", "dit_colour_view"))
        rows.append((title, *(f"{mean:.{digits}f}{unit}" for mean in means)))
    return markdown(["", "grey", "colour"], rows)


@table
def dit_speed() -> str:
    """Time and memory of the reference size."""
    sampler, step, image = read("dit_sampler"), read("dit_step"), read("gpu/dit_sample")["figures"]
    rows = [
        (
            "a sampling step with three branches in one batch, keys and values of the context cached and its padding "
            "cut off",
            f"{sampler['step_ms'] / 1000:.1f} s: {sampler['speedup_over_four']:.2f} times faster than four plain "
            f"passes, {sampler['speedup_over_three']:.2f} times faster than three, results equal within a relative "
            f"difference of {sampler['max_relative_difference']:.1e}",
            "float32, one thread of an AMD EPYC; `bench case=dit_sampler cases.dit_sampler.threads=1`",
        ),
        (
            "a training step with patches",
            f"{step['step_ms'] / 1000:.1f} s: {step['patches_over_cls_time']:.2f} times the time with CLS alone, "
            f"{step['patches_over_cls_memory']:.2f} times its memory ({gigabytes(step['peak_mb'])} GB "
            "without the weights)",
            "the same; `case=dit_step cases.dit_step.threads=1`",
        ),
        (
            "memory of a training step at 512 px, batch 1, bf16",
            f"{step['estimated_512px_bf16_gb']:.1f} GB: {step['estimated_weights_and_states_gb']:.1f} for weights, EMA "
            f"and optimizer states, {step['estimated_step_gb']:.1f} for activations, gradients and copies of the "
            "weights in bf16 at the peak of the step",
            "**counted**, not measured",
        ),
        (
            "an image at 512 px, 50 steps with guidance, bf16, without the autoencoder",
            f"{image['batch_1_image_ms'] / 1000:.1f} s for one image, {image['batch_8_image_ms'] / 1000:.2f} s per "
            "image in a batch of eight",
            "an H100; `bench suite=gpu part=dit_sample`, record `benchmarks/gpu/dit_sample.json`",
        ),
    ]
    return markdown(["measurement", "value", "hardware and command"], rows)
