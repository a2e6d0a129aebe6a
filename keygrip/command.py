"""Common entry point of all commands: Hydra, errors as one line, exit codes, signals, sweeps."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from keygrip import __version__
from keygrip.artifacts import DISK_FULL, json_text
from keygrip.config import (
    SettingError,
    check_overrides,
    complete_overrides,
    config_folder,
    overrides_of,
    register_options,
)
from keygrip.config_errors import describe_config_error, one_line, root_cause
from keygrip.cores import allow_many_files
from keygrip.data.source_files import escaped, is_utf8
from keygrip.help import help_text
from keygrip.launch import is_first_process, is_helper_process, refuse_several_processes, requeue_job
from keygrip.renamed_settings import new_name
from keygrip.training import results, run_folder, sweep_jobs, sweeps
from keygrip.training.signals import Interrupted, SweepInterrupted, SweepRefused

CONFIG_ERROR = 2
USER_ERROR = 1
STOPS = (Exception, KeyboardInterrupt, Interrupted, SweepRefused)  # what may end a command
RESEND_S = 0.01  # delay of a signal that is sent again
USERS = ValueError | OSError | ImportError | NotImplementedError  # errors that the user can correct
MISCONFIGURED = "MisconfigurationException"  # the same, from Lightning
STEP_CALL = "call"  # the config node of a step of `keygrip prepare`, which is not a setting of the user
# Hydra's command-line options: without a value, and with a value.
FLAGS: tuple[str, ...] = (
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--info", "-i"),
    *("--shell-completion", "-sc"),
)
WITH_VALUE: tuple[str, ...] = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    "--experimental-rerun",
)


# Commands that several processes of one start (torchrun, srun) can divide; the others would do their work repeatedly.
DIVIDED = ("train", "demo", "prepare")


def entry_point(config_name: str, run: Callable[[DictConfig], Any]) -> None:
    """Run ``run(cfg)`` under Hydra, with the behaviour that all commands share; exit the process after a failure.

    A user error (ValueError, a missing file, a setting that does not exist, ...) is reported as one line on standard
    error, with exit code 1, or 2 for settings; ``debug=true`` shows the stack trace. Ctrl-C, SIGTERM and a closed
    terminal give exit codes 130, 143 and 129. The warning signal SIGUSR1 of a SLURM job gives 138, and the job is
    queued again. In a sweep a failed job is recorded and the other jobs continue; the exit code is then 1.
    """
    allow_many_files()
    run = _importable_function(run)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors unchanged; the code below decides what is shown
    debug = _debug_requested(sys.argv[1:])
    failed: list[BaseException] = []

    def task(cfg: DictConfig) -> Any:
        # Some launchers pickle this function for other processes, so it contains its imports.
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        run_folder.register_resolvers()
        register_options()
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return sweeps.run_job(run, cfg, lambda error, given: describe_error(error, config_name, given)[0], debug)
        try:
            return sweeps.run_process_job(run, cfg) if sweep_jobs.in_sweep() else run(cfg)
        except STOPS as stop:
            error = _signal_behind(stop)
            _record_failure(error, config_name)
            failed.append(error)  # raised again outside Hydra, which would print additional lines
            return None

    if "--version" in sys.argv[1:]:  # Hydra would print its own version
        sys.stdout.write(f"keygrip {__version__}\n")
        return
    code, received = 0, set[int]()
    try:
        with _raise_on_signals(received):
            run_folder.register_resolvers()
            register_options(overrides_of(sys.argv[1:]))
            if {"--help", "-h"} & set(sys.argv[1:]):
                sys.stdout.write(f"{help_text(config_name, sys.argv[1:])}\n")
                return
            _refuse_odd_bytes(sys.argv[1:])
            if config_name not in DIVIDED:
                refuse_several_processes(config_name)
            sys.argv[1:] = overrides_first(sys.argv[1:])
            if not is_helper_process():  # Lightning adds hydra.run.dir to the arguments of helper processes
                check_overrides(config_name, sys.argv[1:])
            sys.argv[1:] = complete_overrides(config_name, sys.argv[1:])
            folder = str(config_folder())
            hydra.main(config_path=folder, config_name=config_name, version_base="1.3")(task)()
            if failed:
                raise failed[0]
    except STOPS as stop:
        error = _signal_behind(stop)
        if isinstance(error, Interrupted) and is_helper_process():
            sys.exit(0)  # with another exit code Lightning would kill the first process before it has reported
        if debug and not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        line, code = describe_error(error, config_name, sys.argv[1:])
        _print_to_stderr(line)
    for line in sweeps.close_sweeps():
        _print_to_stderr(line)
        code = code or USER_ERROR
    if code:
        if is_first_process():
            run_folder.remove_unbegun()
        if signal.SIGUSR1 in received and is_first_process() and not sweep_jobs.is_launcher_process():
            requeue_job()  # last, because SLURM then ends the job
        sys.stderr.flush()
        sys.exit(code)


def _refuse_odd_bytes(arguments: Sequence[str]) -> None:
    """Raise SettingError for bytes that are not UTF-8, which Python represents as halves of surrogate pairs: no record
    of the run could hold them."""
    for text in (*arguments, os.fspath(Path.cwd())):
        if not is_utf8(text):
            raise SettingError(
                f"{escaped(text)} holds bytes that are not UTF-8: rename the file or folder, and give its new name"
            )


def printable_json(content: Any) -> str:
    """Return `json_text` for standard output: with all characters, or in ASCII if its encoding lacks one of them. Every
    encoding lacks the halves of surrogate pairs by which Python represents file names that are not UTF-8."""
    text = json_text(content)
    try:
        text.encode(sys.stdout.encoding or "utf-8")  # a stream in memory has no encoding
    except UnicodeEncodeError:
        return json_text(content, ascii_only=True)
    return text


def overrides_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with all settings first and options such as ``--cfg job`` and ``-m`` after them, because
    Hydra's parser requires settings to be contiguous.

    Raises:
        SettingError: an option does not exist; the message names the nearest one.
    """
    settings, options = [], []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name = argument.partition("=")[0]
        if not argument.startswith("-"):
            settings.append(argument)
            continue
        if name in ("-sc", "--shell-completion") and "query=bash" not in arguments:
            raise SettingError(
                'tab completion is for bash, of all commands together: eval "$(keygrip -sc install=bash)"'
            )
        if name not in (*FLAGS, *WITH_VALUE):
            close = difflib.get_close_matches(name, (*FLAGS, *WITH_VALUE), n=1, cutoff=0.5)
            hint = f"the nearest is {close[0]}; " if close and "=" not in argument else ""
            setting = argument.lstrip("-") if "=" in argument else "name=value"
            raise SettingError(f"there is no option {name}: {hint}settings are given without dashes, {setting}")
        options.append(argument)
        if name in WITH_VALUE and "=" not in argument:
            if not waiting:
                raise SettingError(f"{name} needs a value behind it")
            options.append(waiting.pop(0))
        elif name in ("--info", "-i") and waiting and "=" not in waiting[0]:
            options.append(waiting.pop(0))
        if name in ("--cfg", "-c") and (value := options[-1].rpartition("=")[2]) not in ("job", "hydra", "all"):
            raise SettingError(f"--cfg {value}: it is one of job, hydra, all")
    return [*settings, *options]


