"""Random programs, as lists of named steps that can be replayed, shortened and read.

A step is a name of the table `STEPS` and a seed. Made for the shape that reaches it, it is a
function of one array; where it does not fit that shape it is left out. The same program can be made
as it is written, and in exact arithmetic: in float64, its constants rounded as written and its
casts left out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

LARGEST = 64  # entries of a result, to keep Jacobians small

Function = Callable[[jax.Array], Any]


class Step(NamedTuple):
    """One line of a program."""

    name: str
    seed: int


Steps = tuple[Step, ...]


class Arithmetic(NamedTuple):
    """How constants become arrays, and whether casts between floating types round."""

    constant: Callable[[np.ndarray], Any]
    casts: bool


WRITTEN = Arithmetic(lambda array: array, casts=True)
EXACT = Arithmetic(lambda array: array.astype(np.float64), casts=False)


def traced(one: jax.Array) -> Arithmetic:
    """The program as written, its constants traced as the number is, which is 1."""
    return Arithmetic(lambda array: array * one.astype(array.dtype), casts=True)


@dataclasses.dataclass(frozen=True)
class Draw:
    """What a step is made from: random numbers, and what it is applied to, as written."""

    rng: np.random.Generator
    like: jax.ShapeDtypeStruct
    arithmetic: Arithmetic

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array that the step is applied to."""
        return self.like.shape

    @property
    def size(self) -> int:
        """Its number of entries."""
        return math.prod(self.like.shape)

    def constant(self, array: Any) -> Any:
        """Numbers as constants of the program."""
        return self.arithmetic.constant(np.asarray(array).astype(self.like.dtype))

    def kernel(self, *shape: int) -> Any:
        """A random kernel, now and then a peculiar one."""
        fan_in = max(math.prod(shape[:-1]), 1)
        array = self.rng.normal(size=shape) / math.sqrt(fan_in)
        kind = self.rng.integers(20)
        if kind == 0:
            array = np.ones(shape)
        elif kind == 1:
            array = np.abs(array)
        elif kind == 2:
            array *= self.extreme()
        elif kind == 3:
            array *= self.rng.integers(2, size=shape)
        return self.constant(array)

    def number(self) -> Any:
        """A random factor."""
        plain = [*self.rng.normal(size=12), -1.0, 2.0, 0.5, 0.0, 100.0]
        return self.constant(self.rng.choice(plain) if self.rng.integers(12) else self.extreme())

    def extreme(self) -> float:
        """A factor that is near the ends of the range of float32."""
        largest = 1e4 if self.like.dtype == jnp.float16 else 1e20
        return float(self.rng.choice([1 / largest, largest, -1 / largest]))

    def axis(self) -> int:
        """One of the axes."""
        return int(self.rng.integers(len(self.shape)))

    def choice(self, *options: Any) -> Any:
        """One of some options."""
        return options[int(self.rng.integers(len(options)))]

    def inner(self, names: Sequence[str], count: int = 2) -> Function:
        """A few steps more, of some names, to be used inside of this one."""
        return realise(random_steps(self.rng, names, count), self.like, self.arithmetic)


def realise(steps: Steps, like: jax.ShapeDtypeStruct, arithmetic: Arithmetic) -> Function:
    """The function that steps are, one after the other."""
    functions = []
    for step in steps:
        after = _after(step, like)
        if after is not None:
            functions.append(_made(step, like, arithmetic))
            like = after
    return lambda x: functools.reduce(lambda value, function: function(value), functions, x)


def _made(step: Step, like: jax.ShapeDtypeStruct, arithmetic: Arithmetic) -> Function | None:
    return STEPS[step.name](Draw(np.random.default_rng(step.seed), like, arithmetic))


