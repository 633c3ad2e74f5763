"""Search a folder of videos by text: an index on disk, queries, and a page of results."""

from tokenmix_ops.video.search.index import Entry, Index
from tokenmix_ops.video.search.model import SearchModel
from tokenmix_ops.video.search.page import write_page
from tokenmix_ops.video.search.querying import Answer, Hit, search
from tokenmix_ops.video.search.updating import update_index

__all__ = [
    "Answer",
    "Entry",
    "Hit",
    "Index",
    "SearchModel",
    "search",
    "update_index",
    "write_page",
]
