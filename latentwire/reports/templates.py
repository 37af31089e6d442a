"""The pages' jinja templates; what they are given is escaped."""

import jinja2

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("latentwire.reports", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
)
