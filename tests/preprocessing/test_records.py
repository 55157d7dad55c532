"""A record says exactly what its type knows: no key more, none fewer, none of another kind; a typo is named."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.plan import Label, Plan
from preprocessing.records import BadRecord, decode, encode, nearest
from preprocessing.steps import Crop, Normalise, Orient, Pad, Resample, Scale, Step

QUIET = settings(derandomize=True, max_examples=25, deadline=None, database=None)
WORDS = st.text(min_size=1, max_size=20)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False)
    | st.sampled_from(["orient", "pad", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "shape", "name"]), inner),
    max_leaves=6,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every kind of field a configuration may have."""

    overlap: float = 0.5
    steps: int = 3
    mirror: bool = False
    device: str | None = None
    speed: Literal["fast", "fine"] = "fine"
    patch: tuple[int, int, int] = (8, 8, 8)
    names: tuple[str, ...] = ()
    weights: dict[str, float] | None = None
    fold: int | Literal["all"] = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Parts that are told apart by their kind, and parts that are all alike."""

    steps: tuple[Step, ...] = ()
    labels: tuple[Label, ...] = ()


NUMBERS = st.floats(-1e30, 1e30)
TRIPLES = st.tuples(*[st.floats(1e-3, 1e3)] * 3)
# plain values alone: the shape checks draw from `random`, which hypothesis does not allow inside a strategy
PLANS = st.fixed_dictionaries(
    {
        "name": WORDS,
        "channels": st.lists(WORDS, min_size=1, max_size=3),
        "labels": st.dictionaries(WORDS, st.integers(1, 65535), min_size=1, max_size=4).filter(
            lambda labels: len(set(labels.values())) == len(labels)
        ),
        "numbers": st.tuples(NUMBERS, NUMBERS),
        "spacing_mm": TRIPLES,
        "patch": st.tuples(*[st.integers(1, 999)] * 3),
        "batch": st.integers(1, 99),
        "reasons": st.dictionaries(WORDS, WORDS, max_size=3),
    }
)


def a_plan(drawn: dict[str, Any]) -> Plan:
    low, mean = drawn["numbers"]
    rules = tuple(Scale(by="dataset", low=low, mean=mean) for _ in drawn["channels"])
    spacing, patch = drawn["spacing_mm"], drawn["patch"]
    return Plan(
        name=drawn["name"],
        channels=tuple(drawn["channels"]),
        labels=tuple(Label(value=v, name=n, colour=(v % 256, 0, 255)) for n, v in drawn["labels"].items()),
        steps=(Orient(), Crop(margin=3), Resample(spacing_mm=spacing), Normalise(channels=rules), Pad(shape=patch)),
        spacing_mm=spacing,
        patch=patch,
        batch=drawn["batch"],
        reasons=drawn["reasons"],
    )


@QUIET
@given(PLANS)
def test_a_plan_written_as_yaml_is_read_back_as_it_was(tmp_path_factory, drawn):
    plan, path = a_plan(drawn), tmp_path_factory.mktemp("plan") / "plan.yaml"
    plan.write(path)
    assert Plan.read(path) == plan
    assert Plan.read(path).digest == plan.digest
    assert [made.name for made in path.parent.iterdir()] == ["plan.yaml"]


@QUIET
@given(PLANS)
def test_a_plan_survives_json_as_well(drawn):
    assert decode(Plan, json.loads(json.dumps(encode(a_plan(drawn)))), where="package") == a_plan(drawn)


def test_a_step_names_its_kind_first_and_is_found_again_by_it():
    record = encode((Orient(), Crop(margin=4), Pad(shape=(1, 2, 3))))
    assert record == [
        {"kind": "orient", "to": "RAS"},
        {"kind": "crop", "margin": 4},
        {"kind": "pad", "shape": [1, 2, 3]},
    ]
    assert decode(Recipe, {"steps": record}, where="recipe").steps == (Orient(), Crop(margin=4), Pad(shape=(1, 2, 3)))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"overlapp": 0.5},
            r"'overlapp' is not a setting of Settings; did you mean 'overlap'\?.*Known: overlap, steps",
        ),
        ({"steps": "3"}, r"tune\.steps: '3' was met; a value of type int is needed"),
        ({"steps": 3.0}, r"tune\.steps: 3\.0 was met"),
        ({"steps": True}, r"tune\.steps: True was met"),
        ({"overlap": True}, r"tune\.overlap: True was met"),
        ({"mirror": 1}, r"tune\.mirror: 1 was met; a value of type bool"),
        ({"device": 0}, r"tune\.device: 0 was met; a value of type str"),
        ({"speed": "fats"}, r"tune\.speed: 'fats' was met; one of 'fast', 'fine'"),
        ({"patch": [8, 8]}, r"tune\.patch: \[8, 8\] was met; a list of 3 values"),
        ({"patch": [8, 8, "8"]}, r"tune\.patch\[2\]: '8' was met"),
        ({"names": "t1"}, r"tune\.names: 't1' was met; a list"),
        ({"weights": [1]}, r"tune\.weights: \[1\] was met; a mapping"),
        ({"weights": {"a": "b"}}, r"tune\.weights\.a: 'b' was met"),
        ([], r"tune: \[\] was met; a mapping of settings"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(record, message):
    with pytest.raises(BadRecord, match=message):
        decode(Settings, record, where="tune")


def test_a_whole_number_serves_where_a_fraction_is_meant():
    told = decode(Settings, {"overlap": 1, "weights": {"a": 2}, "device": None}, where="tune")
    assert told == Settings(overlap=1.0, weights={"a": 2.0})
    assert isinstance(told.overlap, float)


def test_one_of_several_types_is_enough():
    assert [decode(Settings, {"fold": fold}, where="run.yaml").fold for fold in (3, "all")] == [3, "all"]
    with pytest.raises(BadRecord, match=r"run\.yaml\.fold: 'each' was met; one of 'all'"):
        decode(Settings, {"fold": "each"}, where="run.yaml")


def test_what_is_missing_is_named_and_what_has_a_default_is_not_asked_for():
    with pytest.raises(BadRecord, match=r"labels\[1\]: name, colour missing; Label needs it"):
        decode(Recipe, {"labels": [{"value": 1, "name": "a", "colour": [0, 0, 0]}, {"value": 1}]}, where="recipe")
    assert decode(Settings, {}, where="tune") == Settings()


def test_an_unknown_step_is_refused_with_the_nearest_one():
    with pytest.raises(BadRecord, match=r"steps\[1\]: kind 'resampel' is not known; did you mean 'resample'\?"):
        decode(Recipe, {"steps": [{"kind": "orient"}, {"kind": "resampel"}]}, where="recipe")
    with pytest.raises(BadRecord, match=r"steps\[0\] \(pad\): shape missing"):
        decode(Recipe, {"steps": [{"kind": "pad"}]}, where="recipe")


@QUIET
@given(PLAIN)
def test_whatever_a_file_holds_it_is_read_or_refused_by_name(told):
    for kind, record in ((Plan, told), (Settings, told), (Recipe, {"steps": told}), (Label, told)):
        try:
            decode(kind, record, where="somewhere")
        except BadRecord as refusal:
            assert "somewhere" in str(refusal)


@pytest.mark.parametrize("kind", [["orient"], {"orient": 1}, 3, None])
def test_a_kind_that_is_no_word_is_refused(kind):
    with pytest.raises(BadRecord, match="is not known"):
        decode(Recipe, {"steps": [{"kind": kind}]}, where="recipe")


def test_the_nearest_word_is_offered_and_none_when_nothing_is_near():
    assert nearest("livr", ("liver", "kidney")) == "; did you mean 'liver'?"
    assert nearest("xyz", ("liver", "kidney")) == ""


@pytest.mark.parametrize("words", [b"name: [", b"\xff\xfe\x00", b"\x01"])
def test_a_plan_that_is_no_yaml_is_refused(tmp_path: Path, words: bytes):
    path = tmp_path / "plan.yaml"
    path.write_bytes(words)
    with pytest.raises(BadRecord, match=r"plan\.yaml is no YAML"):
        Plan.read(path)


def test_an_empty_plan_is_refused(tmp_path: Path):
    path = tmp_path / "plan.yaml"
    path.write_text("")
    with pytest.raises(BadRecord, match="mapping of settings"):
        Plan.read(path)


def test_a_person_reads_a_plan_with_one_reason_a_line(tmp_path: Path):
    plan = Plan(
        name="liver",
        channels=("CT",),
        labels=(Label(value=1, name="liver", colour=(1, 2, 3)),),
        steps=(Orient(),),
        spacing_mm=(1.0, 1.0, 2.5),
        patch=(8, 8, 8),
        batch=2,
        reasons={"patch": "a long reason, " * 12, "batch": "two"},
    )
    plan.write(tmp_path / "plan.yaml")
    lines = (tmp_path / "plan.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert "liver" in lines[0]
    assert [line for line in lines if line.startswith("  ")][-2:] == [
        f"  patch: '{'a long reason, ' * 12}'",
        "  batch: two",
    ]
    assert next(iter(yaml.safe_load("\n".join(lines)))) == "name"
