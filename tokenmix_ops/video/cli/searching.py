"""What ``tokenmix retrieval search`` does: an index brought up to date, and answers shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenmix_ops.video.engine.progress import Evaluation, Progress
from tokenmix_ops.video.experiments.settings import Opening
from tokenmix_ops.video.search import Answer, Index, SearchModel, search, update_index, write_page
from tokenmix_ops.video.search.querying import check

_SHOWN = 5


def run(
    checkpoint: str,
    folder: Path,
    queries: Sequence[str],
    *,
    index: Path | None,
    top: int,
    rerank: int,
    html: Path | None,
    opening: Opening,
    workers: int,
    precision: str,
    rebuild: bool,
    as_json: bool,
) -> None:
    """Indexes, and answers the queries on standard output; all else goes to standard error."""
    if html is not None:
        if not queries:
            raise ValueError("--html shows what is found: give a query too")
        if html.is_dir():
            raise ValueError(f"--html {html} is a folder: name a file")
        # Not after an hour of indexing.
        html.parent.mkdir(parents=True, exist_ok=True)
    check(queries, top, rerank)
    model = SearchModel(checkpoint, opening, precision=precision)
    with Evaluation(Console(stderr=True, highlight=False)) as progress:
        found = update_index(
            model,
            folder,
            index,
            workers=workers,
            rebuild=rebuild,
            track=progress.track,
            say=progress.say,
        )
        answers = search(
            model,
            found,
            queries,
            top=top,
            rerank=rerank,
            workers=workers,
            track=progress.track,
        )
        if html is not None:
            write_page(html, found, answers)
        _report(found, progress)
    if as_json:
        print(json.dumps(_plain(found, answers)))
    else:
        for answer in answers:
            _show(answer, rerank > 0)
        if html is not None:
            print(html)


def _report(index: Index, progress: Progress) -> None:
    """What there is, and what could not be read."""
    progress.say(f"{len(index.readable)} videos are indexed")
    unreadable = index.unreadable
    if unreadable:
        progress.say(f"{len(unreadable)} could not be read, and will be tried when they change:")
        for entry in unreadable[:_SHOWN]:
            progress.say(_printable(f"  {entry.video}: {entry.error}"))
        if len(unreadable) > _SHOWN:
            progress.say(f"  and {len(unreadable) - _SHOWN} more, listed in the index")


def _show(answer: Answer, reranked: bool) -> None:
    """A table, in which nothing is cut off where no terminal is."""
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    console.print(Text(_printable(answer.query), style="bold"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    if reranked:
        table.add_column("similarity", justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("video", overflow="fold")
    for rank, hit in enumerate(answer.hits, 1):
        table.add_row(
            str(rank),
            f"{hit.score:.3f}",
            *([f"{hit.similarity:.3f}"] if reranked else []),
            "" if hit.duration is None else f"{hit.duration:.1f}",
            Text(_printable(str(hit.path))),
        )
    console.print(table)


def _plain(index: Index, answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "queries": [
            {
                "query": answer.query,
                "hits": [
                    {
                        "video": hit.video,
                        "score": hit.score,
                        "similarity": hit.similarity,
                        "path": str(hit.path),
                        "duration": hit.duration,
                    }
                    for hit in answer.hits
                ],
            }
            for answer in answers
        ],
        "videos": len(index.readable),
        "unreadable": {entry.video: entry.error for entry in index.unreadable},
    }


def _printable(text: str) -> str:
    """Names may hold line breaks, control sequences, and bytes that are no text."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
