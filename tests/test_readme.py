"""The README's example runs as written, and every link of every page leads somewhere."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pages():
    """The Markdown files of the repository, without what is installed or generated beside it."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "*.md"],
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        return sorted(listed.stdout.split())
    folders = ("", "docs", "results", "configs", "kernels", "bindings")
    return sorted(
        path.relative_to(ROOT).as_posix() for f in folders for path in (ROOT / f).glob("*.md")
    )


def links(text):
    """Targets of links and images, outside code."""
    text = re.sub(r"```.*?```|`[^`\n]*`(?!\])", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(text):
    """What headings are called in links, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    assert names["tokens"].shape == (16, 197, 768)
    assert names["output"].shape == names["query"].shape


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in links(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{page}: {link}"


def test_a_readme_with_a_link_to_nowhere_is_noticed():
    assert links("[a](b.md) `x` ![c](d.png)\n```\n[e](f)\n```") == ["b.md", "d.png"]
    assert anchors("# One, two\n## `three` four") == {"one-two", "three-four"}
