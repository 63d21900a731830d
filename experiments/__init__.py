"""The paper's tables and figures, one module for each: `python -m experiments` lists them."""

EXPERIMENTS: dict[str, bool] = {
    "quickstart": False,
    "attack": False,
    "table1": True,
    "table2": True,
    "table3": True,
    "table4": True,
    "fgsm": True,
    "figure1": True,
    "rotation": True,
    "figure7": True,
    "adversarial": True,
    "table5": True,
    "lipschitz": True,
    "figure3": True,
    "figure4": True,
    "figure5": True,
    "figure6": True,
    "ostriches": True,
    "bounds": True,
    "benchmark": False,
    "throughput": False,
    "solvers": False,
}
"""Every experiment, and whether it is a section of the report; in the order of the report."""
