"""Configuration: where conf/ lies, the root schemas, and the frame that every entry point runs in.

Groups (model, data, ...) are untyped nodes built by ``_target_``; root settings are typed scalars, so that a misspelt
or ill-typed setting is an error that names the nearest one. Nothing heavy is imported here: ``--help`` stays quick.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from keygrip.training.signals import Interrupted, SweepInterrupted

log = logging.getLogger(__name__)

CONFIG_ERROR = 2
USER_ERROR = 1


class SettingError(ValueError):
    """A setting that does not exist."""


@dataclass
class EntrySchema:
    """Settings that every entry point has. Derive from it, add typed scalars, and ``register`` the result."""

    seed: int = 0
    debug: bool = False
    run_dir: str | None = None


@dataclass
class TrainSchema(EntrySchema):
    """Root of ``conf/train.yaml``."""

    model: Any = MISSING
    data: Any = MISSING
    backbone: Any = None
    rotation: Any = None
    language: Any = None
    encoders: Any = None
    vlm: Any = None
    geometry: Any = None
    strategy: Any = MISSING
    compile: Any = None
    optimizer: Any = MISSING
    callbacks: Any = None
    logger: Any = None
    closed_loop: Any = None
    max_epochs: int = -1
    max_steps: int = MISSING
    max_minutes: float | None = None
    val_every_n_steps: int | None = None
    limit_val_batches: int | None = None
    log_every_n_steps: int = 20
    accumulate_grad_batches: int = 1
    deterministic: bool = True
    resume: Any = False
    dry_run: bool = False


def register(name: str, schema: type) -> None:
    """Makes ``schema`` (a dataclass) available to the defaults list of a root config under ``name``.

    Its dictionaries take any key from the command line (``task.object_size_m=0.025``): what reads them refuses those
    that it does not know.
    """
    node = OmegaConf.structured(schema)
    for setting in fields(schema):
        if setting.default_factory is dict:
            OmegaConf.set_struct(node[setting.name], False)
    ConfigStore.instance().store(name=name, node=node)


def config_folder() -> Path:
    """The folder of configs: ``conf/`` inside the package (wheel) or beside it (checkout).

    Raises:
        FileNotFoundError: there is neither.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/ folder in or beside {package}: reinstall keygrip, or run from a whole checkout")


def register_resolvers() -> None:
    """Registers the resolvers that the configs use: ``run_folder``, ``sweep_folder``."""
    from keygrip.training import run_folder

    OmegaConf.register_new_resolver("run_folder", run_folder.choose, replace=True)
    OmegaConf.register_new_resolver("sweep_folder", run_folder.choose_for_sweep, replace=True)


