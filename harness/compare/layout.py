"""The common parts of all pages: frame and look (layout.html.jinja, layout.css,
macros.html.jinja), and the way that figures get into them.

A page is one HTML file: no network, no script; light, dark, narrow, printed.
"""

import html
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape


class Figure(NamedTuple):
    """An inline SVG and its caption."""

    svg: Markup
    caption: str


def render(template: Path, title: str, **values: Any) -> str:
    """A page's text, the same for the same values.

    Args:
        template: extends layout.html.jinja.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = breakable
    generator = f"matplotlib {version('matplotlib')}"  # the figures' bytes depend on it
    return environment.get_template(template.name).render(
        title=title, generator=generator, **values
    )


def breakable(name: str) -> Markup:
    """A name that may go on in a new line after each underscore and each equals sign."""
    return Markup(re.sub("([_=])", r"\1<wbr>", str(escape(name))))


def by_section(figures: Mapping[str, str], sections: Iterable[str]) -> dict[str, list[Figure]]:
    """Section of the page -> its figures, from name -> SVG text; a name begins with its section."""
    found: dict[str, list[Figure]] = {section: [] for section in sections}
    for name, svg in figures.items():
        caption = re.search(r"<desc>(.*?)</desc>", svg, re.DOTALL)
        section = next(section for section in found if name.startswith(section))
        found[section].append(Figure(Markup(svg), html.unescape(caption[1]) if caption else ""))
    return found
