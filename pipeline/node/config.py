"""What a hospital decides about its node: frozen dataclasses, each field with its sentence.

Whatever is dangerous is off until it is said: the node listens on loopback, and hears only peers that are named.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .access import Token, User
from .routes import Route, Waiting, Working

GB = 10**9

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Security:
    """TLS in both directions: the node shows its certificate, and wants one of every caller."""

    certificate: Path
    """The node's own, with what leads up to the authority, as PEM."""
    key: Path
    """Its private key, as PEM, readable by the node alone."""
    authority: Path
    """Certificates of the authorities that peers' certificates must come from, as PEM."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Somebody the node knows: a scanner, a workstation, an archive."""

    aet: str
    """Its AE title."""
    host: str = ""
    """Where it listens; empty for one that only sends."""
    port: int = 104
    """On which port."""
    tls: bool = False
    """Whether it is called by TLS, with the node's own certificate."""
    calls_from: tuple[str, ...] = ()
    """The addresses it may call from; none named: any."""
    certificate: str = ""
    """The SHA-256 of its certificate, in hexadecimal; empty: any of the authority."""
    web: str = ""
    """The root of its DICOMweb service, as https://pacs/dicom-web; where given, it is used instead of calling by DIMSE."""
    token: Path | None = None
    """A file with the bearer token for it."""
    timeout_s: float = 30.0
    """How long to wait for an answer before it counts as none."""

    def __post_init__(self) -> None:
        _refuse_title(self.aet)
        _refuse_port(self.port)

    @property
    def answers(self) -> bool:
        """Whether it can be called at all."""
        return bool(self.host or self.web)


