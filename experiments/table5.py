"""Lipschitz bounds of each layer, AlexNet's too (table 5; 12 min; MNIST or a sample).

The paper prints a bound of each layer of a trained AlexNet and multiplies them. Three of its steps
do not hold: the factor of a stride s is 1/s, not 1/s^2; max-pooling whose windows overlap, as
AlexNet's do, can double a difference; and the norm of the cyclic convolution on the grid of the
image is no bound of the one with zero padding. So each layer is shown in several readings: the
paper's formula with either factor (by NumPy's FFT and SVD, half of the frequencies, the image
rounded up to a multiple of the stride); two estimates from below, by power iteration and by
Lanczos on the layer as it is; and the certified bound of `lipschitz.bound`.

The weights of the paper's AlexNet are lost. Its architecture is measured with random ones (He et
al., 2015), on which the times depend little, and with any that are given; the paper's numbers are
of trained ones. A whole net is bounded by the product and, tighter, by `lipschitz.eclipse` and
`lipschitz.lipsdp` of the chains of layers in it; the latter of AlexNet would take hours. Its slope
is estimated from below, too: the largest norm of its Jacobian at some inputs, test digits for the
MNIST nets and Gaussian noise for AlexNet.

AlexNet is measured once, the MNIST nets for each seed. The times are of compiled programs, in
which nothing else ran on the machine if you left it alone; compilation is shown beside them.
"""

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
from experiments import nets, paper, results

NETS = ("FC100-100-10", "ConvNet")
PAPERS = "AlexNet, random weights"
GIVEN = "AlexNet, given weights"

TIGHTER = {"eclipse": lipschitz.eclipse, "lipsdp": lipschitz.lipsdp}

_WORDS = {
    "reduce_window_max": "max-pooling",
    "normalise": "normalisation",
    "logistic": "sigmoid",
}


def main(
    *,
    images: int = 256,
    seeds: int = 3,
    weights: Path | None = None,
    dataset: results.Name = "mnist",
    source: results.Source = "auto",
    out: Path = Path("results"),
    quick: bool = False,
    reuse: bool = False,
) -> dict[str, Any]:
    """Bounds each layer of each net in the paper's way and in ours, and times AlexNet's.

    Args:
        images: At how many test images to take the slope of the MNIST nets.
        seeds: How many times to train the MNIST nets.
        weights: A file of torchvision's AlexNet, of PyTorch or safetensors, to bound too.
        dataset: The data set of the nets that are trained.
        source: Where it comes from: tensorflow-datasets, the sample of MNIST inside the package, or
            the first of both that can be had.
        out: The folder for the numbers.
        quick: One net, hardly trained, and a small AlexNet: a minute, for a trial.
        reuse: Whether to take the numbers in `out`, if they are of the same options.
    """
    train, test = results.load(dataset, source, quick=quick)
    images, seeds = (16, 1) if quick else (images, seeds)

    def measure(seed: int) -> results.Row:
        key = jax.random.key(seed)
        rows = []
        for name in NETS[:1] if quick else NETS:
            net = nets.load_or_train(
                name, train.images, train.labels, key=key, steps=20 if quick else None
            )
            rows.append(_bounds(name, net.logits_fn, jnp.asarray(test.images[:images])))
        if seed == 0:
            alexnets = _alexnets(jax.random.fold_in(key, 5), weights, quick)
            rows += [_bounds(*alexnet) for alexnet in alexnets]
        return {"rows": rows, "pool_stretch": _pool_stretch()}

    config = {"images": images, "dataset": dataset, "quick": quick}
    content = results.measure(
        "table5",
        measure,
        seeds=seeds,
        config=config if weights is None else {**config, "weights": str(weights)},
        splits=(train, test),
        out=out,
        reuse=reuse,
    )
    results.show("table5", describe(content), out)
    return content


# --- the nets --------------------------------------------------------------------------------


def _alexnets(
    key: Key[Array, ""], weights: Path | None, quick: bool
) -> Iterator[tuple[str, jax.tree_util.Partial, Float[Array, "n height width 3"]]]:
    """The name, the logits and some inputs of each AlexNet."""
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


