"""A word that stands in every text of a study, in file names and in callers' names, is found nowhere but where it belongs.

It belongs into DICOM objects, and into the names of a watched folder, which are its owner's own. It belongs into no log, row,
metric, page, path, run, line of the trail, report or temporary file.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import requests
import yaml
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import MRImageStorage

from pipeline.node.access import hashed, token_hash

from .hospital import Orthanc, network_of_its_own
from .scanner import a_slice, write

pytestmark = pytest.mark.slow

WORD = "QZXCANARY"
UIDS = "1.2.826.0.1.3680043.10.777313"
BIRTH = "19070531"
LOOKED_FOR = tuple(
    form
    for word in (WORD, UIDS, BIRTH, "1907-05-31")
    for form in (word.encode(), word.lower().encode(), word.encode("utf-16-le"))
)
PAGE = "http://127.0.0.1:18080"
TOKEN = "a token of sixteen letters and more"

TEXTS = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"}
NEEDED = {
    "SpecificCharacterSet", "PhotometricInterpretation", "Modality", "ImageType", "RescaleType", "PixelPresentation",
    "VolumetricProperties", "VolumeBasedCalculationTechnique", "PatientPosition", "PresentationLUTShape",
    "LossyImageCompression", "BurnedInAnnotation", "ConversionType", "AnatomicalOrientationType",
    "QueryRetrieveLevel", "RetrieveAETitle", "InstanceAvailability", "PixelIntensityRelationship",
}  # fmt: skip
"""Without these in order it is no scan, or another: each has a closed list of words. Modality has a series of its own."""


def sung(data: Dataset, number: int) -> Dataset:
    """The word in every element of text that there is, in sequences and private ones too."""
    for tag, (kind, _, _, retired, keyword) in DicomDictionary.items():
        is_free = (
            keyword and not retired and tag >> 16 not in (0, 2, 4) and tag >> 16 < 0x6000 and keyword not in NEEDED
        )
        if is_free and kind in TEXTS and tag not in data:
            setattr(data, keyword, f"{WORD}{tag & 0xFFFF:04X}")
    data.PatientName, data.PatientID, data.PatientBirthDate = f"{WORD}^Jane", f"{WORD}{number}", BIRTH
    data.SeriesDescription = f"{WORD} head"
    item = Dataset()
    item.CodeValue, item.CodeMeaning, item.CodingSchemeDesignator = WORD, f"{WORD} deep", WORD
    data.ProcedureCodeSequence = Sequence([item])
    block = data.private_block(0x0011, f"{WORD} PRIVATE", create=True)
    for element, kind, value in (
        (1, "UI", f"{UIDS}.9"), (2, "LO", WORD), (3, "OB", WORD.encode() + b" "), (4, "UN", WORD.encode() + b" "), (5, "PN", WORD)
    ):  # fmt: skip
        block.add_new(element, kind, value)
    return data


def a_series(folder: Path, number: int, slices: int = 14, **said: Any) -> list[Path]:
    """An MR series with a bright ball in it, whose every UID is of the canary's own."""
    rows = np.indices((24, 24, slices)).astype(float)
    ball = np.linalg.norm(rows - np.array([12, 12, slices / 2])[:, None, None, None], axis=0) < 5
    noise = np.random.default_rng(number).normal(100, 10, ball.shape)
    voxels = (noise + 200 * ball).astype(np.int16)
    paths = []
    for index in range(slices):
        data = a_slice(f"{UIDS}.1.{number}", f"{UIDS}.2.{number}", f"{UIDS}.3.{number}.{index}", side=24)
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = MRImageStorage
        data.Modality, data.ImageType = "MR", ["ORIGINAL", "PRIMARY", "M", "ND"]
        data.FrameOfReferenceUID, data.InstanceNumber = f"{UIDS}.4.{number}", index + 1
        data.ImageOrientationPatient, data.PixelSpacing = [1, 0, 0, 0, 1, 0], [2.0, 2.0]
        data.ImagePositionPatient, data.SliceThickness = [-20.0, -20.0, 3.0 * index], 3.0
        data.PixelData = voxels[:, :, index].tobytes()
        for keyword, value in said.items():
            setattr(data, keyword, value)
        paths.append(write(folder / f"{number}-{index}.dcm", sung(data, number)))
    return paths


