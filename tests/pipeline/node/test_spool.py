"""What lies in the spool is whole, keeps its name and its bytes, and says nothing of whose it is."""

import os
import re
import threading
from pathlib import Path

import pydicom
import pytest

from pipeline.node.nouns import Arrival, Keys, Place, Refused
from pipeline.node.spool import Part, Spool, hash_of, open_keys

from .scanner import a_slice, write


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "state", open_keys(tmp_path / "state"))


def coming(spool: Spool, path: Path, uid: str | None = None) -> Part:
    """A part as the listener makes one, of a file's data set."""
    meta = pydicom.filereader.read_file_meta_info(path)
    data = path.read_bytes()[132 + 12 + meta.FileMetaInformationGroupLength :]
    part = spool.begin(meta.MediaStorageSOPClassUID, uid or meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID)
    part.write(data)
    part.finish()
    return part


def admitted(spool: Spool, path: Path) -> Arrival:
    part = coming(spool, path)
    arrival = spool.name(part, "scanner")
    spool.admit(part, arrival)
    return arrival


def test_an_object_lies_under_three_keys_and_reads_as_it_was_sent(spool: Spool, tmp_path: Path) -> None:
    sent = write(tmp_path / "sent.dcm", a_slice())
    arrival = admitted(spool, sent)
    path = spool.path(arrival.place)
    assert re.fullmatch(r"[0-9a-f]{20}/[0-9a-f]{20}/[0-9a-f]{20}\.dcm", str(path.relative_to(spool.folder)))
    assert pydicom.dcmread(path) == pydicom.dcmread(sent)
    assert arrival.sha256 == hash_of(path) and arrival.bytes == path.stat().st_size
    assert spool.uids(arrival.place)["StudyInstanceUID"] == pydicom.dcmread(sent).StudyInstanceUID
    assert oct(path.stat().st_mode)[-3:] == "600" and oct(spool.folder.stat().st_mode)[-3:] == "700"


def test_keys_are_this_nodes_own_and_stay(tmp_path: Path) -> None:
    here, there = open_keys(tmp_path / "here"), open_keys(tmp_path / "there")
    assert here.study("1.2") == open_keys(tmp_path / "here").study("1.2") != there.study("1.2")
    assert here.study("1.2") != here.series("1.2") != here.object("1.2")
    assert repr(here) == "Keys()", "a secret in a trace is no secret"
    assert oct((tmp_path / "here" / "secret").stat().st_mode)[-3:] == "600"


