"""What nnU-Net v2 trained, as a package of ours: once, and then nothing of nnU-Net is needed."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing.declared import declared
from preprocessing.nnunet_plans import AS_STORED, Translation, translated
from preprocessing.plan import Plan
from preprocessing.records import BadRecord

from . import seal
from .errors import PackageError, UsageError
from .nnunet_weights import renamed
from .package import ALL, FORMAT, Fold, ModelPackage, Package, build_network, card, library_versions, weights_file
from .postprocessing import Chosen, Largest, LargestOfAll, Rule
from .report import hilum_version
from .unpickling import unpickle

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

NETWORK = "residual_unet"
"""The network here that is the same, plain or residual."""
CHECKPOINTS = {"final": "checkpoint_final.pth", "best": "checkpoint_best.pth", "latest": "checkpoint_latest.pth"}


def import_nnunet(
    results: Path, out: Path, *, folds: Sequence[str] = (), checkpoint: str = "final", orientation: str = AS_STORED
) -> ModelPackage:
    """A package from nnU-Net v2's folder of a trained configuration, which holds plans.json, dataset.json and fold_0 ...

    `folds`: those to take, by default every numbered one that is there; `checkpoint`: final, best or latest of each;
    `orientation`: how scans of the training were stored, as RAS or LPS: new ones are then turned to it. as_stored, like
    nnU-Net itself, turns nothing.
    """
    _refuse_mistakes(results, out, checkpoint)
    with seal.alone(out):
        workshop = out.with_name(f".{out.name}.unpickled")
        shutil.rmtree(workshop, ignore_errors=True)
        workshop.mkdir(parents=True)
        try:
            trained = _unpickled(results, _found(results, folds, checkpoint), checkpoint, workshop)
            return _packed(results, out, trained, orientation)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)


def _refuse_mistakes(results: Path, out: Path, checkpoint: str) -> None:
    if checkpoint not in CHECKPOINTS:
        raise UsageError(
            f"checkpoint {checkpoint!r} was asked for; {', '.join(CHECKPOINTS)} are written by nnU-Net. Use one."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already; an import makes a new package. Give another --out, or move it away.")
    lacking = [name for name in ("plans.json", "dataset.json") if not (results / name).is_file()]
    if lacking:
        inside = sorted(path.parent.name for path in results.glob("*/plans.json")) if results.is_dir() else []
        hint = f"There is {' and '.join(inside)} inside: give one of these." if inside else (
            "Give nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION."
        )  # fmt: skip
        raise UsageError(f"{results} holds no {' and no '.join(lacking)}; the folder of one training is needed. {hint}")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One fold, out of its pickle."""

    name: str
    """Its number, or `all`."""
    weights: Path
    """Its tensors, as safetensors under nnU-Net's names."""
    facts: Mapping[str, Any]
    """What else its checkpoint says."""

    @property
    def configuration(self) -> str:
        return str((self.facts.get("init_args") or {}).get("configuration"))

    @property
    def mirrored(self) -> tuple[int, ...] | None:
        """Axes that inference may mirror, in nnU-Net's order."""
        axes = self.facts.get("inference_allowed_mirroring_axes")
        return None if axes is None else tuple(int(axis) for axis in axes)


def _found(results: Path, asked: Sequence[str], checkpoint: str) -> list[str]:
    """The folds to take; like nnU-Net itself not the one of all cases, unless it is asked for or alone."""
    names = (path.parent.name.removeprefix("fold_") for path in results.glob(f"fold_*/{CHECKPOINTS[checkpoint]}"))
    there = sorted(name for name in names if name == ALL or name.isdecimal())
    missing = [name for name in asked if name not in there]
    if missing or not there:
        of = f" of fold {', '.join(missing)}" if missing else ""
        raise UsageError(
            f"{results} holds no {CHECKPOINTS[checkpoint]}{of} (there is one of: {', '.join(there) or 'none'}); one is "
            "needed for each fold. Give other --folds, or --checkpoint best or latest of an unfinished training."
        )
    return list(dict.fromkeys(asked)) or [name for name in there if name != ALL] or there


