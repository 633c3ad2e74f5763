"""Fine-tunes a video captioner in a plain PyTorch loop, then captions a clip.

python examples/finetune_captioning.py                      # a small random model, rendered clips
python examples/finetune_captioning.py --data my.jsonl --model Salesforce/blip-image-captioning-base
"""

from pathlib import Path

import torch
import tyro
from torch.utils.data import DataLoader

from tokenmix_ops.video.blip import tiny_blip
from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.checkpoints import save_updated
from tokenmix_ops.video.data.dataset import CaptionedClips, collate
from tokenmix_ops.video.data.manifest import read_manifest
from tokenmix_ops.video.data.sampling import EpochBatches
from tokenmix_ops.video.data.shapes import write_world
from tokenmix_ops.video.text import CaptionTokenizer, clean_caption
from tokenmix_ops.video.tuning import MethodName, Tuning, apply
from tokenmix_ops.video.weights import load_blip


def main(
    data: Path | None = None,
    model: str | None = None,
    method: MethodName = "token_mixing",
    out: Path = Path("runs/example_captioning"),
    epochs: int = 2,
    batch_size: int = 8,
) -> None:
    """Fine-tune a captioner on DATA (JSON lines), or by default on clips of moving shapes."""
    out.mkdir(parents=True, exist_ok=True)
    if data is None:
        write_world(out / "world", 100, size=56)
        data = out / "world" / "videos.jsonl"
    manifest = read_manifest(data)
    captions = [caption for video in manifest.videos for caption in video.captions]

    # Load the image model and its tokenizer, or build small random ones.
    size = 224 if model else 56
    if model:
        tokenizer = CaptionTokenizer.from_pretrained(model)
        blip = load_blip(model, "captioning", image_size=size)
    else:
        tokenizer = CaptionTokenizer.from_captions(map(clean_caption, captions))
        blip = tiny_blip("captioning", tokenizer.vocab_size, image_size=size)

    # Convert it to videos; the method decides which modules to insert and what to update.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captioner = VideoCaptioner(blip).to(device)
    tuned = apply(captioner, Tuning(method, everything=None if model else True))
    print(f"{method}: updates {len(tuned.updated)} tensors, inserts {tuned.inserted or 'nothing'}")
    trained = [p for p in captioner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5 if model else 1e-3, weight_decay=0.05)

    clips = CaptionedClips(manifest, "train", size=size)
    batches = EpochBatches(len(clips), batch_size)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        captioner.train()
        for step, batch in enumerate(DataLoader(clips, batch_sampler=batches, collate_fn=collate)):
            texts = [clean_caption(caption) for caption in batch["captions"]]
            ids, mask = tokenizer.encode(texts, 40, first="[DEC]")
            loss = captioner(batch["pixels"].to(device), ids.to(device), mask.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"epoch {epoch + 1}, step {step + 1} of {len(batches)}: loss {loss:.3f}")

    save_updated(out / "captioner.safetensors", captioner, base=model or "tiny")
    captioner.eval()
    written = captioner.generate(clips[0]["pixels"][None].to(device), num_beams=3)
    print(f"{clips.videos[0].video}: {tokenizer.decode(written)[0]}")


if __name__ == "__main__":
    tyro.cli(main)
