"""Fine-tune BERT or ALBERT on a GLUE task, with ContraNorm at a site of every layer or without.

Example:
    ```
    python -m BERT_glue.main --model_name_or_path minilm --task_name rte --pos 7 --scale 0.01 --output_dir out/rte
    ```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from BERT_glue.config import parse
from repro.errors import run_main

PRELOAD = ("BERT_glue.train",)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, and leave record.json in the run's folder."""
    config = parse(sys.argv[1:] if argv is None else argv)
    # Imported after parsing: a bad flag is refused at once, not after transformers has loaded.
    import datasets
    import transformers

    from BERT_glue.efficiency import trained_tokens
    from BERT_glue.models import describe
    from BERT_glue.predict import write_predictions
    from BERT_glue.sites import active_sites
    from BERT_glue.train import (
        collapse_by_layer,
        describe_batch,
        make_accelerator,
        multiply_adds_per_example,
        predict,
        prepare,
        train,
    )
    from repro.run.run import Run

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    accelerator = make_accelerator(config)
    is_main = accelerator.is_main_process
    run = Run(config.output_dir, "BERT_glue", config, main=is_main, report_to=config.report_to)
    setup = None if run.done else prepare(config, accelerator)
    with run:
        if setup is None or run.done:
            return
        model = accelerator.unwrap_model(setup.model)
        accelerator.print(describe(model))
        accelerator.print(describe_batch(setup))
        untrained = collapse_by_layer(setup) if config.probe and is_main else {}
        progress = train(setup, run)
        predictions = {file: predict(setup, loader)[0] for file, loader in setup.test.items()}
        if is_main and predictions:
            write_predictions(run.folder / "predictions", predictions, setup.task)
        if is_main and config.save_model:
            model.save_pretrained(run.folder / "model")
            setup.tokenizer.save_pretrained(run.folder / "model")
        curve, tokens = progress.curve, trained_tokens(model)
        run.finish(
            progress.metrics,
            protocol=config.protocol,
            selection="last epoch",
            best_epoch=max(curve, key=lambda line: line["score"]) if curve else None,
            seconds_per_epoch=[line["train_seconds"] for line in curve],
            processes=accelerator.num_processes,
            parameters=setup.parameters,
            multiply_adds=multiply_adds_per_example(setup),
            trained_tokens=None if tokens is None else len(tokens),
            sites=active_sites(model),
            **(collapse_by_layer(setup) if config.probe and is_main else {}),
            **{f"{name}_untrained": values for name, values in untrained.items()},
        )
        accelerator.print("  ".join(f"{key} {value:.4f}" for key, value in progress.metrics.items()))
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