def describe_error(error: BaseException, config_name: str, overrides: Sequence[str]) -> tuple[str, int]:
    """Return one line that describes the error and its remedy, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT", 128 + signal.SIGINT
    if isinstance(error, SweepRefused):
        return str(error), USER_ERROR
    if isinstance(error, Interrupted):
        further = "; go on with the same command, resume=true and hydra.sweep.dir=<its folder>"
        goes_on = isinstance(error, SweepInterrupted) and config_name == "train"
        return f"{error}{further if goes_on else ''}", 128 + error.signal_number
    root = root_cause(error)
    prefix = ""
    if isinstance(error, InstantiationException):
        key = re.search(r"full_key: (\S+)", str(error))
        prefix = f"{key.group(1)}: " if key and key.group(1) != STEP_CALL else ""
        if isinstance(root, TypeError):
            unexpected = re.search(r"unexpected keyword argument '([^']+)'", str(root))
            old = f"{prefix.removesuffix(': ')}.{unexpected.group(1)}" if unexpected else ""
            new = new_name(old)
            if new is not None:
                return f"the setting {old!r} is now {new!r}", CONFIG_ERROR
            return f"{prefix}{one_line(root)}; see the signature, or `--cfg job` for the composed config", CONFIG_ERROR
        if isinstance(root, InstantiationException):
            return f"{prefix}{one_line(root)}", CONFIG_ERROR
    if isinstance(root, HydraException | OmegaConfBaseException):
        return describe_config_error(error, config_name, overrides), CONFIG_ERROR
    if isinstance(root, SettingError):
        return str(root), CONFIG_ERROR
    if isinstance(root, MarkedYAMLError):
        return f"{prefix}no valid YAML: {one_line(root)}", CONFIG_ERROR
    if isinstance(root, ModuleNotFoundError) and root.name and not root.name.startswith("keygrip"):
        package = root.name.partition(".")[0]
        if package != root.name and package in sys.modules:
            return f"{prefix}the package {package!r} is installed and has no module {root.name!r}", USER_ERROR
        return f"{prefix}the package {package!r} is not installed: {_describe_installation(package)}", USER_ERROR
    lost = re.match(r"Error loading '([^']+)':\s*ModuleNotFoundError\(\"No module named '([\w]+)'", str(root))
    if lost:  # Hydra's message for a class of a package that is not installed
        return f"{lost[1]}: the package {lost[2]!r} is not installed: {_describe_installation(lost[2])}", USER_ERROR
    if type(root).__name__ == "UncompletedJobError":
        further = ": when they have ended, the same command with resume=true makes the table"
        message = f"{_describe_dead_job(str(root))}; others may still run{further if config_name == 'train' else ''}"
        return message, USER_ERROR
    if isinstance(root, RuntimeError) and 'not detect "srun"' in str(root):  # submitit's message
        return "there is no srun here: hydra/launcher=processes runs a sweep on this machine", USER_ERROR
    if type(root).__name__ == "OutOfMemoryError":
        return "out of GPU memory: lower data.batch_size, or shard the model with strategy=fsdp", USER_ERROR
    if results.tells_that_another_ended(root):
        return "another process of this run ended: see its output, and continue with resume=<run folder>", USER_ERROR
    if isinstance(root, OSError) and root.errno in DISK_FULL and root.filename is None and type(root) is OSError:
        reason = (
            f"{os.strerror(root.errno or 0)}: the disk of the run folder, of the data's cache or of temporary files"
        )
        advice = "continue with resume=true" if config_name == "train" else "run the command again"
        return f"{prefix}{reason} is full, or `ulimit -f` is reached; free some, and {advice}", USER_ERROR
    if isinstance(root, USERS) or type(root).__name__ == MISCONFIGURED:
        return f"{prefix}{one_line(root)}", USER_ERROR
    if isinstance(error, InstantiationException):
        detail = f"{type(root).__name__}: {one_line(root)}"
        return f"{prefix}cannot be built with these settings ({detail}; debug=true shows where)", CONFIG_ERROR
    return f"unexpected {type(root).__name__}: {one_line(root)} (debug=true shows where)", USER_ERROR


def _signal_behind(error: BaseException) -> BaseException:
    """Return the exception of a signal that arrived inside Hydra or OmegaConf, whose cleanup then fails with an error
    that would hide it; any other error as it is."""
    if not isinstance(error, HydraException | OmegaConfBaseException | AttributeError):
        return error
    found: BaseException | None = error
    seen: set[int] = set()  # an error that is raised again may be its own cause
    while found is not None and id(found) not in seen:
        if isinstance(found, KeyboardInterrupt | Interrupted):
            return found
        seen.add(id(found))
        found = found.__context__ if found.__cause__ is None else found.__cause__
    return error


def _needs_no_stack_trace(error: BaseException) -> bool:
    """Return whether an error needs no stack trace: a user error or a signal."""
    root = root_cause(error)
    if not isinstance(error, Exception):
        return True
    return isinstance(root, HydraException | OmegaConfBaseException | USERS) or type(root).__name__ == MISCONFIGURED


def _describe_dead_job(message: str) -> str:
    """Return submitit's message about a job that died, without the job's output."""
    found = re.match(r"Job (\S+) .*with path (.+)\n.*state: (\w+)", message)
    if found is None:
        return one_line(ValueError(message.partition("\n")[0]))
    log = found[2].replace("_result.pkl", "_log.err")
    return f"job {found[1]} of the cluster ended without a result (state {found[3]}): see {log}"


def _describe_installation(package: str) -> str:
    """Describe how to install a missing package: with an extra of keygrip that contains and version-bounds it."""
    try:
        needed = metadata.requires("keygrip") or []
    except metadata.PackageNotFoundError:  # keygrip is not installed, only on PYTHONPATH
        needed = []
    extras = set()
    for line in needed:
        name, extra = re.match(r"[\w-]+", line), re.search(r"extra == '(\w+)'", line)
        if name and extra and name[0].replace("-", "_") == package:
            extras.add(extra[1])
    extras -= {"dev", "lmms"}  # these include other extras completely
    if not extras:
        local_paths = [each for each in (Path(package), Path(f"{package}.py")) if each.exists()]
        if local_paths:
            return f"{local_paths[0]} of the present folder is found with `export PYTHONPATH=$PWD`"
        return f"pip install {package}, or, if it is your own, export PYTHONPATH=<the folder that holds it>"
    extra_name = max(extras)
    return f"pip install 'keygrip[{extra_name}]' (in a clone: pip install -e '.[{extra_name}]')"


def _debug_requested(overrides: Sequence[str]) -> bool:
    return any(override.lstrip("+").lower() == "debug=true" for override in overrides)


def _print_to_stderr(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is closed; the exit code still reports the outcome
        sys.stderr.write(f"keygrip: {line}\n")


def _record_failure(error: BaseException, config_name: str) -> None:
    """Write the run's outcome and the stack trace to the run folder, in case the terminal is closed.

    Nothing is written for a run that was refused or stopped before its work began; its folder is removed, so that
    mistyped settings leave no folders. For an unexpected error the folder with the trace is kept.
    """
    from hydra.core.hydra_config import HydraConfig

    if isinstance(root_cause(error), run_folder.RunFolderError):
        return  # the folder is another run's
    with contextlib.suppress(Exception):
        hydra_cfg = HydraConfig.get()
        folder = Path(hydra_cfg.runtime.output_dir)
        if folder.resolve() == Path(hydra_cfg.runtime.cwd).resolve():
            return  # the command has no run folder, and the user's folder stays unchanged
        overrides = list(hydra_cfg.overrides.task)
        line = describe_error(error, config_name, overrides)[0]
        if results.belongs_to_another_start(folder):  # this start ended before its work began
            if is_first_process() and sweep_jobs.is_launcher_process():
                results.record_refusal(folder, line, overrides)
            if is_first_process() and not _needs_no_stack_trace(error):
                results.write_trace(folder, error)
            return
        if run_folder.has_not_begun(folder):
            if _needs_no_stack_trace(error):
                return
            run_folder.begin(folder)
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        status = results.INTERRUPTED if stopped else results.FAILED
        results.record_failure(folder, status, line, overrides, error)


@contextlib.contextmanager
def _raise_on_signals(received: set[int]) -> Iterator[None]:
    """Convert SIGTERM, and SIGHUP of a closed terminal, to exceptions, so that temporary files and child processes are
    cleaned up, and arms stopped, before the process ends. A second signal does not interrupt this cleanup, because a
    shell forwards its SIGHUP, which then arrives twice, and systemd sends SIGTERM and SIGHUP. Ctrl-C does interrupt it.
    Where Python ignores exceptions, as in a destructor, the signal is sent again.

    Args:
        received: the numbers of received signals are added to this set.
    """

    def handler(number: int, frame: Any) -> None:
        received.add(number)
        for other in {*numbers, signal.SIGHUP}:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(f"stopped by {signal.Signals(number).name}", number)

    def send_again(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            former_hook(unraisable)
            return
        number = unraisable.exc_value.signal_number
        signal.signal(number, handler)
        # by another thread, because an exception raised here would be ignored too
        threading.Timer(RESEND_S, os.kill, (os.getpid(), number)).start()

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup the command continues
        numbers.append(signal.SIGHUP)
    if "SLURM_JOB_ID" in os.environ:  # SLURM's warning; during training steps the trainer handles it
        numbers.append(signal.SIGUSR1)
    try:
        previous = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not the main thread: a test or a notebook
        yield
        return
    former_hook = sys.unraisablehook
    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = former_hook
        for number, former in previous.items():
            signal.signal(number, former)


def _importable_function(run: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Return ``run`` of the importable module if it is from ``__main__``, so that it can be sent to another process."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if run.__module__ != "__main__" or spec is None:
        return run
    import importlib

    return getattr(importlib.import_module(spec.name), run.__name__)
