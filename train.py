"""Train, validate, test and sample with any method of Quintet; `python train.py` says how."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_modules.cli.failures import reported_failures
from lightning_modules.cli.invocation import read_invocation
from lightning_modules.cli.overview import OVERVIEW, is_overview_request


def main(args: Sequence[str] | None = None) -> None:
    """Run one subcommand.

    Args:
        args: Command-line arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: 2 if the configuration or the checkpoint is wrong, 1 if the run fails,
            128 + n if signal n stopped it.
    """
    argv = list(sys.argv[1:] if args is None else args)
    if is_overview_request(argv):
        print(OVERVIEW, end="")
        return
    with reported_failures():
        # Lightning takes seconds to import: what the files and flags give away comes first.
        invocation = read_invocation(argv)
        from lightning.pytorch import LightningDataModule, LightningModule

        from lightning_modules.cli.interface import QuintetCLI
        from lightning_modules.cli.quiet import hush_advertisements
        from lightning_modules.cli.signals import StopRequests

        hush_advertisements()
        with StopRequests() as requests:
            QuintetCLI(
                invocation,
                requests,
                model_class=LightningModule,
                datamodule_class=LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                trainer_defaults={"use_distributed_sampler": False, "num_sanity_val_steps": 0},
                auto_configure_optimizers=False,  # each method sets up its own schedule
                save_config_callback=None,  # RunRecord saves it
            )


if __name__ == "__main__":
    main()
