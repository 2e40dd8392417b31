"""Rendering of pages: templates that escape everything, and the style and script by their hash."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

from .wording import cut, visible

__all__ = ["asset", "render"]

# After these characters a long name may break into the next line; none of them occurs in an escape
# such as &lt;.
_JOINT = re.compile(r"(::|[_=]|\.(?=[^\W\d]))")


def render(folder: str, *, package: str = "pdcore_conformance", **contents: Any) -> str:
    """Return the ``page.html.jinja`` of a folder of a package, filled in.

    Parameters
    ----------
    folder : str
        Such as ``"report"``; ``"."`` for the package itself.
    package : str
        The package that has the folder.
    **contents
        Values by name. Texts may be hostile: they are escaped everywhere, and control and
        direction characters are shown as escapes.

    Raises
    ------
    ModuleNotFoundError
        Without jinja2.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def breakable(text: str) -> Markup:
        return Markup(_JOINT.sub(r"\1<wbr>", str(escape(visible(text)))))

    def shown(value: Any) -> Any:
        return visible(value) if type(value) is str else value

    environment = Environment(
        loader=PackageLoader(package, folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cut"] = cut
    environment.filters["breakable"] = breakable
    return environment.get_template("page.html.jinja").render(**contents)


def asset(variable: str, name: str) -> dict[str, Any]:
    """Return a file of this package for a page, and the hash by which the page's policy admits it.

    Returns
    -------
    dict
        ``VARIABLE`` and ``VARIABLE_hash``, for a template.
    """
    from markupsafe import Markup

    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
    return {variable: Markup(text), f"{variable}_hash": digest}