def _bounds(name: str, logits_fn: Callable, inputs: Float[Array, "n *shape"]) -> results.Row:
    """Each layer of a net in all readings, and the net as a whole."""
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
        for method in (TIGHTER if name in NETS else ("eclipse",))
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
    """The norm of a layer in each other way, how long each took, and the stride."""
    layer = jax.tree.map(lambda kernels: kernels[0], stack)
    like = jax.ShapeDtypeStruct(layer.input_shape, layer.kernel.dtype)

    def estimate(method, layer):
        return method(layer.apply, like, key=jax.random.key(0), num_starts=1).value

    found, seconds = {}, {}
    for name, method in (("power", lipschitz.power_iteration), ("lanczos", lipschitz.lanczos)):
        compiled = jax.jit(functools.partial(estimate, method)).lower(layer).compile()
        found[name], seconds[name] = _timed(compiled, layer)
    found["unscaled"], seconds["numpy"] = _timed(unscaled_norm, layer)
    # Compiled already, for the bound of the net.
    _, seconds["bound"] = _timed(functools.partial(lipschitz.bound, layer.apply), like)
    stride = layer.axes[0].stride if isinstance(layer, Conv) else 1
    values = {name: float(value) for name, value in found.items()}
    return {**values, "stride": stride, "seconds": seconds}


def _timed(fn: Callable, *args: Any) -> tuple[Any, float]:
    """What a function returns, and after how many seconds."""
    start = time.perf_counter()
    found = jax.block_until_ready(fn(*args))
    return found, time.perf_counter() - start


def unscaled_norm(layer: Dense | Conv) -> Float[np.ndarray, ""]:
    """The paper's `sup |A(xi)|`, without its factor for the stride, by NumPy.

    Args:
        layer: A dense layer, or a convolution along two axes, taken as cyclic on the grid of its
            input, rounded up to a multiple of the stride.

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
    # Frequency `xi + l N / s` of the input goes into frequency xi of the output, for each l.
    aliases = spectrum.reshape(s, rows, t, columns, *kernel.shape[2:])[:, :, :, : columns // 2 + 1]
    matrices = np.moveaxis(aliases, (0, 2), (2, 3))
    matrices = matrices.reshape(*matrices.shape[:2], -1, kernel.shape[-1])
    return np.linalg.svd(matrices, compute_uv=False).max()


@jax.jit
def steepest(logits_fn: Callable, inputs: Float[Array, "n *shape"]) -> Float[Array, ""]:
    """The largest norm of a Jacobian at the inputs, from below."""

    def slope(x):
        _, jacobian = jax.linearize(logits_fn, x)
        key = jax.random.key(0)
        return lipschitz.lanczos(jacobian, x, key=key, num_starts=1, num_steps=10).value

    return jnp.max(jax.lax.map(slope, inputs))


def _pool_stretch() -> float:
    """How much longer AlexNet's pooling makes a difference: of two images but for one pixel."""

    def pool(x):
        return nn.max_pool(x, (3, 3), (2, 2))

    pixel = jnp.zeros((5, 5, 1)).at[2, 2].set(1.0)
    return float(jnp.linalg.norm(jnp.ravel(pool(pixel) - pool(jnp.zeros_like(pixel)))))


# --- words -----------------------------------------------------------------------------------


def describe(content: dict[str, Any]) -> str:
    """A table for each net, one of the nets as a whole, and one of the times."""
    parts = []
    for row in content["runs"][0]["rows"]:
        parts.append(f"{row['net']}, seed 0:\n\n{_layers(row)}")
        if row["net"] == PAPERS:
            parts.append(_corrected(row))
    whole = results.table(
        ("net", "product", *(f"`{method}`" for method in TIGHTER), "steepest slope found"),
        (
            (
                name,
                _over([row["bound"] for row in rows]),
                *(
                    _over([row["tighter"][method] for row in rows if method in row["tighter"]])
                    for method in TIGHTER
                ),
                _over([row["steepest"] for row in rows]),
            )
            for name, rows in _by_net(content)
        ),
    )
    parts.append(f"The nets as a whole, over the seeds:\n\n{whole}")
    parts += [_times(row) for row in content["runs"][0]["rows"] if row["net"] not in NETS]
    parts[0] = "A product is that of the rows that its column has.\n\n" + parts[0]
    return "\n\n".join(parts)


def _over(values: Sequence[float]) -> str:
    return results.number(results.mean(values), 2) if values else "-"


