"""Lipschitz bounds of EfficientNet-Lite0's layers (table 5; 2 min; photographs).

What table 5 has of AlexNet, of a net with trained weights that everybody can have: the certified
bound of each layer, over an estimate from below by Lanczos, and of each block with the skip
connection around it. The product of fifty layers exceeds float32, so the whole net is bounded in
float64.

The slope of the net is estimated from below, by the largest norm of its Jacobian at the photographs
that it gets right. A photograph is certified within its margin over the square root of two times
the bound.
"""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from advjax import lipschitz
from experiments import imagenet, nets, results, table5

PARTS = ("expand", "depthwise", "project")
"""The layers of a block; the stem, the head and the logits are layers by themselves."""


def main(
    *,
    images: Path | None = None,
    count: int = 20,
    out: Path = Path("results"),
    quick: bool = False,
    reuse: bool = False,
) -> dict[str, Any]:
    """Bounds each layer of EfficientNet-Lite0, and the net.

    Args:
        images: A folder of photographs; the twenty of foolbox by default.
        count: At how many photographs to take the slope of the net, at most.
        out: The folder for the numbers.
        quick: A small image, and the slope at one: a minute, for a trial.
        reuse: Whether to take the numbers in `out`, if they are of the same options.
    """
    net = imagenet.load_net()
    dataset, chosen = imagenet.load_photographs(net, images, count=1 if quick else count)
    if quick:
        chosen = chosen._replace(images=chosen.images[:, ::7, ::7])

    def measure(seed: int) -> results.Row:
        like = jax.ShapeDtypeStruct(chosen.images.shape[1:], jnp.float32)
        print("Bounding the net", flush=True)
        bound, seconds = _bound(net, like)
        names = [_name(layer) for layer in bound.layers]
        print("Estimating the norms of its layers, and its slope, from below", flush=True)
        linear = iter(lipschitz.linear_layers(net.logits_fn, like))
        certified = functools.partial(lipschitz.certified_radius, constant=1.0)
        logits = jax.lax.map(net.logits_fn, jnp.asarray(chosen.images), batch_size=4)
        return {
            "layers": [
                {"layer": name, "bound": float(layer.gain), "lanczos": _lanczos(next(linear))}
                for name, layer in zip(names, bound.layers, strict=True)
                if _is_linear(layer)
            ],
            # The last operation of a block tells how far the bound has come.
            "reached": {
                name.partition("/")[0]: float(layer.constant)
                for name, layer in zip(names, bound.layers, strict=True)
                if name
            },
            "bound": float(bound.constant),
            "seconds": seconds,
            "steepest": float(table5.steepest(net.logits_fn, jnp.asarray(chosen.images))),
            # Those that a bound of 1 would certify.
            "radii": jax.vmap(certified)(logits, chosen.labels).tolist(),
        }

    content = results.measure(
        "bounds",
        measure,
        seeds=1,
        config={"count": count, "dataset": results.PHOTOGRAPHS, "quick": quick},
        splits=(dataset,),
        out=out,
        reuse=reuse,
    )
    results.show("bounds", describe(content), out)
    return content


def _bound(net: nets.Net, like: jax.ShapeDtypeStruct) -> tuple[lipschitz.Bound, float]:
    """The bound of a net in float64, and the seconds that it took, compilation included."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), net.params)
        start = time.perf_counter()
        bound = lipschitz.bound(
            functools.partial(net.model.apply, params), like.update(dtype=jnp.float64)
        )
        return jax.device_get(bound), time.perf_counter() - start


def _name(layer: lipschitz.Layer) -> str:
    """A layer's place in the net: the block and the part of it, of which each may be missing."""
    *modules, _ = layer.name.split("/")
    return "/".join([name for name in modules if not name.startswith("EfficientNet")])


def _is_linear(layer: lipschitz.Layer) -> bool:
    return layer.name.endswith(("conv_general_dilated", "dot_general"))


def _lanczos(stack: lipschitz.Dense | lipschitz.Conv) -> float:
    """The norm of a layer, from below."""

    @jax.jit
    def estimate(layer):
        like = jax.ShapeDtypeStruct(layer.input_shape, layer.kernel.dtype)
        return lipschitz.lanczos(layer.apply, like, key=jax.random.key(0), num_starts=1).value

    return float(estimate(jax.tree.map(lambda kernels: kernels[0], stack)))


# --- words -----------------------------------------------------------------------------------


def describe(content: dict[str, Any]) -> str:
    """A line for each block, and the net as a whole."""
    (run,) = content["runs"]
    cells = {
        layer["layer"]: f"{layer['bound']:.4g} ({layer['bound'] / layer['lanczos']:.4f})"
        for layer in run["layers"]
    }
    blocks = list(dict.fromkeys(name.partition("/")[0] for name in cells))
    steps = _steps(run["reached"])
    layers = results.table(
        ("block", *PARTS, "the block"),
        (
            (
                block,
                *(cells.get(f"{block}/{part}", "-") for part in PARTS),
                cells.get(block) or f"{steps[block]:.4g}",
            )
            for block in blocks
        ),
    )
    bound, steepest = run["bound"], run["steepest"]
    least, largest = min(run["radii"]), max(run["radii"])
    return f"""\
Certified bounds, and in brackets how many times the estimate from below they are:

{layers}

The net as a whole, with pixels in [0, 1]: {bound:.1e}, in {run["seconds"]:.0f} s with compilation.
The steepest slope found is {steepest:.4g}. The bound certifies photographs within an L2 distance of
{largest / bound:.0e} at most; one as low as that slope would certify them within
{least / steepest:.2g} to {largest / steepest:.2g}."""


def _steps(reached: dict[str, float]) -> dict[str, float]:
    """By how much each block multiplies the bound up to it, skip connections included."""
    before = [1.0, *reached.values()]  # the stem has the scale of the pixels with it
    return {
        name: constant / last
        for (name, constant), last in zip(reached.items(), before, strict=False)
    }


def claims(content: dict[str, Any]) -> list[results.Claim]:
    """Layers' bounds multiply to a bound of the net, which for a deep one says nothing."""
    (run,) = content["runs"]
    bounds = [layer["bound"] for layer in run["layers"]]
    return [
        results.Claim(
            "The layers of a large trained net have bounds that multiply to one of the net",
            "Table 5: AlexNet, 2.75 to 11 a layer, 7.9e5 in all",
            f"EfficientNet-Lite0: {min(bounds):.2g} to {max(bounds):.2g} a layer, "
            f"{run['bound']:.1e} in all, where the steepest slope found is {run['steepest']:.3g}: "
            "true, and of no use for a net as deep",
            "holds" if run["bound"] >= run["steepest"] else "does not hold",
        )
    ]
