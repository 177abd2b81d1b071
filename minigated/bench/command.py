"""The work behind `python -m minigated bench`."""

import torch

from minigated.bench.ahead import compile_ahead
from minigated.bench.runner import SUITES, run_suite
from minigated.errors import InputError, one_of


def bench_command(args) -> int:
    """Runs the suites that were named, all by default.

    Returns:
        1 if an output was wrong, a row failed or a suite had nothing to time; 0 otherwise, absent peers or not.
    """
    named = [name for part in [*args.suite, *args.suites] for name in part.split(",") if name] or list(SUITES)
    for name in named:
        one_of("suite", name, SUITES)
    scale = args.scale or ("gpu" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    words = tuple(args.only) or None
    if args.workers is not None:
        if args.workers < 1:
            raise InputError(f"workers {args.workers}; accepted: 1 or more")
        failed = compile_ahead(list(dict.fromkeys(named)), scale, args.device, words, args.workers)
        print(f"compiled ahead{f'; {failed} jobs failed and are left to their turn' if failed else ''}")
    options = {"seeds": args.seeds, "device": args.device, "out": args.out, "resume": args.resume}
    options["seconds"] = args.seconds
    bad = 0
    for name in dict.fromkeys(named):
        record = run_suite(name, scale=scale, names=words, **options)
        untimed = record["config"]["not_timed"] if record else [{"state": "failed"}]
        bad += any(row["state"] in ("wrong", "failed") for row in untimed)
        print()
    return 1 if bad else 0
