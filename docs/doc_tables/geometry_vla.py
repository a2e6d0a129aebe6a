"""Tables about geometry_vla."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from doc_tables.base import ablation, markdown, over_seeds, rate, read, table
from keygrip.evaluation.paired_report import table as paired_table
from keygrip.evaluation.statistics import pooled_interval


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
    """Return the success rate over all trainings of an arm, with its interval by episode."""
    won, tried = (sum(job["closed_loop"][figure] for job in jobs) for figure in ("successes", "episodes"))
    low, high = pooled_interval(
        [{episode: outcome == "1" for episode, outcome in enumerate(job["closed_loop"]["outcomes"])} for job in jobs]
    )
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
