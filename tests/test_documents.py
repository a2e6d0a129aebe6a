"""The documents: their tables match the records, their links have targets, and the options they name exist."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import textwrap
import tomllib
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from metric_table import one_sided, unexplained

from keygrip.config import check_overrides, compose, compose_with_choices, group_options
from keygrip.data.robot.doctor.frozen_poses import LEAST_FRAMES, LEAST_S
from keygrip.data.robot.doctor.images import HUES
from keygrip.data.robot.doctor.run import doctor
from keygrip.data.robot.doctor.views import MOST_FRAMES
from keygrip.help import EXAMPLES
from keygrip.models.patch_dit.monitor import RANGES, attention_figures
from keygrip.models.volume_query.module import BY_TASK
from keygrip.override_values import texts_quoted
from keygrip.training.task_metrics import MOST_TASKS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
PRESENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # it names removed options
LINK = re.compile(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"')
GROUPS = ("experiment", "model", "data", "sweep", "ablation", "strategy", "backbone", "rotation", "shift", "language")
OPTION = re.compile(rf"(?<![\w./+-])({'|'.join(GROUPS)})=([a-z0-9_/]*[a-z0-9_])(?![\w.=/{{(\[])")


def make_tables() -> ModuleType:
    """Import `docs/make_tables.py` as it is imported when it is run: its folder comes first on the path."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(ROOT / "docs")
        return importlib.import_module("make_tables")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return make_tables()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_table_is_what_its_record_says(path: Path, tables: ModuleType) -> None:
    text = path.read_text(encoding="utf-8")
    written = tables.PLACE.sub(lambda place: place[1] + tables.TABLES[place[2]]() + place[3], text)
    assert text == written, "run python docs/make_tables.py"


def test_every_table_has_a_place(tables: ModuleType) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert set(re.findall(r"<!-- table (\w+) -->", text)) == set(tables.TABLES)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_images_lead_to_files(path: Path) -> None:
    found = [first or second for first, second in LINK.findall(path.read_text(encoding="utf-8"))]
    local = [link.partition("#")[0] for link in found if "://" not in link and not link.startswith(("#", "mailto:"))]
    assert [link for link in local if not (path.parent / link).exists()] == []


