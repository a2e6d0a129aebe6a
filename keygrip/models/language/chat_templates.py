"""Rendering of untrusted chat templates with bounded work and memory.

Jinja's sandbox restricts a template to its variables. Nested loops, macros that call each other, texts that double with
every line, and filters whose time is not proportional to their input could still use unlimited time or memory. Here a
template has only the filters, tests, functions and methods that templates of known models use. Each operation is
counted, with the sizes of its inputs and its result: the work of a rendering is at most a constant times the number of
messages and of their characters. A result that may be much larger than its inputs is measured before it is computed;
all other results are larger by a constant factor at most and are measured right after.
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
OPERATIONS, OPERATIONS_A_MESSAGE = 20_000, 1_000  # known templates need less than three hundred per message
CHARACTERS_SAID_AN_OPERATION = 20  # known templates process a long text some ten times
LARGEST, LARGEST_A_CHARACTER = 1_000_000, 10  # characters of a value: constant, and per character of the messages
ITEM = 10  # characters that an item of a list or dictionary counts as
CHARACTERS_AN_OPERATION = 1_000  # characters that count as one more operation
NODES_AN_OPERATION = 10  # nodes of the syntax tree (attributes, assignments, ...) that count as one operation
LARGEST_INTEGER = 2**64
LONGEST_TIME_FORMAT = 200  # characters; a conversion in it produces some 256 at most in Python's strftime
LONGEST_ERROR = 300  # characters of a template's own error message
COMPARED_A_PLACE = 100  # characters that Python's search compares at each place of a text, for search texts of any size
HOLDING = (set, frozenset, range, KeysView, ValuesView, ItemsView)  # besides lists, tuples and dictionaries

# What templates of known models use. The time of each is proportional to its input and output, or is charged.
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
# Of these: those whose time or output may be as large as the product of the sizes of the inputs, ...
GROWING = {"indent", "join", "lstrip", "replace", "rfind", "rpartition", "rsplit", "rstrip", "strip", "trim"}
SEARCHING = {
    "count",
    "find",
    "index",
    "partition",
    "split",
}  # ... those that search for one text in another, from its beginning, ...
DIVIDING = {"rsplit", "split", "splitlines"}  # ... and those that may make an item from every character or two.
# Filters that look up an attribute of every item; it may be a long path of attributes ("a.b.c").
BY_ATTRIBUTE = {"map", "selectattr", "rejectattr", "sort", "unique", "min", "max", "join"}
OF_NUMBERS = {"divisibleby", "even", "odd"}  # tests that compute with %, which formats if applied to a text
JINJAS_OWN = ("_loop_vars", "_block_vars")  # variables that Jinja passes to every call, but not to functions
# Fields of the two kinds of formats, with everything after their key or name; "%%" and "{{" are no fields, but which
# signs these are depends on the signs before them, so they are matched too. Refused: a width of four digits, a width
# that is an argument, and a field that begins with a key with brackets in it, after which nothing is matched.
PUT_IN = {
    "%": re.compile(r"%%|%(?:\([^()]*\))?([-+ #0]*(?:\*|\d+)?(?:\.(?:\*|\d*))?[hlL]?[^*\d]?)"),
    "format": re.compile(r"\{\{|\{(?:\[[^\]]*\]?|[^\[{}:!])*([^{}]*\{?)"),
}
WIDE = {"%": re.compile(r"\d{4}|\*|\($"), "format": re.compile(r"\d{4}|\{$")}
MOST_NESTED = 10  # loops, macros and blocks; their content is counted once more for each that encloses it
CREATING = (nodes.BinExpr, nodes.Call, nodes.Concat, nodes.Dict, nodes.List, nodes.Tuple)
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    **{"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le},
    **{"gt": operator.gt, "gteq": operator.ge},
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


@dataclass
class _Work:
    """Remaining budget of a rendering: operations, and the size of the largest value allowed."""

    operations: int
    largest: int

    def take(self, operations: int) -> None:
        self.operations -= operations
        if self.operations < 0:
            raise SecurityError("it does more than a chat template needs: loops or calls without a near end")


_work: ContextVar[_Work] = ContextVar("chat_template_work")  # of the current rendering in this thread


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], answering: bool, tokens: Mapping[str, Any]
) -> str:
    """Render messages with a chat template.

    Args:
        messages: of plain strings, lists and dictionaries. answering: end where the assistant's words begin.
        tokens: special tokens that the template may use ("bos_token").

    Raises:
        ValueError: the template is invalid, cannot render the messages, uses a filter, a test, a function or a method
            that no known template uses, or needs more work or memory than a chat template needs.
    """
    reset_token, pieces, length = None, [], 0
    try:
        characters = sum(_measured_size(message, math.inf) for message in messages)
        operations = OPERATIONS + OPERATIONS_A_MESSAGE * len(messages) + characters // CHARACTERS_SAID_AN_OPERATION
        work = _Work(operations, LARGEST + LARGEST_A_CHARACTER * characters)
        reset_token = _work.set(work)
        compiled = _compile(template)
        options = {"tools": None, "documents": None, "add_generation_prompt": answering}
        for piece in compiled.generate(messages=messages, **options, **tokens):
            pieces.append(piece)
            length += len(piece)
            if length > work.largest:
                raise SecurityError(f"it makes more than {work.largest} characters: it is no template")
    except Exception as error:  # whatever an untrusted template does in its sandbox
        reason = " ".join(str(error).split())[:LONGEST_ERROR]  # the template may set it, at any length
        raise ValueError(
            f"the tokenizer's chat template cannot render this conversation ({type(error).__name__}: {reason})"
        ) from error
    finally:
        if reset_token is not None:
            _work.reset(reset_token)
    return "".join(pieces)


def _compile(template: str) -> Any:
    compiled = _compile_or_error(template)
    if isinstance(compiled, Exception):
        raise compiled
    return compiled


@functools.lru_cache(maxsize=16)
def _compile_or_error(template: str) -> Any:
    """Return the compiled template, or the error of compiling it, so that a failure is computed only once too."""
    if len(template) > LONGEST_TEMPLATE:
        return ValueError(f"it has {len(template)} characters, more than {LONGEST_TEMPLATE}: it is no template")
    try:
        environment = _environment()
        _refuse_nested(environment.parse(template))
        return environment.from_string(template)
    except Exception as error:  # whatever an untrusted template causes in Jinja's and Python's parsers
        return error


def _refuse_nested(tree: nodes.Template) -> None:
    """Raise ValueError if loops, macros and blocks are nested more than MOST_NESTED times."""
    stack: list[tuple[nodes.Node, int]] = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        depth += isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))
        if depth > MOST_NESTED:
            raise ValueError(f"more than {MOST_NESTED} of its loops, macros and blocks stand in each other")
        stack += [(child, depth) for child in node.iter_child_nodes()]


class _Generator(CodeGenerator):
    """Measures every value that an expression produces, and counts the iterations of loops and the calls of macros with
    their content."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        called: Any  # each of these has a body
        for called in node.find_all((nodes.Macro, nodes.CallBlock, nodes.Block)):
            charge = nodes.Call(
                nodes.EnvironmentAttribute("charged"), [nodes.Const(_count_nodes(called.body))], [], None, None
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
        if others:  # 1 < x < y: each is computed only if those before hold
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
        characters = sum(len(data.data) for each in node.body for data in each.find_all(nodes.TemplateData))
        counted = nodes.EnvironmentAttribute("counted", lineno=node.lineno)
        size = _count_nodes([*node.body, node.target, *([node.test] if node.test else [])])
        turn = nodes.Const(1 + characters // CHARACTERS_AN_OPERATION + size // NODES_AN_OPERATION, lineno=node.lineno)
        node.iter = nodes.Call(counted, [node.iter, turn], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)


def _count_nodes(parts: Sequence[nodes.Node]) -> int:
    """Count the nodes of parts of the syntax tree."""
    return sum(1 + sum(1 for _ in part.find_all(nodes.Node)) for part in parts)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))
    functions: tuple[Any, ...] = ()  # that a template may call, besides its own macros and blocks

    def measured(self, value: Any) -> Any:
        """Count a value, check that it is small enough, and return it."""
        work = _work.get()
        work.take(1 + _measured_size(value, work.largest) // CHARACTERS_AN_OPERATION)
        return value

    def joined(self, parts: tuple[Any, ...]) -> str:
        """Compute the operator ~."""
        text: str = self.measured("".join(map(str, self.measured(parts))))
        return text

    def compared(self, comparison: str, left: Any, right: Any) -> Any:
        """Compute a comparison."""
        self.measured(left)
        self.measured(right)
        if comparison in ("in", "notin"):
            _charge_search(right, left)
        return COMPARISONS[comparison](left, right)

    def counted(self, items: Any, turn: int) -> Any:
        """Count the iterations of a loop, each as `turn` operations, and return its items."""
        items = items if isinstance(items, Sized) else list(islice(items, _work.get().operations + 1))
        _work.get().take(len(items) * turn)
        return items

    def charged(self, size: int) -> None:
        """Count a call of a macro or block of `size` nodes."""
        _work.get().take(size // NODES_AN_OPERATION)

    def getitem(self, obj: Any, argument: Any) -> Any:
        # the hash of a tuple iterates over all of it, each time
        return super().getitem(obj, argument if isinstance(argument, str | int) else self.measured(argument))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # the owner of a method, or of the method that the sandbox has wrapped
        owner = getattr(function, "__self__", getattr(getattr(function, "__wrapped__", None), "__self__", None))
        if owner is self:  # `counted` and `charged`, which no template can name
            return function(*args)
        if any(owner is each for each in self.extensions.values()):  # called by an extension's syntax, with a block
            return super().call(context, function, *args, **kwargs)
        if not isinstance(function, Macro | BlockReference | Undefined):  # an Undefined raises an error with its name
            args, kwargs = tuple(map(_materialise, args)), {name: _materialise(each) for name, each in kwargs.items()}
            named = [each for name, each in kwargs.items() if name not in JINJAS_OWN]
            self._charge_call(function, owner, *args, *named)
        return super().call(context, function, *args, **kwargs)

    def _charge_call(self, function: Any, owner: Any, *arguments: Any) -> None:
        name = getattr(function, "__name__", type(function).__name__)
        for each in arguments:
            self.measured(each)
        if isinstance(function, Joiner) or any(function is each for each in self.functions):
            return
        kind = next((kind for kind in METHODS if isinstance(owner, kind)), None)
        if kind is None or name not in METHODS[kind]:
            prefix = "" if owner is None else f"{type(owner).__name__}."
            raise SecurityError(f"{prefix}{name} is none of the functions and methods that chat templates need")
        self.measured(owner)
        if kind is str:
            _charge(name, owner, *arguments)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for each in (left, right):
            _refuse_integer(each)
        if operator == "%" and isinstance(left, str):
            _charge("%", left, right)
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            _charge_product("*", left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            bits = (abs(left).bit_length() - 1) * right  # the result is at least 2 to the power of this
            if bits > 64:
                raise SecurityError(f"it computes {left}**{right}, a number of more than 64 bits")
        return super().call_binop(context, operator, left, right)


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    """Build an environment that counts, with those of transformers' additions that chat templates need."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    original = _compile_jinja_template("").environment
    environment = _Environment(
        trim_blocks=original.trim_blocks,
        lstrip_blocks=original.lstrip_blocks,
        extensions=[type(extension) for extension in original.extensions.values()],
        optimized=False,  # Jinja would evaluate every part of an expression again for each part above it
    )
    # with the context, so that Jinja computes no output at compile time already
    environment.finalize = pass_context(lambda context, value: environment.measured(value))
    environment.globals = {**original.globals, "strftime_now": _limit_format(original.globals["strftime_now"])}
    environment.functions = tuple(environment.globals[name] for name in FUNCTIONS)
    for kind, names, items, kept in (
        ("filter", FILTERS, original.filters, environment.filters),
        ("test", TESTS, original.tests, environment.tests),
    ):
        kept.clear()
        kept.update({name: (_metered if name in names else _refused)(kind, name, each) for name, each in items.items()})
    return environment


def _refused(kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a filter or test that chat templates do not need; it is an error only if it is called."""

    def refused(*_: Any, **__: Any) -> Any:
        raise SecurityError(f"the {kind} {name} is none of those that chat templates need")

    return refused


def _metered(kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter or a test so that its inputs and its output are measured."""

    @functools.wraps(function)  # copies Jinja's marks, such as whether the first argument is the environment
    def bounded(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(map(_materialise, args)), {name: _materialise(each) for name, each in kwargs.items()}
        measured = _environment().measured
        inputs = [each for each in args if not isinstance(each, Context | EvalContext | Environment)]
        inputs += kwargs.values()
        for each in inputs:
            measured(each)
        if kind == "filter":
            _charge("%" if name == "format" else name, *inputs)
        elif name == "in":
            _charge_search(inputs[1], inputs[0])
        elif name in OF_NUMBERS and any(isinstance(each, str) for each in inputs):
            raise SecurityError(f"the test {name} is given a text")
        return measured(function(*args, **kwargs))

    return bounded


def _limit_format(function: Callable[[str], str]) -> Callable[[str], str]:
    """Limit the function strftime_now to short formats: a width in a format may be any number."""

    @functools.wraps(function)
    def short_time(format: str) -> str:
        if not isinstance(format, str) or len(format) > LONGEST_TIME_FORMAT:
            raise SecurityError(f"strftime_now takes a text of at most {LONGEST_TIME_FORMAT} characters")
        return function(format)

    return short_time


def _charge(name: str, *operands: Any) -> None:
    """Count the time and output of a filter or a text's method beyond the size of its inputs, of which the first is the
    value that it is applied to. Raises SecurityError: the output may be much larger than a chat."""
    value, *options = operands or ("",)
    if name in PUT_IN:
        text = str(value)
        if any(WIDE[name].search(match[1] or "") for match in PUT_IN[name].finditer(text)):
            raise SecurityError(f"widths as in {text[:80]!r} are not taken in chat templates")
        work, widths = _work.get(), sum(map(int, re.findall(r"\d+", text)))
        _charge_product(name, len(text) + widths, ITEM + sum(_measured_size(each, work.largest) for each in options))
    elif name == "replace":
        _charge_product(name, value, 1 + sum(len(str(each)) for each in options))
    elif name == "tojson":
        width = sum(map(_indent_width, options))
        _charge_product(name, value, max(1, _nesting_depth(value) * width // ITEM))
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


def _charge_product(name: str, *factors: Any) -> None:
    work = _work.get()
    sizes = [abs(each) if isinstance(each, int) else _measured_size(each, work.largest) - ITEM for each in factors]
    if (product := math.prod(max(1, size) for size in sizes)) > 10 * work.largest:
        raise SecurityError(f"{name} may make {product} characters or items")
    work.take(product // CHARACTERS_AN_OPERATION)


def _charge_search(text: Any, part: Any) -> None:
    if isinstance(text, str) and isinstance(part, str):
        _work.get().take(len(text) * min(len(part), COMPARED_A_PLACE) // CHARACTERS_AN_OPERATION)


def _indent_width(option: Any) -> int:
    """Return how many characters an option of tojson may put before or after each item."""
    if isinstance(option, str):
        return len(option)
    if isinstance(option, list | tuple):
        return sum(map(_indent_width, option))
    return abs(option) if isinstance(option, int) else 0


def _nesting_depth(value: Any) -> int:
    """Return the nesting depth of lists and dictionaries."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [inner for each in level if isinstance(each, dict | list | tuple) for inner in _elements(each)]
    return depth


def _materialise(value: Any) -> Any:
    """Return a value; an iterator, which can be read only once, as a list, whose size is known."""
    return list(islice(value, LARGEST + 1)) if isinstance(value, Iterator) else value


def _refuse_integer(value: Any) -> None:
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise SecurityError("it computes with numbers of more than 64 bits")


def _elements(value: Any) -> Iterable[Any]:
    """Return the elements of a value."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, Namespace):
        return [object.__getattribute__(value, "__dict__")]  # Namespace's own lookup returns the template's
    if isinstance(value, Cycler | Joiner):
        return value.items if isinstance(value, Cycler) else [value.sep]
    return value if isinstance(value, (list, tuple, *HOLDING)) else ()


def _measured_size(value: Any, largest: float) -> int:
    """Return the characters of a value and its elements, each of which counts as ITEM more. Raises SecurityError: too
    many, or an integer of more than 64 bits."""
    weight, stack = 0, [value]
    while stack:
        element = stack.pop()
        weight += ITEM
        if isinstance(element, str):
            weight += len(element)
        elif isinstance(element, int):
            _refuse_integer(element)
        else:
            stack += _elements(element)
        if weight + ITEM * len(stack) > largest:
            raise SecurityError(f"it makes more than {largest} characters of what is said")
    return weight
