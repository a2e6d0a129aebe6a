"""The documents: their tables are those of the records, their links lead somewhere, and the options they name exist."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from keygrip.config import check_overrides, group_options

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
PRESENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # which tells of options that are gone
LINK = re.compile(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"')
GROUPS = ("experiment", "model", "data", "sweep", "ablation", "strategy", "backbone", "rotation", "shift", "language")
OPTION = re.compile(rf"(?<![\w./+-])({'|'.join(GROUPS)})=([a-z0-9_/]*[a-z0-9_])(?![\w.=/{{(\[])")


def make_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    """The anchors of a document's headings, as GitHub writes them: lower case, blanks to hyphens, punctuation gone."""
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


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_that_a_document_names_exist(path: Path) -> None:
    named = set(OPTION.findall(path.read_text(encoding="utf-8")))
    assert sorted(f"{group}={name}" for group, name in named if name not in group_options(group)) == []


def unquoted(command: str) -> str:
    """A line of shell without its quoted parts and its comment."""
    return re.sub(r"(^|\s)#.*", "", re.sub(r"'[^']*'|\"[^\"]*\"", "", command))


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_survive_the_shell(path: Path) -> None:
    """zsh, macOS's shell, refuses an unquoted [...] that matches no file; bash too makes two words of {a,b}."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^ *```bash\n(.*?)```", text)
    lines = [line for block in blocks for line in block.splitlines()]
    assert [line for line in lines if re.search(r"=\[|[{*?]", unquoted(line))] == []
    inline = re.findall(r"`([^`]+)`", re.sub(r"(?s)```.*?```", "", text))
    assert [line for line in inline if re.search(r"^[\w.+]+=\{\w+:[^}]*,", unquoted(line))] == []
    commands = [line for line in inline if re.search(r"^[\w.+]+=\S+\s.*=|^(python|keygrip) ", line)]
    assert [line for line in commands if re.search(r"=\[[^\]]*,", unquoted(line))] == []


def strings_of(node: Any) -> Iterator[str]:
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from strings_of(child)
    elif isinstance(node, str):
        yield node


def test_commands_of_records_have_the_present_names_of_settings() -> None:
    """A record is evidence as long as its command runs."""
    found = 0
    for file in sorted((ROOT / "benchmarks").rglob("*.json")):
        for text in strings_of(json.loads(file.read_text())):
            if not re.search(r"keygrip[ .](train|demo|evaluate|prepare|bench|sample|run)", text):
                continue
            given = [word.strip("'\"`,;()") for word in text.split() if "=" in word]
            check_overrides("train", [word for word in given if not word.startswith("+")])
            found += 1
    assert found > 50
