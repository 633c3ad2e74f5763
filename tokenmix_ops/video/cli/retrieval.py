"""``tokenmix retrieval``: trains retrievers, scores them, and finds videos by text."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional
from tyro.extras import SubcommandApp

from tokenmix_ops.video.cli.figures import show
from tokenmix_ops.video.cli.train import RunFlags
from tokenmix_ops.video.cli.train import train as run
from tokenmix_ops.video.experiments.settings import Opening, Retrieval

_AS_IT_IS = Opening()


def commands(default: Retrieval, flags: RunFlags) -> SubcommandApp:
    """Returns the subcommands; flags of `train` default to ``default`` and ``flags``."""
    app = SubcommandApp()

    @app.command
    def train(
        experiment: OmitArgPrefixes[Retrieval] = default,
        flags: OmitArgPrefixes[RunFlags] = flags,
    ) -> None:
        """Tunes BLIP to find videos by text; writes a checkpoint of the updated parameters.

        Flags override the config file. On several GPUs: accelerate launch -m
        tokenmix_ops.video.cli retrieval train ...

        Example: tokenmix retrieval train --data videos.jsonl --method token_mixing --out runs/mine

        Example: tokenmix retrieval train --config configs/retrieval/msrvtt.yaml --backbone vit-l16

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
        rerank: int | None = None,
        batch_size: int = 16,
        workers: int = 2,
        precision: Literal["no", "bf16", "fp16"] = "no",
        json: bool = False,
    ) -> None:
        """Ranks a split's videos by its texts, and its texts by its videos.

        Example: tokenmix retrieval evaluate runs/mine/best.safetensors --data videos.jsonl

        Args:
            checkpoint: what train wrote, or a whole model: a directory, a hub name, a .pth file.
            data: JSON lines, one video per line.
            root: folder that its paths are relative to; by default the folder of the data.
            split: the videos to evaluate on.
            max_unreadable: share of videos that may be missing or unreadable; they are left out.
            opening: how to open it.
            rerank: best candidates that the matching head re-ranks; by default as in training.
            batch_size: videos per batch.
            workers: data loader workers.
            precision: mixed precision.
            json: print the figures as JSON.
        """
        from tokenmix_ops.video.experiments.evaluating import evaluate_ranking

        figures = evaluate_ranking(
            checkpoint,
            data,
            root,
            split,
            opening=opening,
            rerank=rerank,
            batch_size=batch_size,
            workers=workers,
            precision=precision,
            max_unreadable=max_unreadable,
        )
        if figures is not None:
            show(figures, as_json=json)

    @app.command
    def search(
        checkpoint: Positional[str],
        folder: Positional[Path],
        queries: Positional[tuple[str, ...]] = (),
        index: Path | None = None,
        top: int = 5,
        rerank: int = 0,
        html: Path | None = None,
        opening: OmitArgPrefixes[Opening] = _AS_IT_IS,
        workers: int = 2,
        precision: Literal["no", "bf16", "fp16"] = "no",
        rebuild: bool = False,
        json: bool = False,
    ) -> None:
        """Searches a folder of videos by text, after updating its index.

        The first run embeds every video, later runs only new and changed ones. You can stop it at
        any time; the next run continues from there. Without a query it only updates the index.

        Example: tokenmix retrieval search runs/mine ~/Videos "a dog runs" --html found.html

        Args:
            checkpoint: what train wrote, its folder, or a whole model: a directory, a hub name, a
                .pth file.
            folder: video files and folders of numbered images, searched recursively.
            queries: what the videos should show.
            index: folder for the index; by default .tokenmix-search inside the folder.
            top: videos to show per query.
            rerank: best candidates that the matching head re-ranks, at least --top; 0 for none.
            html: file to write a page with frames of the results to; any browser opens it.
            opening: how to open it.
            workers: data loader workers.
            precision: mixed precision.
            rebuild: rebuild the index from scratch.
            json: print JSON, and progress on standard error.
        """
        from tokenmix_ops.video.cli import searching

        searching.run(
            checkpoint,
            folder,
            queries,
            index=index,
            top=top,
            rerank=rerank,
            html=html,
            opening=opening,
            workers=workers,
            precision=precision,
            rebuild=rebuild,
            as_json=json,
        )

    @app.command
    def export(
        checkpoint: Positional[Path],
        out: Positional[Path],
        model: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Turns a checkpoint into a whole transformers model directory.

        Example: tokenmix retrieval export runs/mine/best.safetensors my_retriever

        Args:
            checkpoint: what train wrote.
            out: the directory to create.
            model: the model that was tuned, if it has moved since.
            tokenizer: the vocabulary, if it has moved since.
        """
        from tokenmix_ops.video.experiments.evaluating import export_checkpoint

        print(export_checkpoint("retrieval", checkpoint, out, model, tokenizer))

    return app
