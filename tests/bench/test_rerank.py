"""The re-ranking benchmark: its ways agree, and its rows say what was measured."""

import pytest

pytest.importorskip("transformers")
from bench.rerank import FUSED, ONCE, PLAIN, rerank_rows

TINY = {"num_frames": 2, "num_tokens": 5, "dim": 32, "num_heads": 2, "num_layers": 2}


@pytest.mark.interfaces
def test_all_ways_match_alike():
    rows = rerank_rows(videos=2, texts=5, length=4, texts_at_once=2, rounds=3, sizes=TINY)
    assert [row["contender"] for row in rows] == [ONCE, FUSED, PLAIN]
    for row in rows:
        assert row["difference"] < 1e-5
        assert len(row["rounds_ms"]) == 3
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio"] <= high
        assert {name: row[name] for name in TINY} == TINY
    assert rows[0]["ratio"] == 1