def _after(step: Step, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | None:
    """What a step makes of such an array; None where it does not fit."""
    written = _made(step, like, WRITTEN)
    after = None if written is None else jax.eval_shape(written, like)
    return after if after is not None and 1 <= math.prod(after.shape) <= LARGEST else None


def random_program(
    rng: np.random.Generator, groups: Sequence[Sequence[str]], like: jax.ShapeDtypeStruct
) -> Steps:
    """A step of each group that fits, if one is soon found."""
    steps: Steps = ()
    for names in groups:
        for step in random_steps(rng, names, 8):
            after = _after(step, like)
            if after is not None:
                steps, like = (*steps, step), after
                break
    return steps


def random_steps(rng: np.random.Generator, names: Sequence[str], count: int) -> Steps:
    """Some steps of some names."""
    return tuple(
        Step(str(names[rng.integers(len(names))]), int(rng.integers(2**31))) for _ in range(count)
    )


# The table of steps. Each takes a `Draw`, and makes a function, or None where it does not fit.

STEPS: dict[str, Callable[[Draw], Function | None]] = {}


def _simple(table: dict[str, Function]) -> list[str]:
    STEPS.update({name: lambda draw, fn=fn: fn for name, fn in table.items()})
    return list(table)


ARRAYS = range(1, 9)  # the ranks of all but scalars


def _step(group: list[str], *, ranks: Sequence[int] = range(9)):
    """Add a step to the table and to a group, for arrays of some ranks."""

    def add(make):
        name = make.__name__.strip("_")
        STEPS[name] = lambda draw: make(draw) if len(draw.shape) in ranks else None
        group.append(name)
        return make

    return add


# Elementwise functions with a Lipschitz constant

ACTIVATIONS = _simple(
    {
        "relu": jax.nn.relu,
        "relu as maximum": lambda x: jnp.maximum(x, 0),
        "leaky relu": jax.nn.leaky_relu,
        "tanh": jnp.tanh,
        "sigmoid": jax.nn.sigmoid,
        "gelu": jax.nn.gelu,
        "exact gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "softplus": jax.nn.softplus,
        "silu": jax.nn.silu,
        "mish": jax.nn.mish,
        "elu": jax.nn.elu,
        "selu": jax.nn.selu,
        "celu": jax.nn.celu,
        "soft sign": jax.nn.soft_sign,
        "hard tanh": jax.nn.hard_tanh,
        "relu6": jax.nn.relu6,
        "abs": jnp.abs,
        "neg": lambda x: -x,
        "sin": jnp.sin,
        "cos": jnp.cos,
        "arctan": jnp.arctan,
        "arcsinh": jnp.arcsinh,
        "erf": jax.scipy.special.erf,
        "relu by hand": lambda x: (x + jnp.abs(x)) / 2,
        "hard swish": jax.nn.hard_swish,
        "hard sigmoid": jax.nn.hard_sigmoid,
        "squareplus": jax.nn.squareplus,
        "distance to one": lambda x: jnp.abs(1 - x),
    }
)


@_step(ACTIVATIONS)
def _clip(draw):
    lower, upper = np.sort(draw.rng.normal(size=2))
    lower, upper = draw.constant(lower), draw.constant(upper)
    return lambda x: jnp.clip(x, lower, upper)


@_step(ACTIVATIONS)
def _leaky_relu_of_any_slope(draw):
    slope = float(draw.choice(0.2, -0.5, 3.0, 1.0))
    return lambda x: jax.nn.leaky_relu(x, slope)


# Linear functions that leave the shape as it is

LINEAR: list[str] = []


@_step(LINEAR)
def _scale(draw):
    factor = draw.number()
    return lambda x: x * factor


@_step(LINEAR)
def _divide(draw):
    divisor = draw.constant(draw.choice(3.0, -0.5, draw.extreme()))
    return lambda x: x / divisor


@_step(LINEAR)
def _there_and_back(draw):
    factor = draw.constant(draw.choice(draw.extreme(), 3.0))
    return lambda x: x * factor * factor / factor / factor


@_step(LINEAR)
def _scale_entries(draw):
    factors = draw.kernel(*draw.shape)
    return lambda x: factors * x


@_step(LINEAR)
def _bias(draw):
    bias = draw.constant(draw.choice(0.3, 10.0) * draw.rng.normal(size=draw.shape))
    return lambda x: x + bias


@_step(LINEAR)
def _mask(draw):
    mask, other = draw.rng.integers(2, size=draw.shape, dtype=bool), draw.number()
    return lambda x: jnp.where(mask, x, other)


@_step(LINEAR)
def _mask_with_itself(draw):
    mask, factor = draw.rng.integers(2, size=draw.shape, dtype=bool), draw.number()
    return lambda x: jnp.where(mask, x, factor * x)


@_step(LINEAR, ranks=[1])
def _square_dense(draw):
    kernel = draw.kernel(draw.size, draw.size)
    return lambda x: x @ kernel


@_step(LINEAR)
def _flip(draw):
    axis = draw.axis() if draw.shape else None
    return lambda x: jnp.flip(x, axis)


@_step(LINEAR)
def _roll(draw):
    return lambda x: jnp.roll(x, 1)


@_step(LINEAR, ranks=ARRAYS)
def _cumsum(draw):
    axis, reverse = draw.axis(), draw.choice(False, True)
    return lambda x: jax.lax.cumsum(x, axis, reverse=reverse)


@_step(LINEAR)
def _centred(draw):
    return lambda x: x - jnp.mean(x)


PRESERVING = [*ACTIVATIONS, *LINEAR]  # of shape and dtype


# Layers and rearrangements

LAYERS: list[str] = []


@_step(LAYERS, ranks=ARRAYS)
def _dense(draw):
    kernel = draw.kernel(draw.shape[-1], draw.choice(1, 4))
    bias = draw.constant(draw.choice(0.0, 0.3, 3.0) * draw.rng.normal(size=kernel.shape[-1:]))
    return lambda x: x @ kernel + jnp.broadcast_to(bias, (*x.shape[:-1], *bias.shape))


@_step([])
def _dense_logits(draw):
    kernel = draw.constant(draw.rng.normal(size=(draw.size, 3)))
    return lambda x: x @ kernel


@_step(LAYERS, ranks=[1])
def _two_layers(draw):
    first, second = draw.kernel(draw.size, 4), draw.kernel(4, 4)
    bias = draw.constant(draw.rng.normal(size=4))
    activation = draw.choice(
        jax.nn.relu, jnp.tanh, jax.nn.sigmoid, jax.nn.leaky_relu, jax.nn.softplus
    )
    return lambda x: activation(x @ first + bias) @ second


@_step(LAYERS, ranks=[2])
def _dense_from_the_left(draw):
    kernel = draw.kernel(int(draw.rng.integers(1, 5)), draw.shape[0])
    return lambda x: kernel @ x


@_step(LAYERS, ranks=[2])
def _batched_einsum(draw):
    kernel = draw.kernel(draw.shape[0], draw.shape[1], 3)
    return lambda x: jnp.einsum("ab,abc->ac", x, kernel)


@_step(LAYERS)
def _conv(draw):
    """Over all axes but the last, its channels."""
    if len(draw.shape) not in (2, 3):
        return None
    *space, channels = draw.shape
    window = [int(draw.rng.integers(1, 4)) for _ in space]
    kernel = draw.kernel(*window, channels, int(draw.rng.integers(1, 4)))
    strides = [int(draw.rng.integers(1, 3)) for _ in space]
    padding = draw.choice("SAME", "VALID", [(1, 0)] * len(space), [(2, 2)] * len(space))
    dilation = [int(draw.choice(1, 1, 2)) for _ in space]
    layout = ("NWC", "WIO", "NWC") if len(space) == 1 else ("NHWC", "HWIO", "NHWC")

    def conv(x):
        return jax.lax.conv_general_dilated(
            x[None], kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=layout
        )[0]

    return conv


@_step(LAYERS, ranks=[2])
def _conv_by_groups(draw):
    kernel = draw.kernel(3, 1, 2 * draw.shape[1])

    def conv(x):
        return jax.lax.conv_general_dilated(
            x[None],
            kernel,
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=x.shape[1],
        )[0]

    return conv


@_step(LAYERS, ranks=[2])
def _transposed_conv(draw):
    kernel = draw.kernel(3, draw.shape[1], 2)
    return lambda x: jax.lax.conv_transpose(
        x[None], kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0]


@_step(LAYERS)
def _reshape(draw):
    factors = [n for n in range(1, draw.size + 1) if draw.size % n == 0]
    rows = int(draw.rng.choice(factors))
    return lambda x: x.reshape(rows, -1)


@_step(LAYERS)
def _as_image(draw):
    if draw.size % 4:
        return None
    return lambda x: x.reshape(2, -1, 2)


@_step(LAYERS)
def _ravel(draw):
    return jnp.ravel


@_step(LAYERS)
def _transpose(draw):
    return lambda x: x.T


@_step(LAYERS)
def _slice(draw):
    if not draw.shape or draw.shape[0] < 2:
        return None
    start, step = draw.choice(0, 1), draw.choice(1, 2, -1)
    return lambda x: x[start::step]


@_step(LAYERS, ranks=ARRAYS)
def _rows_by_index(draw):
    index = draw.rng.integers(draw.shape[0], size=draw.choice(2, 3, 5))
    return lambda x: x[index]


@_step(LAYERS, ranks=ARRAYS)
def _pad(draw):
    mode = draw.choice("constant", "edge", "wrap")
    return lambda x: jnp.pad(x, [(1, 1), *[(0, 0)] * (x.ndim - 1)], mode=mode)


@_step(LAYERS, ranks=ARRAYS)
def _interior_padding(draw):
    config = [(int(draw.rng.integers(-1, 2)), 1, int(draw.rng.integers(2))) for _ in draw.shape]
    value = draw.number()
    return lambda x: jax.lax.pad(x, value, config)


@_step(LAYERS, ranks=ARRAYS)
def _sum(draw):
    axis = draw.axis()
    return draw.choice(lambda x: x.sum(axis), lambda x: x.sum(axis, keepdims=True))


@_step(LAYERS)
def _mean(draw):
    axis = draw.axis() if draw.shape else None
    return lambda x: x.mean(axis)


@_step(LAYERS)
def _max(draw):
    axis = draw.axis() if draw.shape else None
    return draw.choice(lambda x: x.max(axis), lambda x: x.min(axis))


@_step(LAYERS)
def _broadcast(draw):
    return lambda x: jnp.broadcast_to(x, (2, *x.shape))


@_step(LAYERS)
def _repeat(draw):
    return draw.choice(lambda x: jnp.repeat(x, 2), lambda x: jnp.tile(x.ravel(), 2))


@_step(LAYERS, ranks=[2])
def _max_pool(draw):
    strides, padding = draw.choice(1, 2), draw.choice("SAME", "VALID")
    return lambda x: nn.max_pool(x, (min(2, x.shape[0]),), (strides,), padding)


@_step(LAYERS, ranks=[2])
def _avg_pool(draw):
    strides, padding = draw.choice(1, 2), draw.choice("SAME", "VALID")
    return lambda x: nn.avg_pool(x, (min(2, x.shape[0]),), (strides,), padding)


@_step(LAYERS, ranks=ARRAYS)
def _window_sum(draw):
    window = [int(draw.rng.integers(1, 4)) for _ in draw.shape]
    return lambda x: jax.lax.reduce_window(
        x, jnp.zeros((), x.dtype), jax.lax.add, window, [1] * x.ndim, "SAME"
    )


@_step(LAYERS, ranks=ARRAYS)
def _sort(draw):
    axis = draw.axis()
    return lambda x: jnp.sort(x, axis)


@_step(LAYERS, ranks=ARRAYS)
def _top_values(draw):
    return lambda x: jax.lax.top_k(x, 1)[0]


@_step(LAYERS, ranks=ARRAYS)
def _with_a_constant(draw):
    rows = draw.kernel(2, *draw.shape[1:])
    return lambda x: jnp.concatenate([rows, x])


@_step(LAYERS, ranks=[1])
def _outer_sum(draw):
    return lambda x: x[:, None] + x[None, :]


@_step(LAYERS)
def _differences(draw):
    return (lambda x: jnp.diff(x, axis=0)) if draw.shape and draw.shape[0] > 1 else None


# Functions that are Lipschitz, but for which each part need not be

SMOOTH = _simple(
    {
        "softmax": lambda x: jax.nn.softmax(x, axis=None),
        "log softmax": lambda x: jax.nn.log_softmax(x, axis=None),
        "logsumexp": jax.scipy.special.logsumexp,
        "log sigmoid": jax.nn.log_sigmoid,
        "standardised": lambda x: jax.nn.standardize(x, axis=None, epsilon=0.1),
        "length": lambda x: jnp.sqrt(jnp.sum(x**2)),
        "safe length": lambda x: jnp.sqrt(1 + jnp.sum(x**2)),
        "rms norm": lambda x: x * jax.lax.rsqrt(0.1 + jnp.mean(x**2)),
        "relu by where": lambda x: jnp.where(x > 0, x, 0),
        "log cosh": lambda x: jnp.logaddexp(x, -x),
        "norm": jnp.linalg.norm,
        "softmax by hand": lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x)),
        "softmin along an axis": lambda x: jax.nn.softmax(-x, axis=-1) if x.ndim else x,
        "standard deviation": lambda x: jnp.sqrt(jnp.var(x) + 1e-2),
        "median": jnp.median,
        "cumulative maximum": lambda x: jax.lax.cummax(jnp.ravel(x)),
        "relative": lambda x: x / (1 + jnp.abs(x)),
        "relative to the sum": lambda x: x / (1 + jnp.sum(jnp.abs(x))),
        "cosine similarity": lambda x: jnp.sum(x) / jnp.sqrt(0.1 + jnp.sum(x**2)),
    }
)