def _layers(row: results.Row) -> str:
    printed = iter(paper.TABLE5.values() if row["net"] not in NETS else ())
    lines: list[tuple[float | None, ...]] = []
    for layer in row["layers"]:
        readings: tuple[float | None, ...] = (None,) * 5
        if "lanczos" in layer:
            known = next(printed, None)
            readings = (
                None if known is None else known.bound,
                layer["unscaled"] / layer["stride"] ** 2,
                layer["unscaled"] / layer["stride"],
                layer["power"],
                layer["lanczos"],
            )
        lines.append((*readings, layer["bound"]))
    columns = [[x for x in column if x is not None] for column in zip(*lines, strict=True)]
    products = (math.prod(column) if column else None for column in columns)
    names = [layer["layer"] for layer in row["layers"]]
    return results.table(
        (
            "layer",
            "paper",
            "formula, 1/s²",
            "formula, 1/s",
            "power iteration",
            "Lanczos",
            "certified",
        ),
        (
            (name, *map(_cell, line))
            for name, line in zip([*names, "product"], [*lines, products], strict=True)
        ),
    )


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2e}" if value >= 1e5 else f"{value:.4g}"


def _corrected(row: results.Row) -> str:
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


def _times(row: results.Row) -> str:
    linear = [layer for layer in row["layers"] if "lanczos" in layer]
    ways = ("bound", "numpy", "power", "lanczos")

    def value(layer: results.Row, way: str) -> float:
        return layer["unscaled"] / layer["stride"] if way == "numpy" else layer[way]

    times = results.table(
        ("layer", "certified bound", "NumPy's FFT and SVD", "power iteration", "Lanczos"),
        [
            *(
                (
                    layer["layer"],
                    *(
                        f"{layer['seconds'][way]:.2f} ({value(layer, way) / layer['lanczos']:.4f})"
                        for way in ways
                    ),
                )
                for layer in linear
            ),
            (
                "in all",
                *(f"{sum(layer['seconds'][way] for layer in linear):.2f}" for way in ways),
            ),
        ],
    )
    return f"""\
{row["net"]}: seconds for each layer, and in brackets the value, over that of Lanczos. The bound of
the whole net took {row["seconds"]:.1f} s the first time, compilation included.

{times}"""


def claims(content: dict[str, Any]) -> list[results.Claim]:
    """Products bound the net; the factor of a stride; pooling; the numbers of Table 5."""
    every = [row for run in content["runs"] for row in run["rows"]]
    looseness, tightest = (
        {name: [of(row) / row["steepest"] for row in rows] for name, rows in _by_net(content)}
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
        results.Claim(
            "A net is at most as steep as the product of its layers' bounds",
            "stated; 7.9e5 for AlexNet",
            "never exceeded, but loose: the steepest slope found is smaller by a factor of "
            + ", ".join(f"{np.mean(some):.3g} ({name})" for name, some in looseness.items())
            + "; than the tightest of our bounds by "
            + ", ".join(f"{np.mean(some):.3g}" for some in tightest.values()),
            "holds" if min(map(min, tightest.values())) >= 1 else "does not hold",
        ),
        results.Claim(
            "A convolution of stride s has the norm sup |A(ξ)| / s²",
            "stated",
            "estimated from below it is "
            + ", ".join(f"{more:.2f} (s = {s})" for s, more in sorted(short.items()))
            + " times that: the factor is 1/s. With it the cyclic norm on the image's grid, which "
            f"is no bound where zeros are padded, happens to be one of {held} of the "
            f"{len(convolutions)} convolutions",
            "does not hold" if max(short.values()) > 1.001 else "holds",
        ),
        results.Claim(
            "Max-pooling is contractive",
            "stated",
            f"one pixel, where four of AlexNet's windows overlap, moves the result {stretch:g} "
            "times as far",
            "does not hold" if stretch > 1 else "holds",
        ),
        results.Claim(
            "AlexNet's layers have bounds of 2.75 to 11",
            "Table 5",
            "its weights are lost; with random ones the certified bounds are "
            + _span([row for row in every if row["net"] == PAPERS])
            + "".join(f", with those that were given {_span([row])}" for row in given),
            "cannot be tested here",
        ),
    ]


def _span(rows: Sequence[results.Row]) -> str:
    bounds = [layer["bound"] for row in rows for layer in row["layers"] if "lanczos" in layer]
    return f"{min(bounds):.2f} to {max(bounds):.2f}"


def _by_net(content: dict[str, Any]) -> list[tuple[str, list[results.Row]]]:
    """For each net its rows of all seeds that it was measured for."""
    every = [row for run in content["runs"] for row in run["rows"]]
    return [
        (name, [row for row in every if row["net"] == name])
        for name in dict.fromkeys(row["net"] for row in every)
    ]