def compose(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Composes a root config without running anything (tests, notebooks, a command that calls another's ``run``).

    Hydra may be running a command meanwhile: its state is left as it was.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    register_resolvers()
    running = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        _refuse_unknown_additions(config_name, overrides)
        with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
            return hydra_compose(config_name, overrides=list(overrides))
    finally:
        Singleton.set_state(running)


def entry_point(config_name: str, run: Callable[[DictConfig], Any]) -> None:
    """Runs ``run(cfg)`` under Hydra with the promises of every command; does not return where something failed.

    A user's error (ValueError, a missing file, a setting that does not exist, ...) becomes one line on standard
    error and exit code 1, 2 for settings; the trace is shown with ``debug=true``. Ctrl-C and SIGTERM end with 130
    and 143. In a sweep a failed job is recorded and the others go on; the exit code is then 1.
    """
    import hydra

    from keygrip.training import sweeps

    run = _importable(run)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us whole; what is shown is decided below
    debug = _debug_requested(sys.argv[1:])
    failed: list[Exception] = []

    def task(cfg: DictConfig) -> Any:
        # Pickled to other processes by some launchers: everything needed is imported inside.
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        from keygrip.config import register_resolvers
        from keygrip.training import sweeps

        register_resolvers()
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return sweeps.run_job(run, cfg, config_name, debug)
        try:
            return run(cfg)
        except Exception as error:
            _record_failure(error, config_name)
            failed.append(error)  # raised again outside Hydra, which would add lines of its own
            return None
        except KeyboardInterrupt as error:
            _record_failure(error, config_name)
            raise

    code = 0
    try:
        with _sigterm_raises():
            register_resolvers()
            _refuse_unknown_additions(config_name, sys.argv[1:])
            folder = str(config_folder())
            hydra.main(config_path=folder, config_name=config_name, version_base="1.3")(task)()
            if failed:
                raise failed[0]
    except KeyboardInterrupt:
        _say("stopped by SIGINT")
        code = 128 + signal.SIGINT
    except SweepInterrupted as stop:
        _say(f"{stop}; go on with the same command, resume=true and hydra.sweep.dir=<its folder>")
        code = 128 + stop.signal_number
    except Exception as error:
        if isinstance(error, Interrupted) and _helper_process():
            sys.exit(0)  # the first process reports; an exit code here would make Lightning kill it before it has
        if debug:
            traceback.print_exc()
        line, code = describe_error(error, config_name, sys.argv[1:])
        _say(line)
        if code == CONFIG_ERROR and {"--help", "-h"} & set(sys.argv[1:]):
            code = 0  # a command with a choice to be made first: naming the choices is the help
    for line in sweeps.close_sweeps():
        _say(line)
        code = code or USER_ERROR
    if code:
        sys.stderr.flush()
        sys.exit(code)


def describe_error(error: BaseException, config_name: str, overrides: Sequence[str]) -> tuple[str, int]:
    """One line that says what is wrong and what to do, and the exit code."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, Interrupted):
        return str(error), 128 + error.signal_number
    root = _root_cause(error)
    where = ""
    if isinstance(error, InstantiationException):
        key = re.search(r"full_key: (\S+)", str(error))
        where = f"{key.group(1)}: " if key else ""
        if isinstance(root, TypeError):
            return f"{where}{_one_line(root)}; see the signature, or `--cfg job` for the composed config", CONFIG_ERROR
        if isinstance(root, InstantiationException):
            return f"{where}{_one_line(root)}", CONFIG_ERROR
    if isinstance(root, HydraException | OmegaConfBaseException):
        return _describe_config_error(error, config_name, overrides), CONFIG_ERROR
    if isinstance(root, SettingError):
        return str(root), CONFIG_ERROR
    if isinstance(root, ModuleNotFoundError) and root.name and not root.name.startswith("keygrip"):
        return f"{where}the package {root.name!r} is not installed: pip install {root.name}", USER_ERROR
    if type(root).__name__ == "OutOfMemoryError":
        return "out of GPU memory: lower data.batch_size, or shard the model with strategy=fsdp", USER_ERROR
    expected = (ValueError, OSError, ImportError, NotImplementedError)
    if isinstance(root, expected) or type(root).__name__ == "MisconfigurationException":
        return f"{where}{_one_line(root)}", USER_ERROR
    return f"unexpected {type(root).__name__}: {_one_line(root)} (debug=true shows where)", USER_ERROR


def _refuse_unknown_additions(config_name: str, overrides: Sequence[str]) -> None:
    """``+max_stepz=3`` would add a setting at the root that nobody reads. In groups the constructors refuse them."""
    try:
        schema = ConfigStore.instance().load(f"{config_name}_schema.yaml").node
    except OSError:
        return
    known = [str(key) for key in schema]
    groups = [path.name for path in config_folder().iterdir() if path.is_dir()]
    for override in overrides:
        key = override.lstrip("+").partition("=")[0].partition("@")[0]
        if override.startswith("+") and "." not in key and "/" not in key and key not in {*known, *groups}:
            close = nearest(key, known)
            hint = f"the nearest is {close!r}" if close else f"it has {', '.join(known)}"
            raise SettingError(f"there is no setting {key!r} in {config_name}.yaml: {hint}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known dotted key nearest to a misspelt one, or None: whole keys first, then last parts."""
    known = sorted(set(known))
    whole = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    last = name.rpartition(".")[2]
    by_last: dict[str, str] = {}
    for key in sorted(known, key=lambda key: (key.count("."), key)):
        by_last.setdefault(key.rpartition(".")[2], key)
    found = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    return by_last[found[0]] if found else None


def known_keys(config_name: str, overrides: Sequence[str] = ()) -> list[str]:
    """All dotted keys of a composed config and the names of its groups."""
    try:
        config = compose(config_name, overrides)
    except Exception:
        config = compose(config_name)
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                keys.append(f"{prefix}{name}")
                walk(child, f"{prefix}{name}.")

    walk(OmegaConf.to_container(config, resolve=False), "")
    groups = [path.name for path in config_folder().iterdir() if path.is_dir()]
    return keys + groups


def _describe_config_error(error: BaseException, config_name: str, overrides: Sequence[str]) -> str:
    text = _one_line(error)
    cause = error.__cause__
    missing = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if missing:
        group, name = missing.groups()
        options = _group_options(group)
        close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
        hint = f"nearest is {group}={close[0]}; " if close else ""
        if group == "hydra/launcher":
            hint += "joblib and slurm need their plugins: pip install 'keygrip[slurm]'; "
        return f"no option {name!r} in group {group!r}: {hint}options are {', '.join(options) or 'none'}"
    causes = " ".join([text] + [_one_line(each) for each in _chain(error)])
    unknown = re.search(r"Could not override '([^']+)'", causes) or re.search(r"Key '([^']+)' (?:is )?not in", causes)
    if unknown:
        key = unknown.group(1)
        full = next(
            (o.lstrip("+~").split("=")[0] for o in overrides if o.lstrip("+~").split("=")[0].endswith(key)), key
        )
        others = [o for o in overrides if not o.startswith("-") and o.lstrip("+~").split("=")[0] != full and "=" in o]
        close_key = nearest(full, known_keys(config_name, others))
        hint = f"the nearest is {close_key!r}" if close_key else "see all with `--cfg job`"
        return f"there is no setting {full!r} in {config_name}.yaml: {hint}"
    mandatory = re.search(r"Missing mandatory value: (\S+)", causes)
    if mandatory:
        return f"the setting {mandatory.group(1)} has no value: give {mandatory.group(1)}=..."
    if cause is not None and _one_line(cause) not in text:
        text = f"{text.rstrip('.')}: {_one_line(cause)}"
    if type(error).__name__ == "OverrideParseException":
        text = f"cannot read {getattr(error, 'override', 'the override')}: {text}"
    return text


def _group_options(group: str) -> list[str]:
    folder = config_folder() / group
    options = {path.stem for path in folder.glob("*.yaml")}
    if group.startswith("hydra/"):
        with contextlib.suppress(OSError):
            options |= {name.removesuffix(".yaml") for name in ConfigStore.instance().list(group)}
    return sorted(options)


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause = error.__cause__
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    return chain


def _root_cause(error: BaseException) -> BaseException:
    """What a resolver or constructor raised, without what Hydra and OmegaConf wrapped around it."""
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    current = error
    while isinstance(current, HydraException | OmegaConfBaseException):
        inner = current.__cause__
        if isinstance(current, InterpolationResolutionError):
            inner = inner or current.__context__  # what a resolver raised is not named as the cause
        if inner is None:
            break
        current = inner
    return current


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, KeyError) and error.args:
        text = f"missing key {error.args[0]!r}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.strerror}: {error.filename}"
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and not re.match(r"\s*(full_key|object_type)", line)
    ]
    return " ".join(lines)


