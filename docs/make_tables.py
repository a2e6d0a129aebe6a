"""Write the tables of README.md and docs/*.md from the records in benchmarks/: ``python docs/make_tables.py``.

A table is placed between ``<!-- table NAME -->`` and ``<!-- /table -->``. NAME is the name of a function in this file
that returns the table; its docstring describes the table.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from keygrip.evaluation.paired_report import table as paired_table
from keygrip.evaluation.statistics import wilson_interval

ROOT = Path(__file__).resolve().parent.parent
TABLES: dict[str, Callable[..., str]] = {}
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
FIRST, FRESH = "first_seed_1000000", "first_seed_2000000"
FIRST_MT50 = "volume query with language, 20 demonstrations"
LAST_MT50 = "two cameras, eased scripts, from the one before"  # name of the run of the last policy
# Cases of the image evaluation suite, and the heads of their columns.
IMAGE_CASES = {
    "real": "real images",
    "another_picture": "an unrelated real image",
    "autoencoder": "autoencoder alone",
    "reconstruction": "words and features",
    "text_only": "words alone",
    "changed_words": "features, changed words",
    "dino_swap": "another image's features",
    "shuffled_patches": "shuffled patches",
}


def table(make: Callable[..., str]) -> Callable[..., str]:
    """Register a function that returns the table of its name when it is called without arguments."""
    TABLES[make.__name__] = make
    return make


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines: list[list[object]] = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def rate(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not run"
    low, high = 100 * result["success_low"], 100 * result["success_high"]
    return (
        f"{100 * result['success_rate']:.0f} % ({low:.0f} to {high:.0f}), {result['successes']} of {result['episodes']}"
    )


def ablation(recorded: str) -> str:
    """Return the current name of an ablation whose name in the record has an old prefix (``vlm_small_query``)."""
    system, _, name = recorded.partition("_")
    folders = {"vq": "volume_query", "vlm": "foveated_vlm", "dit": "patch_dit", "vla": "geometry_vla"}
    return "unchanged recipe" if name == "none" else f"`ablation={folders[system]}/{name}`"


@table
def seeds() -> str:
    """Success with the demo's settings, by task and training seed."""
    rows = [(r["task"], r["training_seed"], rate(r[FIRST]), rate(r[FRESH])) for r in read("volume_query_seeds")["runs"]]
    return markdown(["task", "training seed", "seeds from 1 000 000", "fresh seeds from 2 000 000"], rows)


@table
def errors() -> str:
    """The demo's errors on held-out demonstrations, and the errors from quantisation alone."""
    figures = read("volume_query_seeds")["demo_after_float32_geometry"]["errors"]
    rows = [
        (name, f"{scale * figures[key]:.1f} {unit}", f"{scale * figures[floor]:.1f} {unit}")
        for name, key, floor, scale, unit in (
            ("pixel (argmax)", "val/pix_argmax", "val/pix_floor", 1, "px"),
            ("height", "val/height_m", "val/height_m_floor", 1000, "mm"),
            ("position", "val/position_cm", "val/position_cm_floor", 1, "cm"),
            ("rotation", "val/rotation_deg", "val/rotation_deg_floor", 1, "deg"),
        )
    ]
    return markdown(["", "error", "quantisation floor"], rows)


@table
def shifts() -> str:
    """Success of the volume query and of coordinate regression."""
    results = read("volume_query_shifts")["results"]
    keys = list(dict.fromkeys((r["trained_on"], r["training"], r["tested_on"]) for r in results))
    found = {(r["trained_on"], r["tested_on"], r["model"]): r for r in results}
    rows = [
        (
            on,
            training,
            at,
            *(rate(found.get((on, at, model))) for model in ("volume_query_tuned", "coordinate_regression")),
        )
        for on, training, at in keys
    ]
    return markdown(["trained on", "training", "tested on", "volume query", "coordinate regression"], rows)


@table
def margins() -> str:
    """Success with limits on how far plans may leave the box of the training positions."""
    record = read("volume_query_margins")
    rows = []
    for seeds, runs in (("tuning", record["tuning"]), ("held out", record["held_out"])):
        found = {(run["trained_on"], run["tested_on"], run["margin_m"]): run for run in runs}
        for trained, tested in dict.fromkeys((run["trained_on"], run["tested_on"]) for run in runs):
            results = [found.get((trained, tested, margin)) for margin in ("0.01", "[null,null,0.01]", "null")]
            rows.append((trained, tested, seeds, *(_held_back(result) for result in results)))
    header = ["trained on", "tested on", "episodes", "1 cm along all axes", "heights only (default)", "no limit"]
    return markdown(header, rows)