@_step(SMOOTH, ranks=ARRAYS)
def _normalisation_of_flax(draw):
    layer = draw.choice(
        nn.LayerNorm(epsilon=0.1), nn.RMSNorm(epsilon=0.1), nn.GroupNorm(1, epsilon=0.1)
    )
    if isinstance(layer, nn.GroupNorm):
        return lambda x: layer.apply(layer.init(jax.random.key(0), x[None]), x[None])[0]
    return lambda x: layer.apply(layer.init(jax.random.key(0), x), x)


@_step(SMOOTH, ranks=ARRAYS)
def _layer_norm(draw):
    scale = draw.kernel(draw.shape[-1])

    def layer_norm(x):
        centred = x - x.mean(-1, keepdims=True)
        spread = jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 0.01)
        return centred / spread * jnp.broadcast_to(scale, x.shape)

    return layer_norm


@_step(SMOOTH)
def _interpolated(draw):
    places, values = np.sort(draw.rng.normal(size=4)), draw.rng.normal(size=4)
    places, values = draw.constant(places), draw.constant(values)
    return lambda x: jnp.interp(x, places, values).astype(x.dtype)


# Products, powers and quotients: Lipschitz in a box at most

PRODUCTS = _simple(
    {
        "square": jnp.square,
        "cube": lambda x: x**3,
        "product of signals": lambda x: x * jnp.tanh(x),
        "product with its flip": lambda x: x * jnp.flip(x),
        "exp": jnp.exp,
        "sqrt": lambda x: jnp.sqrt(jnp.abs(x)),
        "reciprocal": lambda x: 1 / (1 + x**2),
        "log": lambda x: jnp.log(1 + jnp.abs(x)),
        "gram": lambda x: jnp.outer(x, x),
        "product of all": jnp.prod,
        "normalised": lambda x: x / jnp.sqrt(1e-3 + jnp.sum(x**2)),
        "power": lambda x: (1 + jnp.abs(x)) ** 1.5,
        "gated": lambda x: jax.nn.sigmoid(x) * jnp.flip(x),
        "swish of another": lambda x: jax.nn.silu(jnp.flip(x)) * x,
        "clipped product": lambda x: jnp.clip(x, -1, 1) * jnp.clip(jnp.flip(x), -2, 0.5),
        "softmax times values": lambda x: jax.nn.softmax(x, axis=None) * x,
        "fourth power": lambda x: jnp.square(jnp.square(x)),
        "inverse square": lambda x: x**-2,
        "inverse": lambda x: 1 / x,
        "inverse root": jax.lax.rsqrt,
        "root": jnp.sqrt,
        "logarithm": jnp.log,
        "log1p": jnp.log1p,
        "expm1": jnp.expm1,
        "exp2": jnp.exp2,
        "sinh": jnp.sinh,
        "tan": jnp.tan,
        "arcsin": lambda x: jnp.arcsin(x / 4),
        "cube root": jnp.cbrt,
        "entropy": lambda x: -jnp.sum(jax.nn.softmax(x, None) * jax.nn.log_softmax(x, None)),
        "ratio": lambda x: x / jnp.flip(x),
        "ratio of exponentials": lambda x: jnp.exp(x) / (1 + jnp.exp(jnp.flip(x))),
        "energy of the spectrum": lambda x: jnp.abs(jnp.fft.fft(jnp.atleast_1d(x))) ** 2,
        "pairwise distances": lambda x: jnp.square(x.ravel()[:, None] - x.ravel()[None, :]),
        "cumulative product": lambda x: jnp.cumprod(jnp.ravel(x)),
        "exponent by squaring": lambda x: jax.lax.fori_loop(0, 2, lambda i, h: h * h, x),
    }
)


