"""What decides the way Python code takes, by reading its source.

A trace shows one run of a ``forward``. It stands for every run only where each branch, loop and
choice of what to call depends on nothing but settings: constants, global names, the attributes of
modules, and local names made of these. Whatever else decides (an argument, a tensor, a random
number) is named. An attribute that the code itself assigns is no setting.
"""

import ast
import builtins
import dis
import inspect
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor

_REFUSED = (
    *(ast.Try, ast.TryStar, ast.Match, ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef),
    *(ast.ClassDef, ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal),
    *(ast.Import, ast.ImportFrom),
)
# Functions that give the same for the same arguments.
_PURE = {
    *("abs", "all", "any", "bool", "enumerate", "getattr", "int", "issubclass", "list", "max"),
    *("min", "range", "reversed", "sorted", "str", "sum", "tuple", "zip"),
}
_LISTS = {"OrderedDict", "dict", "enumerate", "list", "reversed", "tuple", "zip"}
_WALKS = {"children", "get", "items", "keys", "named_children", "values", "is_scripting"}
_PLAIN = {name for kind in (Tensor, list, dict, str) for name in dir(kind)}
_CALLS = {"forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl"}
_SETS = {"delattr", "eval", "exec", "setattr"}
_CHANGES = {
    *("add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem"),
    *("popleft", "put", "remove", "reverse", "setdefault", "sort", "update"),
}
_WRITES = ("STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "DELETE", "IMPORT", "MAKE_FUNCTION")
_TENSORS = re.compile("Tensor|Parameter|Buffer|object")
_CHANCE = re.compile("rand|bernoulli|multinomial|item|tolist")
# Names by which a module's code may come to any layer in it.
_REACHING = {
    *("children", "named_children", "modules", "named_modules", "_modules", "get_submodule"),
    *("apply", "__dict__", "vars", "getattr", "attrgetter", "eval", "exec", "locals"),
}


def undecided(
    codes: Mapping[CodeType, Mapping[str, Any]], entered: set[CodeType]
) -> Iterator[tuple[CodeType, str]]:
    """What decides besides settings in functions that call one another: each with its function, in
    a few words. ``codes`` come with their global names; those that are ``entered`` from elsewhere
    may be given anything.
    """
    trees = {code: tree for code in codes if (tree := _parse(code)) is not None}
    scopes = {code: _Scope(tree) for code, tree in trees.items()}
    sites = defaultdict(list)  # where something of a name is called
    aliased = set()  # names that are mentioned without a call
    for code, tree in trees.items():
        nodes = list(_body(tree))
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        for node in nodes:
            if isinstance(node, ast.Call):
                sites[_last_name(node.func)].append((scopes[code], node))
            elif isinstance(node, ast.Attribute | ast.Name) and id(node) not in called:
                aliased.add(_last_name(node))
    for code in codes:
        if code not in trees:
            if not _is_straight(code, codes[code]):
                yield code, f"the source of {code.co_name} cannot be read"
            continue
        scope = scopes[code]
        if code not in entered and code.co_name not in aliased:
            given = _settled_parameters(trees[code], sites[code.co_name])
            scope = _Scope(trees[code], given) if given else scope
        for node in _body(trees[code]):
            if isinstance(node, _REFUSED):
                yield code, f"a trace of {code.co_name} does not stand for a {type(node).__name__}"
            elif (reason := scope.objection(node)) is not None:
                what = ast.unparse(reason)
                yield code, f"a trace of {code.co_name} does not stand for `{what}`"


def _is_straight(code: CodeType, names: Mapping[str, Any]) -> bool:
    """Whether code without a source has one way only: no jump, nothing that it changes, and no
    names but its own, attributes and torch's.
    """
    steps = list(dis.get_instructions(code))
    if code.co_exceptiontable or code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE):
        return False
    if set(code.co_freevars) - {"__class__"}:
        return False
    if any(step.opcode in (*dis.hasjrel, *dis.hasjabs) for step in steps):
        return False
    if any(step.opname.startswith(_WRITES) for step in steps):
        return False
    if any(name in _CALLS | _SETS | _CHANGES or _CHANCE.search(name) for name in code.co_names):
        return False
    loaded = [step.argval for step in steps if step.opname == "LOAD_GLOBAL"]
    things = [names.get(name, getattr(builtins, name, None)) for name in loaded]
    homes = [getattr(each, "__module__", None) or getattr(each, "__name__", "") for each in things]
    return all(home.split(".")[0] in ("torch", "builtins") for home in homes)


