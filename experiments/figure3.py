"""Photographs that excite units of a large network most (figure 3; 1 min; photographs).

The paper shows the ImageNet validation images that go farthest along units of AlexNet. Here the
layer is the last hidden one of EfficientNet-Lite0: 1,280 units after the ReLU6, averaged over the
pixels. There are few photographs unless a folder of others is given, so each is expanded to 14
views: the central square, and four and nine overlapping crops of it, magnified by 9/7 and 12/7.
Most views of a photograph show the same thing, so they do not count as independent photographs.

For the first four units that count, the figure shows the six photographs that go farthest, each by
its best view, without selection. A unit counts if it exceeds its minimum on at least ten views. The
ten farthest views, of whichever photographs, are judged by their purity, the fraction that belongs
to the most frequent photograph. This measures how well a unit separates one photograph, in any
crop, from the others. It cannot say whether a unit responds to something that two photographs
share; for that, look at the figure.
"""

import numpy as np
from matplotlib.figure import Figure

from advjax import units
from experiments.common import markdown
from experiments.common.claims import Claim
from experiments.common.measure import Arrays, Content, Row
from experiments.common.options import PhotographOptions
from experiments.common.photographs import load_network
from experiments.common.units import TOP, alive
from experiments.common.views import (
    LAYER,
    SHOWN,
    Views,
    draw_views,
    farthest,
    flat,
    load_views,
    pooled_features,
    purity,
    table_of_views,
    thumbnails,
)


class Options(PhotographOptions):
    """Draws the photographs that go farthest along single units."""

    def load(self) -> Views:
        """Load the photographs and crop them; eight small ones in a trial."""
        return load_views(self.folder, quick=self.quick)


def measure(options: Options, views: Views, seed: int) -> Row:
    """Find the views farthest along units, and the purity of their photographs."""
    phi = pooled_features(load_network(), views.images, (LAYER,))[LAYER]
    counted = np.flatnonzero(alive(flat(phi)))
    random = np.random.default_rng(seed)
    at_random = random.permuted(np.tile(np.arange(flat(phi).shape[0]), (len(counted), 1)), axis=1)
    found = farthest(
        phi,
        units.natural_basis(phi.shape[-1])[counted],
        [f"unit {i}" for i in counted[:SHOWN]],
        views.names,
    )
    return {
        "photographs": phi.shape[0],
        "views": phi.shape[1],
        "alive": len(counted),
        "units_in_all": phi.shape[-1],
        "at_random": float(purity(at_random[:, :TOP], phi).mean()),
        **found,
        "best": thumbnails(views, found["rows"]),
    }


def describe(content: Content) -> str:
    """The figure, its contents, and the mean purity of all units."""
    (run,) = content["runs"]
    return f"""\
![Six photographs for each of four units](figure3.png)

{table_of_views(run["rows"])}

"Of one" is the purity of the ten views that go farthest. Its mean over the {run["alive"]:,} of
{run["units_in_all"]:,} units that count is {markdown.percent(run["purity"], 1)}; over as many
random sets of ten views it is {markdown.percent(run["at_random"], 1)}. On average the ten views
show {run["different"]:.1f} of the {run["photographs"]} photographs, each of which has
{run["views"]} views."""


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """The best view of each of the photographs that go farthest, a row for each unit."""
    return {"figure3.png": draw_views(content, arrays)}


def claims(content: Content) -> list[Claim]:
    """The images along a unit have something in common, as far as crops show."""
    (run,) = content["runs"]
    return [
        Claim(
            "The images farthest along a unit of an ImageNet network have something in common",
            "Figure 3, by eye",
            f"of the ten views of {run['photographs']} photographs that go farthest along a unit, "
            f"{markdown.percent(run['purity'], 1)} show the same one, at random "
            f"{markdown.percent(run['at_random'], 1)}; what different photographs share is left to "
            "the eye",
            "holds in part" if run["purity"] > run["at_random"] else "does not hold",
        )
    ]
