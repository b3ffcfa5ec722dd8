"""The few SVG elements that the pictures are made of, as plain text.

Backgrounds are transparent and every colour is a middle tone, so that one file reads on a white
page and on a black one: against both, text has a contrast of more than 4.
"""

INK = "#787d85"  # text and lines on the page itself
BLUE, ORANGE, GREEN, PURPLE = "#4078c0", "#c4601a", "#2e8663", "#8a63c9"
GREY, RED, TEAL, OLIVE, PINK = "#767c85", "#c24f4f", "#25839a", "#877a1d", "#b8558f"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


def number(value):
    """A coordinate without needless digits."""
    return f"{value:.1f}".removesuffix(".0")


def escape(text):
    """`text` as XML wants it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def element(name, content=None, **attributes):
    """<name .../>; an underscore in an attribute's name stands for a hyphen."""
    parts = [f'{key.replace("_", "-")}="{number(v) if isinstance(v, (int, float)) else v}"'
             for key, v in attributes.items() if v is not None]
    head = f"<{name} {' '.join(parts)}"
    return f"{head}/>" if content is None else f"{head}>{content}</{name}>"


def text(x, y, content, size=14, anchor="start", fill=INK, weight=None, turn=None):
    """A line of text; `anchor` is start, middle or end, `turn` degrees around its own place."""
    rotate = None if turn is None else f"rotate({number(turn)} {number(x)} {number(y)})"
    return element("text", escape(content), x=x, y=y, font_size=size, text_anchor=anchor,
                   fill=fill, font_weight=weight, transform=rotate)


def rectangle(x, y, width, height, fill="none", stroke=None, dashed=False, round=0, opacity=None):
    return element("rect", x=x, y=y, width=width, height=height, fill=fill, stroke=stroke,
                   stroke_dasharray="3 3" if dashed else None, rx=round or None,
                   fill_opacity=opacity)


def box(x, y, width, height, label, fill=BLUE, size=14, below=None):
    """A filled box with a label in its middle, and a smaller line below the label."""
    shift = -3 if below else 5
    parts = [rectangle(x, y, width, height, fill, round=5),
             text(x + width / 2, y + height / 2 + shift, label, size, "middle", "#ffffff", 600)]
    if below:
        parts.append(text(x + width / 2, y + height / 2 + 14, below, 12, "middle", "#ffffff"))
    return "".join(parts)


def line(*points, stroke=INK, width=1.5, dashed=False, arrow=False):
    """A line through (x, y) points; with `arrow` it ends in one."""
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return element("polyline", points=path, fill="none", stroke=stroke, stroke_width=width,
                   stroke_dasharray="4 3" if dashed else None,
                   marker_end="url(#arrow)" if arrow else None)


def polygon(*points, fill=BLUE, opacity=None):
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return element("polygon", points=path, fill=fill, fill_opacity=opacity)


def circle(x, y, label):
    """A circle with a sign in it, such as the plus of a residual connection."""
    return (element("circle", cx=x, cy=y, r=11, fill="none", stroke=INK, stroke_width=1.5)
            + text(x, y + 5, label, 15, "middle", INK, 600))


def document(width, height, title, parts):
    """The whole file. `title` is what a screen reader says."""
    arrow = element("marker", element("path", d="M0 0L8 4L0 8z", fill=INK), id="arrow",
                    viewBox="0 0 8 8", refX=7, refY=4, markerWidth=7, markerHeight=7,
                    orient="auto")
    body = "\n".join(parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" font-family="{FONT}">\n<title>{escape(title)}</title>\n'
            f"<defs>{arrow}</defs>\n{body}\n</svg>\n")