def _settled_parameters(tree: ast.FunctionDef, sites: list[tuple[Any, ast.Call]]) -> set[str]:
    """The parameters of a function that each of the calls gives a setting."""
    names = [node.arg for node in (*tree.args.posonlyargs, *tree.args.args)]
    defaults = dict(zip(reversed(names), reversed(tree.args.defaults), strict=False))
    names = names[1:] if names[:1] == ["self"] else names
    found = set(names) if sites else set()
    for scope, call in sites:
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        plain = all(not isinstance(arg, ast.Starred) and not _is_self(arg) for arg in call.args)
        if not plain or None in keywords:
            return set()
        given = {**defaults, **keywords, **dict(zip(names, call.args, strict=False))}
        found = {name for name in found if name in given and scope.fixed(given[name])}
    return found


def called_whole(cls: type, names: set[str]) -> set[str]:
    """Of the attributes ``names`` those that a module class's forward, and what it comes to in the
    class, only calls, as in ``self.name(x)`` or ``for block in self.name: x = block(x)``, and never
    looks into.
    """
    bases = [base for base in cls.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
    called: set[str] = set()
    lost: set[str] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        members = [vars(base).get(name) for base in bases]
        for function in (function for member in members for function in _functions(member)):
            if (tree := _parse(function.__code__)) is None:
                return set()
            for name, whole in _mentions(tree, names):
                (called if whole else lost).add(name)
            further = {node.attr for node in _body(tree) if isinstance(node, ast.Attribute)} - seen
            seen |= further
            waiting += further
    return called - lost


def _functions(member: Any) -> list[FunctionType]:
    """Those that a member of a class runs."""
    if isinstance(member, property):
        parts = [member.fget, member.fset, member.fdel]
    else:
        parts = [getattr(member, "__func__", member)]
    return [
        part for part in map(inspect.unwrap, filter(callable, parts)) if inspect.isfunction(part)
    ]


@cache
def _parse(code: CodeType) -> ast.FunctionDef | None:
    try:
        source = inspect.getsource(code)
        nested = source[:1].isspace()
        tree: Any = ast.parse("if True:\n" + source if nested else source)
    except (OSError, SyntaxError, TypeError):
        return None
    (tree,) = tree.body
    function = tree.body[0] if nested else tree
    return function if isinstance(function, ast.FunctionDef) else None


def _body(tree: ast.FunctionDef) -> Iterator[Any]:
    for statement in tree.body:
        yield from ast.walk(statement)


class _Scope:
    """A function's names, and which of them hold settings."""

    def __init__(self, tree: ast.FunctionDef, given: Collection[str] = ()):
        """``given``: parameters that are settings."""
        self._arguments = [node.arg for node in ast.walk(tree.args) if isinstance(node, ast.arg)]
        self._bound: dict[str, list[ast.expr | None]] = {
            name: [ast.Constant(None) if name in given else None] for name in self._arguments
        }
        if self._arguments[:1] == ["self"]:
            del self._bound["self"]
        for node in _body(tree):
            for target, value in _bindings(node):
                for name in ast.walk(target):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        self._bound.setdefault(name.id, []).append(value)
        # The largest set of names each of which is made of settings and names of the set.
        self._settled = set(self._bound)
        while lost := {
            name
            for name in self._settled
            if not all(value is not None and self.fixed(value) for value in self._bound[name])
        }:
            self._settled -= lost

    def objection(self, node: ast.AST) -> ast.AST | None:
        """What decides at this node and is not settled, or changes what settings are."""
        match node:
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                decisions = [test]
            case ast.BoolOp(values=[*decisions, _]):
                pass
            case ast.For(iter=walked) | ast.comprehension(iter=walked):
                decisions = getattr(node, "ifs", [])
                if not self._bounded(walked):
                    return walked
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if not self.fixed(value):
                return None if attr in _PLAIN and attr not in _CALLS else node
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in _CHANGES:
                return None if _is_self(value) else node
            case ast.Call(func=ast.Name(id=name)) if name in _SETS:
                return node
            case ast.Call(func=called):
                decisions = [called]
            case ast.Attribute(value=value, attr=attr) if attr in _CALLS:
                return None if ast.unparse(value).startswith("super(") else node
            case ast.Attribute(ctx=ast.Store() | ast.Del()):
                return node
            case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()) if self.fixed(value):
                return node
            case ast.Expr(value=ast.Call(func=ast.Attribute() as called)) if self._own(called):
                return node
            case _:
                return None
        return next((test for test in decisions if not self.fixed(test)), None)

    def fixed(self, node: ast.expr) -> bool:
        """Whether an expression is made of settings alone."""
        match node:
            case ast.Constant():
                return True
            case ast.Name(id=name):
                return name not in self._bound or name in self._settled
            case ast.Attribute(value=value):
                return self.fixed(value)
            case ast.List(elts=items) | ast.Set(elts=items):
                return bool(items) and all(isinstance(item, ast.Constant) for item in items)
            case ast.Call(func=ast.Name(id="len")):
                return True  # of a list it follows from the way taken so far; a tensor's raises
            case ast.Call(func=ast.Name(id="super")):
                return True
            case ast.Call(func=ast.Name(id="hasattr"), args=[thing, name]):
                return isinstance(thing, ast.Name) and self.fixed(thing) and self.fixed(name)
            case ast.Call(func=ast.Name(id="isinstance"), args=[thing, kinds]):
                # In a trace, what stands for a tensor is none.
                return self.fixed(thing) and not _TENSORS.search(ast.unparse(kinds))
            case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]):
                return name in _PURE and name not in self._bound and all(map(self.fixed, args))
            case ast.Call(func=ast.Attribute(value=value, attr=attr), args=args, keywords=[]):
                return attr in _WALKS and all(map(self.fixed, [value, *args]))
            case (
                ast.Subscript()
                | ast.Slice()
                | ast.Compare()
                | ast.BoolOp()
                | ast.BinOp()
                | ast.UnaryOp()
                | ast.IfExp()
                | ast.Tuple()
                | ast.Starred()
                | ast.JoinedStr()
                | ast.FormattedValue()
            ):
                parts = ast.iter_child_nodes(node)
                return all(self.fixed(part) for part in parts if isinstance(part, ast.expr))
        return False

    def _bounded(self, node: ast.expr | None, within: frozenset[str] = frozenset()) -> bool:
        """Whether a loop over this takes as many turns each time: it is a setting, or a list that
        this code or a module has made. ``within``: names whose values are being looked at.
        """
        if node is None or self.fixed(node):
            return node is not None

        def bounded(*parts: ast.expr | None) -> bool:
            return all(self._bounded(part, within) for part in parts)

        match node:
            case ast.Name(id=name):
                if name in within:
                    return True
                values = [v for v in self._bound[name] if v or name not in self._arguments]
                return all(self._bounded(value, within | {name}) for value in values)
            case ast.List() | ast.Tuple() | ast.Dict():
                return True
            case ast.ListComp() | ast.GeneratorExp() | ast.DictComp():
                return True  # its own loops are looked at themselves
            case ast.Attribute(value=value) | ast.Starred(value=value):
                return bounded(value)
            case ast.Subscript(value=value, slice=index):
                return self.fixed(index) and bounded(value)
            case ast.BinOp(left=left, right=right):
                return bounded(left, right)
            case ast.Call(func=ast.Name(id=name)) if name in _LISTS:
                return bounded(*node.args)
            case ast.Call(func=ast.Attribute(attr="items" | "keys" | "values", value=value)):
                return bounded(value)
            case ast.Call(func=called):
                return self._own(called)
        return False

    def _own(self, node: ast.expr) -> bool:
        """Whether an expression starts at ``self``, or at a local name that holds a setting."""
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return isinstance(node, ast.Name) and (node.id == "self" or node.id in self._settled)


