"""Units and directions of a layer: the paper's first claim, and tests of it."""

from advjax.units.directions import (
    TopImages,
    natural_basis,
    principal_axes,
    random_directions,
    random_rotation,
    top_images,
)
from advjax.units.equivalence import EquivalenceTest, equivalence_test
from advjax.units.rotation import (
    Comparison,
    RotationTest,
    concept_auc,
    label_purity,
    rotation_test,
)

__all__ = [
    "Comparison",
    "EquivalenceTest",
    "RotationTest",
    "TopImages",
    "concept_auc",
    "equivalence_test",
    "label_purity",
    "natural_basis",
    "principal_axes",
    "random_directions",
    "random_rotation",
    "rotation_test",
    "top_images",
]
