"""Two processes against one, for the same global batch: losses, weights, queue and ranking."""

import pytest
import torch
import torch.distributed as dist
from retrieval_models import LENGTH, batch, texts, tiny_retriever
from together import run_together
from torch.nn.parallel import DistributedDataParallel
from waiting import once

from tokenmix_ops.video.engine.placement import gathered, shard
from tokenmix_ops.video.retrieval import RetrievalTraining, rank

STEPS, TEXTS = 3, 6


def rows_of(one, start, stop, length=LENGTH):
    """Some rows of a batch, and so many tokens of their texts."""
    rows = {name: tensor[start:stop] for name, tensor in one.items()}
    for name in ("input_ids", "attention_mask"):
        rows[name] = rows[name][:, :length]
    return rows


def train(world, process):
    """Losses of each step, and the state after them, of one of ``world`` processes."""
    retriever = tiny_retriever().double()
    trained = RetrievalTraining(retriever, queue_size=16, momentum=0.9).double()
    updated = [p for p in trained.parameters() if p.requires_grad]
    own = 6 // world
    losses = []
    for step in range(STEPS):
        one = batch([step, 1, 2, 1, 4, 5], seed=step, dtype=torch.float64)
        found = trained(rows_of(one, own * process, own * (process + 1)), step / 2)
        grads = torch.autograd.grad(found["loss"], updated)
        report = torch.stack([found["itc"], found["itm"]]) / world
        if world > 1:
            for tensor in (*grads, report):
                dist.all_reduce(tensor)
        with torch.no_grad():
            for parameter, grad in zip(updated, grads, strict=True):
                parameter -= 0.05 * grad / world
        trained.after_update()
        losses.append(report)
    return torch.stack(losses), trained.state_dict()


class Pulled(RetrievalTraining):
    """Its temperature is pulled up in the first epoch, where it must not go, and then down."""

    def forward(self, batch, epoch):
        found = super().forward(batch, epoch)
        pull = -1 if epoch < 1 else 1
        return found | {"loss": found["loss"] + pull * self.temperature[0]}


def train_hot(world, process, divided=False):
    """The temperature after each step, from the highest."""
    trained = Pulled(tiny_retriever(), queue_size=16, momentum=0.9, temperature=0.5)
    called = trained
    if divided:
        shard(trained)
    elif world > 1:
        called = DistributedDataParallel(trained, broadcast_buffers=False)
    updated = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(updated, lr=0.05)
    own = 6 // world
    temperatures = []
    for step in range(2 * STEPS):
        one = batch([step, 1, 2, 1, 4, 5], seed=step)
        part = rows_of(one, own * process, own * (process + 1))
        called(part, step / STEPS)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.after_update()
        temperatures.append(float(gathered(trained.temperature)))
    return temperatures


def refused(trained, one):
    with pytest.raises(ValueError, match="processes") as raised:
        trained(one, 0.0)
    return str(raised.value)


def alike(process):
    """What is said of batches that are not of one shape, on all processes and between steps."""
    one = batch([0, 1, 2, 3, 4])
    said = []
    trained = RetrievalTraining(tiny_retriever(), queue_size=5)
    said.append(refused(trained, rows_of(one, 0, 3 - process)))
    said.append(refused(trained, rows_of(one, 0, 2, LENGTH - process)))
    trained(rows_of(one, 0, 2), 0.0)
    said.append(refused(trained, rows_of(one, 0, 2, 5)))
    return said


def ranked(numbers):
    pixels = batch([0, 1, 2, 3, 4])["pixels"][numbers]
    clips = [{"pixels": pixels, "videos": torch.tensor(numbers)}] if numbers else []
    return rank(tiny_retriever(), clips, *texts(TEXTS), num_videos=5, rerank=2)


def work(process, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=2
    )
    found = {"trained": train(2, process), "said": alike(process)}
    found["copied"] = train_hot(2, process)
    found["divided"] = train_hot(2, process, divided=True)
    # Videos shared out unevenly, one of them to both; then all to one.
    found["ranked"] = ranked([[0, 2, 4, 3], [1, 3]][process])
    found["ranked by one"] = ranked([[0, 1, 2, 3, 4], []][process])
    torch.save(found, f"{folder}/{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory, processes):
    """What each of two processes found."""

    def meet(folder):
        run_together([processes.Process(target=work, args=(i, str(folder))) for i in range(2)])

    folder = once(tmp_path_factory, "two_retrievers", meet)
    return [torch.load(folder / f"{process}.pt", weights_only=False) for process in range(2)]


@pytest.fixture(scope="module")
def alone():
    return train(1, 0)


def test_two_processes_train_as_one(both, alone):
    losses, state = alone
    for found in both:
        found_losses, found_state = found["trained"]
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


def test_the_temperature_stays_in_its_range_however_the_model_is_placed(both):
    wanted = train_hot(1, 0)
    assert wanted[:STEPS] == [0.5] * STEPS
    assert 0.01 < wanted[-1] < wanted[STEPS] < 0.49
    for found in both:
        assert found["copied"] == pytest.approx(wanted, rel=1e-4)
        assert found["divided"] == pytest.approx(wanted, rel=1e-4)


def test_batches_of_several_shapes_are_refused_by_all_processes(both):
    either = "all processes must have equally many pairs, with texts padded to one length, got "
    later = "all batches must match the first: expected 2 pairs of 7 tokens, got 2 of 5"
    for found in both:
        pairs, lengths, changed = found["said"]
        assert pairs == f"{either}(3, 2) pairs of (7, 7) tokens"
        assert lengths == f"{either}(2, 2) pairs of (7, 6) tokens"
        assert changed == f"with several processes, {later}"


@pytest.mark.parametrize("name", ["ranked", "ranked by one"])
def test_two_processes_rank_as_one(both, name):
    expected = ranked([0, 1, 2, 3, 4])
    for found in both:
        for scores, wanted in zip(found[name], expected, strict=True):
            torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)
