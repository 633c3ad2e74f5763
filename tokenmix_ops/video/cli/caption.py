"""``tokenmix caption``: trains captioners, scores them, and captions videos."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional
from tyro.extras import SubcommandApp

from tokenmix_ops.video.cli.figures import show_scores
from tokenmix_ops.video.cli.train import RunFlags
from tokenmix_ops.video.cli.train import train as run
from tokenmix_ops.video.experiments.settings import Captioning, Opening

_AS_IT_IS = Opening()


def commands(default: Captioning, flags: RunFlags) -> SubcommandApp:
    """Returns the subcommands; flags of `train` default to ``default`` and ``flags``."""
    app = SubcommandApp()

    @app.command
    def train(
        experiment: OmitArgPrefixes[Captioning] = default,
        flags: OmitArgPrefixes[RunFlags] = flags,
    ) -> None:
        """Tunes BLIP on captioned videos; writes a checkpoint of the updated parameters.

        Flags override the config file. On several GPUs: accelerate launch -m
        tokenmix_ops.video.cli caption train ...

        Example: tokenmix caption train --data videos.jsonl --method token_mixing --out runs/mine

        Example: tokenmix caption train --config configs/captioning/msvd.yaml --backbone vit-l16

        Args:
            experiment: what to train, and how.
            flags: where to start, and where to write.
        """
        run(experiment, flags)

    @app.command
    def evaluate(
        checkpoint: Positional[str],
        data: Path,
        root: Path | None = None,
        split: Literal["train", "val", "test"] = "test",
        max_unreadable: float = 0.0,
        opening: OmitArgPrefixes[Opening] = _AS_IT_IS,
        num_beams: int | None = None,
        batch_size: int = 16,
        workers: int = 2,
        precision: Literal["no", "bf16", "fp16"] = "no",
        score_tokenizer: Literal["auto", "ptb", "python"] = "auto",
        no_meteor: bool = False,
        out: Path | None = None,
        json: bool = False,
    ) -> None:
        """Captions a split of captioned videos and scores the captions.

        Example: tokenmix caption evaluate runs/mine/best.safetensors --data videos.jsonl

        Args:
            checkpoint: what train wrote, or a whole model: a directory, a hub name, a .pth file.
            data: JSON lines, one video per line.
            root: folder that its paths are relative to; by default the folder of the data.
            split: the videos to evaluate on.
            max_unreadable: share of videos that may be missing or unreadable; they are left out.
            opening: how to open it.
            num_beams: beam size; by default as in training.
            batch_size: videos per batch.
            workers: data loader workers.
            precision: mixed precision.
            score_tokenizer: ptb, Stanford's, which published numbers use, needs Java; python, our
                own, does not; auto picks ptb where Java runs.
            no_meteor: skip METEOR, which needs Java.
            out: file to write the captions to, as COCO-style JSON.
            json: print the figures as JSON.
        """
        from tokenmix_ops.video.experiments.evaluating import evaluate_captions

        if out is not None:
            # Not after an hour of captioning.
            out.parent.mkdir(parents=True, exist_ok=True)
        scores, captions = evaluate_captions(
            checkpoint,
            data,
            root,
            split,
            opening=opening,
            num_beams=num_beams,
            batch_size=batch_size,
            workers=workers,
            precision=precision,
            max_unreadable=max_unreadable,
            tokenizer=score_tokenizer,
            meteor=not no_meteor,
            out=out,
        )
        if scores is not None:
            show_scores(scores, as_json=json, videos=len(captions))

    @app.command
    def predict(
        checkpoint: Positional[str],
        videos: Positional[tuple[Path, ...]],
        opening: OmitArgPrefixes[Opening] = _AS_IT_IS,
        num_beams: int | None = None,
        top_p: float | None = None,
        num_captions: int = 1,
        seed: int = 0,
        precision: Literal["no", "bf16", "fp16"] = "no",
        json: bool = False,
    ) -> None:
        """Captions video files, or folders of numbered images.

        Example: tokenmix caption predict runs/mine/best.safetensors holiday.mp4 cat.webm

        Args:
            checkpoint: what train wrote, or a whole model: a directory, a hub name, a .pth file.
            videos: files in any format that FFmpeg reads, or folders of numbered images.
            opening: how to open it.
            num_beams: beam size; by default as in training.
            top_p: sample from the most likely tokens of this total probability instead of beam
                search.
            num_captions: captions per video.
            seed: seed for sampling.
            precision: mixed precision.
            json: print one JSON object per video, with its captions or its error.
        """
        from tokenmix_ops.video.experiments.evaluating import predict_captions

        if not videos:
            raise ValueError("no videos given")
        failed = 0
        for path, captions, error in predict_captions(
            checkpoint,
            videos,
            opening=opening,
            num_beams=num_beams,
            top_p=top_p,
            num_captions=num_captions,
            seed=seed,
            precision=precision,
        ):
            failed += error is not None
            if json:
                row = {"video": str(path), "captions": captions, "error": error}
                print(jsonlib.dumps(row), flush=True)
            elif error is not None:
                print(f"tokenmix: {error}", file=sys.stderr)
            else:
                print(f"{path}: {'; '.join(captions)}", flush=True)
        if failed:
            raise ValueError(f"{failed} of {len(videos)} videos could not be captioned")

    @app.command
    def export(
        checkpoint: Positional[Path],
        out: Positional[Path],
        model: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Turns a checkpoint into a whole transformers model directory.

        Example: tokenmix caption export runs/mine/best.safetensors my_captioner

        Args:
            checkpoint: what train wrote.
            out: the directory to create.
            model: the model that was tuned, if it has moved since.
            tokenizer: the vocabulary, if it has moved since.
        """
        from tokenmix_ops.video.experiments.evaluating import export_checkpoint

        print(export_checkpoint("captioning", checkpoint, out, model, tokenizer))

    return app
