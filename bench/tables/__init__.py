"""Rows of data as Markdown tables, one function for each kind of result file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench.rows import Row
from bench.tables.compiler import aot_table
from bench.tables.gpu import gpu_table
from bench.tables.speed import host_table, layer_table, operator_table, tower_table
from bench.tables.tuning import memory_table, training_table
from bench.tables.video import loading_table, rerank_table, search_table, world_table

TABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "aot": aot_table,
    "gpu": gpu_table,
    "host": host_table,
    "layer": layer_table,
    "loading": loading_table,
    "memory": memory_table,
    "operator": operator_table,
    "rehearsal": gpu_table,
    "rerank": rerank_table,
    "search": search_table,
    "tower": tower_table,
    "training": training_table,
    "world": world_table,
}
