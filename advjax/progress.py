"""Progress bars."""

from typing import Any


def bar(*args: Any, **options: Any) -> Any:
    """A bar of tqdm, with its arguments; an error that says what to install where it is absent."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress: True needs tqdm; pip install 'advjax[experiments]' or pass progress=False."
        ) from error
    return tqdm(*args, **options)
