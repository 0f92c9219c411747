"""Figures inlined in the page: SVG in the page's own colours, ink for black and paper for white."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from markupsafe import Markup

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
INK, PAPER = "currentColor", "var(--paper)"
# Replacements for matplotlib's black and white, in styles and attributes.
INKS = {
  re.compile(r"#000000(?![0-9a-f])|(?<=: )black\b", re.IGNORECASE): INK,
  re.compile(r"#ffffff(?![0-9a-f])|(?<=: )white\b", re.IGNORECASE): PAPER,
}


def inlined(text: str, name: str, title: str) -> Markup:
  """An SVG file for use inside HTML: its ids begin with `name`, so that figures of one page do not
  share any; black is the page's ink and white its paper; it scales, and screen readers read
  `title`."""
  ElementTree.register_namespace("", SVG)
  ElementTree.register_namespace("xlink", XLINK)
  root = ElementTree.fromstring(text)
  for metadata in root.findall(f"{{{SVG}}}metadata"):
    root.remove(metadata)
  for node in root.iter():
    for key, value in node.attrib.items():
      node.set(key, _attribute(key, value, name))
  width = float(root.get("width", "0").removesuffix("pt"))
  for key in ("width", "height", "version"):
    root.attrib.pop(key, None)
  root.set("role", "img")
  root.set("aria-label", title)
  # As large as it was drawn on a wide screen, and not too small to read on a phone. The fill is set
  # since black, SVG's default, is not written out by matplotlib.
  root.set("style", f"fill: {INK}; max-width: {1.3 * width:.0f}px; min-width: {0.85 * width:.0f}px")
  # Escaped as XML, which is valid HTML here.
  return Markup(ElementTree.tostring(root, encoding="unicode"))


def _attribute(key: str, value: str, name: str) -> str:
  if key == "id":
    return f"{name}-{value}"
  if key in ("href", f"{{{XLINK}}}href") and value.startswith("#"):
    return f"#{name}-{value[1:]}"
  value = value.replace("url(#", f"url(#{name}-")
  if key in ("style", "fill", "stroke"):
    for color, ours in INKS.items():
      value = color.sub(ours, value)
  return value
