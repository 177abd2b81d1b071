"""The command line: `python -m minigated COMMAND`. Each command's work is in the module it belongs to."""

import argparse
import json
import sys

from minigated.errors import InputError, one_of

SHARED = {"device": "auto, cpu, cuda or cuda:N", "seed": "of weights and data order", "out": "output folder"}
GPUS = [8, 64, 512]  # of `memory`


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help=SHARED["device"])
    parser.add_argument("--seed", type=int, default=0, help=SHARED["seed"])
    parser.add_argument("--out", default=None, help=SHARED["out"])
    parser.add_argument("--resume", action="store_true", help="go on from what the output folder holds")


def variants(args) -> int:
    """Lists the gate variants beside the paper's numbers."""
    from minigated.variant_table import format_dense_rows, format_rows, variant_rows

    rows = variant_rows()
    print(json.dumps(rows, indent=1) if args.json else f"{format_rows(rows)}\n\n{format_dense_rows()}")
    return 0


def models(args) -> int:
    """Lists every named model with its exact parameter count."""
    from minigated.model_table import format_rows, model_rows

    rows = model_rows()
    print(json.dumps(rows, indent=1) if args.json else format_rows(rows))
    return 0


def memory(args) -> int:
    """Works out how much memory training takes: a language model on each of so many GPUs, a vision model on one."""
    from minigated.lm import SIZES as LANGUAGE
    from minigated.memory import format_report, memory_rows
    from minigated.vit_sizes import SIZES as VISION

    one_of("model", args.model, [*LANGUAGE, *VISION])
    if args.model in VISION:
        return vision_memory(args)
    if args.image_size is not None:
        raise InputError(f"--image-size is for vision models, {args.model} is none; accepted: one of them")
    options = {"recipe": args.recipe, "chunk": args.chunk}
    rows = memory_rows(args.model, args.gpus, args.batch, args.length, args.variant, **options)
    print(json.dumps(rows, indent=1) if args.json else format_report(args.model, rows))
    return 0


def vision_memory(args) -> int:
    """`memory` for a vision model."""
    from minigated.vit_memory import format_vit_report, vit_memory_rows

    usual = {"gpus": GPUS, "length": None, "variant": "none", "recipe": "autocast", "chunk": 0}
    for name, value in usual.items():
        if getattr(args, name) != value:
            raise InputError(f"--{name} is for language models, {args.model} is none; accepted: --batch, --image-size")
    rows = vit_memory_rows(args.model, args.batch, args.image_size)
    print(json.dumps(rows, indent=1) if args.json else format_vit_report(args.model, rows))
    return 0


def data(args) -> int:
    """Fetches (where needed) and describes a data set."""
    from minigated.data import describe

    print(describe(args.name, args.root, args.size))
    return 0


def train(args) -> int:
    """Trains a language model on a text, or a vision model on images."""
    from minigated.commands import train_command

    return train_command(args)


def run(args) -> int:
    """Runs a scaled experiment and writes its record."""
    import torch

    from minigated.experiments import run_experiment

    scale = args.scale or ("gpu" if torch.cuda.is_available() else "cpu")
    options = {"seeds": args.seeds, "device": args.device, "out": args.out, "text": args.text, "resume": args.resume}
    if args.made_only:
        options["made_only"] = True
    run_experiment(args.record_id, scale=scale, names=tuple(args.only) or None, **options)
    return 0


def show_records(args) -> int:
    """Lists the records; with --check says which no longer match the code that made them."""
    from minigated.records import all_records, caption, stale_files

    found = all_records()
    for record in found:
        print(f"{record['id']}: {record['claim']}\n    {caption(record, named=None)}")
    if not found:
        print("no records yet")
    return 1 if args.check and any(stale_files(record) for record in found) else 0


def measure(args) -> int:
    """Measures sinks and massive activations of a checkpoint on a text."""
    from minigated.commands import measure_command

    return measure_command(args)


def generate(args) -> int:
    """Continues a prompt with a trained language model."""
    from minigated.generate_command import generate_command

    return generate_command(args)


def bench(args) -> int:
    """Measures every component beside its reference form and other libraries, and this machine's limits."""
    from minigated.bench.command import bench_command

    return bench_command(args)


