"""Forward passes as CUDA graphs, whose replay takes the host one call however many kernels run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from bench.passes import Begin, Contender, failure, fault, relative_errors

REPLAY = "forward, graph replay"
"""What this pass is called in rows."""
MOST_GRAPHS = 16
"""Of a contender: one for each set of inputs, together still more than the L2 cache holds."""

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Given a run on fixed inputs, returns what repeats it and gives the result."""


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Captures a run that needs no gradient; its replays write the same output tensor.

    Raises RuntimeError without a CUDA GPU, and what the run raises under capture.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a CUDA GPU")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # This context restores the stream if a capture fails; that of the graph would not.
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            run()
        with torch.cuda.graph(graph, stream=stream):
            output = run()
        # What a replay does not write shows.
        output.fill_(float("nan"))
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def replays(
    contenders: Mapping[str, Contender],
    capture: Capture = captured,
    begin: Begin = lambda contender, of_pass: None,
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders whose calls are replays, and why others have none: what a capture raises, or a
    replay that differs from its run. ``begin`` is told who is captured next."""
    found: dict[str, Contender] = {}
    reasons: dict[str, str] = {}
    for name, contender in contenders.items():
        begin(name, REPLAY)
        graphs: dict[int, Callable[[], Tensor]] = {}
        if why := failure(partial(_capture_sets, contender, capture, graphs)):
            reasons[name] = f"no graph: {why}"
            continue
        sets = contender.sets[: len(graphs)]
        found[name] = Contender(partial(_replay, graphs), sets, contender.output_grads)
    return found, reasons


def _capture_sets(
    contender: Contender, capture: Capture, graphs: dict[int, Callable[[], Tensor]]
) -> None:
    """Adds the replays of a contender's sets by the address of the first tensor."""
    for tensors in contender.sets[:MOST_GRAPHS]:
        replay = capture(partial(contender.call, *tensors))
        with torch.no_grad():
            wanted = contender.call(*tensors)
        # Not bit for bit: a library may choose another algorithm under capture.
        wrong = fault(relative_errors({"output": replay()}, {"output": wanted}), wanted.dtype)
        if wrong:
            raise RuntimeError(wrong)
        graphs[tensors[0].data_ptr()] = replay


def _replay(graphs: Mapping[int, Callable[[], Tensor]], query: Tensor, *others: Tensor) -> Tensor:
    return graphs[query.data_ptr()]()
