"""Callables as pytrees, so that a compiled function takes a model as an ordinary argument."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.extend import core


@jax.tree_util.register_pytree_node_class
class Function:
    """A callable whose arrays are the leaves of a pytree; everything else about it is static.

    Two functions with the same static part and arrays of the same shapes share one compilation.
    The arrays of `functools.partial`, `jax.tree_util.Partial` and callable pytrees (an Equinox or
    NNX module) are leaves. Any other callable is static as a whole, and equal to itself alone.

    Args:
        fn: The callable; a `Function` is taken as it is.
    """

    _arrays: Sequence[Any]
    _static: "_Static"

    def __init__(self, fn: Callable[..., Any]) -> None:
        if isinstance(fn, Function):
            self._arrays, self._static = fn._arrays, fn._static
            return
        leaves, structure = jax.tree.flatten(_with_arrays_as_leaves(fn))
        rest = tuple(None if _is_array(leaf) else leaf for leaf in leaves)
        self._arrays = [leaf for leaf in leaves if _is_array(leaf)]
        self._static = _Template(structure, rest, tuple(map(_is_array, leaves)))
        if not _is_hashable(self._static):
            self._arrays, self._static = [], _Opaque(fn)

    def __call__(self, *args: Any) -> Any:
        return self._static.call(self._arrays, *args)

    def hoist(self, *args: Any) -> "Function":
        """Return the same function with the arrays that it closes over as further leaves.

        A function that closes over another model's parameters, or over parameters that have been
        updated since, then runs the compiled program of the first.

        Args:
            args: Arguments, of which only shapes and dtypes count. The result takes no others.
        """
        jaxpr, shapes = jax.make_jaxpr(self._static.call, return_shape=True)(self._arrays, *args)
        consts = [_argument(const) for const in jaxpr.consts]
        static = _Program(self._static, jaxpr.jaxpr, jax.tree.structure(shapes))
        return Function.tree_unflatten(static, [*consts, *self._arrays])

    def tree_flatten(self) -> tuple[Sequence[Any], "_Static"]:
        """Split into arrays and the static part."""
        return self._arrays, self._static

    @classmethod
    def tree_unflatten(cls, static: "_Static", arrays: Sequence[Any]) -> "Function":
        """Join both parts again."""
        function = object.__new__(cls)
        function._arrays, function._static = list(arrays), static
        return function


@runtime_checkable
class _Static(Protocol):
    """What a function is besides its arrays; hashable."""

    def call(self, arrays: Sequence[Any], *args: Any) -> Any:
        """Call the function that it makes with these arrays."""


class _Template:
    """A callable pytree without its arrays."""

    def __init__(self, structure: Any, rest: tuple, is_array: tuple[bool, ...]) -> None:
        self._key = structure, rest, is_array

    def call(self, arrays: Sequence[Any], *args: Any) -> Any:
        structure, rest, is_array = self._key
        remaining = iter(arrays)
        leaves = [
            next(remaining) if array else leaf for leaf, array in zip(rest, is_array, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Template) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class _Opaque:
    """A callable that cannot be hashed; equal to itself alone."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    def call(self, arrays: Sequence[Any], *args: Any) -> Any:
        return self._fn(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Opaque) and self._fn is other._fn

    def __hash__(self) -> int:
        return id(self._fn)


class _Program:
    """A function as it was traced; equal if the source is and the traces read alike."""

    def __init__(self, source: _Static, jaxpr: core.Jaxpr, out_structure: Any) -> None:
        self._source, self._jaxpr, self._out_structure = source, jaxpr, out_structure

    @functools.cached_property
    def _text(self) -> str:
        return str(self._jaxpr)

    def call(self, arrays: Sequence[Any], *args: Any) -> Any:
        num_consts = len(self._jaxpr.constvars)
        closed = core.ClosedJaxpr(self._jaxpr, arrays[:num_consts])
        flat = jax.tree.leaves((arrays[num_consts:], args))
        return jax.tree.unflatten(self._out_structure, core.jaxpr_as_fun(closed)(*flat))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Program) or self._source != other._source:
            return False
        return self._jaxpr is other._jaxpr or self._text == other._text

    def __hash__(self) -> int:
        return hash(self._source)


def _with_arrays_as_leaves(fn: Any) -> Any:
    """Return `fn` with each `functools.partial` in it as a pytree."""
    if not isinstance(fn, functools.partial):
        return fn
    args = tuple(map(_with_arrays_as_leaves, fn.args))
    keywords = {name: _with_arrays_as_leaves(value) for name, value in fn.keywords.items()}
    if jax.tree_util.all_leaves([fn.func]):
        return jax.tree_util.Partial(fn.func, *args, **keywords)
    # `Partial` takes its function for static, so that a callable pytree must be an argument.
    return jax.tree_util.Partial(_call, fn.func, *args, **keywords)


def _call(fn: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    return fn(*args, **keywords)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _argument(const: Any) -> Any:
    """Return a constant of a trace as something that a compiled function takes."""
    return const if isinstance(const, jax.Array) else np.asarray(const)
