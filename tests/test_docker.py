"""The image: made without a registry, and as harmless to the machine it runs on as docker/README.md says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
import yaml

from networks import residual_unet
from pipeline import package
from pipeline.batch import segment
from pipeline.node.service import read_config
from pipeline.outputs import _viewer
from preprocessing import files
from preprocessing.dicom.writing import write_series
from preprocessing.phantoms import phantom
from preprocessing.plan import Label, Plan
from preprocessing.steps import Normalise, Orient, Resample, Scale
from preprocessing.volume import Volume

REPOSITORY = Path(__file__).parents[1]
DOCKER = REPOSITORY / "docker"
UID = 10001
NEEDED_GB = 30
"""CUDA's libraries, which the index's torch brings: downloaded, unpacked, committed."""
LOOPBACK = ("127.0.0.1:", "${HILUM_ADDRESS:-127.0.0.1}:")
"""What is published is published to this machine, unless somebody says otherwise."""
NO_SPACE = "no space left on device"
"""Others may fill the disk while the image is built."""
LEAST_PRIVILEGE = [
    *("--network=none", "--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges"),
    *("--memory=4g", "--pids-limit=256", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096", "--no-healthcheck"),
]
NO_MIRROR = r"E: (Failed getting release file|Couldn't download|Failed to fetch|No such script).*"


def of_the_image(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test for which the image must be built: minutes, and only where there are root and buildah."""
    return pytest.mark.slow(pytest.mark.container(test))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (word, rest), comments gone and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage by its name, those it inherits first."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            source, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            found[name] = list(found.get(source, []))
        elif name:
            found[name].append((word, rest))
    return found


def last(stage: str, word: str) -> str:
    return [rest for found, rest in stages()[stage] if found == word][-1]


def compose(*more: str) -> dict:
    """compose.yaml with other files over it: of what is in both, the mappings are brought together and the rest replaced."""
    found = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for name in more:
        found = over(found, yaml.safe_load((DOCKER / name).read_text()))
    return found


def over(below: dict, above: dict) -> dict:
    both = {key: over(below[key], above[key]) for key in above if isinstance(below.get(key), dict)}
    return below | above | both


MANY = "compose.many.yaml"


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_each_target_runs_hilum_as_a_user_who_is_not_root(target: str) -> None:
    assert last(target, "USER") == f"{UID}:{UID}"
    assert json.loads(last(target, "ENTRYPOINT")) == ["hilum"]
    assert json.loads(last(target, "HEALTHCHECK").split("CMD", 1)[1]) == ["hilum", "--help"]


def test_everything_copied_into_the_image_exists_and_passes_the_ignore_file() -> None:
    let_in = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [shlex.split(rest)[:-1] for stage in stages().values() for word, rest in stage if word == "COPY"]
    sources = {source.removesuffix("/") for line in copied for source in line}
    assert sources == let_in
    assert [source for source in sorted(sources) if not (REPOSITORY / source).exists()] == []


def test_the_image_holds_every_package_of_the_wheel() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    packages = set(json.loads(re.search(r"^packages = (\[.*\])$", text, re.MULTILINE).group(1)))
    assert packages <= {shlex.split(rest)[0] for word, rest in stages()["wheel"] if word == "COPY"}


@pytest.mark.parametrize("more", [(), (MANY,)], ids=["alone", "many"])
def test_no_service_may_do_more_than_it_needs(more: tuple[str, ...]) -> None:
    for name, service in compose(*more)["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"].rpartition("-")[2].startswith(f"{UID}:"), name
        assert "healthcheck" in service and "mem_limit" in service and "pids_limit" in service, name
        assert not {"privileged", "cap_add", "devices", "pid", "ipc", "network_mode"} & service.keys(), name
        assert all(port.startswith(LOOPBACK) for port in service.get("ports", [])), name
        assert "docker.sock" not in json.dumps(service), name


def test_only_what_calls_peers_has_a_way_out_and_the_database_has_none() -> None:
    services = compose(MANY)["services"]
    assert services["database"]["networks"] == ["inside"] and "ports" not in services["database"]
    assert {name for name, said in services.items() if "outside" in said["networks"]} == {"node", "worker", "tracking"}


def test_no_password_stands_in_an_environment_or_a_command() -> None:
    for name, service in compose(MANY)["services"].items():
        said = json.dumps([service.get("environment", {}), service.get("command", [])])
        assert not re.search(r"password|://[^@/\"]*:[^@/\"]*@", said, re.IGNORECASE), name
        if name != "segment":
            assert service["secrets"] == ["pgpass"], name