@_step(PRODUCTS, ranks=[2])
def _attention(draw):
    queries, keys, values = (draw.kernel(draw.shape[1], 2) for _ in range(3))

    def attention(x):
        scores = jnp.einsum("ad,bd->ab", x @ queries, x @ keys)
        return jax.nn.softmax(scores, axis=-1) @ (x @ values)

    return attention


@_step(PRODUCTS, ranks=[1])
def _bilinear(draw):
    kernel = draw.kernel(draw.size, draw.size)
    return draw.choice(
        lambda x: x @ (kernel @ jnp.tanh(x)),
        lambda x: jnp.einsum("a,ab,b->a", x, kernel, x),
        lambda x: jnp.outer(jnp.tanh(x), x) @ kernel,
    )


# Jumps: piecewise constant functions used as numbers. No constant holds for most of them.

JUMPS = _simple(
    {
        "argsort": lambda x: jnp.argsort(jnp.atleast_1d(x)).astype(x.dtype),
        "ranks": lambda x: jnp.argsort(jnp.argsort(x.ravel())).astype(x.dtype),
        "argmax": lambda x: jnp.argmax(x).astype(x.dtype),
        "one hot of argmax": lambda x: jax.nn.one_hot(jnp.argmax(x), 3, dtype=x.dtype),
        "comparison": lambda x: (x > 0).astype(x.dtype),
        "comparison in where": lambda x: jnp.where(x > 0, 1, 0).astype(x.dtype),
        "equality": lambda x: (x == jnp.flip(x)).astype(x.dtype),
        "sign": jnp.sign,
        "round": jnp.round,
        "floor": jnp.floor,
        "to integers": lambda x: x.astype(jnp.int32).astype(x.dtype),
        "modulo": lambda x: x % 1,
        "jump by where": lambda x: jnp.where(x > 0, x, x + 1),
        "jump by cond": lambda x: jax.lax.cond(jnp.sum(x) > 0, lambda y: y, lambda y: y + 1, x),
        "heaviside": lambda x: jnp.heaviside(x, 0),
        "entry at argmax": lambda x: jnp.flip(x.ravel())[jnp.argmax(x)],
        "finite": lambda x: jnp.isfinite(x).astype(x.dtype),
        "sum of comparisons": lambda x: jnp.sum(x > 0).astype(x.dtype),
        "any": lambda x: jnp.any(x > 0).astype(x.dtype),
        "binned": lambda x: jnp.digitize(x, jnp.zeros(1, x.dtype)).astype(x.dtype),
        "dynamic slice": lambda x: jax.lax.dynamic_slice(
            jnp.arange(9.0).astype(x.dtype), (jnp.argmax(x),), (1,)
        ),
        "while": lambda x: jax.lax.while_loop(
            lambda y: jnp.sum(jnp.abs(y)) > 1, lambda y: y / 2, x
        ),
    }
)