def build_parser() -> argparse.ArgumentParser:
    """One subparser a command."""
    parser = argparse.ArgumentParser(prog="python -m minigated", description="Gated attention, built from scratch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, name=None):
        sub = commands.add_parser(name or function.__name__, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        return sub

    chunk = "tokens whose logits the loss holds at once; 0 for all; near batch x length it saves nothing"
    for function in (variants, models):
        command(function).add_argument("--json", action="store_true", help="for programs")
    sub = command(memory)
    sub.add_argument("model", help="a name of `models`, e.g. 15A2B or rmt_s")
    sub.add_argument("--gpus", type=int, nargs="+", default=GPUS, metavar="N", help="that share a language model")
    sub.add_argument("--batch", type=int, default=1, help="sequences or images of one GPU at a time")
    sub.add_argument("--image-size", type=int, default=None, metavar="PIXELS", help="a side; the vision model's own")
    sub.add_argument("--length", type=int, default=None, help="tokens a sequence; the model's context otherwise")
    sub.add_argument("--variant", default="none", help="none, g1_elementwise or g1_headwise")
    sub.add_argument("--recipe", default="autocast", help="autocast, as `train` does, or mixed: bf16 weights gathered")
    sub.add_argument("--chunk", type=int, default=0, help=chunk)
    sub.add_argument("--json", action="store_true", help="for programs")
    sub = command(data)
    texts, images = "sample, shakespeare, enwik8, tinystories, wikitext2", "cifar10, cifar10-sample, mini-imagenet"
    sub.add_argument("name", help=f"{texts}, {images}, or a folder of images in class folders")
    sub.add_argument("--root", default=None, help="data folder; MINIGATED_DATA or a per-user cache otherwise")
    sub.add_argument("--size", type=int, default=None, help="side of the images, for a folder or mini-imagenet")
    sub = command(train)
    sub.add_argument("model", help="a name of `models`, e.g. lm_nano")
    sub.add_argument("--variant", default="none", help="a name of `variants`")
    sub.add_argument("--text", default="shakespeare", help="a data set's name or a .txt, .txt.xz or .txt.gz file")
    sub.add_argument("--tokenizer", default="bytes", help="bytes, or bpe:VOCABULARY to learn byte-pair tokens")
    sub.add_argument("--images", default="cifar10-sample", help="for a vision model: a data set's name or a folder")
    sub.add_argument("--steps", type=int, default=300)
    sub.add_argument("--batch", type=int, default=None, help="sequences (16) or images (64) a step")
    sub.add_argument("--context", type=int, default=None, help="tokens a sequence; the model's own otherwise")
    sub.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    sub.add_argument("--accumulate", type=int, default=1, help="parts of each step's batch, one after the other")
    sub.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="torchrun: copies or shares")
    sub.add_argument("--chunk", type=int, default=0, help=chunk)
    sub.add_argument("--checkpointing", action="store_true", help="blocks keep their inputs alone and run twice")
    _shared(sub)
    sub = command(run)
    sub.add_argument("record_id", metavar="RECORD_ID")
    sub.add_argument("--scale", choices=("cpu", "gpu"), default=None, help="gpu where there is one, else cpu")
    sub.add_argument("--seeds", type=int, default=None, help="how many paired seeds")
    sub.add_argument("--text", "--images", default=None, help="other data than the experiment's own")
    sub.add_argument("--only", action="append", default=[], metavar="ROW", help="a row to run; may be repeated")
    sub.add_argument("--made-only", action="store_true", help="train nothing: the record of the runs that are logged")
    _shared(sub)
    command(show_records, "records").add_argument(
        "--check", action="store_true", help="exit 1 if a record's code has changed"
    )
    sub = command(measure)
    sub.add_argument("folder", metavar="CHECKPOINT_FOLDER")
    sub.add_argument("--text", default="shakespeare", help="a data set's name or a text file")
    sub.add_argument("--tokens", type=int, default=512, help="tokens a sequence")
    sub.add_argument("--sequences", type=int, default=16)
    sub.add_argument("--json", action="store_true", help="for programs")
    _shared(sub)
    sub = command(bench)
    sub.add_argument("suite", nargs="*", metavar="SUITE", help="attention, retention, vit, moe, lm, generate; all")
    sub.add_argument("--suite", dest="suites", action="append", default=[], metavar="NAMES", help="the same, as a flag")
    sub.add_argument("--scale", choices=("cpu", "gpu"), default=None, help="gpu where there is one, else cpu")
    sub.add_argument(
        "--only", action="append", default=[], metavar="WORDS", help="rows whose name holds these; may be repeated"
    )
    sub.add_argument("--seconds", type=float, default=None, help="start no case of a suite after this long")
    sub.add_argument(
        "--workers", type=int, default=None, metavar="N", help="compile all rows first, in N processes; for a GPU"
    )
    sub.add_argument("--seeds", type=int, default=None, metavar="N", help="samples of each row")
    sub.add_argument("--device", default="auto", help=SHARED["device"])
    sub.add_argument("--out", default=None, help="folder of the records and their logs")
    sub.add_argument("--resume", action="store_true", help="go on from the log in that folder")
    sub = command(generate)
    sub.add_argument("prompt", metavar="PROMPT")
    sub.add_argument("--model", default=None, metavar="FOLDER", help="a run or release; the shipped one otherwise")
    sub.add_argument("--tokens", type=int, default=None, help="new tokens at most; until the context is full")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token every time")
    sub.add_argument("--top-k", type=int, default=None, help="draw from the K likeliest tokens")
    sub.add_argument("--top-p", type=float, default=None, help="draw from the likeliest tokens that reach P together")
    sub.add_argument("--stop", action="append", default=[], metavar="STRING", help="end before it; may be repeated")
    sub.add_argument("--static", action="store_true", help="compile one step for every token first; for long texts")
    sub.add_argument("--device", default="auto", help=SHARED["device"])
    sub.add_argument("--seed", type=int, default=0, help="of the draws")
    return parser


def take_gpu(name: str) -> None:
    """Makes the GPU of "cuda:N" the current one: fused kernels and recordings start there. Others change nothing."""
    kind, _, index = name.partition(":")
    if kind == "cuda" and index.isdigit():
        import torch

        if int(index) < torch.cuda.device_count():  # otherwise the command says what is there
            torch.cuda.set_device(int(index))


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns 0 done, 1 a run failed, 2 wrong input, 130 interrupted."""
    args = build_parser().parse_args(arguments)
    try:
        take_gpu(getattr(args, "device", ""))
        return args.function(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
