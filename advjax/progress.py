"""Progress bars."""

from typing import Any


def bar(*args: Any, **options: Any) -> Any:
    """Return `tqdm(*args, **options)`; ImportError with a remedy if tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress: True needs tqdm; pip install 'advjax[experiments]' or pass progress=False."
        ) from error
    return tqdm(*args, **options)