def _held_back(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    moved = f" ({result['clamped_plans']} of {result['plans']} plans moved)" if result["clamped_plans"] else ""
    return f"{result['successes']} of {result['episodes']}{moved}"


@table
def options() -> str:
    """Ablations of the volume query's options."""
    rows = []
    for job in read("volume_query_options")["jobs"]:
        m = job["metrics"]
        rows.append(
            (
                job["overrides"]["ablation"].removeprefix("vq_"),
                f"{100 * m['closed_loop/in_distribution/success_rate']:.0f} %",
                f"{m['val/pix_argmax']:.1f} px",
                f"{1000 * m['val/height_m']:.0f} mm",
                f"{m['val/position_cm']:.1f} cm",
                f"{m['val/rotation_deg']:.0f} deg",
                f"{job['wall_s'] / 60:.1f} min",
            )
        )
    header = ["option switched off", "success, 50 episodes", "pixel error", "height error", "position error"]
    return markdown([*header, "rotation error", "wall time"], rows)


def count(result: Mapping[str, Any] | None) -> str:
    return "" if result is None else f"{result['successes']} of {result['episodes']}"


@table
def rotation() -> str:
    """Success and yaw error at the grip with the second look, with both controllers."""
    runs = {run["task"]: run for run in read("volume_query_rotation")["runs"]}
    cube, own = runs["pick a cube"], ", the windows' own backbone from the start"
    rows = []
    for words, controller, run in (
        ("bar, separate backbone, 1000 steps", "present", runs["pick a bar" + own]),
        ("the same policy", "earlier", runs["pick a bar" + own]["grip_early"]),
        ("bar, shared backbone, 900 steps", "earlier", runs["pick a bar"]),
        ("bar, shared backbone, 360 steps", "earlier", runs["pick a bar, fewer steps"]),
        ("cube, separate backbone, 1000 steps", "present", runs["pick a cube" + own]),
        ("the same policy", "earlier", runs["pick a cube" + own]["grip_early"]),
        ("cube, shared backbone, 412 steps", "earlier", {"tuning": cube["tuning_of_the_first_part"]}),
        ("the same, and 250 more steps with a separate backbone", "earlier", cube),
        ("cube, `pick_place`, shared backbone, the demo's 280 steps", "earlier", runs["pick_place of a cube"]),
        (
            "the same, plans keep to one of the equivalent grips",
            "earlier",
            {"tuning": runs["pick_place of a cube"]["tuning_with_steady_turns"]},
        ),
    ):
        tuning, held = run["tuning"], run.get("held_out")
        spread = (held or {}).get("grip_yaw_error_deg")
        rows.append(
            (
                words,
                controller,
                count(held),
                f"{held['grip_yaw_error_deg_median']:.1f} deg" if held else "",
                f"{spread['within_8_deg']} of {spread['grips']}" if spread else "",
                count(tuning),
                f"{tuning['grip_yaw_error_deg_median']:.1f} deg",
            )
        )
    header = ("object and training", "controller", "held out", "yaw error at the grip (median)", "grips within 8 deg")
    return markdown([*header, "tuning seeds", "yaw error on tuning seeds"], rows)


@table
def controllers() -> str:
    """Success of the same policies with the earlier and with the present controller."""
    bar = _run("volume_query_rotation", "task", "pick a bar, the windows' own backbone from the start")
    handover = _run("volume_query_tasks", "task", "handover of a bar between two arms, more demonstrations")
    steps = read("metaworld_mt10")["controller"]
    two, one = (_run("metaworld_mt50", "name", name) for name in (LAST_MT50, FIRST_MT50))
    pedestals = next(
        job
        for job in read("vla_geometry_comparison")["jobs"]
        if job["overrides"]["ablation"] == "geometry_vla/arm_both" and "closed_loop_gripper_early" in job
    )
    rows = []
    for words, earlier, present, record in (
        ("pick a bar", bar["grip_early"]["held_out"], bar["held_out"], "volume_query_rotation"),
        (
            "handover of a bar",
            handover["held_out"],
            handover["openings_sent_when_the_pose_is_reached"]["held_out"],
            "volume_query_tasks",
        ),
        (
            "geometry-injected policy on pedestals (`arm_both`)",
            pedestals["closed_loop_gripper_early"],
            pedestals["closed_loop"],
            "vla_geometry_comparison",
        ),
        ("MT10, steps of 0.1 s, tuning positions", steps["at_the_beginning"], steps["when_reached"], "metaworld_mt10"),
        ("MT50, two cameras", two["earlier_controller"]["all"], two["result"]["all"], "metaworld_mt50"),
        ("MT50, one camera", one["earlier_controller"]["all"], one["result"]["all"], "metaworld_mt50"),
    ):
        rows.append((words, count(earlier), count(present), f"[`{record}.json`](../benchmarks/{record}.json)"))
    return markdown(["policy", "earlier controller", "present controller", "record"], rows)


def _run(record: str, key: str, name: str) -> dict[str, Any]:
    """Return the run of a record whose `key` is `name`."""
    found: dict[str, Any] = next(run for run in read(record)["runs"] if run[key] == name)
    return found


@table
def grip_windows() -> str:
    """Error of the yaw predicted from windows of the policy's own image and of an image with higher resolution."""
    record = read("grip_yaw")
    rows = [
        (words, *(f"{record[images][f'yaw_error_deg_{kind}']:.1f} deg" for kind in ("median", "mean")))
        for words, images in (
            ("32 px of the policy's own 192 px image", "coarse"),
            ("64 px of a 384 px image", "sharp"),
        )
    ]
    return markdown(
        ["window of 8 cm, 150 steps of batch size 64, one training seed", "yaw error, median", "mean"], rows
    )


@table
def further_tasks() -> str:
    """Success on peg, pedestals and handover."""
    runs = {run["task"]: run for run in read("volume_query_tasks")["runs"]}
    pedestals, handover = "pick off pedestals of 0 to 6 cm", "handover of a bar between two arms"
    two, one = runs[f"{pedestals}, two cameras"], runs[f"{pedestals}, one camera of the same recordings"]
    short, more = runs[f"{handover}, 600 steps"], runs[f"{handover}, more demonstrations"]
    still = runs[f"{handover}, an expert that stands still before it grips"]
    present = "openings_sent_when_the_pose_is_reached"
    rows = []
    for words, controller, trained, run in (
        ("`peg`, second look", "present", runs["peg"], runs["peg"]),
        ("`peg`, trained again with the same command", "earlier", runs["peg"], runs["peg"]["earlier"]),
        ("pedestals, two cameras", "present", two, two),
        ("pedestals, one of the two cameras", "present", one, one),
        ("handover", "earlier", short, short),
        ("handover, second look", "earlier", runs[handover], runs[handover]),
        ("handover, second look, more demonstrations", "earlier", more, more),
        ("the same policy", "present", more, more[present]),
        ("handover, second look, expert stands still before it grips", "earlier", still, still),
        ("the same policy", "present", still, still[present]),
    ):
        demos = re.search(r"demos=(\d+)", trained["command"])
        steps = re.search(r"(\d+) steps", trained["note"]) or re.search(r"max_steps=(\d+)", trained["command"])
        assert demos is not None
        assert steps is not None
        heights = run["held_out"].get("by_height", {})
        by_height = [count(heights.get(height)) for height in ("0-2 cm", "2-4 cm", "4-6 cm")]
        rows.append((words, demos[1], steps[1], controller, count(run["held_out"]), *by_height, count(run["tuning"])))
    header = ["task", "demonstrations", "steps", "controller", "held out"]
    return markdown([*header, "pedestals of 0-2 cm", "2-4 cm", "4-6 cm", "tuning seeds"], rows)


@table
def speed() -> str:
    """Speed and memory of the volume query: loss, training, data loading and inference."""
    loss, training, loader, inference = (read(name) for name in ("volume_loss", "training", "loader", "inference"))
    rows = [
        (
            "exact loss compared with the dense volume, forward and backward, T = 50, batch 8, float32",
            f"{loss['time_ratio']:.0f} times faster, {loss['memory_ratio']:.0f} times less additional memory",
            "`keygrip.bench case=volume_loss`",
        ),
        ("the same at T = 8", f"{loss['time_ratio_t8']:.1f} and {loss['memory_ratio_t8']:.1f} times", ""),
        (
            "training with the demo's earlier settings (batch size 32)",
            f"{training['samples_per_s']:.0f} samples/s; "
            f"{100 * training['data_wait_share']:.1f} % of the time waiting for data",
            "`case=training`",
        ),
        (
            "data loader alone, one worker, the same batches",
            f"{loader['samples_per_s']:.0f} samples/s cached, {loader['uncached_samples_per_s']:.0f} decoded",
            "`case=loader`",
        ),
        (
            "computing a plan",
            f"median {inference['p50_ms']:.0f} ms (p95 {inference['p95_ms']:.0f}); "
            f"with one thread {inference['one_thread_p50_ms']:.0f} ms",
            "`case=inference`",
        ),
    ]
    return markdown(["measurement", "value", "command"], rows)


@table
def headline() -> str:
    """README: the main results of the volume query."""
    rows: list[tuple[str, str]] = []
    runs = read("volume_query_seeds")["runs"]
    settings = {"pick_place": "the demo's earlier settings (700 steps of batch size 32)", "pick": "the same settings"}
    for task, trained in settings.items():
        counts = [r[FRESH] or r[FIRST] for r in runs if r["task"] == task]
        successes = ", ".join(str(c["successes"]) for c in counts)
        rows.append((f"{task}, {trained}, {len(counts)} training seeds", f"{successes} of {counts[0]['episodes']}"))
    found = {(r["trained_on"], r["tested_on"], r["model"]): r for r in read("volume_query_shifts")["results"]}
    for on, at, words in (
        ("bar", "bar", "pick_place of a bar, where yaw matters"),
        (
            "left_right",
            "left_to_right",
            "trained with the object on the left half of the table, tested with it on the right half; bowl and arm "
            "anywhere",
        ),
        ("views", "views_64", "trained with one camera view, tested with 22 others that are up to 25 degrees away"),
    ):
        ours, theirs = (found[on, at, model] for model in ("volume_query_tuned", "coordinate_regression"))
        rows.append(
            (
                words,
                f"{ours['successes']} of {ours['episodes']}; coordinate regression: "
                f"{theirs['successes']} of {theirs['episodes']}",
            )
        )
    picked = {
        run["margin_m"]: f"{run['successes']} of {run['episodes']}"
        for run in read("volume_query_margins")["held_out"]
        if run["tested_on"] == "left_to_right"
    }
    rows.append(
        (
            "trained to pick on the left half, with the arm never on the right half; tested on the right half; for "
            "comparison, with plans limited to within 1 cm of the box of the training positions (`keygrip serve` "
            "and `run` refuse plans more than `bounds.plan_m`, 10 cm, outside the box)",
            f"{picked['[null,null,0.01]']}; with the limit: {picked['0.01']}",
        )
    )
    for record, task, words in (
        ("rotation", "pick a bar, the windows' own backbone from the start", "pick a bar, 150 demonstrations"),
        ("tasks", "peg", "insert a flat peg into a slot, 200 demonstrations"),
        (
            "tasks",
            "handover of a bar between two arms, an expert that stands still before it grips",
            "hand a bar from one arm to the other, 200 demonstrations",
        ),
    ):
        result = next(run["held_out"] for run in read(f"volume_query_{record}")["runs"] if run["task"] == task)
        words += ", with the second look, one training seed"
        rows.append((words, f"{result['successes']} of {result['episodes']}"))
    mt10, mt50 = (
        {run["name"]: run["result"]["all"]["successes"] for run in read(record)["runs"]}
        for record in ("metaworld_mt10", "metaworld_mt50")
    )
    one, two = mt10["volume query with language"], mt10["the same policy, two cameras"]
    best = mt10["the script itself (best possible)"]
    words = "Meta-World MT10, one policy, the task given as a sentence, 50 demonstrations per task, one training seed"
    rows.append((words, f"two cameras {two}, one camera {one} of 200; the scripted policy that it imitates: {best}"))
    words = "the same tasks, two cameras, 20 demonstrations per task: `make metaworld`, 50 minutes in total"
    rows.append((words, f"{mt10['make metaworld: two cameras from the start, 20 demonstrations']} of 200"))
    words = "the same tasks, two cameras, 10 demonstrations per task, 32 minutes of training on one core"
    rows.append((words, f"{mt10['two cameras from the start, 10 demonstrations']} of 200"))
    equal = {
        run["demos"]: run["result"]["all"]
        for run in read("metaworld_equal_time")["runs"]
        if "LeRobot" not in run["name"]
    }
    few = equal[min(equal)]
    words = f"the same tasks, one camera, {min(equal)} demonstrations per task, 20 minutes of training on one core"
    rows.append((words, f"{few['successes']} of {few['episodes']}"))
    words = "Meta-World MT50, one policy for all fifty tasks, 20 demonstrations per task and additional ones for "
    words += "eleven tasks from modified scripts, three hours on one core"
    first = mt50[FIRST_MT50]
    rows.append((words, f"two cameras {mt50[LAST_MT50]} of 500; after the first 65 minutes, one camera: {first}"))
    return markdown(
        ["task (in simulation, 100 demonstrations unless stated otherwise)", "success on held-out seeds"], rows
    )


def over_seeds(values: Sequence[float], digits: int, unit: str = "") -> str:
    """Return the mean of some values; for several values also the lowest and the highest."""
    mean = f"{sum(values) / len(values):.{digits}f}{unit}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def span(values: Iterable[float], digits: int = 2) -> str:
    """Return the lowest and the highest value, or one value if both are equal after rounding."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys(f"{end:.{digits}f}" for end in (ordered[0], ordered[-1])))


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
        ("distance in the attribute classifier's features", "reconstruction/judge_distance", 3, "", "0"),
        ("cube within 4 of 64 px", "reconstruction/cube_within_4px", 2, "", "0.8; CLS only at most 0.15"),
        ("the same with shuffled patches", "shuffled_patches/cube_within_4px", 2, "", "lost"),
        ("PSNR with shuffled patches", "shuffled_patches/psnr_db", 1, " dB", "lost"),
        ("layout of another image (`dino_swap`): cube within 4 px", "dino_swap/cube_within_4px", 2, "", ""),
        ("reconstructions: requested colour", "reconstruction/colour_as_asked", 2, "", "0.98"),
        ("changed words: requested colour", "changed_words/colour_as_asked", 2, "", "0.9"),
        ("words alone: requested colour", "text_only/colour_as_asked", 2, "", ""),
        ("words alone: requested side", "text_only/side_as_asked", 2, "", ""),
    )
    unrelated = jobs[0]["suite"]["cases"]["another_picture"]
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
        own = runs[:1] if case in ("real", "another_picture", "autoencoder") else runs  # the same for all seeds
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
    unrelated = of(small[:1], "another_picture", "ssim")
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
    real, other = (read("dit_images")["explored"][0]["cases"][name] for name in ("real", "another_picture"))
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
    for title, anchor in (("an unrelated real image", "another_picture"), ("real images", "real")):
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
            f"and optimiser states, {step['estimated_step_gb']:.1f} for activations, gradients and copies of the "
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


def gigabytes(mebibytes: float) -> str:
    """Return GB for MiB, the unit of the records."""
    return f"{mebibytes * 2**20 / 1e9:.1f}"


@table
def vla_injection() -> str:
    """The VLA with and without geometry injection, by training seed."""
    runs = read("vla_injection")["runs"]
    seeds = sorted({run["seed"] for run in runs})
    found = {(run["model"], run["seed"]): run for run in runs}
    models = ("geometry_vla", "geometry_vla_no_injection")
    rows: list[list[str]] = []
    for seed in seeds:
        rows.append([f"success, training seed {seed}", *(rate(found[model, seed]["closed_loop"]) for model in models)])
    for heights in found[models[0], seeds[0]]["closed_loop"]["by_height"]:
        cells = []
        for model in models:
            parts = [found[model, seed]["closed_loop"]["by_height"][heights] for seed in seeds]
            cells.append(f"{sum(p['successes'] for p in parts)} of {sum(p['episodes'] for p in parts)}")
        rows.append([f"success with the cube at a height of {heights}, all seeds", *cells])
    lines = (
        ("position error (val)", "val/position_cm", 2, " cm"),
        ("horizontal error at the grip (val)", "val/grip_side_cm", 2, " cm"),
        ("height error at the grip (val)", "val/grip_height_cm", 2, " cm"),
        ("pointing error, next steps (val), of 128 px", "val/pointing_px", 2, " px"),
        ("pointing error, keyframe (val)", "val/keyframe_px", 2, " px"),
        ("error of predicted world points (val)", "val/point_cm", 2, " cm"),
        ("share of the head's attention on compressed geometry tokens", "val/geometry_share", 2, ""),
        ("share of the head's attention on pointed tokens", "val/pointed_share", 2, ""),
        ("parameters", "parameters/all_m", 2, " M"),
        ("time per plan", "closed_loop/in_distribution/plan_ms_median", 0, " ms"),
    )
    for title, figure, digits, unit in lines:
        cells = []
        for model in models:
            values = [found[model, seed]["metrics"].get(figure) for seed in seeds]
            cells.append("" if values[0] is None else over_seeds(values, digits, unit))
        rows.append([title, *cells])
    return markdown(["", "with injection", "without injection"], rows)


@table
def vla_comparison() -> str:
    """Policies trained on the same demonstrations and images."""
    rows = [
        (
            run["model"].replace("_tuned", ""),
            run["views"],
            rate(run["closed_loop"]),
            f"{run['metrics']['val/position_cm']:.1f} cm",
            f"{run['metrics']['closed_loop/in_distribution/plan_ms_median']:.0f} ms",
            f"{run['wall_s'] / 60:.0f} min",
        )
        for run in read("vla_comparison")["runs"]
    ]
    header = ["policy", "input", "success", "position error (val)", "time per plan"]
    header += ["training and 100 episodes, one core"]
    return markdown(header, rows)


@table
def vla_ablations() -> str:
    """Ablations of the geometry-injected policy: one part removed or changed at a time."""
    words = {
        "vla_none": "all parts",
        "vla_no_injection": "no geometry",
        "vla_untrained_geometry": "geometry encoder initialised with random weights",
        "vla_no_pointed_tokens": "no pointed tokens for the head",
        "vla_no_keyframe": "no keyframe map",
        "vla_adamw": "AdamW for all parameters",
    }
    rows = [
        (
            f"{words[job['overrides']['ablation']]}: {ablation(job['overrides']['ablation'])}",
            rate(job["closed_loop"]),
            f"{job['metrics']['val/position_cm']:.2f} cm",
            f"{job['metrics']['val/grip_side_cm']:.2f} cm",
        )
        for job in read("vla_ablations")["jobs"]
    ]
    header = ["", "success, tuning seeds", "position error (val)", "horizontal error at the grip (val)"]
    return markdown(header, rows)


@table
def vla_recipe() -> str:
    """Parts of the small recipe, added one after the other, on named cubes."""
    rows = []
    for job in read("vla_recipe")["jobs"]:
        metrics, result = job["metrics"], job["closed_loop"]
        keyframe = metrics.get("val/keyframe_px")
        rows.append(
            (
                job["what"],
                f"{metrics['val/grip_side_cm']:.1f} cm",
                f"{metrics['val/grip_height_cm']:.1f} cm",
                "" if keyframe is None else f"{keyframe:.1f} px",
                f"{result['successes']} of {result['episodes']}",
            )
        )
    header = ["", "horizontal error at the grip (val)", "height error (val)", "keyframe pointing error (val)"]
    return markdown([*header, "success, tuning seeds"], rows)


@table
def vla_compression() -> str:
    """Kinds of compression of the geometry tokens for the action head."""
    rows = []
    for job in read("vla_compression")["jobs"]:
        name, metrics = job["overrides"]["ablation"].removeprefix("vla_"), job["metrics"]
        kind, _, tokens = name.rpartition("_")
        none = name == "no_injection"
        rows.append(
            (
                "none" if none else kind,
                "" if none else tokens,
                "" if none else f"{metrics['parameters/compressor_m']:.3f} M",
                f"{metrics['parameters/all_m']:.2f} M",
                f"{100 * metrics['closed_loop/in_distribution/success_rate']:.0f} %",
                f"{metrics['val/position_cm']:.2f} cm",
                "" if none else f"{metrics['val/geometry_share']:.2f}",
                f"{metrics['closed_loop/in_distribution/plan_ms_median']:.0f} ms",
                f"{metrics['samples_per_s']:.0f}",
            )
        )
    header = ["kind", "K", "compressor parameters", "policy parameters", "success", "position error (val)"]
    header += ["attention on the tokens", "time per plan"]
    return markdown([*header, "training samples/s (shared cores)"], rows)


ARMS = {
    "neither": "no pointed places, no geometry (the maps are learned, but the head does not read them)",
    "no_pointing": "no maps, no geometry",
    "pool_16_no_pointing": "no maps, 16 pooled tokens",
    "none": "pointed places",
    "pointed": "pointed places, geometry at them",
    "pointed_blank": "pointed places, blank tokens in place of the geometry at them",
    "both": "pointed places, geometry at them, 16 pooled tokens",
    "triangulated": "pointed places, points where their rays meet",
    "both_triangulated": "pointed places, points where their rays meet, geometry at them, 16 pooled tokens",
    "both_standardised": "pointed places, geometry at them, 16 standardised tokens",
    "language": "16 pooled tokens in the language model's prompt, none for the head",
    "mean": "one mean-pooled vector",
    "blank": "16 tokens without information about the scene",
    "pool_16": "16 pooled tokens",
    "pool_4": "4 pooled tokens",
    "pool_64": "64 pooled tokens",
    "per_layer_4": "4 tokens, a linear layer per block",
    "per_layer_16": "16 tokens, a linear layer per block",
    "per_layer_64": "64 tokens, a linear layer per block",
    "per_layer_16_fast": "the same as `per_layer_16`, compressor with ten times the learning rate",
    "per_layer_16_places": "the same as `per_layer_16`, with view, row and column of each token",
    "per_layer_16_no_norm": "the same as `per_layer_16`, tokens not scaled to unit variance",
    "per_layer_16_long": "the same as `per_layer_16`, four times the steps",
    "neither_long": "the same as `neither`, four times the steps",
    "none_long": "the same as `none`, four times the steps",
    "pointed_long": "the same as `pointed`, four times the steps",
    "qformer_4": "4 learned queries",
    "qformer_16": "16 learned queries",
    "qformer_64": "64 learned queries",
    "pool_16_standardised": "16 pooled tokens, standardised",
}


@table
def vla_arms() -> str:
    """Arms of the controlled comparison: success, and validation metrics of the geometry tokens."""
    figures = (("position_cm", " cm"), ("geometry_share", ""), ("geometry_slot", ""), ("geometry_moves_cm", " cm"))
    arms = jobs_by_arm(None)
    rows = []
    for name, jobs in sorted(arms.items(), key=lambda arm: mean_success(arm[1].values())):
        metrics = {key: mean_metric(jobs.values(), key) for key in jobs[min(jobs)]["metrics"]}
        cells = [
            "" if metrics.get(f"val/{figure}") is None else f"{metrics[f'val/{figure}']:.2f}{unit}"
            for figure, unit in figures
        ]
        low = [job["closed_loop"]["by_height"]["0-2 cm"] for job in jobs.values()]
        won, tried = (sum(each[figure] for each in low) for figure in ("successes", "episodes"))
        own = [f"`{name}`: {ARMS[name]}", pooled_rate(jobs.values()), by_seed(jobs, arms), f"{won} of {tried}"]
        rows.append([*own, *cells, f"{metrics['parameters/all_m']:.2f} M"])
    header = ["arm", "success", "successes of 200, by training seed from 0", "success with the cube at 0-2 cm"]
    header += ["mean over seeds: position error (val)", "attention on the tokens", "variance explained by token index"]
    return markdown([*header, "change of plans with another scene's geometry", "parameters"], rows)


@table
def vla_arms_elsewhere() -> str:
    """Arms of the controlled comparison that were also run on tasks other than pedestals."""
    pedestals, flat, hidden = (jobs_by_arm(shift) for shift in (None, "flat", "hidden"))
    rows = []
    for name in sorted({*flat, *hidden}, key=lambda arm: mean_success(pedestals[arm].values())):
        cells = [pooled_rate(arms[name].values()) if name in arms else "" for arms in (pedestals, flat, hidden)]
        rows.append([f"`{name}`: {ARMS[name]}", *cells])
    header = ["arm", "pedestals, cameras moved in every episode", "`shift=flat`: no pedestals, fixed cameras"]
    return markdown([*header, "`shift=hidden`: one camera cannot see the object"], rows)


def jobs_by_arm(shift: str | None) -> dict[str, dict[str, Any]]:
    """Return the finished jobs of the controlled comparison by arm and training seed. shift: that option, or None."""
    arms: dict[str, dict[str, Any]] = {}
    for job in read("vla_geometry_comparison")["jobs"]:
        overrides = job["overrides"]
        if overrides.get("shift") == shift:
            name = overrides["ablation"].removeprefix("geometry_vla/arm_")
            arms.setdefault(name, {})[overrides["seed"]] = job
    return arms


def pooled_rate(jobs: Collection[Any]) -> str:
    """Return the success rate over all trainings of an arm, with its interval."""
    won, tried = (sum(job["closed_loop"][figure] for job in jobs) for figure in ("successes", "episodes"))
    low, high = wilson_interval(won, tried)
    return rate(
        {"success_rate": won / tried, "success_low": low, "success_high": high, "successes": won, "episodes": tried}
    )


def by_seed(jobs: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the successes of an arm by training seed, `-` for seeds that only other arms have."""
    seeds = sorted({seed for each in arms.values() for seed in each})
    while seeds[-1] not in jobs:
        seeds.pop()
    return ", ".join(str(jobs[seed]["closed_loop"]["successes"]) if seed in jobs else "-" for seed in seeds)


def mean_metric(jobs: Collection[Any], key: str) -> float | None:
    """Return the mean of a metric over the trainings of an arm; None if a training lacks the metric."""
    values = [job["metrics"].get(key) for job in jobs]
    return None if any(value is None for value in values) else sum(values) / len(values)


def mean_success(jobs: Collection[Any]) -> float:
    """Return the mean number of successes over the trainings of an arm."""
    return sum(job["closed_loop"]["successes"] for job in jobs) / len(jobs)


@table
def vla_arms_compared() -> str:
    """Arms of the controlled comparison, paired by episode, as in the report that the sweep writes."""
    return markdown(*paired_table(read("vla_geometry_comparison")["paired"]))


@table
def vla_metaworld() -> str:
    """The VLA on MT10 with task sentences: the effect of each addition to the small recipe."""
    hard = ("reach-v3", "peg-insert-side-v3", "push-v3", "pick-place-v3")
    rows = []
    for run in read("vla_metaworld")["runs"]:
        tasks, metrics = run["held_out"]["tasks"], run["training"]["metrics"]
        others = sum(found["successes"] for name, found in tasks.items() if name not in hard)
        cells = [str(tasks[name]["successes"]) for name in hard]
        rows.append(
            [run["name"], rate(run["held_out"]["all"]), rate(run["tuning"]["all"]), f"{others} of 120", *cells]
            + [f"{metrics['val/keyframe_px']:.1f} px", f"{metrics['val/position_cm']:.1f} cm"]
        )
    header = ["run: input of the head", "held out", "tuning positions", "six easier tasks"]
    header += [f"`{name.removesuffix('-v3')}`, of 20" for name in hard]
    return markdown([*header, "keyframe pointing error (val)", "position error (val)"], rows)


@table
def metaworld_same_recordings() -> str:
    """MT10 with task sentences: the VLA and the volume query, trained on the same recordings, task by task."""
    record = read("vla_metaworld")
    vla, volume = record["runs"][-1], record["volume_query"]
    shown = {"VLA (`experiment=metaworld_vla`)": vla, "volume query (`experiment=metaworld_two_cameras`)": volume}
    names = list(vla["held_out"]["tasks"])
    rows = [
        [
            title,
            f"{run['training']['steps']} of batch size {run['training']['batch']}",
            f"{run['training']['wall_s'] / 60:.0f} min",
            rate(run["held_out"]["all"]),
            *(str(run["held_out"]["tasks"][name]["successes"]) for name in names),
        ]
        for title, run in shown.items()
    ]
    header = [f"`{name.removesuffix('-v3')}`, of 20" for name in names]
    return markdown(["system", "steps", "training time", "held out", *header], rows)


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
    adamw = [named["self_supervised_0"], named["own_encoder_1_longer"]]
    rows = [
        row(labelled, "three", [named[f"final_{seed}"] for seed in range(3)]),
        row(own, "three, one encoder for all", [named[f"muon_{seed}"] for seed in range(3)]),
        row(again, "three", claims["recipe"]),
        row("question first, self-supervised encoder, AdamW, 7000 to 9000 steps", stalled, adamw),
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
            "question before the frames, self-supervised encoder (trained twice), six times the steps",
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
        ("a coarse_fine training step in the published order", steps[0], "`bench case=vlm_step`"),
        ("a coarse_fine training step with the question first", steps[1], "the same"),
        ("peak memory in addition to the weights at 1, 8, 16, 32 frames", f"{peaks} GB", "the same"),
        (
            "an autoregressive frame without the encoder, at 8 and 64 frames",
            f"{decode['ms_per_frame_8']:.1f} and {decode['ms_per_frame_64']:.1f} ms",
            "`bench case=vlm_decode`",
        ),
        (
            "the 8th, 64th and 512th frame of a stream, including the encoder",
            f"{eighth}, {later} and {last} ms (last to first: {stream['frame_512_over_8_time']:.2f} times), and "
            f"{span((stream[f'push_extra_mb_{frame}'] for frame in (8, 64, 512)), 1)} MiB at each, in addition to the "
            "cache of earlier frames",
            "`bench case=vlm_stream`, one thread of an Intel Xeon, 2.8 GHz; record `benchmarks/vlm_stream.json`",
        ),
    ]
    return markdown(["measurement", "value", "command"], rows)


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
            "jobs of `sweep=vlm_scaling` with DINOv2-S",
            ("scaling_135m_small", "scaling_360m_small"),
            " and ",
        ),
        (
            "the same jobs with DINOv2-B, which do not fit on a GPU of 24 GB",
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


@table
def metaworld_tasks() -> str:
    """Success of each policy of the record on MT10, by task."""
    runs = read("metaworld_mt10")["runs"]
    rows = _by_task(runs, runs[0]["result"]["tasks"])
    rows.append(("mean", *(rate(run["result"]["all"]) for run in runs)))
    return markdown(["task", *(run["name"] for run in runs)], rows)


def _by_task(runs: Sequence[dict[str, Any]], tasks: Iterable[str]) -> list[tuple[str, ...]]:
    """Return a row for each task: its name, and the success of each run."""
    return [(task.removesuffix("-v3"), *(rate(run["result"]["tasks"][task]) for run in runs)) for task in tasks]


@table
def metaworld_groups() -> str:
    """Success of each policy of the record on MT10, by difficulty group."""
    rows = [
        (run["name"], group, rate(figures))
        for run in read("metaworld_mt10")["runs"]
        for group, figures in run["result"]["all"]["by_difficulty"].items()
    ]
    return markdown(["policy", "group", "success"], rows)


@table
def metaworld_mt50() -> str:
    """Success on MT50 by difficulty group: one policy for all tasks, and the scripts that it imitates."""
    runs = read("metaworld_mt50")["runs"]
    groups = ("easy", "medium", "hard", "very_hard")
    rows = [
        (
            run["name"],
            *(rate(run["result"]["all"]["by_difficulty"].get(group)) for group in groups),
            rate(run["result"]["all"]),
        )
        for run in runs
    ]
    return markdown(["policy", *(group.replace("_", " ") for group in groups), "all 50 tasks"], rows)


@table
def metaworld_mt50_tasks() -> str:
    """Success on MT50 by task, in ascending order of the success of the last policy."""
    runs = read("metaworld_mt50")["runs"]
    last = next(run for run in runs if run["name"] == LAST_MT50)["result"]["tasks"]
    tasks = sorted(last, key=lambda name: last[name]["success_rate"])
    return markdown(["task", *(run["name"] for run in runs)], _by_task(runs, tasks))


@table
def metaworld_equal_time() -> str:
    """Success on MT10 of policies that were trained on the same demonstrations for the same wall time."""
    rows = [
        (run["name"], run["demos"], run["steps"], run["batch"], rate(run["result"]["all"]))
        for run in read("metaworld_equal_time")["runs"]
    ]
    return markdown(["policy", "demonstrations per task", "steps", "batch", "success"], rows)


@table
def metaworld_equal_time_tasks() -> str:
    """Success of the policies of `metaworld_equal_time`, by task."""
    runs = read("metaworld_equal_time")["runs"]
    header = ["task", *(f"{run['name']}, {run['demos']}" for run in runs)]
    return markdown(header, _by_task(runs, runs[0]["result"]["tasks"]))


def main() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(ROOT)}: tables written\n")


if __name__ == "__main__":
    main()
