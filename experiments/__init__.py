"""The paper's tables and figures, one module for each: `python -m experiments` lists them."""