@pytest.mark.parametrize("name", ["node.yaml", "config/node.yaml"])
def test_each_config_is_one_that_a_node_reads(name: str) -> None:
    node = read_config(DOCKER / name)
    assert node.receiving.aet == "HILUM"


def test_the_container_listens_where_compose_publishes_it_and_may_take_what_its_config_says() -> None:
    node, service = read_config(DOCKER / "config/node.yaml"), compose()["services"]["node"]
    published = {int(port.rpartition(":")[2]) for port in service["ports"]}
    assert published == {node.receiving.port, node.showing.port}
    assert {node.receiving.host, node.showing.host} == {"0.0.0.0"}
    assert str(node.state) in {mount["target"] for mount in service["volumes"]}
    asked_gb = node.working.workers * (node.working.memory_gb + 3) + 1
    assert service["mem_limit"] == f"${{HILUM_MEMORY:-{asked_gb:.0f}g}}"


def test_what_reads_scans_cannot_reach_the_world() -> None:
    found = compose()
    assert [found["networks"][name]["internal"] for name in found["services"]["segment"]["networks"]] == [True]
    mounted = {mount["target"]: mount for mount in found["services"]["segment"]["volumes"] if isinstance(mount, dict)}
    assert mounted["/scans"]["read_only"] is mounted["/package"]["read_only"] is True


def test_the_files_name_no_host_and_no_registry() -> None:
    ours = {"127.0.0.1", "tracking", "hilum@database"}
    for path in sorted(path for path in DOCKER.rglob("*") if path.is_file()):
        text = path.read_text()
        assert set(re.findall(r"\w+://([^:/\s\"']*)", text)) <= ours, path.name
        addresses = set(re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text))
        assert addresses <= {"127.0.0.1", "0.0.0.0"}, path.name
        assert not re.search(r"\b[\w-]+\.(?:com|org|net|io|dev)/", text), path.name


