"""Untrusted XML: descriptions of robots, and the models in recordings."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from xml.parsers import expat

LARGEST_XML_BYTES = 8 << 20
DEEPEST_XML = 200  # nested elements; in a robot each body is nested in its parent


def parse_xml(text: str | bytes) -> ElementTree.Element:
    """Return the root of an XML text. Entities are not expanded, because entities that refer to each other could use
    all memory, or crash the process.

    Raises:
        ValueError: It is not XML, declares entities, is larger than `LARGEST_XML_BYTES` or nested too deeply. The
            message continues after the name of the text.
    """
    if len(text) > LARGEST_XML_BYTES:
        raise ValueError(f"has more than {LARGEST_XML_BYTES >> 20} MB: not a robot's description")
    depth = 0

    def refuse(*declared: object) -> None:
        raise ValueError("declares entities: remove them, a robot's description needs none")

    def begin(*element: object) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST_XML:
            raise ValueError(f"has elements that are nested more than {DEEPEST_XML} deep: not a robot's description")

    def end(*element: object) -> None:
        nonlocal depth
        depth -= 1

    # checked by the parser, not in the text, which may have another encoding
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = begin, end
    try:
        parser.Parse(text, True)
        return ElementTree.fromstring(text)
    except (expat.ExpatError, ElementTree.ParseError, UnicodeError, LookupError) as error:
        raise ValueError(f"is not XML: {error}") from error
