"""For the API page: docstrings of this package say "Example:", mkdocstrings knows "Examples:"."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Lets "Example:" open a section whose doctests are shown as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
