"""Words to config to verb to exit code. Decides nothing; what is heavy is imported inside each branch."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, get_type_hints

from preprocessing.records import nearest

from .bar import Bar, Lines
from .errors import Interrupted, UsageError, is_users

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from preprocessing.reading import Reading

    from .node.config import Node
    from .node.heart import Part
    from .results import Batch
    from .scores import Evaluation

DONE, OURS, USERS, SOME_FAILED, STOPPED = 0, 1, 2, 3, 130


def main(words: Sequence[str] | None = None) -> int:
    """The command `hilum`: one verb, its words, an exit code."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return DONE if words else USERS
    if words[0] in ("-V", "--version"):
        from .report import hilum_version

        print(f"hilum {hilum_version()}")
        return DONE
    try:
        return _run(words[0], words[1:])
    except (KeyboardInterrupt, Interrupted) as stop:
        _say(str(stop) or "stopped.")
        return STOPPED
    except BrokenPipeError:  # the reader of our output went away (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OURS
    except Exception as error:
        if is_users(error):
            _say(str(error))
            return USERS
        _say(f"hilum itself failed ({type(error).__name__}: {error}). Set HILUM_DEBUG=1 to see where, and report it.")
        if os.environ.get("HILUM_DEBUG"):
            raise
        return OURS


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One word of the command line."""

    usage: str
    does: str
    describe: Callable[["ArgumentParser"], None]
    """Adds what may be said."""
    act: Callable[["Namespace"], int]
    """Calls the function of the same name, prints what it returned."""


def _run(name: str, words: list[str]) -> int:
    of_group = [verb.split()[1] for verb in VERBS if verb.startswith(f"{name} ")]
    if of_group:
        if not words or words[0] in ("-h", "--help", "help"):
            print("\n".join(_told(f"{name} {word}") for word in of_group))
            return DONE if words else USERS
        if words[0] not in of_group:
            offer = nearest(words[0], of_group) or f"; there are {', '.join(of_group)}."
            raise UsageError(f"{words[0]!r} is no verb of `hilum {name}`{offer} `hilum {name} --help` explains them.")
        name, words = f"{name} {words[0]}", words[1:]
    if name not in VERBS:
        raise UsageError(
            f"{name!r} is no verb of hilum{nearest(name, list(VERBS)) or '.'} `hilum --help` lists them all."
        )
    parser = _parser(name)
    try:
        said = parser.parse_args([_with_underscores(word) for word in words])
    except SystemExit as stop:  # --help and --print_config answer and leave
        return int(stop.code or 0)
    except Exception as error:
        raise UsageError(_parse_error(error, words, parser)) from None
    return VERBS[name].act(said)


def _parser(name: str) -> "ArgumentParser":
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"hilum {name}", exit_on_error=False, description=VERBS[name].does)
    VERBS[name].describe(parser)
    return parser


def _with_underscores(word: str) -> str:
    """--steps-per-epoch is --steps_per_epoch."""
    if not word.startswith("--"):
        return word
    flag, *rest = word.split("=", 1)
    return "=".join(["--" + flag[2:].replace("-", "_"), *rest])


def _parse_error(error: Exception, words: Sequence[str], parser: "ArgumentParser") -> str:
    """What argparse says, and the nearest option to every word it does not know."""
    known = [option for action in parser._actions for option in action.option_strings]
    text = " ".join(str(error).split())
    unknown = [word.split("=")[0] for word in words if word.startswith("--")]
    unknown = [_with_underscores(word) for word in unknown]
    hints = [nearest(w, known) or "." for w in unknown if w.split(".")[0] not in known]
    if "is not accepted" in text:  # a key of a file; the command line spells options with --
        key = text.split("'")[1]
        hints.append(nearest(key, [option.removeprefix("--") for option in known]) or ".")
    end = "" if hints or text.endswith((".", "?", "!")) else "."
    return f"{text}{''.join(hints)}{end} `{parser.prog} --help` lists what may be said."


def _overview() -> str:
    lines = ["hilum: from a folder of scans to a tracked, explainable, deployable segmentation model.", ""]
    lines += [_told(name) for name in VERBS]
    lines += [
        "",
        "`hilum VERB --help` lists every option; each can also stand in a YAML file given by --config.",
        "Exit codes: 0 all done, 1 our fault, 2 your input, 3 some cases failed, 130 stopped.",
    ]
    return "\n".join(lines)


def _told(name: str) -> str:
    return f"  hilum {VERBS[name].usage}\n      {VERBS[name].does}"


def _options(parser: "ArgumentParser", settings: type) -> None:
    """Every field of a config as an option and as a key of a YAML file."""
    plain = {f.name: f for f in fields(settings) if get_type_hints(settings)[f.name] in (bool, tuple[str, ...])}
    parser.add_argument("--config", action="config", help="A YAML file of the options below; later words win.")
    parser.add_class_arguments(settings, skip=set(plain))
    said = _sentences(settings)
    for name, field in plain.items():
        if get_type_hints(settings)[name] is bool:
            parser.add_argument(f"--{name}", action="store_true", help=said[name])
        else:
            assert field.default is not MISSING
            parser.add_argument(f"--{name}", type=_comma_list, default=field.default, help=said[name])


def _sentences(settings: type) -> dict[str, str]:
    from docstring_parser import parse_from_object

    return {one.arg_name: one.description or "" for one in parse_from_object(settings).params}


class _CommaList:
    """What `--allow tilt,gaps` means; --help says it in words."""

    def __call__(self, words: Any) -> tuple[str, ...]:
        return tuple(word.strip() for word in (words.split(",") if isinstance(words, str) else words) if word.strip())

    def __repr__(self) -> str:
        return "words, separated by commas"


_comma_list = _CommaList()


def _decoded(settings: type, said: "Namespace") -> Any:
    try:
        return settings(**{field.name: getattr(said, field.name) for field in fields(settings)})
    except ValueError as error:
        raise UsageError(str(error)) from None


def _say(words: str) -> None:
    """Words go to stderr, data to stdout."""
    print(words, file=sys.stderr)


def _describe_demo(parser: "ArgumentParser") -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("hilum-demo"), help="A new folder; everything stays inside it."
    )
    parser.add_argument("--minutes", type=float, default=2.25, help="How long to train.")


def _demo(said: "Namespace") -> int:
    from .demonstration import demo, where_to_look

    made = demo(said.out, said.minutes, Bar())
    print(where_to_look(made))
    return SOME_FAILED if made.batch.failed or made.slides.batch.failed else DONE


def _describe_dataset(parser: "ArgumentParser") -> None:
    parser.add_argument("dataset", type=Path, help="A Decathlon or nnU-Net folder, images/ + labels/, or a CSV.")


def _describe_reading(parser: "ArgumentParser") -> None:
    """The settings of reading, for verbs that have no config."""
    from preprocessing.reading import Reading

    _describe_allow(parser)
    parser.add_argument("--match", default="", help=_sentences(Reading)["match"])


def _describe_allow(parser: "ArgumentParser") -> None:
    from preprocessing.reading import Reading

    parser.add_argument("--allow", type=_comma_list, default=(), help=_sentences(Reading)["allow"])


def _describe_channels(parser: "ArgumentParser") -> None:
    help = "Names that bring files or series together to one case, as a package's channels do: t1,t2,flair."
    parser.add_argument("--channels", type=_comma_list, default=(), help=help)
    _describe_reading(parser)


def _reading(said: "Namespace") -> "Reading":
    from .config import reading_of

    try:
        return reading_of(said.allow, said.get("match", ""))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _describe_check(parser: "ArgumentParser") -> None:
    parser.add_argument("path", type=Path, help="A scan, a tree of anything, or a dataset as `train` takes it.")
    parser.add_argument("--json", type=Path, help="A file for everything that was found, for programs.")
    parser.add_argument(
        "--all", action="store_true", help="Name every file left alone, every case of a dataset, and every note."
    )
    _describe_channels(parser)


def _check(said: "Namespace") -> int:
    reading = _reading(said)
    if said.json and not said.json.resolve().parent.is_dir():
        raise UsageError(f"{said.json} lies in no folder; one that exists is needed. Make it, or look at the spelling.")
    if said.json and said.json.is_dir():
        raise UsageError(
            f"{said.json} is a folder; --json needs the name of a file. Give one, as {said.json / 'check.json'}."
        )
    from .checking import check
    from .report import as_json, write_whole
    from .verdicts import counted, left_alone, table

    found = check(said.path, reading, said.channels, Bar())
    if said.json:
        write_whole(said.json, as_json(found.records()))
    shown = {case: v for case, v in found.verdicts.items() if said.all or not found.layout or v.word != "fine"}
    told = [
        part for part in (table(shown, _columns(), said.all), left_alone(found.left_alone, said.path, said.all)) if part
    ]
    if told:
        print("\n\n".join(told))
    if found.layout:
        labels = ", ".join(found.labels) or "found by looking"
        _say(f"{found.name} ({found.layout}): channels {', '.join(found.channels)}, labels {labels}")
    for note in found.notes:
        _say(note)
    count = len(found.left_alone)
    alone = f"; {count} file{'' if count == 1 else 's'} left alone" if count else ""
    verdicts = list(found.verdicts.values())
    _say(counted([verdict.word for verdict in verdicts]) + alone)
    _say_refused([(verdict.reason, verdict.message) for verdict in verdicts])
    if found.absent:
        absent = ", ".join(found.absent)
        _say(f"no case has a voxel of {absent}; nothing can learn that. Look at how the labels are called (--all).")
    if found.layout:
        things = "1 thing does" if len(found.findings) == 1 else f"{len(found.findings)} things do"
        _say("every case fits." if found.fits else f"{things} not fit; nothing was changed.")
    return DONE if found.fits else USERS


def _say_refused(why: Sequence[tuple[str, str]]) -> None:
    """How often for which reason, and what may be allowed; nothing where nothing was refused."""
    from .verdicts import what_would_help, why_refused

    for words in (why_refused(reason for reason, _ in why), what_would_help(message for _, message in why)):
        if words:
            _say(words)


def _columns() -> int:
    """How wide a table may be: the terminal, where there is one and it is not absurd."""
    return max(60, min(140, get_terminal_size((100, 24)).columns))


def _describe_convert(parser: "ArgumentParser") -> None:
    parser.add_argument("scan", type=Path, nargs="+", help="Files, DICOM series, or trees of any mix of them.")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="A folder per case: image.nii.gz, verdict.json; summary.csv, summary.json.",
    )
    _describe_channels(parser)


def _convert(said: "Namespace") -> int:
    reading = _reading(said)
    from .conversion import convert
    from .verdicts import counted, printable

    batch = convert(said.scan, said.out, reading, said.channels, Bar())
    for row in batch.failed:
        _say(printable(f"{row.case_id}: {row.message}"))
    reports = [row.report for row in batch.rows if row.report]
    _say(counted([report.word for report in reports]))
    _say_refused([(report.reason, report.message) for report in reports])
    _say(f"{batch.told()}; see {said.out / 'summary.csv'}")
    return SOME_FAILED if batch.failed else DONE


def _describe_import_nnunet(parser: "ArgumentParser") -> None:
    parser.add_argument(
        "results",
        type=Path,
        help="nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION: plans.json, dataset.json, fold_0 ...",
    )
    parser.add_argument("--out", type=Path, required=True, help="The package to make.")
    parser.add_argument("--folds", default="", help="As 0,1 or all; by default every numbered fold that is there.")
    parser.add_argument("--checkpoint", default="final", help="final, best or latest of each fold.")
    parser.add_argument(
        "--orientation",
        default="as_stored",
        help="How scans of the training were stored, as RAS or LPS: new ones are turned to it. as_stored turns nothing, "
        "like nnU-Net.",
    )


def _import_nnunet(said: "Namespace") -> int:
    from .nnunet import import_nnunet

    folds = tuple(fold for fold in said.folds.split(",") if fold)
    package = import_nnunet(
        said.results, said.out, folds=folds, checkpoint=said.checkpoint, orientation=said.orientation
    )
    _say(package.record.origin)
    _say(f"{package.name} is in {said.out}, fold {', '.join(package.record.folds)}; see {said.out / 'card.md'}")
    return DONE


def _describe_import_monai(parser: "ArgumentParser") -> None:
    parser.add_argument("bundle", type=Path, help="A MONAI bundle: its folder, or a zip of it.")
    parser.add_argument("--out", type=Path, required=True, help="The package to make.")
    parser.add_argument(
        "--resample", choices=("", "hilum"), default="",
        help="hilum: where the bundle asks for MONAI's Spacing, hilum's own resampling takes its place; the package says so.",
    )  # fmt: skip
    parser.add_argument(
        "--spacing_mm", type=tuple[float, float, float] | None, default=None,
        help="Of the scans it was trained on, as [1,1,1], where the bundle brings scans to no voxel size.",
    )  # fmt: skip


def _import_monai(said: "Namespace") -> int:
    from .bundles import Wishes, import_monai

    package = import_monai(said.bundle, said.out, Wishes(resample=said.resample, spacing_mm=said.spacing_mm))
    _say(package.record.origin)
    _say(f"{package.name} is in {said.out}; see {said.out / 'card.md'}")
    return DONE


def _describe_export(parser: "ArgumentParser") -> None:
    parser.add_argument("package", type=str, help="A package's folder, or models:/NAME@ALIAS in the registry.")
    parser.add_argument(
        "--out", type=Path, required=True, help="What to write; of several folds each has its number behind the name."
    )
    parser.add_argument("--tracking_uri", help="Where models:/NAME@ALIAS is fetched from; by default hilum's home.")


def _export(kind: str) -> Callable[["Namespace"], int]:
    def act(said: "Namespace") -> int:
        from . import export_monai, export_onnx, export_torchscript
        from .batch import open_package

        package = open_package(said.package, said.tracking_uri)
        verbs = {"onnx": export_onnx, "torchscript": export_torchscript, "monai": export_monai}
        made = verbs[kind](package, said.out, Bar())
        for one in made:
            print(one.path)
            _say(f"fold {one.fold}: checked against torch: {one.agreement.words}")
        return DONE

    return act


def _describe_plan(parser: "ArgumentParser") -> None:
    _describe_dataset(parser)
    parser.add_argument("--out", type=Path, required=True, help="The YAML to write.")
    parser.add_argument("--network", default="residual_unet", help="The network that must fit: a file of networks/.")
    parser.add_argument(
        "--mode", choices=("hilum", "nnunet"), default="hilum", help="hilum's rules, or nnU-Net v2's to the letter."
    )
    presets = ("plain", "resenc_m", "resenc_l", "resenc_xl")
    parser.add_argument("--preset", choices=presets, default="plain", help="With --mode nnunet: which of its networks.")
    parser.add_argument(
        "--configuration", choices=("3d_fullres", "3d_lowres", "2d"), default="3d_fullres", help="With --mode nnunet."
    )
    parser.add_argument("--device", default="auto", help="Plan for cpu, cuda, or auto: a GPU where there is one.")
    parser.add_argument("--memory_gb", type=float, help="Plan for so much memory instead of what is free.")
    _describe_reading(parser)


def _plan(said: "Namespace") -> int:
    reading = _reading(said)
    from .description import show
    from .planning import Wishes, plan

    wishes = Wishes(
        network=said.network, mode=said.mode, preset=said.preset, configuration=said.configuration, device=said.device,
        memory_gb=said.memory_gb,
    )  # fmt: skip
    plan(said.dataset, said.out, wishes, Bar(), reading)
    print(show(said.out))
    return DONE


def _describe_train(parser: "ArgumentParser") -> None:
    from .config import Train

    _describe_dataset(parser)
    parser.add_argument("--out", type=Path, required=True, help="The package to make: a new folder.")
    _options(parser, Train)


def _train(said: "Namespace") -> int:
    from .config import Train

    settings = _decoded(Train, said)
    from .package import card
    from .training import train

    package = train(said.dataset, said.out, settings, Bar())
    print(card(package.record))
    _say(f"package {said.out}, id {package.id[:12]}. Use it: hilum segment SCAN --package {said.out} --out DIR")
    return DONE


def _describe_tune(parser: "ArgumentParser") -> None:
    from .config import Tune

    _describe_dataset(parser)
    parser.add_argument("--package", type=Path, required=True, help="The package's folder; it is sealed anew.")
    _options(parser, Tune)


def _tune(said: "Namespace") -> int:
    from .config import Tune

    settings = _decoded(Tune, said)
    from .package import card
    from .tuning import tune

    package = tune(said.dataset, said.package, settings, Bar())
    print(card(package.record))
    _say(
        f"package {said.package}, id {package.id[:12]}: results of the earlier id stay as they are, in folders of their own."
    )
    return DONE


def _describe_segment(parser: "ArgumentParser") -> None:
    from .config import Segment

    parser.add_argument("scan", type=Path, nargs="+", help="Files, DICOM series folders, or trees of any mix of them.")
    parser.add_argument("--package", required=True, help="A package's folder, or models:/NAME@ALIAS.")
    parser.add_argument(
        "--out", type=Path, required=True, help="A folder per case, summary.csv, summary.json, index.html."
    )
    _options(parser, Segment)


def _segment(said: "Namespace") -> int:
    from .config import Segment

    settings = _decoded(Segment, said)
    from .batch import segment

    batch = segment(said.scan, said.package, said.out, settings, Lines() if settings.progress == "lines" else Bar())
    if settings.progress == "bar":  # lines have told it already
        for row in batch.failed:
            _say(f"{row.case_id}: {row.message}")
        _say(f"{batch.told()}; see {said.out / 'index.html'}")
    return SOME_FAILED if batch.failed else DONE


def _describe_evaluate(parser: "ArgumentParser") -> None:
    parser.add_argument("predictions", type=Path, help="What `segment` wrote, or a folder of label files.")
    parser.add_argument("references", type=Path, help="A folder of label files of the same names, or a dataset.")
    _describe_allow(parser)
    parser.add_argument(
        "--out", type=Path, required=True, help="The JSON to write; a CSV and a page of the same name come beside it."
    )
    parser.add_argument(
        "--against", type=Path, help="Other predictions of the same cases: says whether the two differ."
    )
    parser.add_argument(
        "--tolerance_mm", type=float, default=1.0, help="How far a surface may lie off and count as right."
    )
    parser.add_argument(
        "--surface", choices=("voxels", "surfels"), default="voxels",
        help="Surfaces as MONAI measures them (centres of voxels), or as DeepMind's surface-distance does (by area).",
    )  # fmt: skip


def _evaluate(said: "Namespace") -> int:
    reading = _reading(said)
    from .evaluation import beside, evaluate, table

    bar = Bar()
    scores = evaluate(
        said.predictions, said.references, said.out, tolerance_mm=said.tolerance_mm, surface=said.surface,
        against=said.against, reading=reading, progress=lambda done, of: bar("evaluate", done, of),
    )  # fmt: skip
    print(table(scores))
    _say(f"see {beside(said.out, '.html')}")
    if scores.left_out:
        _say(f"drawn in DICOM objects and none of the labels, so left out: {', '.join(scores.left_out)}")
    _say_lost(scores, "")
    if scores.other:
        _say_lost(scores.other, "the other prediction: ")
    return SOME_FAILED if scores.failed or (scores.other and scores.other.failed) else DONE


def _say_lost(scores: "Evaluation", whose: str) -> None:
    """Every case that is in no mean."""
    for case, reason in scores.failed.items():
        _say(f"{whose}{case}: {reason}")
    for name, cases in (("prediction", scores.unmatched_references), ("reference", scores.unmatched_predictions)):
        if cases:
            more = " ..." if len(cases) > 5 else ""
            _say(f"{whose}no {name} for {len(cases)} case(s): {', '.join(cases[:5])}{more}")


def _describe_compare(parser: "ArgumentParser") -> None:
    parser.add_argument(
        "run", type=Path, nargs="+", help="Packages (folders), and what `evaluate` wrote (JSON), in any mix."
    )
    parser.add_argument("--out", type=Path, required=True, help="The page to write.")


def _compare(said: "Namespace") -> int:
    from .contest import compare, table

    contest = compare(said.run, said.out)
    print(table(contest))
    for caution in contest.cautions:
        _say(caution)
    _say(f"see {said.out}")
    return DONE


def _describe_slides_features(parser: "ArgumentParser") -> None:
    from .config import SlideFeatures

    parser.add_argument(
        "slides", type=Path, nargs="+", help="Slides, DICOM series folders, or trees of any mix of them."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="A file of features per slide, summary.csv, summary.json."
    )
    _options(parser, SlideFeatures)


def _slides_features(said: "Namespace") -> int:
    from .config import SlideFeatures

    settings = _decoded(SlideFeatures, said)
    from .slides.features import extract

    return _told_of_slides(extract(said.slides, said.out, settings, Bar()), said.out / "summary.csv")


def _told_of_slides(batch: "Batch", where: Path) -> int:
    for row in batch.failed:
        _say(f"{row.case_id}: {row.message}")
    _say(f"{batch.told()}; see {where}")
    return SOME_FAILED if batch.failed else DONE


def _describe_slides_train(parser: "ArgumentParser") -> None:
    from .config import SlideTraining

    parser.add_argument("features", type=Path, help="The folder `slides features` wrote.")
    parser.add_argument("labels", type=Path, help="A CSV with a row per slide: slide, patient, label.")
    parser.add_argument("--out", type=Path, required=True, help="The package to make: a new folder.")
    _options(parser, SlideTraining)


def _slides_train(said: "Namespace") -> int:
    from .config import SlideTraining

    settings = _decoded(SlideTraining, said)
    from .slides.package import card
    from .slides.training import train_slides

    package = train_slides(said.features, said.labels, said.out, settings, Bar())
    print(card(package.record))
    use = f"hilum slides classify SLIDES --package {said.out} --out DIR"
    _say(f"package {said.out}, id {package.id[:12]}. Use it: {use}")
    return DONE


def _describe_slides_classify(parser: "ArgumentParser") -> None:
    from .config import SlideClassify

    parser.add_argument(
        "slides", type=Path, nargs="+", help="Slides, DICOM series folders, or trees of any mix of them."
    )
    parser.add_argument("--package", type=Path, required=True, help="A package `slides train` made.")
    parser.add_argument(
        "--out", type=Path, required=True, help="A folder per slide, summary.csv, summary.json, index.html."
    )
    _options(parser, SlideClassify)


def _slides_classify(said: "Namespace") -> int:
    from .config import SlideClassify

    settings = _decoded(SlideClassify, said)
    from .slides.classification import classify

    return _told_of_slides(classify(said.slides, said.package, said.out, settings, Bar()), said.out / "index.html")


def _describe_bundle(parser: "ArgumentParser") -> None:
    parser.add_argument(
        "--image", nargs="+", default=[], help="Archives that `docker save` wrote, or names of images of this machine."
    )
    parser.add_argument(
        "--package", type=Path, nargs="+", default=[], help="Folders of packages; their seals are checked."
    )
    parser.add_argument("--out", type=Path, help="The folder to make, to be carried to the other machine.")
    parser.add_argument("--config", type=Path, help="A node's YAML to begin with there; its packages lie in /packages.")
    parser.add_argument("--verify", type=Path, help="Check every file of such a folder instead.")


def _bundle(said: "Namespace") -> int:
    from .offline import bundle, verify

    if not said.verify and not said.out:
        raise UsageError(
            "neither --out nor --verify was given; one of them is needed. Name a folder to make, or to check."
        )
    made = verify(said.verify) if said.verify else bundle(said.image, said.package, said.out, said.config)
    for name, number in made.packages.items():
        _say(f"package {name}, id {number[:12]}")
    _say(f"{', '.join(made.images)}: {made.bytes / 1e9:.1f} GB in {made.folder}, whole. Install it there: {INSTALL}")
    print(made.sum)
    return DONE


INSTALL = "SUM=the number below ./install.sh"


def _describe_sign(parser: "ArgumentParser") -> None:
    parser.add_argument("package", type=Path, nargs="?", help="A finished package, for scans or for slides.")
    parser.add_argument("--key", type=Path, help="Your private key: ed25519, as PEM.")
    parser.add_argument("--new_key", type=Path, help="Make a key in this new file instead, and FILE.pub beside it.")


def _sign(said: "Namespace") -> int:
    from .signatures import fingerprint, new_key, read_public, sign

    if said.new_key:
        public = new_key(said.new_key)
        print(fingerprint(read_public(public)))
        _say(f"keep {said.new_key} to yourself; {public} belongs into `trusted` of every node that shall believe it.")
        return DONE
    if not said.package or not said.key:
        raise UsageError("a package and --key are needed to sign; `hilum sign --new_key FILE` makes a key.")
    made = sign(said.package, said.key)
    _say(f"{said.package} is signed by {made.key[:12]}, in its signature.json.")
    return DONE


def _describe_node(parser: "ArgumentParser") -> None:
    parser.add_argument("--config", type=Path, help="The node's YAML: its folder, its peers, its routes.")
    parser.add_argument(
        "--only", choices=("front", "worker"),
        help="A part of the node, where several processes or machines share it over one Postgres and one folder: the front "
        "receives, watches and shows, once; workers, as many as you like, work on stories. By default all of it.",
    )  # fmt: skip
    parser.add_argument(
        "--hash_password",
        action="store_true",
        help="Ask for a password and print what belongs into the config instead.",
    )
    parser.add_argument(
        "--make_token",
        action="store_true",
        help="Print a new token for a program, and what belongs into the config for it, instead.",
    )
    parser.add_argument(
        "--verify_audit",
        action="store_true",
        help="Read the whole audit trail instead and say whether a line was touched: exit code 0 or 1. Its head is printed.",
    )
    parser.add_argument(
        "--audit_head", action="append", default=[], help="A head that was printed earlier, and kept somewhere else."
    )
    parser.add_argument("--backup", type=Path, help="Copy its folder to this new one instead, while it works or not.")
    parser.add_argument(
        "--healthy",
        action="store_true",
        help="Ask the node that runs here whether it is ready instead: exit code 0 or 1.",
    )


def _node(said: "Namespace") -> int:
    if said.hash_password:
        from getpass import getpass

        from .node.access import hashed

        print(hashed(getpass("password: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")))
        return DONE
    if said.make_token:
        from .node.access import make_token

        token, kept = make_token()
        print(f"token: {token}\nhash: {kept}")
        _say("the token goes to the program, and nowhere else; the hash into showing.tokens.NAME.hash.")
        return DONE
    if said.config is None:
        raise UsageError("no --config was given; a node needs one. docker/node.yaml is one to begin with.")
    from .node.service import read_config, serve

    node = read_config(said.config)
    if said.verify_audit:
        return _verify_audit(node, said.audit_head)
    if said.backup:
        return _back_up(node, said.config, said.backup)
    if said.healthy:
        return _healthy(node, said.only or "both")
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    part: Part = said.only or "both"
    if part != "worker":
        scheme = "https" if node.showing.security else "http"
        _say(f"the status page is on {scheme}://{node.showing.host}:{node.showing.port} (Ctrl-C stops the node)")
    serve(node, part)
    return DONE


def _verify_audit(node: "Node", heads: Sequence[str]) -> int:
    from .node.audit import read_head, verify
    from .node.spool import open_keys

    if not (node.state / "secret").exists():
        raise UsageError(f"{node.state} is no folder of a node; one that ran is needed. Look at `state` in the config.")
    found = verify(node.state, open_keys(node.state), [read_head(words) for words in heads])
    if found.broken:
        _say(f"after {found.lines} whole lines: {found.broken}")
        return OURS
    print(found.head)
    _say(f"all {found.lines} lines are as they were written. Keep the head above somewhere else, for --audit_head.")
    return DONE


def _back_up(node: "Node", config: Path, folder: Path) -> int:
    from .node.backup import back_up

    made = back_up(node, config, folder)
    _say(f"{made.files} files, {made.bytes / 1e6:.0f} MB, are in {folder}.")
    for name in made.elsewhere:
        _say(f"the {name} lie in a database of their own and are not among them: dump it before, not after.")
    return DONE


def _healthy(node: "Node", part: "Part") -> int:
    from .node.health import ailing

    reason = ailing(node, part)
    if reason:
        _say(reason)
    return OURS if reason else DONE


def _describe_ui(parser: "ArgumentParser") -> None:
    parser.add_argument(
        "--tracking_uri",
        help="The store to show; by default hilum's own. One with a password belongs into MLFLOW_TRACKING_URI: whoever "
        "lists the processes of this machine can read this line.",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="Whoever reaches it can read and delete runs: keep it local."
    )
    parser.add_argument("--port", type=int, default=5000, help="A free port.")


def _ui(said: "Namespace") -> int:
    from . import tracking

    uri = said.tracking_uri or tracking.default_uri()
    tracking.end_the_dead(uri)
    _say(f"open {tracking.ui_url(said.host, said.port, tracking.newest_page(uri))} (Ctrl-C stops it)")
    return tracking.serve(uri, said.host, said.port)


def _describe_show(parser: "ArgumentParser") -> None:
    parser.add_argument("file", type=Path, help="A scan, plan, package or report; or `networks` for a table of them.")
    parser.add_argument("--plan", type=Path, help="The plan whose windows the table of networks is for.")
    parser.add_argument("--open", action="store_true", help="Of a case: open its page in the browser, too.")


def _show(said: "Namespace") -> int:
    from .description import address_of, show

    print(show(said.file, said.plan))
    if not said.open:
        return DONE
    if not (address := address_of(said.file)):
        raise UsageError(
            f"{said.file} has no page to open; the folder of a case with its page.html is needed. "
            "Segment it with --outputs page, or leave --open out."
        )
    import webbrowser

    if not webbrowser.open(address):
        _say(f"no browser was found here; open {address}")
    return DONE


VERBS = {
    "demo": Verb(
        usage="demo [--out DIR]",
        does="Everything once, on patients it makes up itself; prints where to look.",
        describe=_describe_demo,
        act=_demo,
    ),
    "check": Verb(
        usage="check PATH [--json FILE] [--all]",
        does="Says what every scan of a tree or dataset is, and whether it is fine, repaired or refused; exit code 2 if any is.",
        describe=_describe_check,
        act=_check,
    ),
    "convert": Verb(
        usage="convert SCAN... --out DIR [--allow tilt,gaps]",
        does="Reads scans exactly as segment does and writes NIfTI, the verdict and its reason beside each.",
        describe=_describe_convert,
        act=_convert,
    ),
    "import nnunet": Verb(
        usage="import nnunet RESULTS_FOLDER --out PACKAGE [--folds 0,1] [--checkpoint best] [--orientation LPS]",
        does="What nnU-Net v2 trained, as a package: the same logits, without nnU-Net and without pickles.",
        describe=_describe_import_nnunet,
        act=_import_nnunet,
    ),
    "import monai": Verb(
        usage="import monai BUNDLE --out PACKAGE [--resample hilum]",
        does="A package from a MONAI bundle whose network is one of MONAI's; what cannot be done exactly is refused by name.",
        describe=_describe_import_monai,
        act=_import_monai,
    ),
    "export onnx": Verb(
        usage="export onnx PACKAGE --out FILE.onnx",
        does="The trained network for ONNX Runtime and its like; its logits are compared with torch's first.",
        describe=_describe_export,
        act=_export("onnx"),
    ),
    "export torchscript": Verb(
        usage="export torchscript PACKAGE --out FILE.ts",
        does="The trained network for libtorch, which needs no hilum; its logits are compared with torch's first.",
        describe=_describe_export,
        act=_export("torchscript"),
    ),
    "export monai": Verb(
        usage="export monai PACKAGE --out BUNDLE",
        does="A MONAI bundle, as a folder or FILE.zip; MONAI loads it, and its logits are compared, before it is kept.",
        describe=_describe_export,
        act=_export("monai"),
    ),
    "plan": Verb(
        usage="plan DATASET --out PLAN.yaml [--network NAME] [--mode hilum|nnunet]",
        does="Looks at a dataset and plans for it and for this machine, each number with its reason.",
        describe=_describe_plan,
        act=_plan,
    ),
    "train": Verb(
        usage="train DATASET --out PACKAGE [--network NAME] [--fold 0] [--minutes M | --epochs N] [--resume]",
        does="Trains one fold of a network; tracked in MLflow, packed, registered.",
        describe=_describe_train,
        act=_train,
    ),
    "tune": Verb(
        usage="tune DATASET --package PACKAGE [--cases 8] [--coarse MINUTES]",
        does="Measures on held-out cases what speed costs in Dice, chooses, and seals both into the package.",
        describe=_describe_tune,
        act=_tune,
    ),
    "segment": Verb(
        usage="segment SCAN... --package PACKAGE --out DIR [--outputs labels,overlay,measurements,page]",
        does="Segments every scan found; one bad case never stops the rest, a second run does what is missing.",
        describe=_describe_segment,
        act=_segment,
    ),
    "evaluate": Verb(
        usage="evaluate PREDICTIONS REFERENCES --out FILE.json [--against OTHERS]",
        does="Overlap, surface distances, lesions and volumes against references, per case and label: JSON, CSV and a page.",
        describe=_describe_evaluate,
        act=_evaluate,
    ),
    "compare": Verb(
        usage="compare RUN... --out FILE.html",
        does="Packages and evaluations beside each other: scores with intervals, paired tests, what was set differently.",
        describe=_describe_compare,
        act=_compare,
    ),
    "slides features": Verb(
        usage="slides features SLIDES... --out FEATURES [--encoder timm:NAME@WEIGHTS]",
        does="Finds tissue, lays tiles at a stated resolution, writes their features: one file per slide.",
        describe=_describe_slides_features,
        act=_slides_features,
    ),
    "slides train": Verb(
        usage="slides train FEATURES LABELS.csv --out PACKAGE [--network acmil]",
        does="Trains on slides with one label each, cross-validated by patient inside and out; tracked in MLflow.",
        describe=_describe_slides_train,
        act=_slides_train,
    ),
    "slides classify": Verb(
        usage="slides classify SLIDES... --package PACKAGE --out DIR",
        does="Classifies slides: a table, and per slide a heatmap that adds up to the answer, top tiles and a page.",
        describe=_describe_slides_classify,
        act=_slides_classify,
    ),
    "sign": Verb(
        usage="sign PACKAGE --key KEY.pem | sign --new_key FILE",
        does="Vouches for a package: a node that trusts your key loads it, and none that nobody vouches for.",
        describe=_describe_sign,
        act=_sign,
    ),
    "node": Verb(
        usage="node --config NODE.yaml [--only front|worker]",
        does="The hospital node: studies in by DICOM, results back into the archive, a page to watch it.",
        describe=_describe_node,
        act=_node,
    ),
    "bundle": Verb(
        usage="bundle --image ARCHIVE --package PACKAGE --out DIR",
        does="A folder that installs a node where there is no network: image, packages, bill of materials, checksums.",
        describe=_describe_bundle,
        act=_bundle,
    ),
    "ui": Verb(
        usage="ui [--tracking_uri URI] [--port 5000]",
        does="The MLflow UI on the tracking store.",
        describe=_describe_ui,
        act=_ui,
    ),
    "show": Verb(
        usage="show FILE [--open]",
        does="A scan, plan, package or report, in words.",
        describe=_describe_show,
        act=_show,
    ),
}