def _unpickled(results: Path, names: Sequence[str], checkpoint: str, workshop: Path) -> list[Trained]:
    weights = [workshop / weights_file(name if name == ALL else int(name)) for name in names]
    checkpoints = [results / f"fold_{name}" / CHECKPOINTS[checkpoint] for name in names]
    told = unpickle(dict(zip(checkpoints, weights, strict=True)), "network_weights")
    logger.info("%d fold(s) unpickled", len(names))
    return [
        Trained(name=name, weights=place, facts=facts) for name, place, facts in zip(names, weights, told, strict=True)
    ]


def _packed(results: Path, out: Path, trained: Sequence[Trained], orientation: str) -> ModelPackage:
    plans, name = _read(results / "plans.json"), _one_configuration(results, trained)
    made = translated(plans, name, declared(results), mirrored=trained[0].mirrored, orientation=orientation)
    network = build_network(NETWORK, made.network, made.plan)
    for one in trained:
        seal.write_weights(_loaded(network, one, made), one.weights)

    def fill(building: Path, record: Package) -> None:
        for one in trained:
            shutil.copy2(one.weights, building / one.weights.name)
        (building / "card.md").write_text(card(record))

    seal.write(out, _record(results, trained, made, _origin(plans, trained[0], made.plan)), fill)
    return ModelPackage.load(out)


def _one_configuration(results: Path, trained: Sequence[Trained]) -> str:
    first = trained[0].configuration
    if others := {one.configuration for one in trained} - {first}:
        raise PackageError(
            f"{results} holds folds of {first} and of {', '.join(sorted(others))}; those of one configuration are needed. "
            "Give the --folds that belong together."
        )
    return first


