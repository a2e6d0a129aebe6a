"""Chat templates of others, rendered with bounded work and memory.

Jinja's sandbox keeps a template from everything but its variables; loops within loops, macros that call each other and
texts that double with every line would still take all time or memory. Here every operation of a template is counted,
and what it makes is measured, before it is made where it may be much larger than what it is made of.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, Sized, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, operators
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LONGEST_TEMPLATE = 50_000  # characters; the longest of known models have some ten thousand
OPERATIONS, OPERATIONS_A_MESSAGE = 20_000, 1_000  # known templates need less than a hundred for a message
LARGEST, LARGEST_A_CHARACTER = 1_000_000, 10  # characters of a value: in any case, and for each one that is said
ITEM = 10  # characters that an item of a list or dictionary counts as
CHARACTERS_AN_OPERATION = 1_000  # that count as one more operation
NODES_AN_OPERATION = 10  # of a template's syntax tree: the attributes, assignments, ... of a loop's turn
LARGEST_INTEGER = 2**64
HOLDING = (set, frozenset, range, KeysView, ValuesView, ItemsView)  # beside lists, tuples and dictionaries
# Methods and filters that may take or make as much as the product of the sizes of what they are given.
GROWING = {
    *("replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format", "format_map"),
    *("strip", "lstrip", "rstrip", "trim", "indent", "tojson", "batch", "slice", "to_bytes"),
}
# Filters that look up an attribute, which may be a long path of them ("a.b.c"), of every item.
BY_ATTRIBUTE = {"map", "selectattr", "rejectattr", "groupby", "sort", "unique", "min", "max", "join"}
# Filters that may take long, most of them for web pages; no chat template needs them.
LEFT_OUT = {"urlize", "striptags", "wordwrap", "pprint", "xmlattr", "forceescape", "filesizeformat", "random", "sum"}
WIDE = re.compile(r"\d{4}|\*|\{[^{}]*\{")  # in a format: a width of four digits, or one that is an argument
CREATING = (nodes.BinExpr, nodes.Call, nodes.Compare, nodes.Concat, nodes.Dict, nodes.List, nodes.Tuple)


@dataclass
class _Work:
    """What a rendering may still do: operations, and the largest value that it may make."""

    operations: int
    largest: int

    def take(self, operations: int) -> None:
        self.operations -= operations
        if self.operations < 0:
            raise SecurityError("it does more than a chat template needs: loops or calls without a near end")


_work: ContextVar[_Work] = ContextVar("chat_template_work")  # of the rendering that is going on in this thread


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], answering: bool, tokens: Mapping[str, Any]
) -> str:
    """Messages in a chat template.

    Args:
        messages: of plain texts, lists and dictionaries. answering: up to where the assistant begins to speak.
        tokens: what the template may name ("bos_token").

    Raises:
        ValueError: the template is none, cannot render the messages, or does or makes more than a chat template needs.
    """
    said = sum(_weight(message, math.inf) for message in messages)
    work = _Work(OPERATIONS + OPERATIONS_A_MESSAGE * len(messages), LARGEST + LARGEST_A_CHARACTER * said)
    before = _work.set(work)
    pieces, length = [], 0
    try:
        compiled = _compiled(template)
        options = {"tools": None, "documents": None, "add_generation_prompt": answering}
        for piece in compiled.generate(messages=messages, **options, **tokens):
            pieces.append(piece)
            length += len(piece)
            if length > work.largest:
                raise SecurityError(f"it makes more than {work.largest} characters: it is no template")
    except Exception as error:  # whatever a template of somebody else's does, in its sandbox
        raise ValueError(
            f"the tokenizer's chat template cannot render this conversation ({type(error).__name__}: {error})"
        ) from error
    finally:
        _work.reset(before)
    return "".join(pieces)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    if len(template) > LONGEST_TEMPLATE:
        raise ValueError(f"it has {len(template)} characters, more than {LONGEST_TEMPLATE}: it is no template")
    return _environment().from_string(template)


class _Generator(CodeGenerator):
    """Measures every value that an expression makes, and counts the turns of loops and the calls of macros with what
    stands in them."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        called: Any  # each of these has a body
        for called in node.find_all((nodes.Macro, nodes.CallBlock, nodes.Block)):
            charge = nodes.Call(
                nodes.EnvironmentAttribute("charged"), [nodes.Const(_size(called.body))], [], None, None
            )
            called.body.insert(0, nodes.ExprStmt(charge).set_lineno(called.lineno))
        super().visit_Template(node, frame)

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        sliced = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        if not (sliced or isinstance(node, CREATING)) or getattr(node, "ctx", "load") != "load":
            return super().visit(node, *args, **kwargs)
        self.write("environment.measured(")
        super().visit(node, *args, **kwargs)
        self.write(")")
        return None

    def visit_Operand(self, node: nodes.Operand, frame: Any) -> None:
        self.write(f" {operators[node.op]} environment.measured(")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        if node.recursive:
            self.fail("recursive loops are not taken in chat templates", node.lineno)
        written = sum(len(data.data) for each in node.body for data in each.find_all(nodes.TemplateData))
        counted = nodes.EnvironmentAttribute("counted", lineno=node.lineno)
        size = _size([*node.body, node.target, *([node.test] if node.test else [])])
        turn = nodes.Const(1 + written // CHARACTERS_AN_OPERATION + size // NODES_AN_OPERATION, lineno=node.lineno)
        node.iter = nodes.Call(counted, [node.iter, turn], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)


def _size(parts: Sequence[nodes.Node]) -> int:
    """Nodes of a part of the syntax tree."""
    return sum(1 + sum(1 for _ in part.find_all(nodes.Node)) for part in parts)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def measured(self, value: Any) -> Any:
        """A value, after it is counted and found small enough."""
        work = _work.get(None)
        if work is not None:  # None: a constant, while the template is compiled
            work.take(1 + _weight(value, work.largest) // CHARACTERS_AN_OPERATION)
        return value

    def joined(self, parts: tuple[Any, ...]) -> str:
        """What the operator ~ makes."""
        return "".join(map(str, self.measured(parts)))

    def counted(self, items: Any, turn: int) -> Any:
        """What a loop goes through, after its turns are counted, each as so many operations."""
        items = items if isinstance(items, Sized) else list(islice(items, _work.get().operations + 1))
        _work.get().take(len(items) * turn)
        return items

    def charged(self, size: int) -> None:
        """Counts a call of a macro or block of so many nodes."""
        _work.get().take(size // NODES_AN_OPERATION)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(function, "__name__", "") in GROWING:
            args = tuple(map(_held, args))
            owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
            _refuse_growth(function.__name__, owner, *args, *kwargs.values())
        return self.measured(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str | bytes):
            _refuse_growth("format", left, right)
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            _refuse_growth(operator, left, right)
        elif operator == "**" and abs(right) > 64:
            raise SecurityError(f"it computes {left}**{right}")
        found = super().call_binop(context, operator, left, right)
        if isinstance(found, int) and abs(found) > LARGEST_INTEGER:
            raise SecurityError("it computes with numbers of more than 64 bits")
        return found


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    """What transformers gives chat templates, in an environment that counts."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    theirs = _compile_jinja_template("").environment
    own = _Environment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
        optimized=False,  # Jinja would try every part of an expression again for each part above it
    )
    own.finalize = own.measured
    own.globals = {name: value for name, value in theirs.globals.items() if name != "lipsum"}
    own.filters = {name: _bounded(name, each) for name, each in theirs.filters.items() if name not in LEFT_OUT}
    own.tests = {name: _bounded(name, each) for name, each in theirs.tests.items()}
    return own


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or a test with what it is given and gives measured."""

    @functools.wraps(function)  # with Jinja's marks: whether its first argument is the environment, for instance
    def bounded(*args: Any, **kwargs: Any) -> Any:
        args = tuple(map(_held, args))
        measured = _environment().measured
        for each in (*args, *kwargs.values()):
            measured(each)
        if name in GROWING:
            _refuse_growth(name, *args, *kwargs.values())
        if name in BY_ATTRIBUTE:
            _charge_path(*args, *kwargs.values())
        return measured(function(*args, **kwargs))

    return bounded


def _charge_path(*given: Any) -> None:
    """Counts what a filter looks up of the first thing given that has items."""
    # before it some filters are given the context, which Python takes for a mapping and which has no length
    value, *options = [each for each in given if isinstance(each, Sized) and not isinstance(each, Context)] or [()]
    path = 1 + sum(each.count(".") for each in options if isinstance(each, str))
    if (work := _work.get(None)) is not None:
        work.take(len(value) * path // NODES_AN_OPERATION)


def _held(value: Any) -> Any:
    """A value; what can be gone through only once as a list, whose size is known."""
    return list(islice(value, LARGEST + 1)) if isinstance(value, Iterator) else value


def _refuse_growth(name: str, *given: Any) -> None:
    """Raises SecurityError: what is made of what is given may be much larger than a chat."""
    work = _work.get(None)
    largest = LARGEST if work is None else work.largest
    if name in ("format", "format_map") and WIDE.search(str(given[0])):
        raise SecurityError(f"widths as in {str(given[0])[:80]!r} are not taken in chat templates")
    if name == "replace":  # what is replaced makes nothing larger
        texts = [each for each in given if isinstance(each, str)]
        given = (texts[0], *texts[2:]) if texts else given
    sizes = [abs(each) if isinstance(each, int) else _weight(each, largest) - ITEM for each in given]
    if (product := math.prod(max(1, size) for size in sizes)) > 10 * largest:
        raise SecurityError(f"{name} may make {product} characters or items")


def _weight(value: Any, largest: float) -> int:
    """Characters of a value with all that it holds; other items count as some. Raises SecurityError: too many."""
    weight, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        weight += ITEM
        if isinstance(each, str | bytes):
            weight += len(each)
        elif isinstance(each, list | tuple):
            waiting += each
        elif isinstance(each, dict):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, Namespace):
            waiting.append(object.__getattribute__(each, "__dict__"))  # its own is what the template has put in
        elif isinstance(each, HOLDING):
            waiting += each
        if weight + ITEM * len(waiting) > largest:
            raise SecurityError(f"it makes more than {largest} characters of what is said")
    return weight
