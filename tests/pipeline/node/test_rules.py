"""Which series a route takes: asked of real series, and of made-up ones where real ones have no such case."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.node.rules import Rule, SeriesFacts, choose, facts_of
from preprocessing import dicom
from preprocessing.records import BadRecord


def made_up(**values: object) -> SeriesFacts:
    known = {
        "series": dicom.Series(uid=str(values.get("uid", "1.2")), paths=(Path("a.dcm"),)), "modality": "CT",
        "description": "Abdomen portal venous 3.0", "direction": "axial", "slices": 80, "distance_mm": 3.0,
        "contrast": True, "image_type": ("ORIGINAL", "PRIMARY", "AXIAL"), "part": "",
    }  # fmt: skip
    values.pop("uid", None)
    return SeriesFacts(**(known | values))


LIVER = Rule(
    modality=("CT",), description="portal|venous", not_description="scout|topogram", direction=("axial",),
    least_slices=40, most_slices=2000, widest_mm=5.0, contrast=True, image_type=("ORIGINAL",), not_image_type=("MIP",),
)  # fmt: skip


def test_a_series_that_is_all_a_rule_asks_for_is_taken():
    assert LIVER.unmet(made_up()) == ()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"modality": "MR"}, "modality MR, not CT"),
        ({"description": "arterial"}, "its description does not hold /portal|venous/"),
        ({"description": "SCOUT venous"}, "its description holds /scout|topogram/"),
        ({"direction": "coronal"}, "slices coronal, not axial"),
        ({"slices": 39}, "39 slices, fewer than 40"),
        ({"slices": 2001}, "2001 slices, more than 2000"),
        ({"distance_mm": 7.5}, "slices 7.50 mm apart, more than 5.0"),
        ({"distance_mm": None}, "slices unknown mm apart, more than 5.0"),
        ({"contrast": False}, "no contrast agent is named"),
        ({"image_type": ("DERIVED",)}, "its image type lacks ORIGINAL"),
        ({"image_type": ("ORIGINAL", "MIP")}, "its image type has MIP"),
    ],
)
def test_each_thing_it_is_not_is_said_by_itself(values: dict, reason: str):
    assert LIVER.unmet(made_up(**values)) == (reason,)
    assert choose([made_up(**values)], {"image": LIVER}, "most_slices").why_not[0][1] == reason


def test_a_reason_never_holds_what_a_person_typed_into_the_header():
    named = made_up(description="MUELLER^HANS 1950", slices=3)
    assert "MUELLER" not in " ".join(LIVER.unmet(named)) + repr(named)
    odd = made_up(modality="MUELLER")  # of a sender that keeps no list
    assert "modality unknown, not CT" in LIVER.unmet(odd) and "MUELLER" not in repr(odd)


def test_among_several_the_one_with_most_slices_or_the_thinnest_is_taken_and_the_other_told():
    many, thin = made_up(uid="1.1", slices=120), made_up(uid="1.2", distance_mm=1.0)
    for prefer, wanted, other in (("most_slices", many, thin), ("thinnest", thin, many)):
        for order in ([many, thin], [thin, many]):
            choice = choose(order, {"image": LIVER}, prefer)
            assert choice.chosen == ((wanted,),)
            assert choice.why_not == ((other, f"another series is preferred ({prefer})"),)


def test_equal_series_give_the_same_choice_whatever_came_first():
    one, two = made_up(uid="1.1"), made_up(uid="1.2")
    assert (
        choose([one, two], {"image": LIVER}, "thinnest").chosen
        == choose([two, one], {"image": LIVER}, "thinnest").chosen
    )


def test_all_makes_a_case_of_each_and_is_refused_for_several_channels():
    one, two = made_up(uid="1.1"), made_up(uid="1.2")
    assert choose([one, two], {"image": LIVER}, "all").chosen == ((one,), (two,))
    with pytest.raises(BadRecord, match="which series belong together"):
        choose([one], {"t1": LIVER, "t2": LIVER}, "all")


def test_every_channel_gets_its_own_series_or_nothing_is_done():
    rules = {"t1": Rule(description="t1"), "t2": Rule(description="t2")}
    t1, t2 = made_up(uid="1.1", description="T1 post"), made_up(uid="1.2", description="T2 tse")
    assert choose([t2, t1], rules, "most_slices").chosen == ((t1, t2),)
    alone = choose([t1], rules, "most_slices")
    assert alone.chosen == () and alone.why_not == ((t1, "no series fits the channel t2"),)
    both = choose([made_up(description="t1 t2")], rules, "most_slices")
    assert both.chosen == () and "make the rules differ" in both.why_not[0][1]


def test_a_study_without_series_and_one_without_a_fitting_one_are_told_apart():
    assert choose([], {"image": LIVER}, "most_slices").refusal == "the study holds no series of images"
    assert "no series of the study fits" in choose([made_up(slices=1)], {"image": LIVER}, "most_slices").refusal


def test_a_pattern_that_is_none_is_refused_when_the_rules_are_read():
    with pytest.raises(BadRecord, match="no regular expression"):
        Rule(description="(portal")


@pytest.mark.parametrize(
    ("folder", "wanted"),
    [
        ("dicom_ct_siemens_j2k", {"modality": "CT", "direction": "axial"}),
        ("dicom_ibsi_STS019_MR_T1", {"modality": "MR"}),
        ("dicom_mr_siemens_HFS", {"modality": "MR"}),
    ],
)
def test_real_series_say_what_their_headers_and_positions_say(shared: Path, folder: str, wanted: dict):
    series, _ = dicom.series_in([path for path in sorted((shared / "data/zoo" / folder).rglob("*")) if path.is_file()])
    facts = facts_of(series[0])
    assert {name: getattr(facts, name) for name in wanted} == wanted
    spacing = dicom.read(series[0]).geometry.spacing  # another way to the same distance
    assert facts.distance_mm == pytest.approx(spacing[2], abs=1e-3)
    assert facts.slices == len(series[0].frames) and facts.image_type
    assert replace(LIVER, modality=("US",)).unmet(facts)[0].startswith(f"modality {facts.modality}, not US")
