"""A figure and its table as one self-contained HTML file."""

import base64
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
img { max-width: 100%; cursor: zoom-in; background: #fff; }
img.whole { max-width: none; cursor: zoom-out; }
pre { overflow-x: auto; background: #f4f4f4; color: #111; padding: 0.75rem; }
pre:empty { display: none; }
</style>
</head>
<body>
<h1>$title</h1>
<pre>$command</pre>
<figure><img alt="$title" src="data:image/png;base64,$image"></figure>
<pre>$table</pre>
<script>
const [image] = document.images;
image.addEventListener("click", () => image.classList.toggle("whole"));
document.documentElement.dataset.ready = document.images.length;
</script>
</body>
</html>
""")


def page(title: str, command: str, image: bytes, table: str) -> str:
    """An HTML page with the PNG image and plain-text table that ``command`` has made.

    A click shows the image at its own size.
    """
    texts = {"title": title, "command": command, "table": table}
    shown = {name: escape(lines(text)) for name, text in texts.items()}
    return _PAGE.substitute(shown, image=base64.b64encode(image).decode())
