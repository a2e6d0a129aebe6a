"""XML from untrusted sources: its declarations are not expanded, and files that are too large or too deep are
refused."""

from __future__ import annotations

import pytest

from keygrip.robots import xml_text
from keygrip.robots.xml_text import parse_xml


def chained(count: int) -> str:
    declared = "".join(f"<!ENTITY e{n} '&e{n - 1};'>" for n in range(1, count))
    return f"<!DOCTYPE m [<!ENTITY e0 'x'>{declared}]><mujoco>&e{count - 1};</mujoco>"


@pytest.mark.parametrize("text", [chained(3), chained(3).encode("utf-16"), '<!DOCTYPE m SYSTEM "m.dtd"><mujoco/>'])
def test_entities_are_refused_before_they_are_expanded(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^declares entities: remove them"):
        parse_xml(text)


def test_what_is_too_large_or_too_deep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "<a>" * 200 + "</a>" * 200
    assert len([*parse_xml(deep).iter()]) == 200
    with pytest.raises(ValueError, match="nested more than 200 deep"):
        parse_xml(f"<a>{deep}</a>")
    monkeypatch.setattr(xml_text, "LARGEST_XML_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="has more than 1 MB"):
        parse_xml(b"<a>" + b" " * (1 << 20) + b"</a>")


@pytest.mark.parametrize("text", ["", "<a>", b"\xff\xfe<", b'<?xml version="1.0" encoding="none"?><a/>'])
def test_what_is_no_xml_says_so(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^is not XML: "):
        parse_xml(text)


def test_elements_are_read_with_their_text_in_any_encoding() -> None:
    root = parse_xml('<?xml version="1.0" encoding="utf-16"?><a b="\u00e4"><!-- no --><c>d</c></a>'.encode("utf-16"))
    assert (root.tag, root.get("b"), root.findtext("c")) == ("a", "\u00e4", "d")
