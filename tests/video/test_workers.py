"""Workers outlive signals while they are needed, and nobody waits for them afterwards."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tokenmix_ops.video.data.workers import OutliveSignals


class Numbers(Dataset):
    """Numbers that take a while, and none above 99."""

    def __len__(self):
        return 200

    def __getitem__(self, index):
        time.sleep(0.01)
        if index > 99:
            raise ValueError("too large")
        return torch.tensor(index)


def loader(outliving, context, workers=2):
    return DataLoader(
        Numbers(),
        batch_size=1,
        num_workers=workers,
        worker_init_fn=outliving,
        multiprocessing_context=context,
    )


def alive(pids):
    return {process.pid for process in active_children()} & set(pids)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_signals_do_not_end_workers_but_their_reader_does(context):
    outliving = OutliveSignals(2)
    stream = iter(loader(outliving, context))
    got = [int(next(stream)) for _ in range(6)]
    pids = list(outliving.pids)
    assert alive(pids) == set(pids)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    with pytest.raises(ValueError, match="too large") as error:
        got.extend(int(number) for number in stream)
    assert got == list(range(100))
    assert alive(pids) == set(pids)
    began = time.monotonic()
    outliving.end()
    assert not alive(pids)
    del stream, error
    assert time.monotonic() - began < 4


def test_whoever_reads_to_the_end_has_nothing_to_end():
    outliving = OutliveSignals(1)
    rows = DataLoader(range(9), num_workers=1, worker_init_fn=outliving)
    assert len(list(rows)) == 9
    outliving.end()
    outliving.end()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_process_that_fails_while_it_reads_exits(tmp_path, context):
    script = tmp_path / "reads.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_workers import OutliveSignals, loader\n"
        "if __name__ == '__main__':\n"
        f"    for number in loader(OutliveSignals(2), {context!r}):\n"
        "        pass\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert "too large" in ended.stderr