def test_starts_at_the_same_time_make_one_secret(tmp_path: Path) -> None:
    found: list[Keys] = []
    threads = [threading.Thread(target=lambda: found.append(open_keys(tmp_path / "state"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({keys.secret for keys in found}) == 1 and len(found) == 8
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["secret"]


def test_a_secret_that_was_cut_short_is_told(tmp_path: Path) -> None:
    open_keys(tmp_path)
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"5 bytes, not the 32 .* Restore it"):
        open_keys(tmp_path)


def test_the_same_object_twice_is_one_file_and_other_bytes_are_refused(spool: Spool, tmp_path: Path) -> None:
    one = a_slice()
    arrival = admitted(spool, write(tmp_path / "one.dcm", one))
    before = spool.path(arrival.place).read_bytes()
    part = coming(spool, tmp_path / "one.dcm")
    assert spool.admit(part, spool.name(part, "")) is False
    one.SeriesDescription = "changed"
    part = coming(spool, write(tmp_path / "other.dcm", one))
    with pytest.raises(Refused) as refused:
        spool.admit(part, spool.name(part, ""))
    assert refused.value.reason.code == "other_bytes"
    assert spool.path(arrival.place).read_bytes() == before
    assert not list((tmp_path / "state" / "parts").iterdir())


def test_of_many_who_bring_other_bytes_at_once_one_wins_whole(spool: Spool, tmp_path: Path) -> None:
    one, parts = a_slice(), []
    for number in range(8):
        one.SeriesDescription = str(number)
        part = coming(spool, write(tmp_path / f"{number}.dcm", one))
        parts.append((part, spool.name(part, "")))
    said: list[str] = []

    def bring(part: Part, arrival: Arrival) -> None:
        try:
            said.append("new" if spool.admit(part, arrival) else "same")
        except Refused as refused:
            said.append(refused.reason.code)

    threads = [threading.Thread(target=bring, args=pair) for pair in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == ["new"] + ["other_bytes"] * 7
    assert hash_of(spool.path(parts[0][1].place)) in {arrival.sha256 for _, arrival in parts}


@pytest.mark.parametrize(
    "change, code",
    [
        ({"StudyInstanceUID": ""}, "no_study"),
        ({"SeriesInstanceUID": "../../1"}, "no_study"),
        ({"StudyInstanceUID": "1." * 32 + "1"}, "no_study"),
        ({"SOPInstanceUID": "1.2.3"}, "other_object"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "other_object"),
    ],
)
def test_what_cannot_be_placed_is_refused(spool: Spool, tmp_path: Path, change: dict[str, str], code: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydicom.config.settings, "_writing_validation_mode", pydicom.config.IGNORE)
        data = a_slice()
        uid, kind = data.SOPInstanceUID, data.SOPClassUID
        for tag, value in change.items():
            data[tag]._value = value
        path = write(tmp_path / "odd.dcm", data)
    part = spool.begin(kind, uid, "1.2.840.10008.1.2.1")
    meta = pydicom.filereader.read_file_meta_info(path)
    part.write(path.read_bytes()[132 + 12 + meta.FileMetaInformationGroupLength :])
    part.finish()
    with pytest.raises(Refused) as refused:
        spool.name(part, "")
    assert refused.value.reason.code == code


def test_a_half_anonymised_object_is_named_by_what_was_announced(spool: Spool, tmp_path: Path) -> None:
    data = a_slice()
    uid, kind = data.SOPInstanceUID, data.SOPClassUID
    path = write(tmp_path / "sent.dcm", data)
    plain = path.read_bytes().replace(uid.encode(), b"\0" * len(uid))
    part = spool.begin(kind, uid, "1.2.840.10008.1.2.1")
    meta = pydicom.filereader.read_file_meta_info(path)
    part.write(plain[132 + 12 + meta.FileMetaInformationGroupLength :])
    part.finish()
    assert spool.name(part, "").place.object == spool.keys.object(uid)


def test_a_start_throws_parts_away_and_finds_whole_objects(spool: Spool, tmp_path: Path) -> None:
    arrival = admitted(spool, write(tmp_path / "sent.dcm", a_slice()))
    coming(spool, write(tmp_path / "half.dcm", a_slice()))
    stock = spool.take_stock()
    assert stock.parts == 1 and set(stock.files) == {arrival.place}
    assert stock.files[arrival.place].bytes == arrival.bytes
    assert spool.take_stock().parts == 0
    assert spool.arrival_at(arrival.place, "scanner") == arrival


def test_what_was_removed_leaves_no_folder_and_may_come_again(spool: Spool, tmp_path: Path) -> None:
    path = write(tmp_path / "sent.dcm", a_slice())
    arrival = admitted(spool, path)
    spool.remove(arrival.place)
    spool.remove(arrival.place)
    assert list(spool.folder.iterdir()) == []
    assert admitted(spool, path) == arrival


def test_file_and_folders_are_on_the_disk_before_a_name_is_given(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the calls is what a power cut would test: file, then its name, then the folder that holds the name."""
    steps: list[str] = []
    for name in ("fsync", "link"):
        real = getattr(os, name)

        def spy(*words, name=name, real=real):
            steps.append(name if name == "link" else f"fsync {Path(f'/proc/self/fd/{words[0]}').readlink().suffix}")
            return real(*words)

        monkeypatch.setattr(os, name, spy)
    arrival = admitted(spool, write(tmp_path / "sent.dcm", a_slice()))
    assert steps == ["fsync .part", "fsync ", "fsync ", "link", "fsync "]
    assert spool.path(arrival.place).exists()


def test_a_place_is_three_words_and_nothing_else(spool: Spool) -> None:
    assert spool.path(Place(study="a", series="b", object="c")) == spool.folder / "a" / "b" / "c.dcm"