@_step(JUMPS, ranks=ARRAYS)
def _top_indices(draw):
    return lambda x: jax.lax.top_k(x, 1)[1].astype(x.dtype)


@_step(JUMPS, ranks=ARRAYS)
def _sorted_payload(draw):
    payload = draw.kernel(*draw.shape)
    return lambda x: jax.lax.sort_key_val(x, jnp.asarray(payload))[1]


@_step(JUMPS, ranks=ARRAYS)
def _sorted_with_itself(draw):
    """The keys are scaled copies of the values, or their flip."""
    return draw.choice(
        lambda x: jax.lax.sort((x, 2 * x), num_keys=1)[1],
        lambda x: jax.lax.sort((x, jnp.flip(x)), num_keys=1)[1],
        lambda x: jax.lax.sort((jnp.flip(x), x), num_keys=2)[0],
    )


@_step(JUMPS, ranks=ARRAYS)
def _rows_at_argsort(draw):
    table = draw.kernel(*draw.shape)
    return draw.choice(
        lambda x: jnp.take_along_axis(x, jnp.argsort(x, 0), 0),
        lambda x: jnp.take_along_axis(jnp.asarray(table), jnp.argsort(x, 0), 0),
    )


@_step(JUMPS)
def _gradient(draw):
    """The gradient of a sum of activations, which jumps where the activation has a kink."""
    activation = draw.inner(ACTIVATIONS, 1)
    return jax.grad(lambda y: jnp.sum(activation(y)))


