"""XML that nobody vouches for: descriptions of robots, and the models that recordings bring along."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from xml.parsers import expat

LARGEST_XML_BYTES = 8 << 20
DEEPEST_XML = 200  # nested elements; those of a robot are its bodies, one in another


def parse_xml(text: str | bytes) -> ElementTree.Element:
    """The root of an XML text. Nothing that it declares is expanded: entities that name one another would take all the
    memory, or end the process.

    Raises:
        ValueError: it is no XML, declares entities, is larger than `LARGEST_XML_BYTES` or nested too deeply. The
            message goes on from the name of the text.
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

    # asked of the parser, not sought in the text, which may be in another encoding
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = begin, end
    try:
        parser.Parse(text, True)
        return ElementTree.fromstring(text)
    except (expat.ExpatError, ElementTree.ParseError, UnicodeError, LookupError) as error:
        raise ValueError(f"is not XML: {error}") from error
