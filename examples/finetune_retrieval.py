"""Fine-tunes text-video retrieval in a plain PyTorch loop, then ranks clips for a text.

python examples/finetune_retrieval.py                       # a small random model, rendered clips
python examples/finetune_retrieval.py --data my.jsonl --model Salesforce/blip-itm-base-coco
"""

from pathlib import Path

import torch
import tyro
from torch.utils.data import DataLoader

from tokenmix_ops.video.blip import tiny_blip
from tokenmix_ops.video.checkpoints import save_updated
from tokenmix_ops.video.data.dataset import CaptionedClips, Clips, collate
from tokenmix_ops.video.data.manifest import read_manifest
from tokenmix_ops.video.data.sampling import EpochBatches
from tokenmix_ops.video.data.shapes import write_world
from tokenmix_ops.video.retrieval import RetrievalTraining, VideoRetriever, rank
from tokenmix_ops.video.text import CaptionTokenizer, clean_caption
from tokenmix_ops.video.tuning import MethodName, Tuning, apply
from tokenmix_ops.video.weights import load_blip


def main(
    data: Path | None = None,
    model: str | None = None,
    method: MethodName = "token_mixing",
    out: Path = Path("runs/example_retrieval"),
    epochs: int = 2,
    batch_size: int = 8,
) -> None:
    """Fine-tune a retriever on DATA (JSON lines), or by default on clips of moving shapes."""
    out.mkdir(parents=True, exist_ok=True)
    if data is None:
        write_world(out / "world", 100, size=56)
        data = out / "world" / "videos.jsonl"
    manifest = read_manifest(data)
    words = [caption for video in manifest.videos for caption in video.captions]
    size = 224 if model else 56
    if model:
        tokenizer = CaptionTokenizer.from_pretrained(model)
        blip = load_blip(model, "retrieval", image_size=size)
    else:
        tokenizer = CaptionTokenizer.from_captions(map(clean_caption, words))
        blip = tiny_blip("retrieval", tokenizer.vocab_size, image_size=size)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    retriever = VideoRetriever(blip).to(device)
    apply(retriever, Tuning(method, everything=None if model else True))
    training = RetrievalTraining(retriever, queue_size=57_600 if model else 128).to(device)
    trained = [p for p in training.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5 if model else 1e-3, weight_decay=0.05)
    clips = CaptionedClips(manifest, "train", size=size)
    batches = EpochBatches(len(clips), batch_size)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        training.train()
        for step, batch in enumerate(DataLoader(clips, batch_sampler=batches, collate_fn=collate)):
            ids, mask = tokenizer.encode([clean_caption(c) for c in batch.pop("captions")], 35)
            batch |= {"input_ids": ids, "attention_mask": mask}
            on_device = {name: value.to(device) for name, value in batch.items()}
            losses = training(on_device, epoch + step / len(batches))
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            training.after_update()
            print(f"epoch {epoch + 1}, step {step + 1}: loss {losses['loss']:.3f}")
    save_updated(out / "retriever.safetensors", retriever, base=model or "tiny")
    held = Clips(manifest, "test", size=size)
    loader, text = DataLoader(held, 8, collate_fn=collate), held.videos[0].captions[0]
    ids, mask = tokenizer.encode([text], 35)
    scores = rank(retriever, loader, ids, mask, num_videos=len(held), rerank=8)
    for row in scores.text_to_video[0].argsort(descending=True)[:3].tolist():
        print(f"{text!r}: {held.videos[row].video} ({held.videos[row].captions[0]})")


if __name__ == "__main__":
    tyro.cli(main)