@pytest.mark.skipif(shutil.which("sh") is None, reason="no sh on this machine")
def test_the_build_script_refuses_a_target_that_is_none() -> None:
    done = subprocess.run(["sh", DOCKER / "build.sh", "tpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "'tpu'" in done.stderr and "cpu, gpu, database or base" in done.stderr


@dataclass(frozen=True, kw_only=True)
class Engine:
    """buildah and podman with a store of their own, away from the images of this machine."""

    folder: Path
    environment: dict[str, str]

    def call(self, *words: object, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in words], env=self.environment, capture_output=True, text=True, timeout=seconds
        )

    def run(self, *words: object, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """A container with every restriction docker/README.md asks for."""
        return self.call("podman", "run", "--rm", *LEAST_PRIVILEGE, *words, seconds=seconds)

    def inside(self, program: str) -> str:
        """What a line of shell prints in the image."""
        done = self.run("--entrypoint", "/bin/sh", "hilum:cpu", "-c", program)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Skips where containers cannot be made or run at all; the base image is the proof that they can."""
    missing = [name for name in ("buildah", "podman", "runc", "debootstrap") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not on this machine (apt-get install {' '.join(missing)})")
    if os.geteuid() != 0:
        pytest.skip("debootstrap needs root")
    scratch = Path("/var/tmp")  # /tmp may live in memory; an image of gigabytes must not
    free_gb = shutil.disk_usage(scratch).free / 1e9
    if free_gb < NEEDED_GB:
        pytest.skip(f"{free_gb:.0f} GB free in {scratch}; building the image takes {NEEDED_GB} GB")
    folder = Path(tempfile.mkdtemp(prefix="hilum-test-image-", dir=scratch))
    made = Engine(folder=folder, environment=_own_store(folder))
    try:
        base = made.call(DOCKER / "build.sh", "base", seconds=900)
        if no_mirror := re.search(NO_MIRROR, base.stdout + base.stderr):
            pytest.skip(f"no Debian mirror can be reached: {no_mirror.group()}")
        assert base.returncode == 0, _tail(base)
        tried = made.run("localhost/hilum-base:bookworm", "/bin/true")
        if tried.returncode != 0:
            pytest.skip(f"no container runs here: {_tail(tried)}")
        yield made
    finally:
        made.call("podman", "rm", "--all", "--force")
        subprocess.run(["umount", folder / "store" / "overlay"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _own_store(folder: Path) -> dict[str, str]:
    """runc and cgroupfs: they also run inside a container and where there is no systemd."""
    storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n'
    (folder / "storage.conf").write_text(storage)
    limits = 'default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]'
    runtime = 'runtime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"'
    (folder / "containers.conf").write_text(f"[containers]\n{limits}\n[engine]\n{runtime}\n")
    return os.environ | {
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "BUILDAH_ISOLATION": "chroot",
        "TMPDIR": str(folder),
    }


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr or done.stdout).strip()[-2000:]


@pytest.fixture(scope="module")
def image(engine: Engine) -> Engine:
    """The engine, its store holding hilum:cpu."""
    done = engine.call(DOCKER / "build.sh", "cpu", seconds=2400)
    if NO_SPACE in (done.stdout + done.stderr).lower():
        pytest.skip(f"the disk became full while the image was built: {_tail(done)}")
    assert done.returncode == 0, _tail(done)
    return engine


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scans (one of them broken), a package, and a results folder of the image's user."""
    folder = tmp_path_factory.mktemp("ward")
    case = phantom(7)
    (folder / "scans").mkdir()
    files.write(case.image, folder / "scans" / "patient.nii.gz")
    (folder / "scans" / "torn.nii.gz").write_bytes((folder / "scans" / "patient.nii.gz").read_bytes()[:1000])
    a_package(folder / "package", case.image)
    (folder / "results").mkdir()
    os.chown(folder / "results", UID, UID)
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)  # pytest's folders are its own user's alone
    return folder


def a_package(folder: Path, scan: Volume) -> None:
    """An untrained network: it finds nothing true, but always the same."""
    plan = Plan(
        name="phantom",
        channels=scan.channels,
        labels=(
            Label(value=1, name="liver", colour=(200, 60, 60)),
            Label(value=2, name="lesion", colour=(60, 200, 60)),
        ),
        steps=(
            Orient(),
            Resample(spacing_mm=(4.0, 4.0, 4.0)),
            Normalise(channels=tuple(Scale(by="scan") for _ in scan.channels)),
        ),
        spacing_mm=(4.0, 4.0, 4.0),
        patch=(16, 16, 16),
        batch=1,
    )
    torch.manual_seed(0)
    config = residual_unet.fit(residual_unet.Config(width=4), patch=plan.patch, spacing=plan.spacing_mm)
    network = residual_unet.build(config, channels=len(plan.channels), classes=plan.classes)
    fold = package.Fold(
        weights="weights-fold0.safetensors", dice={}, cases_trained=0, cases_held_out=0, epochs=0, minutes=0.0, seed=0
    )
    settings = json.loads(json.dumps(vars(config)))
    package.save(
        folder, network=network, name="phantom", network_name="residual_unet", network_config=settings, plan=plan,
        fold_number=0, fold=fold,
    )  # fmt: skip


@pytest.fixture(scope="module")
def night(ward: Path, image: Engine) -> subprocess.CompletedProcess[str]:
    """The batch, run as docker/README.md says."""
    return segment_inside(image, ward, "/scans")


def segment_inside(image: Engine, ward: Path, scans: str) -> subprocess.CompletedProcess[str]:
    mounts = [f"--volume={ward}/{name}:/{name}:ro" for name in ("scans", "package")]
    words = ["segment", scans, "--package", "/package", "--out", "/results"]
    return image.run(*mounts, f"--volume={ward}/results:/results", "hilum:cpu", *words)


@of_the_image
def test_the_image_segments_a_mounted_folder(night: subprocess.CompletedProcess[str], ward: Path) -> None:
    assert night.returncode == 3, night.stderr  # one of the two scans is broken
    results = ward / "results"
    assert {"summary.csv", "summary.json", "index.html", "patient", "torn"} <= {path.name for path in results.iterdir()}
    assert (results / "torn" / "error.json").is_file()
    assert json.loads((results / "patient" / "report.json").read_text())["status"] == "done"
    assert {path.stat().st_uid for path in results.rglob("*")} == {UID}
    assert list(results.rglob("*.partial")) == []


@of_the_image
def test_the_container_finds_what_the_same_package_finds_outside(
    night: subprocess.CompletedProcess[str], ward: Path, tmp_path: Path
) -> None:
    segment([ward / "scans" / "patient.nii.gz"], ward / "package", tmp_path)
    inside = files.read(ward / "results" / "patient" / "labels.nii.gz")
    outside = files.read(tmp_path / "patient" / "labels.nii.gz")
    assert inside.geometry.matches(outside.geometry)
    assert len(np.unique(outside.voxels)) > 1  # two empty maps would agree on anything
    assert np.mean(inside.voxels == outside.voxels) > 0.999


@of_the_image
def test_a_second_night_touches_nothing_that_is_complete(
    night: subprocess.CompletedProcess[str], image: Engine, ward: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (ward / "results" / "patient").iterdir()}
    again = segment_inside(image, ward, "/scans/patient.nii.gz")
    assert again.returncode == 0, again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (ward / "results" / "patient").iterdir()}


