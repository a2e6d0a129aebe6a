"""The command line: commands by name, and help that lists what a command reads."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keygrip import __version__, cli
from keygrip.help import EXAMPLES, help_text


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["keygrip", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"keygrip {__version__}\n"
    assert run(monkeypatch, "train", "--version") == 0
    assert capsys.readouterr().out == f"keygrip {__version__}\n"
    assert run(monkeypatch, "trian") == 2
    assert "there is no command 'trian': the nearest is 'train'" in capsys.readouterr().err
    with monkeypatch.context() as context:
        context.setattr(cli.runpy, "run_module", lambda module, **_: sys.stdout.write(f"{module} {sys.argv[1:]}"))
        assert run(monkeypatch, "help", "train", "model=patch_dit") == 0
    assert capsys.readouterr().out == "keygrip.train ['--help', 'model=patch_dit']"
    assert set(EXAMPLES) == set(cli.COMMANDS)
    assert {len(examples) for examples in EXAMPLES.values()} == {3}


def test_options_and_settings_go_in_any_order() -> None:
    from keygrip.command import overrides_first
    from keygrip.config import SettingError

    given = ["seed=1", "--cfg", "job", "max_steps=3", "-m", "~sweep", "--config-dir=a=b", "-cd", "c=d"]
    assert overrides_first(given) == [
        *("seed=1", "max_steps=3", "~sweep"),
        *("--cfg", "job", "-m", "--config-dir=a=b", "-cd", "c=d"),
    ]
    assert overrides_first(["--info", "defaults", "seed=1"]) == ["seed=1", "--info", "defaults"]
    for wrong, said in (
        ("--max_steps=3", "no option --max_steps: settings are given without dashes, max_steps=3"),
        ("--confg", "no option --confg: the nearest is --cfg; settings are given without dashes, name=value"),
        ("--cfg=banana", "--cfg banana: it is one of job, hydra, all"),
        ("--cfg", "--cfg needs a value behind it"),
    ):
        with pytest.raises(SettingError, match=said):
            overrides_first(["seed=1", wrong])
    for asked in ("install=bash", "install=fish", "uninstall=zsh"):
        with pytest.raises(SettingError, match="tab completion is for bash, of all commands together"):
            overrides_first(["-sc", asked])


@pytest.mark.parametrize("asked", [["install=zsh"], ["uninstall=bash"], ["query=fish"], []])
def test_completion_of_other_shells_is_refused(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["keygrip", "-sc", *asked])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert "tab completion is for bash" in err


def test_tab_completion(tmp_path: Path) -> None:
    """The request is that of bash, with a command `keygrip` on its path."""
    executable = tmp_path / "keygrip"
    executable.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m keygrip "$@"\n')
    executable.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"

    def completed(line: str) -> list[str]:
        script = (
            f'eval "$(keygrip -sc install=bash)"; COMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}; '
            f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _keygrip; echo ${{COMPREPLY[@]}}"
        )
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path})
        return done.stdout.split()

    assert completed("keygrip ev") == ["evaluate"]
    assert completed("keygrip train seed=1 data=yam_s") == ["data=yam_stills"]
    assert completed("keygrip trian data=yam_s") == []


def test_python_m_keygrip(command: Callable[..., Any]) -> None:
    done = command("keygrip", "prepare", "step=validate", "rot=x")
    assert done.returncode == 2
    assert "no setting 'rot' in prepare.yaml: the nearest is 'root'" in done.stderr


def test_help_lists_what_a_command_reads() -> None:
    import keygrip.serve
    import keygrip.train  # noqa: F401

    serve = help_text("serve", ["--help"])
    assert len(serve.splitlines()) < 60
    assert "ablation" not in serve
    assert "  limits.requests=32                  # in progress at once" in serve
    steps = help_text("prepare", ["-h"])
    assert "step=doctor " in steps
    assert "frames_per_demo=12 " in help_text("prepare", ["step=doctor"])
    vla = help_text("train", ["model=geometry_vla", "data=yam_language", "--help"])
    assert "  vlm=tiny  (qwen2_5_vl | qwen2_5_vl_lora | tiny)" in vla
    assert "geometry_vla/no_injection" in vla
    assert "volume_query/no_state" not in vla
    assert "rotation" not in vla.partition("Settings:")[0]
    assert "  vlm.width=128                       # the action head's too" in vla
