"""Chat templates of others, rendered with bounded work and memory.

Jinja's sandbox keeps a template from everything but its variables; loops within loops, macros that call each other,
texts that double with every line and filters whose time is not that of what they are given would still take all time
or memory. Here a template has the filters, tests, functions and methods that templates of known models use, and no
others. Each operation is counted, with the size of what it is given and of what it makes: the work of a rendering is at
most some constant times the number of messages and of characters in them. What may be much larger than what it is made
of is measured before it is made; all else grows by a constant factor at most and is measured right after.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Sized, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jinja2 import Environment, nodes, pass_context
from jinja2.compiler import CodeGenerator, operators
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

LONGEST_TEMPLATE = 50_000  # characters; the longest of known models have some ten thousand
OPERATIONS, OPERATIONS_A_MESSAGE = 20_000, 1_000  # known templates need less than three hundred for a message
CHARACTERS_SAID_AN_OPERATION = 20  # known templates go through a long text some ten times
LARGEST, LARGEST_A_CHARACTER = 1_000_000, 10  # characters of a value: in any case, and for each one that is said
ITEM = 10  # characters that an item of a list or dictionary counts as
CHARACTERS_AN_OPERATION = 1_000  # that count as one more operation
NODES_AN_OPERATION = 10  # of a template's syntax tree: the attributes, assignments, ... of a loop's turn
LARGEST_INTEGER = 2**64
LONGEST_TIME_FORMAT = 200  # characters; a conversion in it makes some 256 at most, as Python's strftime has it
LONGEST_ERROR = 300  # characters of what a template says itself
COMPARED_A_PLACE = 100  # characters: Python's search compares so many at each place of a text, whatever it looks for
HOLDING = (set, frozenset, range, KeysView, ValuesView, ItemsView)  # beside lists, tuples and dictionaries

# What templates of known models use. All of it takes time in proportion to what it is given and makes, or is charged.
FILTERS = {
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format", "indent"),
    *("int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr"),
    *("replace", "reverse", "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim", "unique"),
    "upper",
}
TESTS = {
    *("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "le", "lessthan", "lt", "ne"),
    *("boolean", "callable", "defined", "divisibleby", "even", "false", "filter", "float", "in", "integer", "iterable"),
    *("lower", "mapping", "none", "number", "odd", "sameas", "sequence", "string", "test", "true", "undefined"),
    "upper",
}
FUNCTIONS = ("cycler", "dict", "joiner", "namespace", "raise_exception", "range", "strftime_now")
METHODS: dict[type, set[str]] = {
    str: {
        *("capitalize", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isdecimal", "isdigit"),
        *("islower", "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix"),
        *("removesuffix", "replace", "rfind", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith"),
        *("strip", "title", "upper"),
    },
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    LoopContext: {"changed", "cycle"},
    Cycler: {"next", "reset"},
}
# Of these, what may take or make as much as the product of the sizes of what it is given, ...
GROWING = {"indent", "join", "lstrip", "replace", "rfind", "rpartition", "rsplit", "rstrip", "strip", "trim"}
SEARCHING = {
    "count",
    "find",
    "index",
    "partition",
    "split",
}  # ... what looks for one text in another, from its beginning, ...
DIVIDING = {"rsplit", "split", "splitlines"}  # ... and what may make an item of every character or two.
# Filters that look up an attribute, which may be a long path of them ("a.b.c"), of every item.
BY_ATTRIBUTE = {"map", "selectattr", "rejectattr", "sort", "unique", "min", "max", "join"}
OF_NUMBERS = {"divisibleby", "even", "odd"}  # tests that compute with %, which with a text is a format
JINJAS_OWN = ("_loop_vars", "_block_vars")  # variables that it hands to every call, and no function gets
# What is put into the two kinds of formats, with all that stands behind its key or name; "%%" and "{{" put nothing in,
# but which signs these are depends on those before, so that they are found with it. Refused is a width of four digits,
# or one that is an argument, and what begins as a key with brackets in it, behind which nothing is looked for.
PUT_IN = {
    "%": re.compile(r"%%|%(?:\([^()]*\))?([-+ #0]*(?:\*|\d+)?(?:\.(?:\*|\d*))?[hlL]?[^*\d]?)"),
    "format": re.compile(r"\{\{|\{(?:\[[^\]]*\]?|[^\[{}:!])*([^{}]*\{?)"),
}
WIDE = {"%": re.compile(r"\d{4}|\*|\($"), "format": re.compile(r"\d{4}|\{$")}
MOST_NESTED = 10  # loops, macros and blocks; what stands in each is counted once more for each around it
CREATING = (nodes.BinExpr, nodes.Call, nodes.Concat, nodes.Dict, nodes.List, nodes.Tuple)
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    **{"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le},
    **{"gt": operator.gt, "gteq": operator.ge},
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


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
        ValueError: the template is none, cannot render the messages, uses a filter, a test, a function or a method
            that no known template does, or does or makes more than a chat template needs.
    """
    before, pieces, length = None, [], 0
    try:
        said = sum(_weight(message, math.inf) for message in messages)
        operations = OPERATIONS + OPERATIONS_A_MESSAGE * len(messages) + said // CHARACTERS_SAID_AN_OPERATION
        work = _Work(operations, LARGEST + LARGEST_A_CHARACTER * said)
        before = _work.set(work)
        compiled = _compiled(template)
        options = {"tools": None, "documents": None, "add_generation_prompt": answering}
        for piece in compiled.generate(messages=messages, **options, **tokens):
            pieces.append(piece)
            length += len(piece)
            if length > work.largest:
                raise SecurityError(f"it makes more than {work.largest} characters: it is no template")
    except Exception as error:  # whatever a template of somebody else's does, in its sandbox
        reason = " ".join(str(error).split())[:LONGEST_ERROR]  # which it may say itself, at any length
        raise ValueError(
            f"the tokenizer's chat template cannot render this conversation ({type(error).__name__}: {reason})"
        ) from error
    finally:
        if before is not None:
            _work.reset(before)
    return "".join(pieces)