@of_the_image
def test_inside_there_is_no_root_no_capability_and_no_network(image: Engine) -> None:
    assert image.inside("id -u; id -g").split() == [str(UID), str(UID)]
    status = dict(line.split(":\t", 1) for line in image.inside("cat /proc/self/status").splitlines() if ":\t" in line)
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert image.inside("ls /sys/class/net") == "lo"


@of_the_image
def test_nothing_can_be_written_but_what_is_mounted(image: Engine) -> None:
    tried = image.inside("for d in / /opt/hilum /data /data/hilum /etc; do touch $d/x 2>&1 || true; done; touch /tmp/x")
    assert tried.count("Read-only file system") == 5, tried


@of_the_image
def test_any_other_user_may_run_it(image: Engine) -> None:
    done = image.run("--user", "4711:4711", "hilum:cpu", "--help")
    assert done.returncode == 0, done.stderr
    assert "segment" in done.stdout


@of_the_image
def test_the_image_has_no_compiler_no_pip_and_only_versions_of_the_lock(image: Engine) -> None:
    tools = image.inside("command -v gcc cc clang g++ make pip pip3 || true")
    assert tools == ""
    listing = "from importlib.metadata import distributions as all; print(*(f'{d.name}=={d.version}' for d in all()))"
    found = dict(word.split("==") for word in image.inside(f'python3 -c "{listing}"').split())
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pinned = dict(re.match(r"([\w.-]+)==([^\s;\\]+)", line).groups() for line in lines if re.match(r"[\w.-]+==", line))
    normal = {_normal(name): version for name, version in pinned.items()}
    ours = {_normal(name): version.partition("+")[0] for name, version in found.items()}
    strangers = {name for name, version in ours.items() if normal.get(name) != version}
    assert strangers <= {"hilum", "setuptools"}  # `pip freeze` leaves setuptools out of a lock


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@of_the_image
def test_the_image_has_the_viewer_if_this_checkout_could_fetch_it(image: Engine) -> None:
    why = image.inside("python3 -c 'from pipeline.outputs import _viewer; print(_viewer.missing())'")
    assert bool(why) == bool(_viewer.missing()), why


@of_the_image
def test_the_health_check_of_the_image_passes(image: Engine) -> None:
    found = image.call("podman", "image", "inspect", "--format={{json .HealthCheck}}", "hilum:cpu")
    check = json.loads(found.stdout)["Test"]
    assert check == ["CMD", "hilum", "--help"]
    done = image.run("--entrypoint", check[1], "hilum:cpu", *check[2:])
    assert done.returncode == 0, done.stderr