def _bindings(node: ast.AST) -> Iterator[tuple[ast.AST, ast.expr | None]]:
    """Where a node binds names, and what to; None: to what is no setting."""
    match node:
        case ast.Assign(targets=targets, value=value):
            yield from ((target, value) for target in targets)
        case ast.AnnAssign() | ast.AugAssign() | ast.NamedExpr():
            yield node.target, node.value
        case ast.For() | ast.comprehension():
            yield from _elements(node.target, node.iter)
        case ast.withitem(optional_vars=ast.expr() as target):
            yield target, None


def _elements(target: ast.expr, walked: ast.expr) -> Iterator[tuple[ast.AST, ast.expr]]:
    """What a loop binds, each with what its values come from."""
    match walked, target:
        case ast.Call(func=ast.Name(id="zip"), args=a), ast.Tuple(elts=t) if len(a) == len(t):
            for each, arg in zip(t, a, strict=True):
                yield from _elements(each, arg)
        case ast.Call(func=ast.Name(id="enumerate"), args=[arg]), ast.Tuple(elts=[count, each]):
            yield count, ast.Constant(0)
            yield from _elements(each, arg)
        case ast.Call(func=ast.Name(id="reversed"), args=[arg]), _:
            yield from _elements(target, arg)
        case _:
            yield target, walked


