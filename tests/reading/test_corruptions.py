"""Every kind of damage, through hilum and its peers in one run: fine, repaired or refused, and never silently wrong.

`pytest tests/reading/test_corruptions.py -s` prints the table; HILUM_MATRIX=FILE.md keeps it, with details beside it.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import pytest

from tests.reading import dicom_kinds, file_kinds, matrix, ours  # noqa: F401  # the kinds enter themselves
from tests.reading.kinds import FINE, KINDS, REFUSED, Kind, Made
from tests.reading.peers import Peers
from tests.reading.readers import PEERS, applies

CONTROLS = [name for name in KINDS if name.endswith(": control")]
LEAST_KINDS = 40
STRANGE = (": two ", ": a ", "beside", "in place", "twice", "cut within", "enhanced")
"""Folders in which something may be overlooked."""

Cell = tuple[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every damaged scan, in a folder of its own."""
    root = tmp_path_factory.mktemp("damaged")
    return {name: kind.make(root / f"{number:03d}" / "scan") for number, (name, kind) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def told_by_peers(made: dict[str, Made]) -> Iterator[Future[dict[tuple[str, str], Cell]]]:
    """What the other readers say, found out beside the tests of ours."""
    peers = Peers()
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(_asked, peers, made)
    peers.close()


def _asked(peers: Peers, made: dict[str, Made]) -> dict[tuple[str, str], Cell]:
    return {
        (name, reader): _shown(kind, peers.read(reader, made[name].path, made[name].truths))
        if applies(reader, kind)
        else (matrix.NOT_APPLICABLE, "")
        for name, kind in KINDS.items()
        for reader in PEERS
    }


def _shown(kind: Kind, cell: Cell) -> Cell:
    return (matrix.BELIEVED, cell[1]) if kind.unknowable and cell[0] != REFUSED else cell


one_scan = cache(ours.read_file)
scans = cache(ours.read_scans)


def ask_hilum(kind: Kind, made: Made) -> Cell:
    """Its word of one scan; of several scans in a folder the best word, once all of them were judged."""
    if not kind.scans:
        return one_scan(kind, made)
    words, detail = scans(made)
    return (FINE if FINE in words else words[0]), f"{', '.join(words)}. {detail}"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("told_by_peers")
def test_a_damaged_scan_is_told_by_the_right_word(name: str, made: dict[str, Made]) -> None:
    kind = KINDS[name]
    word, detail = one_scan(kind, made[name])
    if not kind.unknowable:
        assert word in kind.words, detail
    if word == REFUSED and kind.reasons:
        assert detail[1:].partition("]")[0] in kind.reasons, detail


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.family != "labels"])
def test_a_batch_neither_loses_a_damaged_scan_nor_gets_it_wrong(name: str, made: dict[str, Made]) -> None:
    kind = KINDS[name]
    words, detail = scans(made[name])
    assert words or kind.scans == (), "the case was lost: no scan was found, and none refused"
    if not kind.unknowable:
        assert matrix.WRONG not in words, detail
    if kind.scans is not None:
        assert words == tuple(sorted(kind.scans)), detail


@pytest.mark.parametrize(
    "name", [name for name in KINDS if name.startswith("DICOM") and any(word in name for word in STRANGE)]
)
def test_of_every_file_something_is_said(name: str, made: dict[str, Made]) -> None:
    assert not ours.unaccounted(made[name].path)


def test_the_table_of_all_readers(made: dict[str, Made], told_by_peers: Future[dict[tuple[str, str], Cell]]) -> None:
    cells = {(name, "hilum"): _shown(kind, ask_hilum(kind, made[name])) for name, kind in KINDS.items()}
    cells |= told_by_peers.result()
    matrix.save(cells)
    print(matrix.markdown(cells))
    assert len(KINDS) >= LEAST_KINDS
    wrong = [name for name in KINDS if cells[name, "hilum"][0] == matrix.WRONG]
    assert not wrong, "\n".join(f"{name}: {cells[name, 'hilum'][1]}" for name in wrong)


def test_what_is_right_is_right_for_every_reader(told_by_peers: Future[dict[tuple[str, str], Cell]]) -> None:
    cells = told_by_peers.result()
    for name in CONTROLS:
        for reader in PEERS:
            assert cells[name, reader][0] in (FINE, matrix.NOT_APPLICABLE), (name, reader, cells[name, reader])