def _record(results: Path, trained: Sequence[Trained], made: Translation, origin: str) -> Package:
    rules, left_out = rules_of(results, [one.name for one in trained], made.plan)
    return Package(
        format=FORMAT,
        hilum=hilum_version(),
        name=made.plan.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        network=NETWORK,
        network_config=made.network,
        plan=made.plan,
        folds={one.name: _fold(results, one, made.plan) for one in trained},
        versions=library_versions(),
        postprocessing=rules,
        origin=" ".join([origin, *left_out]),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PackageError(f"{path.name} is no JSON ({error}); as nnU-Net wrote it is needed. Copy it anew.") from None
    if not isinstance(said, dict):
        raise PackageError(f"{path.name} is no table; as nnU-Net wrote it is needed. Copy it anew.")
    return said


def _origin(plans: Mapping[str, Any], first: Trained, plan: Plan) -> str:
    trainer = first.facts.get("trainer_name") or "an unknown trainer"
    return (
        f"Trained by nnU-Net v2 ({trainer}, {plans.get('plans_name', 'plans')}, {first.configuration}) and imported: "
        f"{plan.reasons['orient']}."
    )


def _loaded(network: "nn.Module", one: Trained, made: Translation) -> "nn.Module":
    """The network with the weights of a fold; refused where a name or a size does not fit."""
    from safetensors.torch import load_file

    try:
        network.load_state_dict(renamed(load_file(one.weights), made), strict=True)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PackageError(
            f"the weights of fold {one.name} are not those of the network that plans.json tells ({reason}); plans, dataset "
            "and folds of one training are needed, by a trainer that changes nothing of the network. Take those together."
        ) from None
    return network


# what is said of each fold


def _fold(results: Path, one: Trained, plan: Plan) -> Fold:
    """With the Dice of nnU-Net's own validation, where it is there."""
    dice, held_out = _validation(results / f"fold_{one.name}" / "validation" / "summary.json", plan)
    trained_on = int(_read(results / "dataset.json").get("numTraining") or 0)
    epochs = int(one.facts.get("current_epoch") or 0)
    return Fold(
        weights=one.weights.name,
        dice=dice,
        cases_trained=max(0, trained_on - held_out) if held_out or one.name == ALL else 0,
        cases_held_out=held_out,
        epochs=epochs,
        minutes=_minutes(one.facts.get("logging") or {}),
        seed=0,
        steps=epochs * (plan.recipe.steps_per_epoch or 0),
    )


def _minutes(log: Mapping[str, Any]) -> float:
    pairs = zip(log.get("epoch_start_timestamps") or (), log.get("epoch_end_timestamps") or (), strict=False)
    return round(sum(end - start for start, end in pairs if start is not None and end is not None) / 60, 1)


def _validation(path: Path, plan: Plan) -> tuple[dict[str, float], int]:
    """Mean Dice per label, and over how many cases."""
    if not path.is_file():
        return {}, 0
    said = _read(path)
    keys = {
        label.name: str(label.parts) if len(label.parts) > 1 else str((*label.parts, label.value)[0])
        for label in plan.labels
    }
    scores = {name: said.get("mean", {}).get(key, {}).get("Dice") for name, key in keys.items()}
    dice = {name: round(float(score), 6) for name, score in scores.items() if score is not None and score == score}
    return dice, len(said.get("metric_per_case", ()))


# post-processing

KEEP_LARGEST = "remove_all_but_largest_component_from_segmentation"


def rules_of(results: Path, folds: Sequence[str], plan: Plan) -> tuple[tuple[Chosen, ...], list[str]]:
    """The rules that nnU-Net chose for these folds, and what was left out of them, in words. No pickle is opened for it:
    the JSON that lies beside it says the same."""
    tried = results / f"crossval_results_folds_{'_'.join(sorted(folds))}"
    homes = [home for home in (tried, results) if (home / "postprocessing.pkl").exists()]
    if not homes:
        return (), []
    if not (homes[0] / "postprocessing.json").is_file():
        return (), [
            "Its postprocessing.pkl was left out: what it does stands in a postprocessing.json, which is not beside it, and a "
            "pickle is not opened to find out."
        ]
    said = _read(homes[0] / "postprocessing.json")
    try:
        steps = zip(said["postprocessing_fns"], said["postprocessing_kwargs"], strict=True)
        return tuple(_chosen(_rule(function, asked, plan), said, folds, plan) for function, asked in steps), []
    except (BadRecord, KeyError, TypeError, ValueError) as error:
        return (), [f"Its post-processing was left out ({error}): hilum has no rule that does exactly that."]


def _rule(function: str, asked: Mapping[str, Any], plan: Plan) -> Rule:
    """The rule of ours that changes the same voxels."""
    if (
        function != KEEP_LARGEST
        or set(asked) - {"labels_or_regions", "background_label"}
        or asked.get("background_label")
    ):
        raise BadRecord(f"it calls {function} with {sorted(asked)}")
    meant = asked["labels_or_regions"]
    labels = meant if isinstance(meant, list) else [meant]
    if sorted(map(str, labels)) == sorted(str(part) for part in plan.parts):
        return LargestOfAll()
    names = {label.value: label.name for label in plan.labels if not label.parts}
    if len(labels) != 1 or labels[0] not in names:
        raise BadRecord(f"it keeps the largest part of {labels} together")
    return Largest(label=names[labels[0]])


def _chosen(rule: Rule, said: Mapping[str, Any], folds: Sequence[str], plan: Plan) -> Chosen:
    """With the Dice that nnU-Net measured before and after all of its rules."""
    touched = [label for label in plan.labels if rule.label in ("", label.name)]
    before, after = (
        {label.name: round(float(said[when]["mean"][str(label.parts or label.value)]["Dice"]), 4) for label in touched}
        for when in ("input_folder", "postprocessed")
    )  # fmt: skip
    return Chosen(rule=rule, dice_before=before, dice_after=after, cases=0, better=0, worse=0, folds=tuple(folds))
