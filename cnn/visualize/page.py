"""Figures and their table as one HTML file that needs no other."""

import base64
from collections.abc import Mapping
from html import escape
from string import Template

from ..text import lines

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; font: 1rem/1.5 sans-serif; }
figure { margin: 1.5rem 0; }
figcaption { color: #555; }
img { max-width: 100%; cursor: zoom-in; background: #fff; }
img.whole { max-width: none; cursor: zoom-out; }
pre { overflow-x: auto; background: #f4f4f4; color: #111; padding: 0.75rem; }
</style>
</head>
<body>
<h1>$title</h1>
<pre>$command</pre>
$figures
$table
<script>
for (const image of document.images) {
  image.addEventListener("click", () => image.classList.toggle("whole"));
}
document.documentElement.dataset.ready = document.images.length;
</script>
</body>
</html>
""")


def page(title: str, command: str, figures: Mapping[str, bytes], table: str = "") -> str:
    """An HTML page of PNG images by their captions, and of a table in plain text.

    A click shows an image in its own size. ``command`` is what made them.
    """
    parts = []
    for caption, image in figures.items():
        data, text = base64.b64encode(image).decode(), _shown(caption)
        parts.append(
            f'<figure>\n<img alt="{text}" src="data:image/png;base64,{data}">\n'
            f"<figcaption>{text}</figcaption>\n</figure>"
        )
    return _PAGE.substitute(
        title=_shown(title),
        command=_shown(command),
        figures="\n".join(parts),
        table=f"<pre>{_shown(table)}</pre>" if table else "",
    )


def _shown(text: str) -> str:
    return escape(lines(text))
