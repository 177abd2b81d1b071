"""The work behind `python -m minigated generate`: a prompt continued before the reader's eyes."""

import sys
import time
from collections.abc import Iterator

import torch

from minigated.commands import open_checkpoint
from minigated.data.tokenizer import TextStream, prompt_tokens
from minigated.device import choose_device
from minigated.errors import InputError
from minigated.generate import generate
from minigated.lm import LanguageModel
from minigated.run_tokenizer import read_tokenizer, refuse_other_vocabulary
from minigated.shipped import SHIPPED, load_shipped
from minigated.static_cache import StaticCache

DEFAULT = "moe_nano"
# A model can write any character; those that steer a terminal are shown as U+FFFD. Tab and line end stay.
CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"} | {13: None}


class Continuation:
    """The continuation of a prompt, in pieces of text that can be shown as they come.

    Args:
        model, tokenizer: as `open_checkpoint` gives them.
        prompt: some text.
        new_tokens: at most; as many as the context has room for by default.
        stop: strings that end the text; they are not given out.
        **sampling: temperature, top_k, top_p, generator, cache, as `minigated.generate.generate` takes them.

    Attributes:
        tokens: new tokens so far. ended: why it ended, once it has.

    Raises:
        InputError: at once: an empty or too long prompt, a setting out of its range, an empty stop string.
    """

    def __init__(self, model: LanguageModel, tokenizer, prompt: str, new_tokens=None, stop=(), **sampling):
        if not prompt:
            raise InputError("the prompt is empty; accepted: at least one character")
        if "" in stop:
            raise InputError("a stop string is empty; accepted: at least one character")
        start, self._eot = prompt_tokens(tokenizer, prompt), tokenizer.eot
        ends = () if tokenizer.eot is None else (tokenizer.eot,)
        self._drawn = generate(model, start, new_tokens, stop=ends, **sampling)
        self._stream = TextStream(tokenizer, stop)
        self._room = model.config.context - start.shape[1]
        self._context, self.tokens, self.ended = model.config.context, 0, None

    def __iter__(self) -> Iterator[str]:
        for drawn in self._drawn:
            self.tokens += 1
            if text := self._stream.feed(drawn.item()):
                yield text
            if self._stream.stopped is not None:
                self._drawn.close()
                break
            if drawn.item() == self._eot:
                self.ended = "the text is over"
        if text := self._stream.finish():
            yield text
        if self._stream.stopped is not None:
            self.ended = f"stopped at {self._stream.stopped!r}"
        elif self.ended is None and self.tokens == self._room:
            self.ended = f"the context of {self._context} tokens is full"


def open_model(folder: str | None) -> tuple[LanguageModel, object]:
    """A language model and its tokenizer: from `folder`, or the one that comes with the package."""
    if folder is not None:
        return open_checkpoint(folder)
    model, tokenizer = load_shipped(DEFAULT), read_tokenizer(SHIPPED / DEFAULT)
    refuse_other_vocabulary(tokenizer, model.config.vocabulary, SHIPPED / DEFAULT)
    return model, tokenizer


def _without_compiler(error: Exception) -> bool:
    """Whether torch.compile stopped for want of a C++ compiler, which it says inside an error of its own."""
    from torch._inductor.exc import InvalidCxxCompiler  # not at import: it takes a second

    return isinstance(getattr(error, "inner_exception", error), InvalidCxxCompiler)


def generate_command(args) -> int:
    """Prints the prompt and its continuation as it comes; how fast, and why it ended, on standard error."""
    device = choose_device(args.device)
    if not 0 <= args.seed < 1 << 63:
        raise InputError(f"seed {args.seed} is out of range; accepted: 0 to 2**63 - 1")
    model, tokenizer = open_model(args.model)
    model = model.to(device).eval()
    cache = StaticCache(model) if args.static else True
    text = Continuation(
        model, tokenizer, args.prompt, args.tokens, tuple(args.stop), temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, generator=torch.Generator().manual_seed(args.seed), cache=cache,
    )  # fmt: skip
    if args.static:
        try:
            cache.prepare()  # compiles: seconds to minutes that are no part of the speed
        except RuntimeError as error:
            if not _without_compiler(error):
                raise
            print("error: torch.compile found no working C++ compiler; leave out --static", file=sys.stderr)
            return 1
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows few characters shows a question mark
    print(args.prompt, end="", flush=True)
    begin = time.perf_counter()
    try:
        for piece in text:
            print(piece.translate(CONTROL), end="", flush=True)
    finally:  # also after Ctrl-C: what is said next starts a line of its own
        print(flush=True)
    seconds = time.perf_counter() - begin
    why = f"; {text.ended}" if text.ended else ""
    print(f"{text.tokens} tokens, {text.tokens / seconds:,.0f} tokens/s{why}", file=sys.stderr)
    return 0
