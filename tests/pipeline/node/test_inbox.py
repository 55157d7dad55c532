"""Watched folders: what is put in once comes out once, whatever is half, wrong, open, in the way or killed."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from pipeline.node.config import Inbox, Node, Receiving
from pipeline.node.desk import Desk
from pipeline.node.inbox import Inboxes, cases_in
from pipeline.node.ledger import open_ledger
from pipeline.node.nouns import Refused
from pipeline.node.routes import Route
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.steps import take
from pipeline.node.stories import ENDED, Stories
from pipeline.node.submissions import outputs_for
from tests.pipeline.test_postgres import INITDB, cluster

from .scanner import REPOSITORY, until

__all__ = ["cluster"]  # a fixture

POSTGRES = [pytest.mark.slow, pytest.mark.skipif(INITDB is None, reason="no Postgres on this machine")]


def a_desk(
    folder: Path,
    *channels: str,
    settled_s: float = 0.05,
    cap_s: float = 0.3,
    results: Path | None = None,
    uri: str = "",
) -> Desk:
    (folder / "in").mkdir(parents=True, exist_ok=True)
    route = Route(package=folder, take={channel: Rule() for channel in channels or ("mr",)})
    inbox = Inbox(folder=folder / "in", route="liver", settled_s=settled_s, cap_s=cap_s, results=results)
    node = Node(
        state=folder / "state", receiving=Receiving(reserve_gb=0), routes={"liver": route}, inboxes={"night": inbox}
    )
    keys, ledger = open_keys(node.state), open_ledger(node.state, uri)
    return Desk(node=node, spool=Spool(node.state, keys), ledger=ledger, stories=Stories(ledger))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    at = a_desk(tmp_path)
    yield at
    at.ledger.close()


@pytest.fixture
def inbox(desk: Desk) -> Path:
    return desk.node.inboxes["night"].folder


def a_scan(path: Path, seed: int = 0) -> Path:
    """As nibabel writes one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(0, 99, (4, 5, 6)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return path


def work_off(at: Desk, state: str = "done") -> None:
    """What the workflow does, in one step: a result per case, or a reason why there is none."""
    for story in at.stories.all():
        if story.state in ENDED:
            continue
        taken = take(at, story.study, story.revision, story.route)
        results = at.folder(story.study, story.revision, story.route) / "results/case-1"
        results.mkdir(parents=True, exist_ok=True)
        if state == "done":
            (results / "error.json").unlink(missing_ok=True)
            (results / "labels.nii.gz").write_bytes(b"of " + story.study.encode())
        else:
            (results / "error.json").write_text(json.dumps({"message": "its voxels are NaN", "verdict": "refused"}))
        assert taken["cases"] == ["case-1"]
        at.stories.note(story, state, "" if state == "done" else "nan", "" if state == "done" else "refused")  # type: ignore[arg-type]


def look_until_empty(at: Desk, state: str = "done", seconds: float = 10) -> None:
    watching, folder = Inboxes(at), at.node.inboxes["night"].folder

    def is_empty() -> bool:
        watching.look()
        work_off(at, state)
        taken = folder / ".taken"
        return not [one for one in folder.iterdir() if one.name not in (".taken", "results")] and not (
            taken.exists() and list(taken.iterdir())
        )

    assert until(is_empty, seconds), sorted(map(str, folder.rglob("*")))


def test_a_file_is_claimed_once_it_is_whole_and_its_result_lies_beside_it(desk: Desk, inbox: Path) -> None:
    content = a_scan(inbox / "Jane Doe.nii.gz").read_bytes()
    look_until_empty(desk)
    (story,) = desk.stories.all()
    folder = inbox / "results/Jane Doe"
    assert (folder / "labels.nii.gz").read_bytes() == b"of " + story.study.encode()
    assert json.loads((folder / "submission.json").read_text())["submission"] == story.study
    kept = desk.submissions.folder / story.study / "case-1_0000.nii.gz"
    assert kept.read_bytes() == content and kept.stat().st_nlink == 2, "laid out by a link"
    assert desk.submissions.get(story.study).door == "night"  # type: ignore[union-attr]


def test_a_file_that_still_grows_or_is_open_to_write_is_left_until_it_is_whole(desk: Desk, inbox: Path) -> None:
    content = a_scan(inbox.parent / "scan.nii.gz").read_bytes()
    watching, path = Inboxes(desk), inbox / "a.nii.gz"
    with path.open("wb") as slow:
        slow.write(content[:50])
        slow.flush()
        from pipeline.node.inbox import is_being_written

        if not is_being_written(path):
            pytest.skip("this file system grants leases on files that are open to write")
        assert not until(lambda: watching.look() or not path.exists(), 0.5)
        slow.write(content[50:])
    assert until(lambda: watching.look() or not path.exists())
    (story,) = desk.stories.all()
    assert (desk.submissions.folder / story.study / "case-1_0000.nii.gz").read_bytes() == content


def test_channels_are_brought_together_by_number_or_by_name_and_never_by_guess(tmp_path: Path) -> None:
    at = a_desk(tmp_path, "t1", "t2")
    inbox = tmp_path / "in"
    a_scan(inbox / "a_0001.nii.gz", 1), a_scan(inbox / "a_0000.nii.gz", 0)
    a_scan(inbox / "b/T2.nii", 2), a_scan(inbox / "b/t1.nii", 3)
    a_scan(inbox / "c/x_0000.nii.gz", 4), a_scan(inbox / "c/x_0001.nii.gz", 5)
    look_until_empty(at)
    assert sorted(path.name for path in (inbox / "results").iterdir()) == ["a", "b", "c"]
    for name, seeds, ending in (("a", (0, 1), ".nii.gz"), ("b", (3, 2), ".nii"), ("c", (4, 5), ".nii.gz")):
        key = json.loads((inbox / "results" / name / "submission.json").read_text())["submission"]
        for number, seed in enumerate(seeds):
            lies = at.submissions.folder / key / f"case-1_000{number}{ending}"
            wanted = np.random.default_rng(seed).integers(0, 99, (4, 5, 6))
            assert (np.asarray(nibabel.load(lies).dataobj) == wanted).all()
    at.ledger.close()


def test_what_stays_incomplete_is_given_back_with_its_reason(tmp_path: Path) -> None:
    at = a_desk(tmp_path, "t1", "t2")
    inbox = tmp_path / "in"
    a_scan(inbox / "only_0001.nii.gz"), a_scan(inbox / "loose.nii.gz"), (inbox / "empty").mkdir()
    a_scan(inbox / "three/t1.nii"), a_scan(inbox / "three/t2.nii"), a_scan(inbox / "three/t3.nii")
    look_until_empty(at)
    for name in ("only", "loose", "three"):
        said = json.loads((inbox / "results" / name / "error.json").read_text())
        assert said["code"] == "files_missing" and said["channels"] == "t1, t2"
        assert list((inbox / "results" / name / "input").rglob("*.nii*"))
    assert (inbox / "results/empty/error.json").exists() and at.stories.all() == []
    assert at.ledger.refused() == {("files_missing", "night"): 4}
    at.ledger.close()


def test_a_scan_that_is_refused_when_it_is_read_comes_back_with_the_words_of_who_read_it(
    desk: Desk, inbox: Path
) -> None:
    content = a_scan(inbox / "a.nii.gz").read_bytes()
    look_until_empty(desk, "refused")
    said = json.loads((inbox / "results/a/error.json").read_text())
    assert said == {"code": "nan", "words": "refused", "scan": "its voxels are NaN"}
    assert (inbox / "results/a/input/a.nii.gz").read_bytes() == content
    (inbox / "a.nii.gz").write_bytes(content)
    look_until_empty(desk)
    assert not (inbox / "results/a/error.json").exists() and (inbox / "results/a/labels.nii.gz").exists()
    assert not (inbox / "results/a-2").exists(), "the same files once more: the answer is the newest"


def test_links_pipes_and_what_is_no_scan_are_refused_and_the_rest_is_served(desk: Desk, inbox: Path) -> None:
    secret = desk.node.state / "secret"
    (inbox / "link.nii.gz").symlink_to(secret)
    os.mkfifo(inbox / "pipe.nii.gz")
    (inbox / "text.nii.gz").write_text("not a scan")
    (inbox / "zip.nii.gz").write_bytes(gzip.compress(b"x" * 999))
    (inbox / "notes.txt").write_text("left alone"), (inbox / ".hidden.nii.gz").write_text("left alone")
    a_scan(inbox / "good.nii.gz"), a_scan(inbox / "folder/inner.nii.gz", 1)
    watching = Inboxes(desk)
    assert until(lambda: watching.look() or work_off(desk) or len(list((inbox / "results").glob("[!.]*"))) == 6)
    for name in ("link", "pipe", "text", "zip"):
        assert json.loads((inbox / "results" / name / "error.json").read_text())["code"] == "no_scan"
    for name in ("good", "folder"):
        assert (inbox / "results" / name / "labels.nii.gz").exists()
    given = inbox / "results/link/input/link.nii.gz"
    assert given.is_symlink(), "the link is given back, and not what it leads to"
    assert (inbox / "notes.txt").exists() and (inbox / ".hidden.nii.gz").exists()


def test_another_scan_of_the_same_name_gets_a_folder_of_its_own(desk: Desk, inbox: Path) -> None:
    for seed in range(3):
        a_scan(inbox / "a.nii.gz", seed)
        look_until_empty(desk)
    assert sorted(path.name for path in (inbox / "results").iterdir()) == ["a", "a-2", "a-3"]
    name = "ä" * 120 + ".nii.gz"
    a_scan(inbox.parent / "x.nii.gz", 9).rename(inbox / name)
    look_until_empty(desk)
    assert len(list((inbox / "results").iterdir())) == 4


def test_the_same_content_under_two_names_is_one_story_with_two_results(desk: Desk, inbox: Path) -> None:
    content = a_scan(inbox / "a.nii.gz").read_bytes()
    (inbox / "b.nii.gz").write_bytes(content)
    look_until_empty(desk)
    assert len(desk.stories.all()) == 1
    assert {path.name for path in (inbox / "results").iterdir()} == {"a", "b"}


def test_every_format_that_a_file_can_have_is_known_by_its_content(desk: Desk) -> None:
    image = SimpleITK.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    for ending in (".nii", ".nii.gz", ".nrrd", ".mha"):
        path = desk.node.state / f"scan{ending}"
        SimpleITK.WriteImage(image, str(path))
        key = desk.submissions.begin("liver", {"mr": path.rename(path.with_name("anything"))})
        assert desk.submissions.get(key).files == (f"case-1_0000{ending}",)  # type: ignore[union-attr]
    with pytest.raises(Refused):
        desk.submissions.begin("liver", {"mr": desk.node.state / "secret"})
    with pytest.raises(Refused):
        desk.submissions.begin("liver", {"ct": desk.node.state / "anything"})
    assert not [one for one in desk.submissions.folder.iterdir() if one.name.startswith(".")]


def test_no_name_of_a_file_is_in_any_row_log_or_path_of_the_node(
    desk: Desk, inbox: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    a_scan(inbox / "Kanarienvogel.nii.gz"), (inbox / "Kanarienvogel2.nii.gz").write_text("no scan")
    a_scan(inbox / "Kanarienvogel3.nii.gz", 3).chmod(0)
    look_until_empty(desk)
    (inbox.parent / "elsewhere").touch()
    shutil.rmtree(inbox / "results")
    (inbox / "results").touch()  # now nothing can be put there
    a_scan(inbox / "Kanarienvogel4.nii.gz", 4)
    watching = Inboxes(desk)
    assert until(lambda: watching.look() or work_off(desk) or watching.watched[0].trouble)
    assert "inbox night: " in caplog.text and "Kanarienvogel" not in caplog.text
    desk.audit.note("stop")
    for path in desk.node.state.rglob("*"):
        assert "Kanarienvogel" not in str(path)
        assert not path.is_file() or b"Kanarienvogel" not in path.read_bytes(), path


def test_what_is_written_without_a_patient_says_the_same_as_what_is_with_one() -> None:
    how = Route(
        package=Path(), take={"mr": Rule()}, outputs=("dicom_seg", "secondary_capture", "labels", "pdf"),
        output_options={"labels": {"format": "nrrd"}, "pdf": {"x": 1}},
    )  # fmt: skip
    assert outputs_for(how) == (("labels", "overlay", "page"), {"labels": {"format": "nrrd"}})


def test_a_submission_whose_files_were_let_go_is_taken_anew_when_it_comes_again(desk: Desk, tmp_path: Path) -> None:
    path = a_scan(tmp_path / "a.nii.gz")
    key = desk.submissions.begin("liver", {"mr": path})
    work_off(desk)
    desk.submissions.remove(key)
    assert not (desk.submissions.folder / key).exists() and desk.submissions.get(key).present is False  # type: ignore[union-attr]
    assert desk.submissions.begin("liver", {"mr": path}) == key
    (story,) = desk.stories.all()
    assert story.state == "done" and story.attempt == 1 and desk.submissions.get(key).present  # type: ignore[union-attr]
    shutil.rmtree(desk.folder(key, 1, "liver"))
    desk.submissions.begin("liver", {"mr": path})
    assert desk.stories.all()[0].attempt == 2, "its results were let go, too: it is made again"


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=POSTGRES)])
def test_the_same_scan_by_many_at_once_is_one_submission(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    at = a_desk(tmp_path, uri="" if kind == "sqlite" else request.getfixturevalue("cluster").uri)
    path, keys, gate = a_scan(tmp_path / "scan.nii"), list[str](), threading.Barrier(4)

    def hand_in() -> None:
        gate.wait()
        keys.append(at.submissions.begin("liver", {"mr": path}))

    threads = [threading.Thread(target=hand_in) for _ in range(4)]
    assert at.submissions.get("0" * 20) is None
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 4 and len(set(keys)) == 1
    assert [(story.study, story.attempt) for story in at.stories.all()] == [(keys[0], 1)]
    assert [one.name for one in at.submissions.folder.iterdir()] == [keys[0]]
    at.ledger.close()


def test_a_note_that_somebody_forged_leads_nowhere_else(
    desk: Desk, inbox: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, (name, file) in enumerate(
        (("../../out", "a.nii"), ("out", "../../../state/secret"), ("out", "/etc/passwd"))
    ):
        (inbox / f".taken/{number}/in").mkdir(parents=True)
        a_scan(inbox / f".taken/{number}/in/a.nii")
        note = {"name": name, "entries": ["a.nii"], "files": {"mr": file}}
        (inbox / f".taken/{number}/case.json").write_text(json.dumps(note))
    a_scan(inbox / "good.nii.gz", 1)
    watching = Inboxes(desk)
    assert until(lambda: watching.look() or work_off(desk) or (inbox / "results/good").exists())
    assert sorted(path.name for path in inbox.parent.iterdir()) == ["in", "state"] and len(desk.stories.all()) == 1
    assert len(list((inbox / ".taken").iterdir())) == 3 and "inbox night: OSError" in caplog.text


def test_cases_are_told_in_order_and_results_are_no_case(tmp_path: Path) -> None:
    a_scan(tmp_path / "b.nii.gz"), a_scan(tmp_path / "results/x/labels.nii.gz"), a_scan(tmp_path / "a/scan.nii")
    found = list(cases_in(tmp_path, ("mr",), tmp_path / "results"))
    assert [(case.name, case.files, case.missing) for case in found] == [
        ("a", {"mr": "a/scan.nii"}, False), ("b", {"mr": "b.nii.gz"}, False),
    ]  # fmt: skip


KILLED = """
import os, sys
from pathlib import Path
from tests.pipeline.node.test_inbox import a_desk, a_scan, look_until_empty, work_off
from pipeline.node.inbox import Inboxes
TOUCHING = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.rmtree", "sqlite3.connect"}

def dies_at(number, folder):
    left = [number]
    def count(event, arguments):
        if event in TOUCHING and ".py" not in str(arguments[0])[-4:]:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
    at = a_desk(folder, "t1", "t2", settled_s=1e-9, cap_s=9)
    watching = Inboxes(at)
    sys.addaudithook(count)
    at.submissions.reconcile()
    for _ in range(4):
        watching.look()
        work_off(at)
    os._exit(0)

folder, step = Path(sys.argv[1]), int(sys.argv[2])
number, deaths = 1, 0
while True:
    here = folder / str(number)
    a_scan(here / "in/a_0000.nii.gz", 1), a_scan(here / "in/a_0001.nii.gz", 2), a_scan(here / "in/b/t1.nii", 3)
    a_scan(here / "in/b/t2.nii", 4), (here / "in/c").mkdir()
    (here / "in/c/t1.nii").write_text("no scan"), (here / "in/c/t2.nii").write_text("no scan")
    child = os.fork()
    if not child:
        dies_at(number, here)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    deaths += died == 9
    at = a_desk(here, "t1", "t2", settled_s=1e-9, cap_s=9)
    at.submissions.reconcile()
    look_until_empty(at)
    assert sorted(path.name for path in (here / "in/results").iterdir()) == ["a", "b", "c"], number
    for name, file in (("a", "labels.nii.gz"), ("b", "labels.nii.gz"), ("c", "error.json"), ("c", "input/c/t2.nii")):
        assert (here / "in/results" / name / file).exists(), (number, name)
    assert sorted(story.state for story in at.stories.all()) == ["done", "done"], number
    assert all(story.attempt == 1 for story in at.stories.all()), number
    assert not [path for path in at.submissions.folder.iterdir() if path.name.startswith(".")], number
    at.ledger.close()
    if died == 0:
        break
    number += step
print(deaths)
"""


@pytest.mark.slow
def test_whatever_call_it_is_killed_in_every_case_comes_out_once(tmp_path: Path) -> None:
    """A process that dies at each of its calls to the system in turn; every seventh of them unless HILUM_LONG is set."""
    step = "1" if os.environ.get("HILUM_LONG") else "7"
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), step], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert int(ended.stdout) >= 8, "it died"
