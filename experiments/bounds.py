"""Lipschitz bounds of EfficientNet-Lite0's layers (table 5; 2 min; photographs).

The counterpart of table 5's AlexNet, for a trained network that everybody can get: the certified
bound of each layer, compared with a lower estimate by Lanczos, and of each block including the skip
connection around it. The product over fifty layers exceeds the range of float32, so the network as
a whole is bounded in float64.

The slope of the network is estimated from below, by the largest norm of its Jacobian at the
photographs that it gets right. A photograph is certified within its margin divided by the square
root of two times the bound.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from advjax import lipschitz
from experiments.common import markdown, networks
from experiments.common.claims import Claim
from experiments.common.measure import Content, Row
from experiments.common.options import PhotographOptions, trial
from experiments.common.photographs import Subjects, load_network, load_subjects
from experiments.common.slopes import estimate, steepest

PARTS = ("expand", "depthwise", "project")
"""The layers of a block; the stem, the head and the logits are single layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PhotographOptions):
    """Bounds each layer of EfficientNet-Lite0, and the network."""

    count: int = 20
    """The maximum number of photographs at which to estimate the slope."""
    TRIAL = trial(count=1)

    def load(self) -> Subjects:
        """Load the network and the photographs that it gets right; one small one in a trial."""
        stride = 7 if self.quick else 1
        return load_subjects(load_network(), self.folder, count=self.count, stride=stride)


def measure(options: Options, subjects: Subjects, seed: int) -> Row:
    """Bound the layers and the network, and estimate its slope."""
    network, _, chosen = subjects
    like = jax.ShapeDtypeStruct(chosen.images.shape[1:], jnp.float32)
    print("Bounding the network", flush=True)
    bound, seconds = _bound(network, like)
    names = [_name(layer) for layer in bound.layers]
    print("Estimating the norms of its layers, and its slope, from below", flush=True)
    linear = iter(lipschitz.linear_layers(network.logits_fn, like))
    certified = functools.partial(lipschitz.certified_radius, constant=1.0)
    logits = jax.lax.map(network.logits_fn, jnp.asarray(chosen.images), batch_size=4)
    return {
        "layers": [
            {"layer": name, "bound": float(layer.gain), "lanczos": _lanczos(next(linear))}
            for name, layer in zip(names, bound.layers, strict=True)
            if _is_linear(layer)
        ],
        # The bound up to and including each block: that of its last operation.
        "reached": {
            name.partition("/")[0]: float(layer.constant)
            for name, layer in zip(names, bound.layers, strict=True)
            if name
        },
        "bound": float(bound.constant),
        "seconds": seconds,
        "steepest": float(steepest(network.logits_fn, jnp.asarray(chosen.images))),
        # The radii that a bound of 1 would certify.
        "radii": jax.vmap(certified)(logits, chosen.labels).tolist(),
    }


def _bound(network: networks.Network, like: jax.ShapeDtypeStruct) -> tuple[lipschitz.Bound, float]:
    """Bound a network in float64; also return the seconds, including compilation."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), network.params)
        start = time.perf_counter()
        bound = lipschitz.bound(
            functools.partial(network.model.apply, params), like.update(dtype=jnp.float64)
        )
        return jax.device_get(bound), time.perf_counter() - start


def _name(layer: lipschitz.Layer) -> str:
    """The block of a layer and its part of it; each may be missing."""
    *modules, _ = layer.name.split("/")
    return "/".join([name for name in modules if not name.startswith("EfficientNet")])


def _is_linear(layer: lipschitz.Layer) -> bool:
    return layer.name.endswith(("conv_general_dilated", "dot_general"))


def _lanczos(stack: lipschitz.Dense | lipschitz.Conv) -> float:
    """A lower estimate of the norm of a layer."""
    layer = jax.tree.map(lambda kernels: kernels[0], stack)
    return float(estimate(lipschitz.lanczos, layer))


# --- words -----------------------------------------------------------------------------------


def describe(content: Content) -> str:
    """A line for each block, and the whole network."""
    (run,) = content["runs"]
    cells = {
        layer["layer"]: f"{layer['bound']:.4g} ({layer['bound'] / layer['lanczos']:.4f})"
        for layer in run["layers"]
    }
    blocks = list(dict.fromkeys(name.partition("/")[0] for name in cells))
    steps = _steps(run["reached"])
    layers = markdown.table(
        [
            ("block", block),
            *((part, cells.get(f"{block}/{part}", "-")) for part in PARTS),
            ("the block", cells.get(block) or f"{steps[block]:.4g}"),
        ]
        for block in blocks
    )
    bound, steepest = run["bound"], run["steepest"]
    least, largest = min(run["radii"]), max(run["radii"])
    return f"""\
Certified bounds, and in brackets their ratio to the lower estimate:

{layers}

The whole network, with pixels in [0, 1]: {bound:.1e}, in {run["seconds"]:.0f} s with compilation.
The steepest slope found is {steepest:.4g}. The bound certifies photographs within an L2 distance of
at most {largest / bound:.0e}; a bound as low as that slope would certify them within
{least / steepest:.2g} to {largest / steepest:.2g}."""


def _steps(reached: dict[str, float]) -> dict[str, float]:
    """The factor that each block contributes to the bound, including skip connections."""
    before = [1.0, *reached.values()]  # the stem includes the scaling of the pixels
    return {
        name: constant / last
        for (name, constant), last in zip(reached.items(), before, strict=False)
    }


def claims(content: Content) -> list[Claim]:
    """The product of the layers' bounds is a bound, but a useless one for a deep network."""
    (run,) = content["runs"]
    bounds = [layer["bound"] for layer in run["layers"]]
    return [
        Claim(
            "The bounds of a large trained network's layers multiply to a bound of the network",
            "Table 5: AlexNet, 2.75 to 11 per layer, 7.9e5 in all",
            f"EfficientNet-Lite0: {min(bounds):.2g} to {max(bounds):.2g} per layer, "
            f"{run['bound']:.1e} in all, where the steepest slope found is {run['steepest']:.3g}: "
            "true, but useless for so deep a network",
            "holds" if run["bound"] >= run["steepest"] else "does not hold",
        )
    ]
