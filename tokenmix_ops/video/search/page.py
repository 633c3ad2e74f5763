"""Writes search results to one HTML file that opens without a server."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from tokenmix_ops.video.data.clips import ClipError
from tokenmix_ops.video.files import replace_text
from tokenmix_ops.video.search.index import Index
from tokenmix_ops.video.search.querying import Answer, Hit
from tokenmix_ops.video.search.strip import frame_strip

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1d2024; --faint: #646b75; --line: #e2e4e8;
  --accent: #1f5fbf; --shade: #eceef1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131518; --card: #1b1e22; --ink: #e8eaed; --faint: #9aa2ad; --line: #2d3238;
    --accent: #8ab4f8; --shade: #24282d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 4rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere;
}
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 0.15em; }
h1 { margin: 0; font-size: 1.125rem; font-weight: 600; }
.about, .figures, .missing, footer { color: var(--faint); font-size: 0.875rem; }
.about { margin: 0.125rem 0 0; }
nav ol { margin: 1rem 0 0; padding-left: 1.5rem; }
section { margin-top: 2.75rem; }
h2 { margin: 0 0 0.875rem; font-size: 1.5rem; line-height: 1.25; font-weight: 600; }
.hits { margin: 0; padding: 0; list-style: none; display: grid; gap: 0.875rem; }
.hit {
  background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem;
  padding: 0.75rem 0.875rem 0.875rem;
}
.head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.75rem; }
.rank { color: var(--faint); font-variant-numeric: tabular-nums; min-width: 1.25rem; }
.name { flex: 1 1 12rem; min-width: 0; font-weight: 500; }
.figures { font-variant-numeric: tabular-nums; }
.figures b { color: var(--ink); font-weight: 600; }
.strip { display: grid; grid-template-columns: repeat(8, 1fr); gap: 3px; margin-top: 0.625rem; }
.strip img {
  display: block; width: 100%; height: auto; border-radius: 3px; background: var(--shade);
}
.missing { margin: 0.5rem 0 0; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 0.75rem; }
@media (max-width: 40rem) {
  body { padding: 1.5rem 0.875rem 3rem; }
  .strip { grid-template-columns: repeat(4, 1fr); }
}
"""


def write_page(path: str | os.PathLike[str], index: Index, answers: Sequence[Answer]) -> None:
    """Write a page of answers that shows each hit's rank, score, link and frames.

    The page embeds its style and images and needs no network; links to videos are relative.
    Creates the folder and replaces an earlier file atomically. Raises OSError if it cannot be
    written.
    """
    path = Path(path)
    strips: dict[Path, str] = {}
    sections = []
    for number, answer in enumerate(answers, 1):
        hits = "\n".join(_hit(rank, hit, path, strips) for rank, hit in enumerate(answer.hits, 1))
        nothing = "" if answer.hits else '\n<p class="missing">No results.</p>'
        sections.append(
            f'<section id="query-{number}">\n<h2><bdi>{_text(answer.query)}</bdi></h2>\n'
            f'<ol class="hits">\n{hits}\n</ol>{nothing}\n</section>'
        )
    title = answers[0].query if len(answers) == 1 else f"{len(answers)} queries"
    folder = _text(str(index.folder.absolute()))
    count = len(index.readable)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)} – video search</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>Video search</h1>
<p class="about">{count:,} video{"" if count == 1 else "s"} in <bdi>{folder}</bdi></p>
{_contents(answers)}</header>
<main>
{chr(10).join(sections)}
</main>
<footer>Frames are evenly spaced, in order of time. Written by tokenmix retrieval search.</footer>
</body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)


def _contents(answers: Sequence[Answer]) -> str:
    if len(answers) < 2:
        return ""
    items = "\n".join(
        f'<li><a href="#query-{number}"><bdi>{_text(answer.query)}</bdi></a></li>'
        for number, answer in enumerate(answers, 1)
    )
    return f'<nav aria-label="Queries">\n<ol>\n{items}\n</ol>\n</nav>\n'


def _hit(rank: int, hit: Hit, page: Path, strips: dict[Path, str]) -> str:
    name = _text(hit.video)
    if hit.path not in strips:
        strips[hit.path] = _strip(hit, name)
    figures = f"score <b>{hit.score:.3f}</b>"
    if hit.score != hit.similarity:
        figures += f" · similarity {hit.similarity:.3f}"
    if hit.duration is not None:
        figures += f" · {_clock(hit.duration)}"
    return (
        f'<li class="hit">\n<div class="head"><span class="rank">{rank}</span>'
        f'<a class="name" href="{_link(page, hit.path)}"><bdi>{name}</bdi></a>'
        f'<span class="figures">{figures}</span></div>\n{strips[hit.path]}\n</li>'
    )


def _strip(hit: Hit, name: str) -> str:
    try:
        frames = frame_strip(hit.path)
    except ClipError as error:
        return f'<p class="missing">No frames: {_text(str(error))}</p>'
    images = "\n".join(
        f'<img alt="{name}, frame {number} of {len(frames)}" '
        f'src="data:image/jpeg;base64,{base64.b64encode(frame).decode()}">'
        for number, frame in enumerate(frames, 1)
    )
    return f'<div class="strip">\n{images}\n</div>'


def _link(page: Path, video: Path) -> str:
    """Return a relative link, so that a folder can be moved with its page; browsers resolve ".."
    textually, as `os.path.relpath` does."""
    way = os.path.relpath(video.absolute(), page.absolute().parent)
    return quote(os.fsencode(way.replace(os.sep, "/")))


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _text(text: str) -> str:
    """Escape a text; bytes that are not UTF-8 become question marks."""
    return escape(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