def _debug_requested(overrides: Sequence[str]) -> bool:
    return any(override.lstrip("+").lower() == "debug=true" for override in overrides)


def _helper_process() -> bool:
    """Whether Lightning started this process from another one that the user started."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys()


def _say(line: str) -> None:
    sys.stderr.write(f"keygrip: {line}\n")


def _record_failure(error: BaseException, config_name: str) -> None:
    """Leaves in the run folder what became of the run, and the trace: both are wanted when the terminal is gone."""
    from hydra.core.hydra_config import HydraConfig

    from keygrip.training.sweeps import FAILED, INTERRUPTED, record_failure

    with contextlib.suppress(Exception):
        hydra_cfg = HydraConfig.get()
        folder = Path(hydra_cfg.runtime.output_dir)
        if folder.resolve() == Path(hydra_cfg.runtime.cwd).resolve():
            return  # the command has no run folder: nothing is left in the user's
        overrides = list(hydra_cfg.overrides.task)
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        line = "stopped by SIGINT" if isinstance(error, KeyboardInterrupt) else ""
        line = line or describe_error(error, config_name, overrides)[0]
        record_failure(folder, INTERRUPTED if stopped else FAILED, line, overrides, error)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM becomes an exception, so that temporary files and child processes are cleaned up on the way out."""

    def handler(number: int, frame: Any) -> None:
        raise Interrupted(number, f"stopped by {signal.Signals(number).name}")

    try:
        previous = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread: a test or a notebook
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _importable(run: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """``run`` of the module proper where it comes from ``__main__``: it can then be sent to another process."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if run.__module__ != "__main__" or spec is None:
        return run
    import importlib

    return getattr(importlib.import_module(spec.name), run.__name__)


register("train_schema", TrainSchema)
