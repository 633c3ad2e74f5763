"""``tokenmix retrieval``: trains retrievers, scores them, and finds videos by text."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional
from tyro.extras import SubcommandApp

from tokenmix_ops.video.cli.figures import show
from tokenmix_ops.video.cli.train import Launch
from tokenmix_ops.video.cli.train import train as run
from tokenmix_ops.video.experiments.settings import Opening, Retrieval

_AS_IT_IS = Opening()


def commands(default: Retrieval, launch: Launch) -> SubcommandApp:
    """Returns the subcommands; flags of `train` default to ``default`` and ``launch``."""
    app = SubcommandApp()

    @app.command
    def train(
        experiment: OmitArgPrefixes[Retrieval] = default,
        launch: OmitArgPrefixes[Launch] = launch,
    ) -> None:
        """Tunes BLIP to find videos by text; writes a checkpoint of the updated parameters.

        Flags override the config file. On several GPUs: accelerate launch -m
        tokenmix_ops.video.cli retrieval train ...

        Example: tokenmix retrieval train --data videos.jsonl --method token_mixing --out runs/mine

        Example: tokenmix retrieval train --config configs/retrieval/msrvtt.yaml --backbone vit-l16

        Args:
            experiment: what to train, and how.
            launch: where to start, and where to write.
        """
        run(experiment, launch)

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
            data: JSON lines, one video a line.
            root: folder that its paths start from; by default the one of the data.
            split: which videos.
            max_unreadable: share of videos that may be missing or unreadable and are left out.
            opening: how it is opened.
            rerank: best candidates that the matching head ranks anew; by default as in training.
            batch_size: videos at a time.
            workers: processes that read videos.
            precision: type of mixed precision.
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
        """Finds videos of a folder by text; brings an index of them up to date first.

        The first time every video is embedded, later only new and changed ones. It may be stopped
        at any time, and goes on where it was. Without a query it only indexes.

        Example: tokenmix retrieval search runs/mine ~/Videos "a dog runs" --html found.html

        Args:
            checkpoint: what train wrote, its folder, or a whole model: a directory, a hub name, a
                .pth file.
            folder: holds video files and folders of numbered images, also in folders below it.
            queries: what is to be seen.
            index: folder for the index; by default .tokenmix-search in the folder.
            top: how many videos to show for each query.
            rerank: best candidates that the matching head ranks anew, at least --top; 0 for none.
            html: a page to write, with frames of what is found; it opens in any browser.
            opening: how it is opened.
            workers: processes that read videos.
            precision: type of mixed precision.
            rebuild: make the index anew.
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
        """Writes a whole transformers model directory of a checkpoint.

        Example: tokenmix retrieval export runs/mine/best.safetensors my_retriever

        Args:
            checkpoint: what train wrote.
            out: the directory; it is made.
            model: the model that was tuned, if it is not where the checkpoint says.
            tokenizer: where the vocabulary is, if not where the checkpoint says.
        """
        from tokenmix_ops.video.experiments.evaluating import export_checkpoint

        print(export_checkpoint("retrieval", checkpoint, out, model, tokenizer))

    return app
