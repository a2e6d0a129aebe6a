"""Tables about volume_query: the demo, its seeds and shifts, further tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from doc_tables.base import LAST_MT50, markdown, rate, read, table

FIRST, FRESH = "first_seed_1000000", "first_seed_2000000"
FIRST_MT50 = "volume query with language, 20 demonstrations"


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
            f"training of the demo's policy, batch size {training['batch_size']}",
            f"{training['samples_per_s']:.0f} samples/s; "
            f"{100 * training['data_wait_share']:.1f} % of the time waiting for data",
            _bench("training", training),
        ),
        (
            f"data loader alone, one worker, batch size {loader['batch_size']}",
            f"{loader['samples_per_s']:.0f} samples/s cached, {loader['uncached_samples_per_s']:.0f} decoded",
            _bench("loader", loader),
        ),
        (
            "computing a plan",
            f"median {inference['p50_ms']:.0f} ms (p95 {inference['p95_ms']:.0f}); "
            f"with one thread {inference['one_thread_p50_ms']:.0f} ms",
            "`case=inference`",
        ),
    ]
    return markdown(["measurement", "value", "command"], rows)


def _bench(case: str, record: Mapping[str, Any]) -> str:
    """Return the arguments of `keygrip bench` that measure a case with the batch size of its record."""
    overrides = f'["experiment=demo","~closed_loop","data.batch_size={record["batch_size"]}"]'
    return f"`case={case} 'cases.{case}.overrides={overrides}'`"


@table
def headline() -> str:
    """README: the main results of the volume query."""
    rows: list[tuple[str, str]] = []
    demo = read("demo")["make_demo_float32"]["runs"]
    counts = ", ".join(str(run["successes"]) for run in demo)
    rows.append(
        (
            f"pick_place, `make demo` (280 steps of batch size 16), {len(demo)} training seeds",
            f"{counts} of {demo[0]['episodes']}",
        )
    )
    runs = read("volume_query_seeds")["runs"]
    settings = {"pick_place": "700 steps of batch size 32", "pick": "the same settings"}
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
