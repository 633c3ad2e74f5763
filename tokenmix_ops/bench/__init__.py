"""Benchmarks: contenders are timed side by side, rows of data are written, tables rendered."""
