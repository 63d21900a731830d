"""Lipschitz bounds of the layers of networks (table 5; 12 min; MNIST or a sample).

The paper prints a bound for each layer of a trained AlexNet and multiplies them. Three of its steps
do not hold. The factor for a stride s is 1/s, not 1/s^2. Max-pooling with overlapping windows, as
in AlexNet, can double a difference. And the norm of the cyclic convolution on the image's grid does
not bound that of the convolution with zero padding. So each layer is shown in several readings: the
paper's formula with either factor (NumPy's FFT and SVD, half of the frequencies, the image rounded
up to a multiple of the stride); two lower estimates, by power iteration and by Lanczos on the layer
itself; and the certified bound of `lipschitz.bound`.

The weights of the paper's AlexNet are lost. We measure its architecture with random weights (He et
al., 2015), which hardly affect the times, and with a weight file if one is given; the paper's
numbers are for trained weights. A whole network is bounded by the product and, more tightly, by
`lipschitz.eclipse` and `lipschitz.lipsdp` for the chains of layers in it; the latter would take
hours for AlexNet. Its slope is estimated from below, by the largest norm of its Jacobian at some
inputs: test digits for the MNIST networks, Gaussian noise for AlexNet.

AlexNet is measured once, the MNIST networks for each seed. The times are those of compiled programs
on an otherwise idle machine; compilation is reported separately.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key, PyTree

from advjax import lipschitz, models
from advjax.lipschitz import Conv, Dense
from experiments.common import markdown, networks, paper, statistics
from experiments.common.claims import Claim
from experiments.common.measure import Content, Row, grouped
from experiments.common.options import DigitOptions, Digits, trial
from experiments.common.slopes import estimate, input_like, steepest

NETWORKS = ("FC100-100-10", "ConvNet")
PAPERS = "AlexNet, random weights"
GIVEN = "AlexNet, given weights"

TIGHTER = {"eclipse": lipschitz.eclipse, "lipsdp": lipschitz.lipsdp}

WAYS = {
    "bound": "certified bound",
    "numpy": "NumPy's FFT and SVD",
    "power": "power iteration",
    "lanczos": "Lanczos",
}
_WORDS = {
    "reduce_window_max": "max-pooling",
    "normalise": "normalisation",
    "logistic": "sigmoid",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
    """Bounds each layer of each network in the paper's way and in ours, and times AlexNet's."""

    images: int = 256
    """At how many test images to estimate the slope of the MNIST networks."""
    weights: Path | None = None
    """A weight file of torchvision's AlexNet, PyTorch or safetensors, to bound too."""
    seeds: int = 3
    TRIAL = trial(images=16, seeds=1)
    TRIAL_STEPS = 20


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Bound each network."""
    key = jax.random.key(seed)
    inputs = jnp.asarray(digits.test.images[: options.images])
    rows = []
    for name in NETWORKS[:1] if options.quick else NETWORKS:
        network = networks.load_or_train(key, name, digits.train, steps=options.steps)
        rows.append(_bounds(name, network.logits_fn, inputs))
    if seed == 0:
        alexnets = _alexnets(jax.random.fold_in(key, 5), options.weights, options.quick)
        rows += [_bounds(*alexnet) for alexnet in alexnets]
    return {"rows": rows, "pool_stretch": _pool_stretch()}


# --- the networks --------------------------------------------------------------------------------


def _alexnets(
    key: Key[Array, ""], weights: Path | None, quick: bool
) -> Iterator[tuple[str, jax.tree_util.Partial, Float[Array, "n height width 3"]]]:
    """The name, the logits function and some inputs of each AlexNet."""
    small = {"channels": (8, 12, 12, 12, 8), "features": (16, 16, 10)}
    wide = {"channels": (96, 256, 384, 384, 256)}
    options: dict[str, Any] = small if quick else wide
    model = models.AlexNet(padding=0, normalize=models.local_response_norm, **options)
    weight_key, noise_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (4, 227, 227, 3))
    noise = noise[:1, :67, :67] if quick else noise
    params = _he(weight_key, jax.eval_shape(model.init, key, noise[0]))
    yield PAPERS, jax.tree_util.Partial(model.apply, params), noise
    if weights is not None:
        model = models.AlexNet()
        params = models.alexnet_from_torch(model, models.load_torch_weights(weights))
        yield GIVEN, jax.tree_util.Partial(model.apply, params), noise[:, :224, :224]


def _he(key: Key[Array, ""], shapes: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """Kernels of variance `2 / fan_in`, and biases of 0."""
    leaves, tree = jax.tree.flatten(shapes)
    draw, zeros = nn.initializers.he_normal(), nn.initializers.zeros
    keys = jax.random.split(key, len(leaves))
    arrays = [
        (draw if len(leaf.shape) > 1 else zeros)(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)


# --- measuring -------------------------------------------------------------------------------


def _bounds(name: str, logits_fn: Callable, inputs: Float[Array, "n *shape"]) -> Row:
    """Bound each layer of a network in all readings, and the network as a whole."""
    print(f"{name}: bounding", flush=True)
    bound, seconds = _timed(lipschitz.bound, logits_fn, inputs[0])
    linear = iter(lipschitz.linear_layers(logits_fn, inputs[0]))
    layers = []
    for layer in bound.layers:
        *modules, operation = layer.name.split("/")
        is_linear = operation in ("conv_general_dilated", "dot_general")
        layers.append(
            {
                "layer": modules[-1] if is_linear else _WORDS.get(operation, operation),
                "bound": float(layer.gain),
                **(_readings(next(linear)) if is_linear else {}),
            }
        )
    tighter = {
        method: float(lipschitz.bound(logits_fn, inputs[0], method=TIGHTER[method]).constant)
        for method in (TIGHTER if name in NETWORKS else ("eclipse",))
    }
    return {
        "net": name,
        "layers": layers,
        "bound": float(bound.constant),
        "tighter": tighter,
        "seconds": seconds,
        "steepest": float(steepest(logits_fn, inputs)),
    }


def _readings(stack: Dense | Conv) -> dict[str, Any]:
    """The other readings of a layer's norm, their times, and the stride."""
    layer = jax.tree.map(lambda kernels: kernels[0], stack)
    found, seconds = {}, {}
    for name, method in (("power", lipschitz.power_iteration), ("lanczos", lipschitz.lanczos)):
        compiled = estimate.lower(method, layer).compile()
        found[name], seconds[name] = _timed(compiled, layer)
    found["unscaled"], seconds["numpy"] = _timed(unscaled_norm, layer)
    # Already compiled for the bound of the whole network.
    like = input_like(layer)
    _, seconds["bound"] = _timed(functools.partial(lipschitz.bound, layer.apply), like)
    stride = layer.axes[0].stride if isinstance(layer, Conv) else 1
    values = {name: float(value) for name, value in found.items()}
    return {**values, "stride": stride, "seconds": seconds}