@dataclass(frozen=True, kw_only=True)
class Receiving:
    """How studies come in by DICOM."""

    aet: str = "HILUM"
    """The AE title that callers must ask for."""
    host: str = "127.0.0.1"
    """The address to listen on; loopback unless said otherwise."""
    port: int = 11112
    """The port to listen on, registered for DICOM and open to a process without privileges; 0 takes a free one."""
    security: Security | None = None
    """Certificates for TLS; without, everything goes over the wire in the clear."""
    strangers: bool = False
    """Hear callers that are not among the peers, too. Only for a network that nobody else is in."""
    kinds: Literal["images", "all"] = "images"
    """Which objects are accepted: images that may be scans, or all that can be stored (reports, presentation states ...)."""
    reserve_gb: float = 5.0
    """What must stay free on the spool's disk: below it associations are refused until there is room again."""
    object_gb: float = 4.0
    """The largest object that is taken; breast tomosyntheses and cardiac MR reach two."""
    associations: int = 16
    """How many are open at once; each takes about a megabyte and two threads."""
    silence_s: float = 30.0
    """How long a caller may say nothing, in an association or in the middle of an object."""

    def __post_init__(self) -> None:
        _refuse_title(self.aet)
        _refuse_port(self.port)
        for name in ("object_gb", "associations", "silence_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if self.reserve_gb < 0:
            raise ValueError(f"reserve_gb is {self.reserve_gb}; it must be 0 or more.")


@dataclass(frozen=True, kw_only=True)
class Showing:
    """The status page, metrics and health."""

    host: str = "127.0.0.1"
    """The address to listen on. Anything else than loopback needs `security`, or a proxy before it that speaks TLS."""
    port: int = 8080
    security: Security | None = None
    """Certificates for HTTPS. A browser needs none of its own; a peer that shows the one its `certificate` names may send
    without a token."""
    users: dict[str, User] = field(default_factory=dict)
    """Who may log in; nobody unless somebody is named. Metrics and health tell nothing of patients and need no login."""
    tokens: dict[str, Token] = field(default_factory=dict)
    """Programs that may call by DICOMweb and REST, by a name of your choice."""


@dataclass(frozen=True, kw_only=True)
class Inbox:
    """A folder that is watched: whatever scan is put into it is segmented."""

    folder: Path
    """Where scans are put: NAME.nii.gz, NAME_0000.nii.gz beside NAME_0001.nii.gz, or a folder NAME with a file per channel."""
    route: str
    """What is done with them. Its rules for series do not count here: what is put in is what is meant."""
    results: Path | None = None
    """Where results go, into a folder per case; by default `results` in the folder."""
    settled_s: float = 5.0
    """A file is whole when nobody changed it, or has it open to write, for so long."""
    cap_s: float = 600.0
    """A case whose other channels have not come after so long is refused."""

    def __post_init__(self) -> None:
        if not 0 < self.settled_s <= self.cap_s:
            raise ValueError(
                f"settled_s {self.settled_s} and cap_s {self.cap_s} were given; the first must be above 0, the second no shorter."
            )


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How long what is no longer needed is kept. Dead letters are kept until a person begins them anew or gives them up."""

    input_h: float = 72.0
    """Received objects, after the last story of their study ended: late slices of a weekend still find the others here."""
    results_h: float = 720.0
    """Results and their pictures, after their story ended; 720 are thirty days."""

    def __post_init__(self) -> None:
        if not 0 <= self.input_h <= self.results_h:
            raise ValueError(
                f"input_h is {self.input_h} and results_h {self.results_h}; 0 or more are needed, and results are kept no "
                "shorter than what they were made of."
            )


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node: one folder of its own, the peers it knows, and what it does for them."""

    state: Path
    """The folder that holds all it must not lose: the spool, the secret that keys are made with, the sqlite ledger."""
    ledger: str = ""
    """A Postgres for the ledger (postgresql+psycopg2://…), for more than one machine; by default sqlite in the folder. One
    with a password belongs into HILUM_LEDGER: whoever lists processes or reads the config would read it."""
    peers: dict[str, Peer] = field(default_factory=dict)
    """Everybody it knows, by a name of your choice: the name stands in logs and rows, the AE title does not."""
    receiving: Receiving = field(default_factory=Receiving)
    """How studies come in."""
    waiting: Waiting = field(default_factory=Waiting)
    """When a study counts as whole."""
    working: Working = field(default_factory=Working)
    """What a case may take, and how often anything is tried."""
    routes: dict[str, Route] = field(default_factory=dict)
    """What is done with studies, by a name of your choice."""
    keeping: Keeping = field(default_factory=Keeping)
    """How long it keeps what is no longer needed."""
    showing: Showing = field(default_factory=Showing)
    """The status page, and who may see it."""
    inboxes: dict[str, Inbox] = field(default_factory=dict)
    """Folders that are watched for scans without DICOM, by a name of your choice."""
    trusted: tuple[Path, ...] = ()
    """Public keys (PEM, ed25519). Where any is named, only packages work here that one of them signed (`hilum sign`)."""
    tracking: str = ""
    """An MLflow store for a run of each story that ended, without a word of a header; empty: none. One with a password
    belongs into HILUM_TRACKING."""
    stories: str = ""
    """A Postgres for the workflows (postgresql://…), for more than one machine; by default sqlite in the folder. One with a
    password belongs into HILUM_STORIES."""

    def __post_init__(self) -> None:
        for name in (*self.peers, *self.routes, *self.showing.users, *self.showing.tokens, *self.inboxes):
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} was met as the name of a peer, route, user, token or inbox; up to 40 letters, digits, - and _ are needed. "
                    "It stands in addresses, logs and folders."
                )
        for name, route in self.routes.items():
            for target in route.targets:
                if target not in self.peers or not self.peers[target].answers:
                    raise ValueError(
                        f"route {name} sends to {target!r}; a peer with a host or a web address is needed. Add it to peers."
                    )
            if route.proof == "commitment":
                for target in route.targets:
                    if not self.peers[target].host:
                        raise ValueError(
                            f"route {name} has {target} vouch for objects, which has no host; storage commitment goes by "
                            "DIMSE. Give it host and port, or let the route read back."
                        )
        for name, inbox in self.inboxes.items():
            if inbox.route not in self.routes:
                raise ValueError(f"inbox {name} names the route {inbox.route!r}; one of the routes is needed. Add it.")
        titles = [peer.aet.strip() for peer in self.peers.values()]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"two peers have the AE title {title!r}; each needs its own. Rename one of them.")

    def peer_called(self, title: str) -> tuple[str, Peer] | None:
        """The peer of that AE title, with its name."""
        return next(((name, peer) for name, peer in self.peers.items() if peer.aet.strip() == title.strip()), None)


def _refuse_title(title: str) -> None:
    """PS3.5 6.2: up to 16 letters of the default repertoire, no backslash, no control characters, not only spaces."""
    if not title.strip() or len(title) > 16 or any(not " " <= letter <= "~" or letter == "\\" for letter in title):
        raise ValueError(
            f"{title!r} is no AE title; 1 to 16 letters, digits, spaces and signs but the backslash are needed. Shorten it."
        )


def _refuse_port(port: int) -> None:
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; a number from 0 to 65535 is needed.")