def _compiled(template: str) -> Any:
    compiled = _compiled_once(template)
    if isinstance(compiled, Exception):
        raise compiled
    return compiled


@functools.lru_cache(maxsize=16)
def _compiled_once(template: str) -> Any:
    """The template, or the error that compiling it ends with, so that this too is done once."""
    if len(template) > LONGEST_TEMPLATE:
        return ValueError(f"it has {len(template)} characters, more than {LONGEST_TEMPLATE}: it is no template")
    try:
        environment = _environment()
        _refuse_nested(environment.parse(template))
        return environment.from_string(template)
    except Exception as error:  # whatever somebody else's template makes of Jinja's parser and of Python's
        return error


def _refuse_nested(tree: nodes.Template) -> None:
    """Raises ValueError: loops, macros and blocks stand in each other more than MOST_NESTED times."""
    left: list[tuple[nodes.Node, int]] = [(tree, 0)]
    while left:
        node, depth = left.pop()
        depth += isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))
        if depth > MOST_NESTED:
            raise ValueError(f"more than {MOST_NESTED} of its loops, macros and blocks stand in each other")
        left += [(child, depth) for child in node.iter_child_nodes()]


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

    def visit_Const(self, node: nodes.Const, frame: Any) -> None:
        if isinstance(node.value, int) and node.value > LARGEST_INTEGER:
            self.fail("it computes with numbers of more than 64 bits", node.lineno)
        super().visit_Const(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        first, *others = node.ops
        if others:  # 1 < x < y: each is computed only where those before hold
            if any(each.op in ("in", "notin") for each in node.ops):
                self.fail("comparisons in a row with `in` among them are not taken in chat templates", node.lineno)
            super().visit_Compare(node, frame)
            return
        self.write(f"environment.compared({first.op!r}, ")
        self.visit(node.expr, frame)
        self.write(", ")
        self.visit(first.expr, frame)
        self.write(")")

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
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))
    functions: tuple[Any, ...] = ()  # that a template may call, beside its own macros and blocks

    def measured(self, value: Any) -> Any:
        """A value, after it is counted and found small enough."""
        work = _work.get()
        work.take(1 + _weight(value, work.largest) // CHARACTERS_AN_OPERATION)
        return value

    def joined(self, parts: tuple[Any, ...]) -> str:
        """What the operator ~ makes."""
        text: str = self.measured("".join(map(str, self.measured(parts))))
        return text

    def compared(self, comparison: str, left: Any, right: Any) -> Any:
        """Whether a comparison holds."""
        self.measured(left)
        self.measured(right)
        if comparison in ("in", "notin"):
            _charge_search(right, left)
        return COMPARISONS[comparison](left, right)

    def counted(self, items: Any, turn: int) -> Any:
        """What a loop goes through, after its turns are counted, each as so many operations."""
        items = items if isinstance(items, Sized) else list(islice(items, _work.get().operations + 1))
        _work.get().take(len(items) * turn)
        return items

    def charged(self, size: int) -> None:
        """Counts a call of a macro or block of so many nodes."""
        _work.get().take(size // NODES_AN_OPERATION)

    def getitem(self, obj: Any, argument: Any) -> Any:
        # the hash of a tuple goes through all of it, each time
        return super().getitem(obj, argument if isinstance(argument, str | int) else self.measured(argument))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # a method's own, or that of the one for which the sandbox has put another in its place
        owner = getattr(function, "__self__", getattr(getattr(function, "__wrapped__", None), "__self__", None))
        if owner is self:  # `counted` and `charged`, which no template can name
            return function(*args)
        if any(owner is each for each in self.extensions.values()):  # what its syntax calls, with a block
            return super().call(context, function, *args, **kwargs)
        if not isinstance(function, Macro | BlockReference | Undefined):  # which raises an error that names it
            args, kwargs = tuple(map(_held, args)), {name: _held(each) for name, each in kwargs.items()}
            named = [each for name, each in kwargs.items() if name not in JINJAS_OWN]
            self._charge_call(function, owner, *args, *named)
        return super().call(context, function, *args, **kwargs)

    def _charge_call(self, function: Any, owner: Any, *given: Any) -> None:
        name = getattr(function, "__name__", type(function).__name__)
        for each in given:
            self.measured(each)
        if isinstance(function, Joiner) or any(function is each for each in self.functions):
            return
        kind = next((kind for kind in METHODS if isinstance(owner, kind)), None)
        if kind is None or name not in METHODS[kind]:
            of = "" if owner is None else f"{type(owner).__name__}."
            raise SecurityError(f"{of}{name} is none of the functions and methods that chat templates need")
        self.measured(owner)
        if kind is str:
            _charge(name, owner, *given)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for each in (left, right):
            _refuse_integer(each)
        if operator == "%" and isinstance(left, str):
            _charge("%", left, right)
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            _charge_product("*", left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            bits = (abs(left).bit_length() - 1) * right  # what it makes is at least 2 to the power of this
            if bits > 64:
                raise SecurityError(f"it computes {left}**{right}, a number of more than 64 bits")
        return super().call_binop(context, operator, left, right)


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    """What transformers gives chat templates and these need, in an environment that counts."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    theirs = _compile_jinja_template("").environment
    own = _Environment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
        optimized=False,  # Jinja would try every part of an expression again for each part above it
    )
    # with the context, so that Jinja computes nothing of what is put out already when it compiles
    own.finalize = pass_context(lambda context, value: own.measured(value))
    own.globals = {**theirs.globals, "strftime_now": _short_time(theirs.globals["strftime_now"])}
    own.functions = tuple(own.globals[name] for name in FUNCTIONS)
    for kind, taken, given, kept in (
        ("filter", FILTERS, theirs.filters, own.filters),
        ("test", TESTS, theirs.tests, own.tests),
    ):
        kept.clear()
        kept.update({name: (_bounded if name in taken else _refused)(kind, name, each) for name, each in given.items()})
    return own


def _refused(kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of a filter or test that chat templates do not need; it is an error only where it is reached."""

    def refused(*_: Any, **__: Any) -> Any:
        raise SecurityError(f"the {kind} {name} is none of those that chat templates need")

    return refused


def _bounded(kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or a test with what it is given and gives measured."""

    @functools.wraps(function)  # with Jinja's marks: whether its first argument is the environment, for instance
    def bounded(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(map(_held, args)), {name: _held(each) for name, each in kwargs.items()}
        measured = _environment().measured
        given = [each for each in args if not isinstance(each, Context | EvalContext | Environment)]
        given += kwargs.values()
        for each in given:
            measured(each)
        if kind == "filter":
            _charge("%" if name == "format" else name, *given)
        elif name == "in":
            _charge_search(given[1], given[0])
        elif name in OF_NUMBERS and any(isinstance(each, str) for each in given):
            raise SecurityError(f"the test {name} is given a text")
        return measured(function(*args, **kwargs))

    return bounded


def _short_time(function: Callable[[str], str]) -> Callable[[str], str]:
    """The function strftime_now of short formats alone: a width in one may be any number."""

    @functools.wraps(function)
    def short_time(format: str) -> str:
        if not isinstance(format, str) or len(format) > LONGEST_TIME_FORMAT:
            raise SecurityError(f"strftime_now takes a text of at most {LONGEST_TIME_FORMAT} characters")
        return function(format)

    return short_time


def _charge(name: str, *given: Any) -> None:
    """Counts what a filter or a text's method may take and make beyond the size of what it is given; the first is what
    it is applied to. Raises SecurityError: that may be much larger than a chat."""
    value, *options = given or ("",)
    if name in PUT_IN:
        text = str(value)
        if any(WIDE[name].search(found[1] or "") for found in PUT_IN[name].finditer(text)):
            raise SecurityError(f"widths as in {text[:80]!r} are not taken in chat templates")
        work, widths = _work.get(), sum(map(int, re.findall(r"\d+", text)))
        _charge_product(name, len(text) + widths, ITEM + sum(_weight(each, work.largest) for each in options))
    elif name == "replace":
        _charge_product(name, value, 1 + sum(len(str(each)) for each in options))
    elif name == "tojson":
        width = sum(map(_width, options))
        _charge_product(name, value, max(1, _depth(value) * width // ITEM))
    elif name in GROWING:
        _charge_product(name, value, *options)
    elif name in SEARCHING and isinstance(value, str) and options:
        _charge_search(value, options[0])
    if name in DIVIDING and isinstance(value, str):
        work, divider = _work.get(), next((each for each in options if isinstance(each, str)), None)
        pieces = value.count(divider) if divider else len(value) // (1 if name == "splitlines" else 2)
        if len(value) + ITEM * pieces > work.largest + ITEM:
            raise SecurityError(f"{name} may make {pieces} items")
    if name in BY_ATTRIBUTE and isinstance(value, Sized):
        path = 1 + sum(len(re.findall("[.,]", each)) for each in options if isinstance(each, str))
        _work.get().take(len(value) * path // NODES_AN_OPERATION)


def _charge_product(name: str, *given: Any) -> None:
    work = _work.get()
    sizes = [abs(each) if isinstance(each, int) else _weight(each, work.largest) - ITEM for each in given]
    if (product := math.prod(max(1, size) for size in sizes)) > 10 * work.largest:
        raise SecurityError(f"{name} may make {product} characters or items")
    work.take(product // CHARACTERS_AN_OPERATION)


def _charge_search(text: Any, part: Any) -> None:
    if isinstance(text, str) and isinstance(part, str):
        _work.get().take(len(text) * min(len(part), COMPARED_A_PLACE) // CHARACTERS_AN_OPERATION)


def _width(option: Any) -> int:
    """Characters that an option of tojson may put before or behind each item."""
    if isinstance(option, str):
        return len(option)
    if isinstance(option, list | tuple):
        return sum(map(_width, option))
    return abs(option) if isinstance(option, int) else 0


def _depth(value: Any) -> int:
    """Of lists and dictionaries within each other."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [inner for each in level if isinstance(each, dict | list | tuple) for inner in _inside(each)]
    return depth


def _held(value: Any) -> Any:
    """A value; what can be gone through only once as a list, whose size is known."""
    return list(islice(value, LARGEST + 1)) if isinstance(value, Iterator) else value


def _refuse_integer(value: Any) -> None:
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise SecurityError("it computes with numbers of more than 64 bits")


def _inside(value: Any) -> Iterable[Any]:
    """What a value holds."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, Namespace):
        return [object.__getattribute__(value, "__dict__")]  # its own is what the template has put in
    if isinstance(value, Cycler | Joiner):
        return value.items if isinstance(value, Cycler) else [value.sep]
    return value if isinstance(value, (list, tuple, *HOLDING)) else ()


def _weight(value: Any, largest: float) -> int:
    """Characters of a value with all that it holds; other items count as some. Raises SecurityError: too many, or an
    integer of more than 64 bits."""
    weight, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        weight += ITEM
        if isinstance(each, str):
            weight += len(each)
        elif isinstance(each, int):
            _refuse_integer(each)
        else:
            waiting += _inside(each)
        if weight + ITEM * len(waiting) > largest:
            raise SecurityError(f"it makes more than {largest} characters of what is said")
    return weight
