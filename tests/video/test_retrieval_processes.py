"""Two processes against one, for the same global batch: losses, weights, queue and ranking."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from retrieval_models import batch, texts, tiny_retriever

from tokenmix_ops.video.retrieval import RetrievalTraining, rank

STEPS, TEXTS = 3, 6
SHARES = {"even": (3, 3), "uneven": (4, 2)}


def share(one, start, stop):
    """Some rows of a batch, its texts no longer than the longest of them."""
    rows = {name: tensor[start:stop] for name, tensor in one.items()}
    longest = int(rows["attention_mask"].sum(1).max())
    return {
        name: tensor[:, :longest] if name in ("input_ids", "attention_mask") else tensor
        for name, tensor in rows.items()
    }


def train(sizes, process):
    """Losses of each step, and the state after them, of one of ``len(sizes)`` processes."""
    retriever = tiny_retriever().double()
    trained = RetrievalTraining(retriever, queue_size=16, momentum=0.9).double()
    updated = [p for p in trained.parameters() if p.requires_grad]
    start, total = sum(sizes[:process]), sum(sizes)
    losses = []
    for step in range(STEPS):
        one = batch([step, 1, 2, 1, 4, 5], seed=step, dtype=torch.float64)
        found = trained(share(one, start, start + sizes[process]), step / 2)
        # As the engine scales: by this process's share of the pairs.
        weight = sizes[process] * len(sizes) / total
        grads = torch.autograd.grad(weight * found["loss"], updated)
        report = weight / len(sizes) * torch.stack([found["itc"], found["itm"]])
        if len(sizes) > 1:
            for tensor in (*grads, report):
                dist.all_reduce(tensor)
        with torch.no_grad():
            for parameter, grad in zip(updated, grads, strict=True):
                parameter -= 0.05 * grad / len(sizes)
        trained.after_update()
        losses.append(report)
    return torch.stack(losses), trained.state_dict()


def ranked(numbers):
    pixels = batch([0, 1, 2, 3, 4])["pixels"][numbers]
    clips = [{"pixels": pixels, "videos": torch.tensor(numbers)}] if numbers else []
    return rank(tiny_retriever(), clips, *texts(TEXTS), num_videos=5, rerank=2)


def work(process, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=2
    )
    found = {name: train(sizes, process) for name, sizes in SHARES.items()}
    # Videos shared out unevenly, one of them to both; then all to one.
    found["ranked"] = ranked([[0, 2, 4, 3], [1, 3]][process])
    found["ranked by one"] = ranked([[0, 1, 2, 3, 4], []][process])
    torch.save(found, f"{folder}/{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{process}.pt", weights_only=False) for process in range(2)]


@pytest.fixture(scope="module")
def alone():
    return train((6,), 0)


@pytest.mark.parametrize("shares", SHARES)
def test_two_processes_train_as_one(processes, alone, shares):
    losses, state = alone
    for found in processes:
        found_losses, found_state = found[shares]
        torch.testing.assert_close(found_losses, losses, rtol=1e-9, atol=1e-9)
        assert found_state.keys() == state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(found_state[name], tensor, rtol=1e-7, atol=1e-9, msg=name)


def test_training_did_change_the_weights(alone):
    losses, state = alone
    before = tiny_retriever().double().state_dict()
    name = "encoder.vision_model.encoder.layers.1.self_attn.qkv.weight"
    assert (state[f"retriever.{name}"] - before[name]).abs().max() > 1e-3
    assert losses.isfinite().all()


@pytest.mark.parametrize("name", ["ranked", "ranked by one"])
def test_two_processes_rank_as_one(processes, name):
    expected = ranked([0, 1, 2, 3, 4])
    for found in processes:
        for scores, wanted in zip(found[name], expected, strict=True):
            torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)