@of_the_image
def test_the_tracking_service_of_compose_answers_and_stops_when_told(image: Engine) -> None:
    service = compose()["services"]["tracking"]
    variables = [f"--env={name}={value}" for name, value in service["environment"].items()]
    started = image.call(
        "podman", "run", "--detach", "--name", "tracking", *LEAST_PRIVILEGE, *variables, "--volume=runs:/data/hilum",
        "hilum:cpu", *service["command"],
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    try:
        assert _is_healthy(image, service["healthcheck"]["test"]), image.call("podman", "logs", "tracking").stderr
        began = time.monotonic()
        image.call("podman", "stop", "--time", "60", "tracking")
        assert time.monotonic() - began < 30
    finally:
        image.call("podman", "rm", "--force", "--time", "1", "tracking")


def _is_healthy(engine: Engine, check: str, name: str = "tracking") -> bool:
    def passes() -> bool:
        return engine.call("podman", "exec", name, "sh", "-c", check).returncode == 0

    return _until(passes, lambda: _is_running(engine, name))


def _until(holds: Callable[[], bool], lives: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 400  # beside other tests it has half a core at times
    while time.monotonic() < deadline and lives():
        if holds():
            return True
        time.sleep(2)
    return False


def _is_running(engine: Engine, name: str) -> bool:
    found = engine.call("podman", "container", "inspect", "--format={{.State.Running}}", name)
    return found.stdout.strip() == "true"


@of_the_image
def test_the_bill_of_materials_in_the_image_says_what_is_installed_there(image: Engine) -> None:
    bill = json.loads(image.inside("cat /usr/share/doc/hilum/sbom.json"))
    named = {one["purl"] for one in bill["components"] if "purl" in one}
    listing = "from importlib.metadata import distributions as all; print(*(f'{d.name}=={d.version}' for d in all()))"
    python = [word.split("==") for word in image.inside(f'python3 -c "{listing}"').split()]
    debian = image.inside("dpkg-query -W -f '${Package} ${Version}\\n'").splitlines()
    assert {f"pkg:pypi/{_normal(name)}@{quote(version)}" for name, version in python} <= named
    assert len([one for one in named if one.startswith("pkg:deb/")]) == len(debian)


@pytest.fixture
def hospital(ward: Path) -> Path:
    """A node's folder, its config, and a study for it, as its container sees them."""
    scan = files.read(ward / "scans" / "patient.nii.gz")
    for number, name in enumerate(("t1", "t2")):
        channel = Volume(voxels=scan.voxels[number : number + 1], geometry=scan.geometry, channels=(name,))
        write_series(channel, ward / "study" / name, description=name, study="a phantom")
    (ward / "state").mkdir(mode=0o700)
    os.chown(ward / "state", UID, UID)
    said = yaml.safe_load((DOCKER / "config/node.yaml").read_text())
    said["receiving"] |= {"reserve_gb": 0.1}
    take = {name: {"description": name} for name in ("t1", "t2")}
    said |= {
        "peers": {"scanner": {"aet": "SCANNER"}},
        "waiting": {"quiet_s": 2.0, "settled_s": 1.0},
        "working": {"memory_gb": 2.0},
        "routes": {"body": {"package": "/package", "take": take, "outputs": ["dicom_seg", "secondary_capture"]}},
    }
    (ward / "config").mkdir()
    (ward / "config" / "node.yaml").write_text(yaml.safe_dump(said))
    return ward


@of_the_image
def test_the_image_is_a_node_that_receives_segments_and_says_that_it_is_well(image: Engine, hospital: Path) -> None:
    """As compose.yaml has it, and with no network at all: the sender is in the same container."""
    service = compose()["services"]["node"]
    mounts = {"config": "/etc/hilum:ro", "package": "/package:ro", "study": "/study:ro", "state": "/state"}
    volumes = [f"--volume={hospital / name}:{place}" for name, place in mounts.items()]
    started = image.call(
        "podman", "run", "--detach", "--name", "node", *LEAST_PRIVILEGE, *volumes, "hilum:cpu", *service["command"]
    )
    assert started.returncode == 0, started.stderr
    try:
        assert _is_healthy(image, service["healthcheck"]["test"], "node"), image.call("podman", "logs", "node").stderr
        sender = ["storescu", "127.0.0.1", "11112", "/study", "--recurse", "-aet", "SCANNER", "-aec", "HILUM"]
        sent = image.call("podman", "exec", "node", *sender)
        assert sent.returncode == 0, sent.stderr
        assert _until(lambda: 'state="done"' in _metrics(image), lambda: _is_running(image, "node")), _metrics(image)
        assert len(list((hospital / "state/work").glob("*/body/results/*/*.dcm"))) == 2
        image.call("podman", "stop", "--time", "60", "node")
        ended = image.call("podman", "container", "inspect", "--format={{.State.ExitCode}}", "node")
        assert ended.stdout.strip() == "0", image.call("podman", "logs", "node").stderr
    finally:
        image.call("podman", "rm", "--force", "--time", "1", "node")


def _metrics(engine: Engine) -> str:
    asked = (
        "from urllib.request import urlopen as u; print(u('http://127.0.0.1:8080/metrics', timeout=5).read().decode())"
    )
    return engine.call("podman", "exec", "node", "python3", "-c", asked).stdout


@of_the_image
@pytest.mark.skipif(not os.environ.get("HILUM_LONG"), reason="fifteen more gigabytes; HILUM_LONG=1 runs it")
def test_a_bundle_of_the_image_installs_and_starts_without_network(image: Engine, ward: Path) -> None:
    """Into an engine that has no image, in a network namespace that has not even a loopback."""
    words = [
        sys.executable,
        "-m",
        "pipeline",
        "bundle",
        "--image",
        "localhost/hilum:cpu",
        "--package",
        ward / "package",
    ]
    made = image.call(*words, "--out", image.folder / "bundle", seconds=1200)
    assert made.returncode == 0, made.stderr
    (image.folder / "other").mkdir()
    other = Engine(folder=image.folder / "other", environment=_own_store(image.folder / "other"))
    other.environment.update(ENGINE="podman", NETWORK="none", MEMORY="4g", SUM=made.stdout.strip())
    try:
        done = other.call(
            "unshare", "--net", image.folder / "bundle" / "install.sh", image.folder / "srv", seconds=1200
        )
        assert done.returncode == 0, done.stderr
        assert "the node is ready" in done.stdout
    finally:
        other.call("podman", "rm", "--all", "--force", "--time", "1")
        subprocess.run(["umount", other.folder / "store" / "overlay"], capture_output=True)
