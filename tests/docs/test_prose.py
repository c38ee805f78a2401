"""Sentences of at most 25 words, in everything that a stranger reads."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST = 25
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|cf|vs|approx|no)\.$", re.IGNORECASE)


def blocks(markdown):
    """The running text of each paragraph and list item; code, tables, headings, comments and directives left out."""
    markdown = re.sub(r"^(```|~~~).*?^\1\s*$", "\n", markdown, flags=re.MULTILINE | re.DOTALL)
    markdown = re.sub(r"<!--.*?-->", "\n", markdown, flags=re.DOTALL)
    block, in_list = [], False
    for line in [*markdown.splitlines(), ""]:
        text = line.strip()
        item = re.match(r"(?:[-*+]|\d+\.)\s+", text)
        code = line.startswith("    ") and not block and not in_list
        if not text or item or code or re.match(r"#|\||:::|!\[|[-=]{3,}$", text):
            if block:
                yield " ".join(block)
            block = [text[item.end() :]] if item else []
            in_list = bool(item) or (in_list and not text) or (in_list and line.startswith("  "))
        else:
            in_list = in_list and (bool(block) or line.startswith("  "))
            block.append(text)


def sentences(block):
    """Sentences of one block: links by their text, code and formulas as one word each."""
    block = re.sub(r"`+[^`]*`+", "code", block)
    block = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", block)
    block = re.sub(r"[*_]{1,2}(?=\S)|(?<=\S)[*_]{1,2}", "", block)
    start = 0
    for end in re.finditer(r"[.!?][)\"”]*(?=\s|$)", block):
        if not ABBREVIATION.search(block[start : end.start() + 1]):
            yield block[start : end.end()].strip()
            start = end.end()
    if block[start:].strip():
        yield block[start:].strip()


def words(sentence):
    return [word for word in sentence.split() if re.search(r"\w", word)]


def running_text(markdown):
    return [sentence for block in blocks(markdown) for sentence in sentences(block)]


def test_the_splitter():
    text = """# A heading of many words
One, e.g. this. Two [with a link](x.md) and `some code. here`!

    pip install this is code

| a | table |
- an item
  that goes on. And another

```python
code = "here. too"
```
"""
    assert running_text(text) == [
        "One, e.g. this.",
        "Two with a link and code!",
        "an item that goes on.",
        "And another",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page):
    long = [s for s in running_text(page.read_text(encoding="utf-8")) if len(words(s)) > MOST]
    assert not long, "\n".join(f"{len(words(s))} words: {s}" for s in long)