def _timed(fn: Callable, *args: Any) -> tuple[Any, float]:
    """Return the result of a function, and the seconds that it took."""
    start = time.perf_counter()
    found = jax.block_until_ready(fn(*args))
    return found, time.perf_counter() - start


def unscaled_norm(layer: Dense | Conv) -> Float[np.ndarray, ""]:
    """Compute the paper's `sup |A(xi)|`, without its factor for the stride, with NumPy.

    Args:
        layer: A dense layer, or a convolution along two axes, which is taken as cyclic on the grid
            of its input, rounded up to a multiple of the stride.

    Returns:
        The largest singular value of all A(xi), whose rows are the aliases of a frequency. Half of
        the frequencies suffice, since the kernel is real.

    Source: Szegedy et al. (2013), section 4.3.
    """
    kernel = np.asarray(layer.kernel)
    if isinstance(layer, Dense):
        return np.linalg.svd(kernel, compute_uv=False)[0]
    (rows, s), (columns, t) = ((-(-a.size // a.stride), a.stride) for a in layer.axes)
    spectrum = np.fft.fft2(kernel, (rows * s, columns * t), axes=(0, 1))
    # Frequencies `xi + l N / s` of the input, for all l, map to frequency xi of the output.
    aliases = spectrum.reshape(s, rows, t, columns, *kernel.shape[2:])[:, :, :, : columns // 2 + 1]
    matrices = np.moveaxis(aliases, (0, 2), (2, 3))
    matrices = matrices.reshape(*matrices.shape[:2], -1, kernel.shape[-1])
    return np.linalg.svd(matrices, compute_uv=False).max()


def _pool_stretch() -> float:
    """By how much AlexNet's pooling stretches a difference of one pixel."""

    def pool(x: Array) -> Array:
        return nn.max_pool(x, (3, 3), (2, 2))

    pixel = jnp.zeros((5, 5, 1)).at[2, 2].set(1.0)
    return float(jnp.linalg.norm(jnp.ravel(pool(pixel) - pool(jnp.zeros_like(pixel)))))


# --- words -----------------------------------------------------------------------------------


def describe(content: Content) -> str:
    """A table for each network, one for the whole networks, and one of the times."""
    parts = []
    for row in content["runs"][0]["rows"]:
        parts.append(f"{row['net']}, seed 0:\n\n{_layers(row)}")
        if row["net"] == PAPERS:
            parts.append(_corrected(row))
    whole = markdown.table(
        [
            ("network", name),
            ("product", _over([row["bound"] for row in rows])),
            *(
                (
                    f"`{method}`",
                    _over([row["tighter"][method] for row in rows if method in row["tighter"]]),
                )
                for method in TIGHTER
            ),
            ("steepest slope found", _over([row["steepest"] for row in rows])),
        ]
        for name, rows in grouped(content, "net").items()
    )
    parts.append(f"The whole networks, over the seeds:\n\n{whole}")
    parts += [_times(row) for row in content["runs"][0]["rows"] if row["net"] not in NETWORKS]
    parts[0] = "Products are over the rows that have a value.\n\n" + parts[0]
    return "\n\n".join(parts)


def _over(values: Sequence[float]) -> str:
    return markdown.number(statistics.mean(values), 2) if values else "-"


def _layers(row: Row) -> str:
    printed = iter(paper.TABLE5.values() if row["net"] not in NETWORKS else ())
    lines: list[list[float | None]] = []
    for layer in row["layers"]:
        readings: list[float | None] = [None] * 5
        if "lanczos" in layer:
            known = next(printed, None)
            formula = [layer["unscaled"] / layer["stride"] ** power for power in (2, 1)]
            bound = None if known is None else known.bound
            readings = [bound, *formula, layer["power"], layer["lanczos"]]
        lines.append([*readings, layer["bound"]])
    columns = [[x for x in column if x is not None] for column in zip(*lines, strict=True)]
    lines.append([math.prod(column) if column else None for column in columns])
    names = [*(layer["layer"] for layer in row["layers"]), "product"]
    readings_of = ("formula, 1/s²", "formula, 1/s", "power iteration", "Lanczos", "certified")
    return markdown.grid(
        ("layer", "paper", *readings_of),
        ((name, *map(_cell, line)) for name, line in zip(names, lines, strict=True)),
    )


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2e}" if value >= 1e5 else f"{value:.4g}"


def _corrected(row: Row) -> str:
    bounds = [one.bound for one in paper.TABLE5.values()]
    stride = math.prod(one.stride or 1 for one in paper.TABLE5.values())
    pools, normalised = (
        math.prod(layer["bound"] for layer in row["layers"] if layer["layer"] == word)
        for word in ("max-pooling", "normalisation")
    )
    return (
        f"The paper's bounds multiply to {math.prod(bounds):.2g}. With 1/s for 1/s² they would be "
        f"{stride:g} times that, with the certified factors of the pools {pools:.3g} times and of "
        f"the normalisations {normalised:.3g} times: "
        f"{math.prod(bounds) * stride * pools * normalised:.2g} in all."
    )


def _times(row: Row) -> str:
    linear = [layer for layer in row["layers"] if "lanczos" in layer]

    def cell(layer: Row, way: str) -> str:
        value = layer["unscaled"] / layer["stride"] if way == "numpy" else layer[way]
        return f"{layer['seconds'][way]:.2f} ({value / layer['lanczos']:.4f})"

    in_all = [sum(layer["seconds"][way] for layer in linear) for way in WAYS]
    times = markdown.grid(
        ("layer", *WAYS.values()),
        [
            *((layer["layer"], *(cell(layer, way) for way in WAYS)) for layer in linear),
            ("in all", *(f"{seconds:.2f}" for seconds in in_all)),
        ],
    )
    return f"""\
{row["net"]}: seconds for each layer, and in brackets the value divided by that of Lanczos. The
first bound of the whole network took {row["seconds"]:.1f} s, including compilation.

{times}"""


def claims(content: Content) -> list[Claim]:
    """Products bound the network; the stride's factor; pooling; the numbers of Table 5."""
    every = [row for run in content["runs"] for row in run["rows"]]
    looseness, tightest = (
        {
            name: [of(row) / row["steepest"] for row in rows]
            for name, rows in grouped(content, "net").items()
        }
        for of in (lambda row: row["bound"], lambda row: min(row["tighter"].values()))
    )
    convolutions = [
        layer for row in every for layer in row["layers"] if layer["layer"].startswith("conv")
    ]
    short = {
        layer["stride"]: layer["lanczos"] / (layer["unscaled"] / layer["stride"] ** 2)
        for layer in convolutions
        if layer["stride"] > 1
    }
    held = sum(
        layer["unscaled"] / layer["stride"] >= layer["lanczos"] * (1 - 1e-5)
        for layer in convolutions
    )
    stretch = max(run["pool_stretch"] for run in content["runs"])
    given = [row for row in every if row["net"] == GIVEN]
    return [
        Claim(
            "A network is at most as steep as the product of its layers' bounds",
            "stated; 7.9e5 for AlexNet",
            "never exceeded, but loose: it exceeds the steepest slope found by a factor of "
            + ", ".join(f"{np.mean(some):.3g} ({name})" for name, some in looseness.items())
            + "; the tightest of our bounds does so by "
            + ", ".join(f"{np.mean(some):.3g}" for some in tightest.values()),
            "holds" if min(map(min, tightest.values())) >= 1 else "does not hold",
        ),
        Claim(
            "A convolution of stride s has the norm sup |A(ξ)| / s²",
            "stated",
            "the lower estimate is "
            + ", ".join(f"{more:.2f} (s = {s})" for s, more in sorted(short.items()))
            + " times that: the factor is 1/s. With it the cyclic norm on the image's grid, which "
            f"is no bound under zero padding, happens to bound {held} of the "
            f"{len(convolutions)} convolutions",
            "does not hold" if max(short.values()) > 1.001 else "holds",
        ),
        Claim(
            "Max-pooling is contractive",
            "stated",
            f"a change of one pixel where four of AlexNet's windows overlap changes the result "
            f"{stretch:g} times as much",
            "does not hold" if stretch > 1 else "holds",
        ),
        Claim(
            "AlexNet's layers have bounds of 2.75 to 11",
            "Table 5",
            "its weights are lost; with random ones the certified bounds are "
            + _span([row for row in every if row["net"] == PAPERS])
            + "".join(f", with the given ones {_span([row])}" for row in given),
            "cannot be tested here",
        ),
    ]


def _span(rows: Sequence[Row]) -> str:
    bounds = [layer["bound"] for row in rows for layer in row["layers"] if "lanczos" in layer]
    return f"{min(bounds):.2f} to {max(bounds):.2f}"
