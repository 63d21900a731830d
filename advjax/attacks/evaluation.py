"""One evaluation of a model, which an attack and a search after it take turns to use.

Under `jax.vmap` some lanes are at the attack while others are past it, and a condition between the
two would compute both for every lane. So the attack's step is traced with a stand-in for the model,
and the one place in its program where the model is evaluated serves whoever's turn it is.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Bool, Float

from advjax import jaxprs
from advjax.types import LogitsFn

T = TypeVar("T")

_LOGITS, _PULLBACK = "advjax_logits", "advjax_pullback"  # the names of the calls of a stand-in


class Query(NamedTuple):
    """What is asked of the model in place of an attack's step.

    Attributes:
        image: Where to evaluate it.
        cotangent: By the logits there, of what combination of them to take the gradient.
    """

    image: Float[Array, "*shape"]
    cotangent: Callable[[Float[Array, " classes"]], Float[Array, " classes"]]


def step_or_ask(
    step: Callable[[LogitsFn, T], T],
    state: T,
    logits_fn: LogitsFn,
    *,
    ask: Bool[Array, ""],
    query: Query,
) -> tuple[T, Float[Array, " classes"], Float[Array, "*shape"]]:
    """Step an attack, or evaluate its model elsewhere, by one value_and_grad of the model.

    A step that evaluates the model within a loop or a condition, as jaxopt's line search does, is
    made beside the query, which takes a second evaluation.

    Args:
        step: `(logits_fn, state) -> state`, by one value_and_grad of `logits_fn`.
        state: The attack's state.
        logits_fn: The model.
        ask: Whether to evaluate the query instead of stepping.
        query: What to evaluate.

    Returns:
        The attack's state, stepped unless `ask`; and if `ask`, the logits of the query and the
        gradient. Otherwise these two are of no use.
    """
    stand_in = _stand_in(logits_fn, query.image)
    trace = jax.make_jaxpr(lambda state: step(stand_in, state), return_shape=True)
    jaxpr, shapes = trace(state)
    if _is_evaluated_once(jaxpr.jaxpr, query.image.shape):
        leaves, logits, gradient = _run(jaxpr, jax.tree.leaves(state), logits_fn, ask, query)
        stepped = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    else:
        stepped = step(logits_fn, state)
        logits, pullback = jax.vjp(logits_fn, query.image)
        (gradient,) = pullback(query.cotangent(logits))
    kept = jax.tree.map(lambda old, new: jnp.where(ask, old, new), state, stepped)
    return kept, logits, gradient


def _stand_in(logits_fn: LogitsFn, image: Float[Array, "*shape"]) -> LogitsFn:
    """A model of the same shapes, whose evaluation and pullback are calls of known names."""
    out = jax.eval_shape(logits_fn, image)

    def logits(x: Float[Array, "*shape"]) -> Float[Array, " classes"]:
        return jnp.broadcast_to(jnp.sum(x), out.shape).astype(out.dtype)

    def pullback(cotangent: Float[Array, " classes"]) -> Float[Array, "*shape"]:
        return jnp.broadcast_to(jnp.sum(cotangent), image.shape).astype(image.dtype)

    logits.__name__, pullback.__name__ = _LOGITS, _PULLBACK
    logits, pullback = jax.jit(logits), jax.jit(pullback)

    @jax.custom_vjp
    def model(x: Float[Array, "*shape"]) -> Float[Array, " classes"]:
        return logits(x)

    model.defvjp(lambda x: (logits(x), None), lambda _, cotangent: (pullback(cotangent),))
    return model


def _is_evaluated_once(jaxpr: core.Jaxpr, shape: tuple[int, ...]) -> bool:
    """Whether the model is evaluated and pulled back once, at the top level, for one image."""
    calls = [eqn for eqn in jaxpr.eqns if _call(eqn) is not None]
    if [_call(eqn) for eqn in calls] != [_LOGITS, _PULLBACK]:
        return False
    image: Any = calls[0].invars[0].aval
    if image.shape != shape:  # several images, by jax.vmap
        return False
    others = (eqn for eqn in jaxpr.eqns if _call(eqn) is None)
    return not any(_calls_within(inner) for eqn in others for inner in jaxprs.inner(eqn))


def _calls_within(jaxpr: core.Jaxpr) -> bool:
    return any(
        _call(eqn) is not None or any(map(_calls_within, jaxprs.inner(eqn))) for eqn in jaxpr.eqns
    )


def _call(eqn: core.JaxprEqn) -> str | None:
    name = eqn.params.get("name")
    return name if name in (_LOGITS, _PULLBACK) else None


def _run(
    closed: core.ClosedJaxpr,
    args: list[Any],
    logits_fn: LogitsFn,
    ask: Bool[Array, ""],
    query: Query,
) -> tuple[list[Any], Float[Array, " classes"], Float[Array, "*shape"]]:
    """The results of a step's program, with the model evaluated for it or for the query."""
    jaxpr = closed.jaxpr
    evaluation, pull = (i for i, eqn in enumerate(jaxpr.eqns) if _call(eqn) is not None)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    _evaluate(jaxpr, slice(evaluation), env)
    (image,) = _read(jaxpr.eqns[evaluation].invars, env)
    logits, pullback = jax.vjp(logits_fn, jnp.where(ask, query.image, image))
    env[jaxpr.eqns[evaluation].outvars[0]] = logits

    _evaluate(jaxpr, slice(evaluation + 1, pull), env)
    (cotangent,) = _read(jaxpr.eqns[pull].invars, env)
    (gradient,) = pullback(jnp.where(ask, query.cotangent(logits), cotangent))
    env[jaxpr.eqns[pull].outvars[0]] = gradient

    _evaluate(jaxpr, slice(pull + 1, None), env)
    return _read(jaxpr.outvars, env), logits, gradient


def _evaluate(jaxpr: core.Jaxpr, part: slice, env: dict[core.Var, Any]) -> None:
    """Add to the values of variables what some of a program's operations make of them."""
    eqns = jaxpr.eqns[part]
    if not eqns:
        return
    later = jaxpr.eqns[part.stop :] if part.stop is not None else []
    used_later = {*_variables(later), *(v for v in jaxpr.outvars if isinstance(v, core.Var))}
    made = [v for eqn in eqns for v in eqn.outvars if v in used_later]
    given = [v for v in _variables(eqns) if v in env]
    program = jaxpr.replace(constvars=[], invars=given, outvars=made, eqns=eqns)
    results = core.jaxpr_as_fun(core.ClosedJaxpr(program, ()))(*_read(given, env))
    env |= dict(zip(made, results, strict=True))


def _read(atoms: Iterable[Any], env: dict[core.Var, Any]) -> list[Any]:
    return [atom.val if isinstance(atom, core.Literal) else env[atom] for atom in atoms]


def _variables(eqns: Iterable[core.JaxprEqn]) -> list[core.Var]:
    """The variables that are read, each once, in the order of their first use."""
    return list(dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, core.Var)))
