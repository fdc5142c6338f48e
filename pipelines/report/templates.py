"""What every page that this software writes has in common: escaped text, one style, nothing from outside."""

from __future__ import annotations

import base64

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template


def page_template(name: str, package: str = "pipelines.report") -> Template:
    """The template `name` of `package`. It may include `style.css.jinja`, and use the filters below."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(each, ".") for each in dict.fromkeys((package, "pipelines.report"))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, duration=duration, data_uri=_data_uri)
    return environment.get_template(name)


def duration(seconds: float) -> str:
    """ "0.8 s", "42 s", "3 min 07 s" or "6 h 15 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _data_uri(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
