"""``tokenmix retrieval``: trains retrievers and scores them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional
from tyro.extras import SubcommandApp

from tokenmix_ops.video.cli import training
from tokenmix_ops.video.experiments.settings import Opening, Retrieval

_AS_IT_IS = Opening()


def commands(default: Retrieval) -> SubcommandApp:
    """The subcommands; ``default`` is what `train` starts from before its flags."""
    app = SubcommandApp()

    @app.command
    def train(
        experiment: OmitArgPrefixes[Retrieval] = default,
        out: Path = Path("runs/retrieval"),
        config: Path | None = None,
        tiny: bool = False,
        resume: bool = False,
        print_config: bool = False,
        json: bool = False,
    ) -> None:
        """Tunes BLIP to find videos by text; writes a checkpoint with what was updated.

        For several GPUs: accelerate launch -m tokenmix_ops.video.cli retrieval train ...

        Example: tokenmix retrieval train --data videos.jsonl --method token_mixing --out runs/mine

        Args:
            experiment: settings; flags override those of --config.
            out: folder for checkpoints, the curve and the states to resume from.
            config: an experiment file, as those in configs/retrieval.
            tiny: start from a small random model, with settings that suit it, to try things out;
                token_mixing and spatial update all of it unless --everything says otherwise.
            resume: go on with the training in --out where it stopped.
            print_config: print the whole experiment as YAML, and do nothing.
            json: print the final figures as JSON, and progress on standard error.
        """
        training.train(experiment, out, tiny, resume, print_config, json)

    @app.command
    def evaluate(
        checkpoint: Positional[str],
        data: Path,
        root: Path | None = None,
        split: Literal["train", "val", "test"] = "test",
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
        )
        if figures is not None:
            training.show(figures, as_json=json)

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