@dataclass(frozen=True, kw_only=True)
class House:
    """A node with everything open, an archive that sends and receives, and a place for whatever anybody leaves behind."""

    folder: Path
    archive: Orthanc
    process: subprocess.Popen

    @property
    def state(self) -> Path:
        return self.folder / "state"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with network_of_its_own():
        node = {"hilum": {"AET": "HILUM", "Host": "127.0.0.1", "Port": 11112}}
        orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"), node)
        orthanc.start()
        yield orthanc
        orthanc.stop()


@pytest.fixture
def house(archive: Orthanc, tiny: Path, tmp_path: Path) -> Iterator[House]:
    route = {"package": str(tiny), "take": {"mr": {"modality": ["MR"]}}, "outputs": ["dicom_seg", "structured_report"]}
    config = {
        "state": str(tmp_path / "state"),
        "receiving": {"aet": "HILUM", "port": 11112, "reserve_gb": 0.01},
        "peers": {"archive": {"aet": "ORTHANC", "host": "127.0.0.1", "port": 14242}},
        "waiting": {"quiet_s": 1.5, "settled_s": 0.3, "cap_s": 3, "ask_every_s": 0.5},
        "working": {"first_pause_s": 0.2, "attempts": 2, "target_attempts": 2, "seconds": 120},
        "routes": {
            "brain": route | {"targets": ["archive"], "shadow": str(tiny)},
            "picky": route | {"take": {"mr": {"description": "liver", "part": "echo 2"}}},
        },
        "showing": {
            "port": 18080,
            "users": {"ann": {"role": "operator", "password": hashed("right horse")}},
            "tokens": {"program": {"role": "operator", "hash": token_hash(TOKEN)}},
        },
        "inboxes": {"desk": {"folder": str(tmp_path / "inbox"), "route": "brain", "settled_s": 0.5}},
        "tracking": f"sqlite:///{tmp_path}/mlflow/mlflow.db",
    }
    (tmp_path / "node.yaml").write_text(yaml.safe_dump(config))
    for name in ("inbox", "tmp", "home"):
        (tmp_path / name).mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp"),
        "HILUM_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    # whatever any library has to say, at its most talkative
    loud = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG); from pipeline.cli import main; sys.exit(main())"
    )
    with (tmp_path / "log").open("wb") as log:
        words = [sys.executable, "-c", loud, "node", "--config", str(tmp_path / "node.yaml")]
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, cwd=tmp_path / "tmp")
    try:
        yield House(folder=tmp_path, archive=archive, process=process)
    finally:
        process.kill()
        process.wait()


def ask(method: str, place: str, **words: Any) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, f"{PAGE}{place}", timeout=30, **words)


def until(holds: Callable[[], object], house: House, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert house.process.poll() is None, log_of(house)
        try:
            if holds():
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.3)
    raise AssertionError(log_of(house) + ask("GET", "/metrics").text[:2000])


def log_of(house: House) -> str:
    return (house.folder / "log").read_text()[-3000:]


def ended(house: House) -> int:
    said = ask("GET", "/metrics").text.splitlines()
    states = ("done", "refused", "dead", "superseded")
    return sum(
        int(float(line.split()[-1])) for line in said if any(f'stories{{state="{one}"' in line for one in states)
    )


def give(house: House, paths: list[Path]) -> None:
    """Into the archive, and from there to the node, as a hospital does it."""
    known = [house.archive.ask("instances", path.read_bytes())["ID"] for path in paths]  # type: ignore[index]
    house.archive.ask("modalities/hilum/store", json.dumps(known).encode())


def stow(paths: list[Path]) -> requests.Response:
    parts = b"".join(b"--b\r\nContent-Type: application/dicom\r\n\r\n" + path.read_bytes() + b"\r\n" for path in paths)
    kind = 'multipart/related; type="application/dicom"; boundary=b'
    headers = {"Content-Type": kind, "Authorization": f"Bearer {TOKEN}", "Accept": "application/dicom+json"}
    return ask("POST", "/dicom-web/studies", data=parts + b"--b--\r\n", headers=headers)


def test_the_word_stands_in_a_study_as_often_as_it_should(tmp_path: Path) -> None:
    path = a_series(tmp_path, 1, slices=1)[0]
    assert path.read_bytes().count(WORD.encode()) > 1000
    assert pydicom.dcmread(path).PatientName == f"{WORD}^Jane"


