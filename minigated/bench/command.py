"""The work behind `python -m minigated bench`."""

import torch

from minigated.bench.ahead import compile_ahead
from minigated.bench.plan import SUITES, plan_suites
from minigated.bench.runner import run_plan
from minigated.errors import InputError


def bench_command(args) -> int:
    """Runs the suites that were named, all by default.

    Returns:
        1 if an output was wrong, a row failed or a suite had nothing to time; 0 otherwise, absent peers or not.
    """
    named = [name for part in [*args.suite, *args.suites] for name in part.split(",") if name] or list(SUITES)
    named = list(dict.fromkeys(named))
    scale = args.scale or ("gpu" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    words = tuple(args.only) or None
    if args.workers is not None and args.workers < 1:
        raise InputError(f"workers {args.workers}; accepted: 1 or more")
    options = {"seeds": args.seeds, "device": args.device, "out": args.out, "resume": args.resume}
    plans = plan_suites(named, scale=scale, names=words, seconds=args.seconds, **options)
    if without := [name for name in named if name not in {plan.suite for plan in plans}]:
        print(f"no such rows in {', '.join(without)}")
    if args.workers is not None:
        failed = compile_ahead(named, scale, args.device, words, args.workers)
        print(f"compiled ahead{f'; {failed} jobs failed and are left to their turn' if failed else ''}")
    bad = 0
    for plan in plans:
        record = run_plan(plan)
        untimed = record["config"]["not_timed"] if record else [{"state": "failed"}]
        bad += any(row["state"] in ("wrong", "failed") for row in untimed)
        print()
    return 1 if bad else 0