@_step(JUMPS, ranks=ARRAYS)
def _gradient_of_a_selection(draw):
    weights = draw.kernel(*draw.shape)
    loss = draw.choice(
        jnp.max,
        lambda x: jnp.sum(jnp.sort(x, 0) * weights),
        jnp.linalg.norm,
        lambda x: jnp.sum(jnp.clip(x, -0.1, 0.1) * weights),
    )
    return jax.grad(loss)


# Precision

CASTS: list[str] = []


def _cast(dtype):
    return lambda draw: (lambda x: x.astype(dtype)) if draw.arithmetic.casts else (lambda x: x)


for _name in ("bfloat16", "float16", "float32"):
    STEPS[f"to {_name}"] = _cast(jnp.dtype(_name))
    CASTS.append(f"to {_name}")


# Transformations and control flow around other steps

STRUCTURES: list[str] = []


@_step(STRUCTURES)
def _jit(draw):
    return jax.jit(draw.inner([*PRESERVING, *LAYERS]))


@_step(STRUCTURES)
def _checkpoint(draw):
    return jax.checkpoint(draw.inner([*PRESERVING, *LAYERS]))


@_step(STRUCTURES)
def _residual(draw):
    branch = draw.inner(PRESERVING)
    return lambda x: x + branch(x)


