"""Text becomes markup that an HTML parser reads back as the same text."""

from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from dump_activations.report.markup import Markup, tag


class Reader(HTMLParser):
    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def visible(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@settings(max_examples=50)
@given(st.text(), st.text())
def test_text_and_attributes_are_read_back(text, value):
    reader = Reader(tag("p", text, tag("b", "x"), title=value, id=None))
    assert reader.tags == [("p", {"title": visible(value)}), ("b", {})]
    assert reader.text == visible(text) + "x"


def test_markup_is_taken_as_it_is_and_other_text_is_not():
    assert Markup.of("<&", Markup("<b>"), None, 3) == "&lt;&amp;<b>3"