def test_no_word_of_a_study_is_found_where_it_does_not_belong(
    house: House, tmp_path: Path, scan_file: Callable[..., Path]
) -> None:
    until(lambda: ask("GET", "/health/ready").status_code == 200, house)
    in_order = a_series(tmp_path / "scans", 1)
    give(house, in_order)  # its source is asked how many there are, and results go back and are read back
    odd = a_series(tmp_path / "scans", 2, Modality=WORD)  # refused by rules, which tell why
    gap = [path for n, path in enumerate(a_series(tmp_path / "scans", 3)) if n != 5]  # refused by the reader
    assert stow([*odd, *gap]).status_code == 200
    assert stow([write(tmp_path / "no.dcm", sung(a_slice("no uid", f"{UIDS}.5"), 9))]).status_code in (202, 409)
    strangers = [WORD[:16], "X"]
    for name in strangers:
        words = ["storescu", "-aet", name, "-aec", WORD[:16], "127.0.0.1", "11112", str(in_order[0])]
        assert subprocess.run(words, capture_output=True).returncode != 0
    volume = scan_file(tmp_path / f"{WORD}.nii.gz")
    scan_file(house.folder / "inbox" / f"{WORD}.nii.gz", seed=1)
    (house.folder / "inbox" / f"{WORD}-bad.nii.gz").write_bytes(WORD.encode())
    form = {"Authorization": f"Bearer {TOKEN}"}
    handed = ask(
        "POST", "/api/submissions?route=brain", files={"mr": (f"{WORD}.nii.gz", volume.read_bytes())}, headers=form
    )
    assert handed.status_code == 202
    until(lambda: ended(house) >= 8, house)
    until(lambda: (house.folder / f"inbox/results/{WORD}").exists(), house)
    pages = looked_at(house)
    room = subprocess.run(["pgrep", "-P", str(house.process.pid)], capture_output=True, text=True).stdout.split()
    for child in room:  # a room that crashes while it holds a patient leaves nothing, either
        os.kill(int(child), signal.SIGSEGV)
    give(house, a_series(tmp_path / "scans", 4))
    until(lambda: ended(house) >= 10, house)
    until(lambda: b"volume_ml" in contents(house.folder / "mlflow/mlflow.db"), house)
    until(lambda: "hilum_shadow_dice{" in ask("GET", "/metrics").text, house)
    pages.append(ask("GET", "/metrics").text)
    house.process.send_signal(signal.SIGTERM)
    assert house.process.wait(60) == 0, log_of(house)
    assert [said for page in pages if (said := betrayed(page.encode()))] == []
    assert betrayals(house) == []


def looked_at(house: House) -> list[str]:
    """Every page that a person and a program may ask for."""
    seen = []
    with requests.Session() as session:
        session.trust_env = False
        session.post(f"{PAGE}/login", data={"name": f"{WORD}", "password": WORD}, timeout=30)
        session.post(f"{PAGE}/login", data={"name": "ann", "password": "right horse"}, timeout=30)
        places, known = ["/"], {"/logout"}
        while places:
            place = places.pop()
            known.add(place)
            answer = session.get(f"{PAGE}{place}", timeout=30)
            if "html" in answer.headers["content-type"]:
                seen.append(answer.text)
                found = {part.split('"')[0] for part in answer.text.split('href="')[1:]}
                places += [one for one in found if one.startswith("/") and one not in known and one not in places]
        assert len(seen) > 8, "the stories have pages, too"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    seen.append(ask("GET", f"/api/studies/{UIDS}.1.1", headers=headers).text.replace(f"{UIDS}.1.1", ""))
    seen.append(ask("GET", "/metrics").text)
    return seen


def betrayals(house: House) -> list[str]:
    """Files, and names of files, in which something stands that has no business there."""
    found = []
    own = {house.folder / "scans", house.folder / "inbox"}
    for path in sorted(house.folder.rglob("*")):
        if own & {path, *path.parents} or path.name in (f"{WORD}.nii.gz", "no.dcm"):
            continue
        name = str(path.relative_to(house.folder))
        said = betrayed(name.encode()) or (betrayed(contents(path)) if path.is_file() and path.suffix != ".dcm" else "")
        if said:
            found.append(f"{name}: {said}")
    return found


def betrayed(content: bytes) -> str:
    """What stands around the first word that has no business there; empty where there is none."""
    places = [place for form in LOOKED_FOR if (place := content.find(form)) >= 0]
    return repr(content[max(0, min(places) - 80) : min(places) + 40]) if places else ""


def contents(path: Path) -> bytes:
    if not path.exists():
        return b""
    content = path.read_bytes()
    try:
        return content + gzip.decompress(content)
    except (OSError, EOFError):
        return content