@_step(STRUCTURES)
def _difference_of_branches(draw):
    one, other = draw.inner(PRESERVING), draw.inner(PRESERVING)
    return lambda x: one(x) - other(x)


@_step(STRUCTURES)
def _larger_of_branches(draw):
    one, other = draw.inner(PRESERVING), draw.inner(PRESERVING)
    join = draw.choice(jnp.maximum, jnp.minimum)
    return lambda x: join(one(x), other(x))


@_step(STRUCTURES, ranks=ARRAYS)
def _concatenated_branches(draw):
    one, other = draw.inner(PRESERVING), draw.inner(PRESERVING)
    return lambda x: jnp.concatenate([one(x), other(x)])


# The next three hide their derivative, but not from the oracle.


@_step(STRUCTURES)
def _stop_gradient(draw):
    branch = draw.inner(PRESERVING)
    hide = jax.lax.stop_gradient if draw.arithmetic.casts else lambda y: y
    return lambda x: x + hide(branch(x))


@_step(STRUCTURES)
def _wrong_gradient(draw):
    """A function whose derivative, by its own account, is zero."""
    branch = draw.inner(PRESERVING)
    if not draw.arithmetic.casts:
        return branch
    fn = jax.custom_jvp(branch)
    fn.defjvp(lambda primals, tangents: (branch(primals[0]), jnp.zeros_like(tangents[0])))
    return fn


@_step(STRUCTURES)
def _wrong_vector_product(draw):
    branch = draw.inner(PRESERVING)
    if not draw.arithmetic.casts:
        return branch
    fn = jax.custom_vjp(branch)
    fn.defvjp(lambda x: (branch(x), None), lambda _, g: (jnp.zeros_like(g),))
    return fn


@_step(STRUCTURES)
def _unused(draw):
    """Results that nothing reads, one of them a jump."""
    branch = draw.inner(PRESERVING)

    def unused(x):
        _ = jnp.argsort(x.ravel()), jnp.exp(x), x.astype(jnp.int32)
        return branch(x)

    return jax.jit(unused)


@_step(STRUCTURES)
def _scan(draw):
    branch = draw.inner(PRESERVING, 1)
    factors = draw.kernel(3)

    def scan(x):
        return jax.lax.scan(lambda h, w: (branch(h) * w, None), x, jnp.asarray(factors))[0]

    return scan


@_step(STRUCTURES, ranks=ARRAYS)
def _scan_over_rows(draw):
    """Rows in, rows out, and a carry that the last row may overwrite."""
    row = draw.constant(np.zeros(draw.shape[1:]))
    reverse = draw.choice(False, True)
    kind = draw.choice("overwritten", "summed", "kept", "shifted")
    factor = draw.number()

    def body(h, x):
        return {
            "overwritten": (x, h),
            "summed": (h + x, h * factor),
            "kept": (h, x * factor),
            "shifted": (x * factor, x + h),
        }[kind]

    def scan(x):
        carry, rows = jax.lax.scan(body, jnp.asarray(row), x, reverse=reverse)
        return jnp.concatenate([carry[None], rows])

    return scan


@_step(STRUCTURES)
def _scan_that_overwrites(draw):
    """Two carries that change places, or of which one is replaced in the last step."""
    branch, factor = draw.inner(PRESERVING, 1), draw.number()
    flags = np.array([False, False, True])
    kind = draw.choice("swapped", "replaced", "delayed")

    def body(carry, last):
        a, b = carry
        if kind == "swapped":
            return (b * factor, branch(a)), None
        if kind == "replaced":
            return (jnp.where(last, b * factor, branch(a)), b), None
        return (b, a + b), None

    def scan(x):
        a, b = jax.lax.scan(body, (x, x), jnp.asarray(flags))[0]
        return a + b if kind == "delayed" else a

    return scan


@_step(STRUCTURES)
def _fori_loop(draw):
    branch = draw.inner(PRESERVING, 1)
    return lambda x: jax.lax.fori_loop(0, 3, lambda i, h: branch(h), x)


@_step(STRUCTURES)
def _weights_by_iteration(draw):
    branch = draw.inner(PRESERVING, 1)
    table = draw.kernel(3)
    return lambda x: jax.lax.fori_loop(0, 3, lambda i, h: branch(h) * jnp.asarray(table)[i], x)


