"""What names mean in SNOMED CT and DICOM: nothing that the standard's own tables do not say."""

import json
from pathlib import Path

import pytest
from pydicom.sr._concepts_dict import concepts

from preprocessing import codes
from preprocessing.codes import Code, meaning_of
from preprocessing.datasets import label_table
from preprocessing.plan import Label
from preprocessing.records import BadRecord, decode, encode

KNOWN = {
    (scheme, value, meaning.casefold())
    for scheme, words in concepts.items()
    for codes_of_word in words.values()
    for value, (meaning, _) in codes_of_word.items()
}


def every_code() -> list[Code]:
    tables = [
        *codes.STRUCTURES.values(),
        *codes.TISSUES.values(),
        *codes.SUBSTANCES.values(),
        *codes.MODIFIERS.values(),
    ]
    tables += [code for _, code in codes.ABNORMAL]
    return [*tables, codes.STRUCTURE, codes.TISSUE, codes.ABNORMALITY, codes.SUBSTANCE]


@pytest.mark.parametrize(
    "code", sorted(set(every_code()), key=lambda code: code.meaning), ids=lambda code: code.meaning
)
def test_every_code_stands_in_pydicoms_copy_of_the_standard_with_this_meaning(code: Code) -> None:
    assert (code.scheme, code.value, code.meaning.casefold()) in KNOWN


def test_one_code_has_one_meaning() -> None:
    meanings = {(code.scheme, code.value): code.meaning for code in every_code()}
    assert all(meanings[code.scheme, code.value] == code.meaning for code in every_code())


@pytest.mark.parametrize(
    ("name", "category", "kind", "modifiers"),
    [
        ("liver", "Anatomical Structure", "Liver", ()),
        ("kidney_left", "Anatomical Structure", "Kidney", ("Left",)),
        ("Left Kidney", "Anatomical Structure", "Kidney", ("Left",)),
        ("RightKidneys", "Anatomical Structure", "Kidney", ("Right",)),
        ("lung_upper_lobe_left", "Anatomical Structure", "Upper lobe of lung", ("Left",)),
        ("vertebrae_T12", "Anatomical Structure", "T12 vertebra", ()),
        ("rib_left_7", "Anatomical Structure", "Rib", ("Left",)),
        ("heart_ventricle_left", "Anatomical Structure", "Left ventricle", ()),
        ("Anterior", "Tissue", "Tissue", ("Anterior",)),
        ("hippocampus anterior", "Anatomical Structure", "Hippocampus", ("Anterior",)),
        ("edema", "Morphologically Abnormal Structure", "Edema", ()),
        ("enhancing tumour", "Morphologically Abnormal Structure", "Enhancing Lesion", ()),
        ("non-enhancing tumor", "Morphologically Abnormal Structure", "Non-Enhancing Lesion", ()),
        ("liver tumours", "Morphologically Abnormal Structure", "Neoplasm", ()),
        ("kidney_cyst_left", "Morphologically Abnormal Structure", "Cyst", ("Left",)),
        ("lung nodule", "Morphologically Abnormal Structure", "Nodule", ()),
        ("CSF", "Body Substance", "Cerebrospinal Fluid", ()),
        ("white matter", "Tissue", "White Matter", ()),
        ("blob 7", "Tissue", "Tissue", ()),
        ("", "Tissue", "Tissue", ()),
        ("肝臓", "Tissue", "Tissue", ()),
    ],
)
def test_a_name_is_understood_or_openly_not(name: str, category: str, kind: str, modifiers: tuple[str, ...]) -> None:
    meaning = meaning_of(name)
    assert (meaning.category.meaning, meaning.type.meaning) == (category, kind)
    assert tuple(modifier.meaning for modifier in meaning.modifiers) == modifiers


def test_every_organ_of_totalsegmentators_list_has_a_code(shared: Path) -> None:
    tables = json.loads((shared / "data" / "zoo" / "labels.json").read_text())
    names = {name for table in tables.values() for name, _ in table.values()} - {"intervertebral_discs"}
    assert len(names) > 40 and not [name for name in names if meaning_of(name).type == codes.TISSUE]


def test_a_table_of_labels_carries_its_codes_and_a_person_may_change_them() -> None:
    (label,) = label_table({"kidney_left": 4})
    assert (label.category, label.type) == (codes.STRUCTURE, Code(value="64033007", scheme="SCT", meaning="Kidney"))
    record = encode(label)
    assert record["modifiers"] == [{"value": "7771000", "scheme": "SCT", "meaning": "Left"}]
    record["type"] = {"value": "X1", "scheme": "99HILUM", "meaning": "Transplant kidney"}
    assert decode(Label, record, where="label").type == Code(value="X1", scheme="99HILUM", meaning="Transplant kidney")


def test_labels_written_before_there_were_codes_still_load() -> None:
    label = decode(Label, {"value": 1, "name": "liver", "colour": [1, 2, 3]}, where="label")
    assert label.category is None and label.type is None and label.meaning == meaning_of("liver")


@pytest.mark.parametrize("value", ["", "1" * 17, "a\\b"])
def test_a_code_that_dicom_cannot_hold_is_refused_where_it_is_written(value: str) -> None:
    with pytest.raises(ValueError, match="code"):
        Code(value=value, scheme="SCT", meaning="Liver")
    with pytest.raises((BadRecord, ValueError), match="code"):
        decode(Code, {"value": value, "scheme": "SCT", "meaning": "Liver"}, where="code")
