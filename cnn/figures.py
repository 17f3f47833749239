"""Figures without a window, and as PNG files."""

import io
import warnings
from typing import Any

from .errors import missing


def new_figure(use: str, **options: Any):
    """An empty matplotlib figure without a window."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib", f"drawing {use}") from None
    return Figure(**options)


def png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG file."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # matplotlib draws a box instead
        figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
