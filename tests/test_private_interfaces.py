"""Private names of other packages: each is used in one file, and a test fails when it changes."""

from __future__ import annotations

import ast
import functools
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from syntax_trees import nodes_of
from torch import nn

PACKAGE = Path(__file__).resolve().parents[1] / "keygrip"
# name -> the one file that uses it
PRIVATE = {
    "_attn_implementation": "models/language/hub.py",
    "_C": "training/torch_files.py",  # tests/training/test_torch_files.py reads archives through it
    "_call_impl": "training/compilation.py",
    "_compiled_call_impl": "training/compilation.py",
    "_foreach_lerp_": "training/ema.py",
    "_should_accumulate": "training/lightning_loops.py",
    "_dynamo": "training/compilation.py",
    "_inductor": "training/compilation.py",
    "_triton": "training/compilation.py",
    "_internal": "training/sweeps.py",
    "_subclasses": "training/memory.py",  # tests/training/test_memory.py counts with both
    "_python_dispatch": "training/memory.py",
    "_Unpickler": "data/robot/formats/raiden.py",  # test_raiden.py reads pickles of every kind and protocol with it
    "_get_full_key": "config.py",  # tests/test_configs.py reads the messages that it makes
    "_server_thread": "runtime/i2rt_yam.py",  # tests/runtime/test_robots.py runs i2rt's own class
    "_freeze_rand_vec": "envs/metaworld/environment.py",  # tests/envs/metaworld draws positions by seed through it
    "_inheriting": "training/main_guard.py",
    "_version": "training/host_copy.py",  # tests/training/test_host_copy.py changes buffers in every way
    # tests/models/foveated_vlm/test_hostile_exports.py compares with what transformers renders
    "_compile_jinja_template": "models/language/chat_templates.py",
}
# methods and attributes of other packages' classes that a class of keygrip replaces -> the one file that does
REPLACED = {
    "_apply": "models/nn/kept_buffers.py",
    "_load_from_state_dict": "models/geometry_vla/mapanything.py",
    "_data_parallel_size": "training/sharding.py",
    "_determine_device_ids": "training/sharding.py",
}
# attributes of Lightning's trainer and loops that are not documented; tests/training/test_lightning_loops.py uses all
# of them in training
LIGHTNING_LOOPS = {
    *("fit_loop", "epoch_loop", "val_loop", "validate_loop", "test_loop", "predict_loop"),
    *("optim_progress", "batch_progress", "epoch_progress", "total_batch_idx"),
    *("restarted_mid_epoch", "val_check_batch", "increment_ready", "increment_started", "increment_completed"),
}
# documented in spite of the underscore
DOCUMENTED = {"_exit", "_target_"}


@functools.cache
def names_of_others() -> dict[str, set[str]]:
    """Names that keygrip uses and does not define, and the files that use them."""
    own: set[str] = set()
    used: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        where = str(path.relative_to(PACKAGE))
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    own.add(node.attr)
                else:
                    used.setdefault(node.attr, set()).add(where)
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("keygrip"):
                for name in [*(node.module or "").split("."), *(alias.name for alias in node.names)]:
                    used.setdefault(name, set()).add(where)
            elif isinstance(node, ast.Import):
                for name in [part for alias in node.names for part in alias.name.split(".")]:
                    used.setdefault(name, set()).add(where)
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "setattr", "hasattr")
                and not (isinstance(node.args[0], ast.Name) and node.args[0].id == "self")
                and isinstance(node.args[1], ast.Constant)
            ):
                used.setdefault(str(node.args[1].value), set()).add(where)
    return {name: files for name, files in used.items() if name not in own}


def test_each_private_name_is_used_in_one_file() -> None:
    """Those with one leading underscore."""
    others = {name: files for name, files in names_of_others().items() if name not in DOCUMENTED}
    private = {name: files for name, files in others.items() if name.startswith("_") and not name.startswith("__")}
    assert private == {name: {file} for name, file in PRIVATE.items()}


def test_lightnings_loops_are_used_in_one_file() -> None:
    used = {name: files for name, files in names_of_others().items() if name in LIGHTNING_LOOPS}
    assert {"fit_loop", "epoch_loop", "val_check_batch"} <= set(used)
    assert set().union(*used.values()) == {"training/lightning_loops.py"}


def test_each_replaced_name_is_replaced_in_one_file() -> None:
    for name, file in REPLACED.items():
        spelled = (f"def {name}(", f"self.{name} =")
        files = {path for path in PACKAGE.rglob("*.py") if any(each in path.read_text() for each in spelled)}
        assert files == {PACKAGE / file}, name


def test_torch_moves_and_loads_submodules_through_the_methods_that_are_replaced() -> None:
    called: list[str] = []

    class Part(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
            called.append("moved")
            return super()._apply(fn, recurse)

        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
            called.append(f"loaded {prefix}")
            super()._load_from_state_dict(state, prefix, *others)

    module = nn.Sequential(Part(1, 1)).double()
    module.load_state_dict(module.state_dict())
    assert called == ["moved", "loaded 0."]


def test_lightning_divides_a_model_by_the_names_that_are_replaced() -> None:
    strategy = ModelParallelStrategy(data_parallel_size=3, tensor_parallel_size=1)
    assert strategy._data_parallel_size == 3
    assert list(inspect.signature(strategy._determine_device_ids).parameters) == []


def test_a_spawned_process_says_that_it_is_importing_its_parents_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "print(getattr(multiprocessing.current_process(), '_inheriting', False), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=print)\n"
        "    process.start(); process.join()\n"
    )
    said = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.split() == ["False", "True"]


def test_transformers_takes_the_attention_of_its_configuration() -> None:
    from transformers import LlamaConfig, LlamaModel

    from keygrip.models.language.hub import with_fused_attention

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    config._attn_implementation = "eager"
    assert LlamaModel(with_fused_attention(config)).config._attn_implementation == "sdpa"


def test_a_compiled_module_is_called_through_the_name_that_is_replaced() -> None:
    module = nn.Linear(2, 2)
    assert module._compiled_call_impl is None
    module.compile(backend="eager")
    assert callable(module._compiled_call_impl)
    module._compiled_call_impl = lambda *inputs: "replaced"
    assert module(torch.zeros(1, 2)) == "replaced"
    assert module._call_impl(torch.zeros(1, 2)).shape == (1, 2)
    assert isinstance(torch._dynamo.config.recompile_limit, int)


def test_weights_are_averaged_in_one_call() -> None:
    averages, weights = [torch.zeros(2), torch.ones(1)], [torch.ones(2), torch.zeros(1)]
    torch._foreach_lerp_(averages, weights, 0.25)
    torch.testing.assert_close(averages, [torch.full((2,), 0.25), torch.full((1,), 0.75)])


def test_lightning_says_whether_gradients_are_still_added_up() -> None:
    loop = Trainer(accumulate_grad_batches=2, logger=False, enable_checkpointing=False).fit_loop.epoch_loop
    assert not inspect.signature(loop._should_accumulate).parameters


def test_inductor_names_a_missing_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    required = [p for p in inspect.signature(get_cpp_compiler).parameters.values() if p.default is p.empty]
    assert required == []
    assert issubclass(InvalidCxxCompiler, RuntimeError)
    assert isinstance(has_triton(), bool)


def test_hydras_sweeper_divides_overrides_into_jobs() -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(["a=1,2", "b=x"])
    assert BasicSweeper.split_arguments(parsed, max_batch_size=None) == [[["a=1", "b=x"], ["a=2", "b=x"]]]