def headings(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub writes them: lower case, blanks to hyphens, without
    punctuation."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in re.findall(r"(?m)^#+ (.+)$", text)
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_sections_lead_to_headings(path: Path) -> None:
    lost = []
    for link, _ in LINK.findall(path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        if "://" not in link and anchor and anchor not in headings(path.parent / file if file else path):
            lost.append(link)
    assert lost == []


def test_lines_that_are_no_rows_of_tables_fit_into_120_columns() -> None:
    pages = (*DOCUMENTS, *sorted(ROOT.glob("plugins/*/*.md")))
    lines = [(path.name, line) for path in pages for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(name, line) for name, line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_colour_words_of_the_doctor_are_those_that_the_page_of_data_names() -> None:
    text = " ".join((ROOT / "docs" / "data.md").read_text(encoding="utf-8").split())
    (told,) = re.findall(r"one of the colours ([\w, ]+) \(before", text)
    assert re.split(r", | or ", told) == list(HUES)


def test_limits_of_the_doctor_are_those_that_the_page_of_data_names() -> None:
    text = " ".join((ROOT / "docs" / "data.md").read_text(encoding="utf-8").split())
    assert LEAST_S == 0.5
    assert f"spans of half a second or more, and of at least {LEAST_FRAMES} frames" in text
    not_covered = text.partition("Not covered:")[2]
    configured = compose("prepare", ["step=doctor", "root=x"]).max_demos
    for limit in (configured, signature(doctor).parameters["max_demos"].default):
        assert f"Demonstrations beyond the {limit} that are examined" in not_covered
    assert f"demonstrations of more than {MOST_FRAMES} frames" in not_covered


def test_recordings_of_one_folder_have_the_same_task_in_every_document() -> None:
    tasks: dict[str, set[str]] = {}
    for path in PRESENT:
        text = " ".join(path.read_text(encoding="utf-8").split())
        for settings in re.findall(r"keygrip prepare step=record ((?:[\w.]+=[\w./]+ ?)+)", text):
            given = dict(each.split("=", 1) for each in settings.split())
            if "root" in given:
                tasks.setdefault(given["root"], set()).add(given.get("task.name", "the default"))
    assert tasks["data/my_picks"] == {"pick"}
    assert [root for root, names in tasks.items() if len(names) > 1] == []


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_that_a_document_names_exist(path: Path) -> None:
    named = set(OPTION.findall(path.read_text(encoding="utf-8")))
    assert sorted(f"{group}={name}" for group, name in named if name not in group_options(group)) == []


def unquoted(command: str) -> str:
    """Return a line of shell without its quoted parts and its comment."""
    return re.sub(r"(^|\s)#.*", "", re.sub(r"'[^']*'|\"[^\"]*\"", "", command))


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_survive_the_shell(path: Path) -> None:
    """zsh, macOS's shell, rejects an unquoted [...] that matches no file; bash also expands {a,b} to two words."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^ *```bash\n(.*?)```", text)
    lines = [line for block in blocks for line in block.splitlines()]
    assert [line for line in lines if re.search(r"=\[|[{*?]", unquoted(line))] == []
    inline = re.findall(r"`([^`]+)`", re.sub(r"(?s)```.*?```", "", text))
    assert [line for line in inline if re.search(r"^[\w.+]+=\{\w+:[^}]*,", unquoted(line))] == []
    commands = [line for line in inline if re.search(r"^[\w.+]+=\S+\s.*=|^(python|keygrip) ", line)]
    assert [line for line in commands if re.search(r"=\[[^\]]*,", unquoted(line))] == []


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_hydra_reads_the_settings_of_commands(path: Path) -> None:
    """A comma outside quotes and brackets is a sweep, which needs ``-m``."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"(?ms)^ *```bash\n(.*?)```", text) for line in block.splitlines()]
    parser = OverridesParser.create()
    for line in lines:
        found = re.search(r"(?:\bkeygrip |python -m keygrip[. ])\w+( .*)?$", line)
        arguments = shlex.split(found[1] or "", comments=True) if found else []
        settings = [each for each in arguments if re.match(r"[+~\w.]+=", each)]
        flags = [each for each in arguments if each.startswith("-")]
        for setting in texts_quoted([*settings, *flags], ())[: len(settings)]:
            is_sweep = parser.parse_override(setting).is_sweep_override()
            assert not is_sweep or {"-m", "--multirun"} & set(flags), line


def test_commands_of_help_and_of_configurations_survive_the_shell() -> None:
    """Help prints its examples, and the comments at the head of the files."""
    commands = [f"keygrip {command} {each}" for command, examples in EXAMPLES.items() for each in examples]
    for path in sorted(ROOT.glob("conf/**/*.yaml")):
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        comments = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
        commands += re.findall(r"`((?:python -m )?keygrip[. ][^`]+)`", comments)
    assert any(command.startswith("python") for command in commands)
    assert [command for command in commands if re.search(r"=\[|[{*?]", unquoted(command))] == []


def test_classes_that_a_pages_python_builds_are_imported_there() -> None:
    found = 0
    for page in (*PRESENT, *sorted(ROOT.glob("plugins/*/*.md"))):
        blocks = re.findall(r"(?ms)^ *```python\n(.*?)^ *```", page.read_text(encoding="utf-8"))
        nodes = [node for block in blocks for node in ast.walk(ast.parse(textwrap.dedent(block)))]
        known = {name.asname or name.name for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names}
        known |= {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        built = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert {name for name in built - known if name[0].isupper()} == set(), page
        found += len(built)
    assert found


def test_batches_of_several_machines_divide_over_their_processes() -> None:
    commands = []
    for page in PRESENT:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        commands += re.findall(r"--nnodes=(\d+) --nproc-per-node=(\d+) .*-m keygrip\.train ([^#\n]*)", text)
        assert len(re.findall(r"--nnodes=.*keygrip\.train", text)) == text.count("--nnodes="), page
    assert len(commands) >= 2
    for nodes, processes, settings in commands:
        cfg, _ = compose_with_choices("train", settings.replace("...", "FOLDER").split())
        assert cfg.data.batch_size % (int(nodes) * int(processes)) == 0, settings


def strings_of(node: Any) -> Iterator[str]:
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from strings_of(child)
    elif isinstance(node, str):
        yield node


def test_commands_of_records_have_the_present_names_of_settings() -> None:
    """A record is evidence only as long as its command runs."""
    found, parts = 0, 0
    for file in sorted((ROOT / "benchmarks").rglob("*.json")):
        record = json.loads(file.read_text())
        commands = [
            text
            for text in strings_of(record)
            if re.search(r"keygrip[ .](train|demo|evaluate|prepare|bench|sample|run)", text)
        ]
        found += len(commands)
        settings = list(parts_of_commands(record))  # they stand for SETTINGS or OVERRIDES in such a command
        parts += len(settings)
        translated = [re.sub("[A-Z]+", r"\\S+", name) for name in record.get("names_today", {})]
        for text in commands + settings:
            given = [word.strip("'\"`,;()") for word in text.split() if "=" in word]
            known = [word for word in given if any(re.fullmatch(f"(ablation=)?{name}", word) for name in translated)]
            check_overrides("train", [word for word in given if not word.startswith("+") and word not in known])
    assert found > 50
    assert parts > 100


def parts_of_commands(record: Any) -> Iterator[str]:
    for node in (*values_of(record, "settings"), *values_of(record, "overrides")):
        if isinstance(node, dict):
            yield from (f"{name}={value}" for name, value in node.items())
        else:
            yield from strings_of(node)


def records() -> Iterator[tuple[str, Any]]:
    for file in sorted((ROOT / "benchmarks").glob("*.json")):
        yield file.stem, json.loads(file.read_text(encoding="utf-8"))


def test_records_have_their_command_or_say_that_it_was_not_kept() -> None:
    lost = [
        name
        for name, record in records()
        if not {"command", "commands"} & set(record)
        and not all("command" in run or "commands" in run for run in record.get("runs", [{}]))
    ]
    assert lost == ["dit_images"], "its runs are at the top level, each with its own command"
    by_name = dict(records())
    parts = [by_name["volume_query_rotation"]["shared_or_own_backbone"]]
    parts += [by_name["vla_metaworld"][n] for n in ("pointing_at_the_puck", "at_the_grip", "where_push_succeeds")]
    assert all("not kept" in part["command"] for part in parts)


def values_of(node: Any, key: str) -> Iterator[Any]:
    if isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            if name == key:
                yield child
            yield from values_of(child, key)


def test_sections_name_the_controller_of_records_whose_date_does_not_tell_it() -> None:
    """The controller was replaced within a day: records of that day, and those without a date, leave it open."""
    rule = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").partition("**Two controllers.**")[2]
    (day,) = re.findall(r"replaced the earlier one on (\d{4}-\d\d-\d\d)", " ".join(rule.partition("\n\n")[0].split()))
    openly = set[str]()
    for name, record in records():
        dates = set(values_of(record, "date"))
        if (day in dates or not dates) and any(values_of(record, "successes")):
            openly.add(name)
    assert {"vla_joint", "metaworld_smolvla", "metaworld_mt10", "volume_query_tasks"} <= openly
    silent = [
        (page.name, name, section.splitlines()[0])
        for page in sorted((ROOT / "docs").glob("*.md"))
        for section in re.split(r"(?m)^(?=#+ )", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))
        for name in openly
        if f"benchmarks/{name}.json" in section
        and not re.search(r"\b(earlier|present|current)\s+(controller|one\])|\bcontroller \|", section)
    ]
    assert silent == []


def test_speed_of_training_has_the_batch_size_of_its_record(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = tables.TABLES["speed"]
    changed = {name: {**record, "batch_size": 7} for name, record in records() if name in ("training", "loader")}
    real = speed.__globals__["read"]
    monkeypatch.setitem(speed.__globals__, "read", lambda name: changed.get(name) or real(name))
    rows = [line for line in speed().splitlines() if "samples/s" in line]
    assert len(rows) == 2
    for case, row in zip(("training", "loader"), rows, strict=True):
        assert "batch size 7 |" in row
        (setting,) = re.findall(rf"case={case} '(.*)'", row)
        (override,) = OverridesParser.create().parse_overrides([setting])
        cfg, _ = compose_with_choices("train", [str(each) for each in override.value()])
        assert cfg.data.batch_size == 7


def test_two_runs_of_64_tokens_are_told_as_recorded() -> None:
    record = json.loads((ROOT / "benchmarks" / "foveated_vlm.json").read_text(encoding="utf-8"))
    (short,) = (
        run
        for run in record["claims"]["token_counts_label_taught"]["runs"]
        if (run["experiment"], run["steps"]) == ("vlm_tokens_64", 3000)
    )
    val = {point["step"]: point for point in short["val"]}
    text = " ".join((ROOT / "docs" / "foveated_vlm.md").read_text(encoding="utf-8").split())
    told = re.search(
        r"In the run of 3000 steps, .{,80} \*cue\* is (\S+) at step 2000 and (\S+) at the end, \*glance\* (\S+) and "
        r"(\S+), and the validation loss (\S+) and (\S+):",
        text,
    )
    assert told is not None
    figures = [val[step][name] for name in ("accuracy_cue", "accuracy_glance", "loss") for step in (2000, 3000)]
    assert [float(each) for each in told.groups()] == pytest.approx(figures, abs=0.005)


def test_range_of_the_readme_says_over_how_many_trainings_it_is(tables: ModuleType) -> None:
    record = json.loads((ROOT / "benchmarks" / "foveated_vlm.json").read_text(encoding="utf-8"))
    muon = [run for run in record["label_free"]["runs"] + record["runs"] if run["run"].startswith("muon_")]
    again = [run for run in record["claims"]["runs"] if run["ablation"] == "vlm_claims/recipe"]
    assert (len(muon), len(again)) == (3, 3)
    (row,) = (line for line in tables.TABLES["vlm_headline"]().splitlines() if "trained twice" in line)
    assert "(trained twice, three seeds with each)" in row


def test_the_virtual_environment_of_make_is_one_that_the_documents_enter() -> None:
    folder = re.search(r"(?m)^VENV := (.+)$", (ROOT / "Makefile").read_text())
    assert folder is not None
    for page in ("README.md", "docs/metaworld.md"):
        assert f". {folder[1]}/bin/activate" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_metaworld_begins_other_runs_and_goes_on_with_its_own(tmp_path: Path) -> None:
    others = ("MAKEFLAGS", "DEMOS", "STEPS", "METAWORLD_RUN", "METAWORLD_DATA")
    plain = {name: value for name, value in os.environ.items() if name not in others}

    def said(*settings: str) -> list[str]:
        command = ["make", "-n", "-f", str(ROOT / "Makefile"), "-o", "metaworld-test", "metaworld", *settings]
        text = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True, check=True).stdout
        return re.findall(r"run_dir=(\S+)|(resume=true)|checkpoint=(\S+)", text)

    commands = re.findall(
        r"(?m)^make metaworld(?: (.*))?$", (ROOT / "docs" / "metaworld.md").read_text(encoding="utf-8")
    )
    runs = [said(*settings.split()) for settings in commands]
    assert len(runs) == len({str(run) for run in runs}) == 2
    assert all(train[0] == evaluate[2] for train, evaluate in runs)
    own = f"METAWORLD_RUN={tmp_path}"
    assert "resume=true" not in str(said(own))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert "resume=true" in str(said(own))


def test_the_claims_of_the_foveated_model_are_counted_as_their_table_has_them() -> None:
    text = (ROOT / "docs" / "foveated_vlm.md").read_text(encoding="utf-8")
    table = text.partition("| claim | state | seeds |")[2].partition("\n\n")[0].splitlines()[2:]
    states = [(state, seeds.strip()) for _, _, state, seeds, *_ in (line.split("|") for line in table)]
    three = [state for state, seeds in states if seeds == "3 of 3"]
    half = [state for state in three if "confirmed here" in state and "refuted here" in state]
    holds = [state for state in three if "confirmed here" in state and state not in half]
    words = ("None", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight")
    told = re.findall(r"\*\*(\w+) (?:claims have three seeds|holds? here|holds? in half|do(?:es)? not hold)\*\*", text)
    assert told == [words[len(each)] for each in (three, holds, half, [s for s in three if "confirmed" not in s])]
    assert all("open" in state for state, seeds in states if seeds != "3 of 3")
    assert not [state for state, seeds in states if seeds != "3 of 3" and re.search("confirmed|refuted", state)]
    assert not [state for state, _ in states if "label-supervised" in state]  # these figures have their own column


def test_claims_of_the_foveated_model_with_three_seeds_have_them_in_the_record() -> None:
    """Runs that are compared (jobs between two semicolons) have the same seeds and precisions."""
    text = (ROOT / "docs" / "foveated_vlm.md").read_text(encoding="utf-8")
    table = text.partition("| claim | state | seeds |")[2].partition("\n\n")[0].splitlines()[2:]
    claims = dict(records())["foveated_vlm"]["claims"]
    assert "vlm_encoder_self_supervised" in claims["encoder"]["command"]
    runs: dict[str, list[tuple[int, str]]] = {}
    for run in [*claims["runs"], *claims["stopped_on_a_gpu"]["runs"]]:
        runs.setdefault(run["ablation"].removeprefix("vlm_claims/"), []).append((run["seed"], run["precision"]))
    compared = 0
    for _, _, _, seeds, jobs, *_ in (line.split("|") for line in table):
        if seeds.strip() != "3 of 3":
            continue
        for group in jobs.split(";"):
            (found, *others) = [sorted(runs[name]) for name in re.findall(r"`(\w+)`", group)]
            assert [seed for seed, _ in found] == [0, 1, 2], jobs
            assert all(other == found for other in others), jobs
            compared += len(others)
    assert compared == 7


def test_claims_of_the_foveated_model_that_were_not_run_name_jobs_that_are_not_recorded() -> None:
    text = (ROOT / "docs" / "foveated_vlm.md").read_text(encoding="utf-8")
    table = text.partition("| claim | state | seeds |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [line.split("|")[1:-1] for line in table]
    named = [re.findall(r"`ablation=foveated_vlm/(\w+)`", jobs) for _, state, _, jobs, _ in rows if "not run" in state]
    assert {"no_text", "trained_encoder", "no_visual_scale", "refinement"} <= {each[0] for each in named if each}
    assert {name for each in named for name in each} <= {
        name.partition("/")[2] for name in swept("vlm_ablations", "ablation")
    }
    recorded = {job["overrides"]["ablation"] for job in dict(records())["foveated_vlm"]["ablations"]}
    assert [names[0] for names in named if names and f"vlm_{names[0]}" in recorded] == []


def test_metrics_that_runs_are_compared_by_are_explained() -> None:
    """Every scalar of a run: tests/models/test_contract.py."""
    for model in ("volume_query", "coordinate_regression", "patch_dit", "geometry_vla"):
        kind = get_class(compose_with_choices("train", [f"model={model}"])[0].model._target_)
        assert len(kind.headline_metrics) > 5
        names = {name.replace("train/", "val/") for name in kind.headline_metrics}  # some are logged in validation only
        assert unexplained(names) == [], model
    assert unexplained(["val/position_cn", "val/position_cm"]) == ["val/position_cn"]


def test_a_prefix_that_the_table_of_metrics_has_wrong_is_found() -> None:
    assert one_sided("patch_dit", ["train/share_both", "train/loss_both", "val/loss", "train/loss"]) == []
    assert one_sided("patch_dit_base", ["train/share_both", "val/share_both", "val/loss"]) == ["loss", "train/share_*"]
    assert one_sided("geometry_vla", ["val/position_cm"]) == []
    assert one_sided("volume_query", ["val/position_cm", "val/off_screen_share"]) == [
        "position_cm",
        "train/off_screen_share",
    ]


def test_groups_of_a_model_are_those_that_training_names() -> None:
    def table(head: str) -> list[list[str]]:
        lines = text.partition(head)[2].partition("\n\n")[0].splitlines()[1:]
        return [line.split("|")[1:-1] for line in lines]

    def names(cell: str) -> list[str]:
        return re.findall(r"`([^`]+)`", cell)

    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    of_all = {"callbacks"} | {name for group, _ in table("| group | options |\n") for name in names(group)}
    models: list[str] = []
    told: dict[str, set[str]] = {}
    for model, group, options in table("| model | group | options |\n"):
        models = names(model) or models
        (name,) = names(group)
        for each in (each for pattern in models for each in fnmatch.filter(group_options("model"), pattern)):
            told.setdefault(each, set()).add(name)
        if "as above" not in options:
            listed = {each for pattern in names(options) for each in fnmatch.filter(group_options(name), pattern)}
            assert listed == set(group_options(name)), name
    assert {"volume_query_tuned", "coordinate_regression", "geometry_vla", "foveated_vlm", "patch_dit"} <= set(told)
    for model, groups in told.items():
        data = "robot_images" if model.startswith("patch_dit") else "robot_videos" if model.endswith("vlm") else "yam"
        _, choices = compose_with_choices("train", [f"model={model}", f"data={data}"])
        assert {name for name in choices if "/" not in name} - of_all == groups, model


def swept(sweep: str, group: str) -> set[str]:
    """Return the options of a group that a sweep runs."""
    settings = yaml.safe_load((ROOT / "conf" / "sweep" / f"{sweep}.yaml").read_text(encoding="utf-8"))
    return {name.strip() for name in settings["hydra"]["sweeper"]["params"][group].split(",")}


def test_ablations_of_the_sweep_are_those_that_the_page_of_patch_dit_names() -> None:
    text = (ROOT / "docs" / "patch_dit.md").read_text(encoding="utf-8")
    table = text.partition("| ablation | what it changes |\n")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [line.split("|")[1:-1] for line in table]
    told = {each: "not in the sweep" not in change for names, change in rows for each in re.findall(r"`(\w+)`", names)}
    options = {name.partition("/")[2] for name in group_options("ablation") if name.startswith("patch_dit/")}
    assert set(told) | {"none"} == options
    ran = {name.partition("/")[2] for name in swept("dit_ablations", "ablation")}
    assert {name for name, in_sweep in told.items() if in_sweep} | {"none"} == ran


def test_ablations_that_the_page_of_patch_dit_calls_measured_are_in_a_record() -> None:
    text = (ROOT / "docs" / "patch_dit.md").read_text(encoding="utf-8")
    table = text.partition("| ablation | what it changes |\n")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [(re.findall(r"`(\w+)`", line.split("|")[1]), line.split("|")[2]) for line in table]
    claims = {job["overrides"]["ablation"].removeprefix("dit_") for job in dict(records())["dit_claims"]["jobs"]}
    earlier = [name for names, change in rows if "measured with the earlier recipe" in change for name in names]
    assert set(earlier) | {"none"} == claims
    never = [name for names, change in rows if re.search("(never|not) measured", change) for name in names]
    assert {"no_position", "no_resolution_shift"} == set(never)
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.json"))
    assert [name for name in never if name in written] == []


def test_records_of_frechet_distances_without_their_encoder_are_those_that_the_page_names() -> None:
    text = " ".join((ROOT / "docs" / "patch_dit.md").read_text(encoding="utf-8").split())
    told = text.partition("do not name the feature encoder")[2].partition("The default encoder")[0]
    named = set(re.findall(r"`(\w+)`", told))
    for name in ("dit_images", "dit_ablations"):
        record = dict(records())[name]
        sections = record if name == "dit_images" else {"all": record}
        lacking = {
            section
            for section, node in sections.items()
            if any(values_of(node, "frechet")) and not any("sha256" in each for each in values_of(node, "features"))
        }
        assert lacking == (named if name == "dit_images" else {"all"})
    assert "all of `benchmarks/dit_ablations.json`" in told


def test_sweeps_of_the_foveated_model_without_a_record_are_those_that_its_page_names() -> None:
    text = " ".join((ROOT / "docs" / "foveated_vlm.md").read_text(encoding="utf-8").split())
    told = set(re.findall(r"`sweep=(\w+)`", text.partition("Never run: ")[2]))
    record = dict(records())["foveated_vlm"]
    sweeps = {name for name in group_options("sweep") if name.startswith("vlm_")}
    assert told == {name for name in sweeps if not any(values_of(record, name.removeprefix("vlm_")))}


def test_distances_of_demonstrations_of_metaworld_are_those_of_the_expert() -> None:
    """The expert itself cannot be imported without Meta-World."""
    text = " ".join((ROOT / "docs" / "metaworld.md").read_text(encoding="utf-8").split())
    code = (ROOT / "keygrip" / "envs" / "metaworld" / "expert.py").read_text(encoding="utf-8")
    limits = {
        name: [
            [round(100 * float(number), 1) for number in side.split(",")]
            for side in re.findall(r"\[([^\[\]]+)\]", told)
        ]
        for name, told in re.findall(r"(?m)^(START_NOISE_M|DISTURBANCE_M) = np\.array\((.+)\)$", code)
    }
    assert limits["START_NOISE_M"] == [[-6.0, -6.0, -1.5], [6.0, 6.0, 4.5]]
    assert "up to 6 cm from its default position along x and along y, and up to 4.5 cm above or 1.5 cm below it" in text
    assert limits["DISTURBANCE_M"] == [[-8.0, -8.0, -2.0], [8.0, 8.0, 8.0]]
    assert "pushed away by up to 8 cm along each axis (2 cm downwards)" in text


def test_metrics_by_task_are_those_that_training_names() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"(?m)^\| `val_by_task/\*` \|.*", text)
    assert set(re.findall(r"`(\w+)`", row)) == set(BY_TASK)
    assert f"with 2 to {MOST_TASKS} instructions" in row


def test_shifts_of_the_sweep_are_those_that_training_names() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    cell = text.partition("| `shift` | ")[2].partition(" |")[0]
    of_sweep = cell.partition("`sweep=shifts`")[2].partition("`sweep=")[0]
    patterns = re.findall(r"`([^`]+)`", of_sweep)
    assert {name for each in patterns for name in fnmatch.filter(group_options("shift"), each)} == swept(
        "shifts", "shift"
    )


def test_scales_of_the_guide_that_were_compared_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "dit_images.json").read_text(encoding="utf-8"))
    compared = tuple(record["run_latents_128px"]["runs"][0]["guide_on_val"])
    for page in ("conf/ablation/patch_dit/options.yaml", "conf/experiment/options.yaml", "docs/patch_dit.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        told = re.findall(r"chosen (?:from|among) ([\d.]+), ([\d.]+) and ([\d.]+)([^(]{0,40})", text)
        assert [each[:3] for each in told] == [compared], page
        assert re.search(r"on (64 `)?val", told[0][3]), page


def test_monitored_attention_without_an_expected_range_is_that_which_the_page_names() -> None:
    figures = attention_figures(torch.full((2, 1, 3), 1 / 3))
    by_block = {name for name in figures if "_block_" in name}
    assert set(figures) - set(RANGES) == by_block | {"attention_cls"}
    text = " ".join((ROOT / "docs" / "patch_dit.md").read_text(encoding="utf-8").split())
    assert "All except the attention on CLS and the attention by block have an expected range" in text


def test_lower_bounds_that_a_page_names_are_those_of_the_package() -> None:
    """Of packages that keygrip always needs; the changes of a day have the bounds of that day."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    bounds = dict(each.split(">=") for each in needed if ">=" in each)
    found = 0
    for page in (*PRESENT, *sorted(ROOT.glob("plugins/*/*.md"))):
        text = " ".join(page.read_text(encoding="utf-8").split())
        for name, bound in bounds.items():
            for told in re.findall(rf"(?i)\b{re.escape(name)}\b[^.;|]{{0,60}}? ([\d.]+) or newer", text):
                assert told == bound, (page, name)
                found += 1
    assert found