def _mentions(tree: ast.FunctionDef, names: set[str]) -> Iterator[tuple[str, bool]]:
    """Each of the attributes ``names`` where a function mentions it, and whether it only calls it
    there. Where a function may come to any, all are.
    """
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in _body(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in names:
                yield name, _is_called(node, parents)
            case ast.Attribute(attr=name) | ast.Constant(value=name) if name in names:
                yield name, False
            case ast.Attribute(attr=name) | ast.Name(id=name) if name in _REACHING:
                yield from ((each, False) for each in names)
            case ast.Name(id="self"):
                parent = parents[node]
                if not isinstance(parent, ast.Attribute) and not _is_call_of("super", parent):
                    yield from ((each, False) for each in names)


def _is_called(node: ast.AST, parents: dict[ast.AST, Any]) -> bool:
    """Whether a module is called here, or each of those in it, or compared to None."""
    parent = parents[node]
    if _is_call_of("enumerate", parent):
        node, parent = parent, parents[parent]
    match parent:
        case ast.Call(func=called) if called is node:
            return True
        case ast.Call(args=[first, *_]) if first is node:
            return _is_call_of("checkpoint", parent)
        case ast.Compare(ops=[ast.Is() | ast.IsNot()]):
            return True
        case ast.For(target=target, iter=walked) | ast.comprehension(target=target, iter=walked):
            if walked is not node:
                return False
            each = target.elts[-1] if isinstance(target, ast.Tuple) else target
            return isinstance(each, ast.Name) and all(
                isinstance(parents[use], ast.Call) and parents[use].func is use
                for use in parents
                if isinstance(use, ast.Name) and use.id == each.id and use is not each
            )
    return False


def _is_call_of(name: str, node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _last_name(node.func) == name


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _last_name(node: ast.AST) -> str:
    """f of ``f`` and of ``a.b.f``."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
