"""Train, validate, test and sample with any method of Quintet; `python train.py` says how."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_modules.cli.failures import reported_failures
from lightning_modules.cli.invocation import read_invocation
from lightning_modules.cli.overview import EXAMINATION, is_overview_request, overview


def main(args: Sequence[str] | None = None) -> None:
    """Run one subcommand.

    Args:
        args: Command-line arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: 2 if the configuration or the checkpoint is wrong, 1 if the run fails,
            128 + n if signal n stopped it; after ``doctor`` always, 0 or 2.
    """
    argv = list(sys.argv[1:] if args is None else args)
    if is_overview_request(argv):
        print(overview(), end="")
        return
    with reported_failures():
        if argv[0] == EXAMINATION:
            from lightning_modules.cli.doctor.examination import examine

            raise SystemExit(examine(argv[1:]))
        # Lightning takes seconds to import: what the files and flags give away comes first.
        invocation = read_invocation(argv)
        from lightning_modules.cli.interface import LIGHTNING_OPTIONS, QuintetCLI
        from lightning_modules.cli.quiet import hush_advertisements
        from lightning_modules.cli.signals import StopRequests

        hush_advertisements()
        with StopRequests() as requests:
            QuintetCLI(invocation, requests, **LIGHTNING_OPTIONS)


if __name__ == "__main__":
    main()