@_step(STRUCTURES)
def _cond_of_a_constant(draw):
    one, other, flag = draw.inner(PRESERVING), draw.inner(PRESERVING), draw.choice(False, True)
    return lambda x: jax.lax.cond(flag, one, other, x)


@_step(STRUCTURES, ranks=ARRAYS)
def _vmap(draw):
    row = dataclasses.replace(draw, like=jax.ShapeDtypeStruct(draw.shape[1:], draw.like.dtype))
    return jax.vmap(row.inner([*PRESERVING, *LAYERS]))


@_step(STRUCTURES, ranks=ARRAYS)
def _scattered(draw):
    factor = draw.number()
    return draw.choice(
        lambda x: x.at[0].set(x[-1] * factor),
        lambda x: x.at[0].add(x[-1]),
        lambda x: jnp.zeros_like(x).at[jnp.array([0, 0, -1])].add(x[jnp.array([0, -1, 0])]),
        lambda x: x.at[0].multiply(factor),
        lambda x: x.at[0].max(x[-1]),
    )


@_step(STRUCTURES)
def _printed(draw):
    def printed(x):
        jax.debug.callback(lambda y: None, x)
        return x

    return printed


@_step(STRUCTURES)
def _by_the_spectrum(draw):
    if not draw.shape or (draw.arithmetic.casts and draw.like.dtype != jnp.float32):
        return None
    return lambda x: jnp.fft.ifft(jnp.fft.fft(x)).real.astype(x.dtype)


@_step(STRUCTURES)
def _filtered_spectrum(draw):
    """A circular convolution, by complex products."""
    if not draw.shape or (draw.arithmetic.casts and draw.like.dtype != jnp.float32):
        return None
    kernel = draw.kernel(*draw.shape)
    real = draw.choice(False, True)

    def filtered(x):
        forth, back = (jnp.fft.rfft, jnp.fft.irfft) if real else (jnp.fft.fft, jnp.fft.ifft)
        product = forth(x) * forth(jnp.asarray(kernel))
        back = functools.partial(back, n=x.shape[-1]) if real else back
        return jnp.real(back(product)).astype(x.dtype)

    return filtered


@_step(STRUCTURES)
def _pulled_back(draw):
    """The transposed Jacobian at a constant: linear, by the transposes of all operations."""
    branch = draw.inner([*LAYERS, *PRESERVING], 2)
    at = draw.constant(draw.rng.normal(size=draw.shape))

    def pulled_back(x):
        _, pull = jax.vjp(branch, jnp.asarray(at))
        return pull(branch(x))[0]

    return pulled_back


@_step(STRUCTURES)
def _pushed_forward(draw):
    """The Jacobian at a constant."""
    branch = draw.inner([*LAYERS, *PRESERVING], 2)
    at = draw.constant(draw.rng.normal(size=draw.shape))
    return lambda x: jax.jvp(branch, (jnp.asarray(at),), (x,))[1]


@_step(STRUCTURES)
def _cond_of_a_number(draw):
    """The predicate is known, unless constants are traced."""
    one, other, number = draw.inner(PRESERVING), draw.inner(PRESERVING), draw.number()
    return lambda x: jax.lax.cond(jnp.asarray(number) > 0, one, other, x)


@_step(STRUCTURES, ranks=ARRAYS)
def _at_an_index(draw):
    """The index is known, unless constants are traced."""
    number = draw.constant(draw.rng.integers(draw.shape[0]))

    def at_an_index(x):
        index = jnp.asarray(number).astype(jnp.int32)
        return jnp.stack([x[index], jax.lax.dynamic_index_in_dim(x, index, keepdims=False)])

    return at_an_index


@_step(STRUCTURES)
def _updated(draw):
    if not draw.shape or draw.shape[0] < 2:
        return None
    branch = draw.inner(PRESERVING, 1)
    return draw.choice(
        lambda x: jax.lax.dynamic_update_slice_in_dim(x, branch(x)[:1], 1, 0),
        lambda x: jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(x), branch(x)[:1], 1, 0),
        lambda x: x.at[1:].set(branch(x)[:-1]),
    )


@_step(STRUCTURES, ranks=ARRAYS)
def _associative_scan(draw):
    join = draw.choice(jnp.add, jnp.maximum)
    return lambda x: jax.lax.associative_scan(join, x)


@_step(STRUCTURES, ranks=ARRAYS)
def _mapped(draw):
    row = dataclasses.replace(draw, like=jax.ShapeDtypeStruct(draw.shape[1:], draw.like.dtype))
    branch = row.inner(PRESERVING)
    return lambda x: jax.lax.map(branch, x)
